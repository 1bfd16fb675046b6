"""Images of a pipeline with diffusers' interface."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from plain import PictureOrder

__all__ = ["DiffusersPipeline"]


class DiffusersPipeline:
    """Function that runs a pipeline for an order."""

    def __init__(self, pipe: Any) -> None:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe

    def __call__(self, order: PictureOrder) -> Image.Image:
        """Return the image of an order."""
        image: Image.Image = self._pipe(
            order.prompt,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance_scale,
            width=order.width,
            height=order.height,
            generator=torch.Generator("cpu").manual_seed(order.seed),
        ).images[0]
        return image
