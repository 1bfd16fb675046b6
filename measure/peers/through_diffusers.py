"""Adapter of pipelines with diffusers' interface: requests in its terms, and timed stages."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from serving import PeerJob, Stages, timed

__all__ = ["TimedPipeline"]

_STAGES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "unet": "denoiser",
    "vae_decoder": "vae_decoder",
}


class TimedPipeline:
    """Pipeline that generates a job's images and times the calls of its models."""

    def __init__(self, pipe: Any, job: PeerJob) -> None:
        import diffusers

        self._pipe, self._job = pipe, job
        self._stages: Stages = {}
        pipe.set_progress_bar_config(disable=True)
        kind, options = getattr(diffusers, job.scheduler["name"]), job.scheduler.get("options", {})
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
        for name, stage in _STAGES.items():
            if part := getattr(pipe, name, None):
                part.forward = timed(part.forward, self._calls(stage))

    def __call__(self, stages: Stages) -> NDArray[np.float32]:
        """Return the images, (n, 3, height, width) in -1..1, and add call times to ``stages``."""
        self._stages = stages
        images = self._pipe(**self._arguments(), output_type="np").images
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2) * 2 - 1, dtype=np.float32)

    def _arguments(self) -> dict[str, Any]:
        import torch

        settings, timesteps = self._job.settings, self._job.scheduler.get("timesteps")
        sizes = {
            "original_size": settings.get("original_size"),
            "crops_coords_top_left": tuple(settings.get("crop", (0, 0))),
            "target_size": settings.get("target_size"),
        }
        return {
            "prompt": list(settings["prompts"]),
            "negative_prompt": list(settings["negative_prompts"]) or None,
            "num_images_per_prompt": settings["images_per_prompt"],
            "num_inference_steps": settings["steps"],
            "guidance_scale": settings["guidance_scale"],
            "guidance_rescale": settings["guidance_rescale"],
            "height": settings["height"],
            "width": settings["width"],
            "generator": torch.Generator("cpu").manual_seed(settings["seed"]),
            **({"timesteps": timesteps} if timesteps else {}),
            **(sizes if getattr(self._pipe, "text_encoder_2", None) else {}),
        }

    def _calls(self, stage: str) -> Callable[[], list[float]]:
        return lambda: self._stages.setdefault(stage, [])
