"""What optimum's pipelines have in common: the request in diffusers' terms, and their stages."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from serving import Job, Stages, timed

__all__ = ["TimedPipeline"]

_STAGES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "unet": "denoiser",
    "vae_decoder": "vae_decoder",
}


class TimedPipeline:
    """Makes a job's pictures with a pipeline that takes what diffusers' take."""

    def __init__(self, pipe: Any, job: Job) -> None:
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
        """Make them, and note the seconds of each call of each model."""
        self._stages = stages
        images = self._pipe(**self._arguments(), output_type="np").images
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2) * 2 - 1, dtype=np.float32)

    def _arguments(self) -> dict[str, Any]:
        import torch

        wanted, timesteps = self._job.settings, self._job.scheduler.get("timesteps")
        sizes = {
            "original_size": wanted.get("original_size"),
            "crops_coords_top_left": tuple(wanted.get("crop", (0, 0))),
            "target_size": wanted.get("target_size"),
        }
        return {
            "prompt": list(wanted["prompts"]),
            "negative_prompt": list(wanted["negative_prompts"]) or None,
            "num_images_per_prompt": wanted["images_per_prompt"],
            "num_inference_steps": wanted["steps"],
            "guidance_scale": wanted["guidance_scale"],
            "guidance_rescale": wanted["guidance_rescale"],
            "height": wanted["height"],
            "width": wanted["width"],
            "generator": torch.Generator("cpu").manual_seed(wanted["seed"]),
            **({"timesteps": timesteps} if timesteps else {}),
            **(sizes if getattr(self._pipe, "text_encoder_2", None) else {}),
        }

    def _calls(self, stage: str) -> Any:
        return lambda: self._stages.setdefault(stage, [])
