"""Plain server around OpenVINO GenAI's pipeline: ``python genai.py MODEL PORT``."""

import openvino_genai
from PIL import Image
from plain import PictureOrder, arguments, serve

options = arguments()
config = {"INFERENCE_PRECISION_HINT": "f32"} if options.f32 else {}
pipe = openvino_genai.Text2ImagePipeline(options.model, "CPU", **config)


def generate(order: PictureOrder) -> Image.Image:
    """Return the image of an order."""
    tensor = pipe.generate(
        order.prompt,
        num_inference_steps=order.steps,
        guidance_scale=order.guidance_scale,
        width=order.width,
        height=order.height,
        rng_seed=order.seed,
    )
    return Image.fromarray(tensor.data[0])


serve(generate, options.port)
