"""Plain server around stable-diffusion.cpp's Python package: ``python sd_cpp.py MODEL PORT``."""

import stable_diffusion_cpp
from PIL import Image
from plain import PictureOrder, arguments, serve

options = arguments()
model = stable_diffusion_cpp.StableDiffusion(
    model_path=options.model, vae_decode_only=True, verbose=False
)


def generate(order: PictureOrder) -> Image.Image:
    """Return the image of an order."""
    image: Image.Image = model.generate_image(
        order.prompt,
        sample_steps=order.steps,
        cfg_scale=order.guidance_scale,
        sample_method="euler",  # as DDIM without noise
        width=order.width,
        height=order.height,
        seed=order.seed,
    )[0]
    return image


serve(generate, options.port)
