"""Generate an image with one of optimum's pipelines, in optimum's environment.

Writes OUT/latents.npy (1, channels, h, w) before the VAE, and OUT/images.npy (1, 3, height, width)
in -1..1.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import optimum.onnxruntime
import torch
from PIL import Image


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="such as ORTStableDiffusionPipeline")
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--image", type=Path, help="to start from; needs --strength")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--io-binding", action="store_true", help="the default on CUDA")
    return parser.parse_args()


def main() -> None:
    """Load the directory without exporting it, and run one request."""
    options = arguments()
    kind = getattr(optimum.onnxruntime, options.pipeline)
    pipe = kind.from_pretrained(options.directory, export=False, use_io_binding=options.io_binding)
    pipe.set_progress_bar_config(disable=True)
    latents: list[torch.Tensor] = []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        return tensors

    start = {}
    if options.image:
        start = {"image": Image.open(options.image).convert("RGB"), "strength": options.strength}
    images = pipe(
        options.prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        output_type="np",
        callback_on_step_end=keep,
        **start,
    ).images
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "latents.npy", latents[-1].numpy())
    np.save(options.out / "images.npy", images.transpose(0, 3, 1, 2) * 2 - 1)


if __name__ == "__main__":
    main()
