"""The diffusers pipeline itself, on the same settings: the reference for all we claim.

``python -m latentforge.export.eager CHECKPOINT SETTINGS THREADS PICTURE`` serves it to a
benchmark, see runtime/worker.py.
"""

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.modules import load_module
from latentforge.export.scheduler import SCHEDULERS, corrected
from latentforge.runtime.image import from_array
from latentforge.runtime.pipeline import Result
from latentforge.runtime.profile import Stopwatch
from latentforge.runtime.settings import Settings
from latentforge.runtime.worker import serve

__all__ = ["EagerPipeline"]


class EagerPipeline:
    """diffusers' StableDiffusionPipeline in float32 on the CPU, with our settings and timings."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        scheduler = checkpoint.config("scheduler", "scheduler_config.json")
        self._config = {k: v for k, v in corrected(scheduler).items() if not k.startswith("_")}
        self._pipe: Any = diffusers.StableDiffusionPipeline(
            vae=load_module(checkpoint, "vae", diffusers.AutoencoderKL),
            text_encoder=load_module(checkpoint, "text_encoder", CLIPTextModel),
            tokenizer=CLIPTokenizer.from_pretrained(checkpoint.path / "tokenizer"),
            unet=load_module(checkpoint, "unet", diffusers.UNet2DConditionModel),
            scheduler=diffusers.DDIMScheduler.from_config(self._config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipe.set_progress_bar_config(disable=True)

    def __call__(self, settings: Settings) -> Result:
        """Make the pictures of one request; same seed, same noise, same steps as ours."""
        self._pipe.scheduler = self._scheduler(settings.sampler)
        watch = Stopwatch()
        with watch.running(), torch.inference_mode(), _Timed(self._pipe, watch):
            latents = self._latents(settings)
            with watch.stage("vae_decoder"):
                images = self._decode(latents)
        return Result(
            images=from_array(images),
            latents=latents.numpy(),
            timings=watch.timings(),
            settings=settings,
        )

    def _scheduler(self, sampler: str) -> Any:
        """The diffusers scheduler of our sampler's name.

        It is told to start at its first step. Left alone it looks the step up by its timestep,
        and misses it where Karras levels of a cosine schedule have the same one twice.
        """
        name, options = SCHEDULERS[sampler]
        scheduler = getattr(diffusers, name).from_config(self._config, **options)
        plan = scheduler.set_timesteps

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            plan(*args, **kwargs)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)

        scheduler.set_timesteps = functools.wraps(plan)(set_timesteps)
        return scheduler

    def _latents(self, settings: Settings) -> torch.Tensor:
        latents: torch.Tensor = self._pipe(
            list(settings.prompts),
            negative_prompt=list(settings.negative_prompts),
            num_images_per_prompt=settings.images_per_prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            height=settings.height,
            width=settings.width,
            generator=torch.Generator().manual_seed(settings.seed),
            output_type="latent",
        ).images
        return latents

    def _decode(self, latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        vae = self._pipe.vae
        pixels: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample
        return pixels.numpy()

    @staticmethod
    def versions() -> dict[str, str]:
        """The libraries that made the pictures."""
        return {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}


class _Timed:
    """Times the text encoder and the UNet of a diffusers pipeline while in the block."""

    def __init__(self, pipe: Any, watch: Stopwatch) -> None:
        self._modules = {"text_encoder": pipe.text_encoder, "unet": pipe.unet}
        self._watch = watch

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            module.forward = self._wrapped(name, module.forward)

    def __exit__(self, *_: object) -> None:
        for module in self._modules.values():
            del module.forward

    def _wrapped(self, name: str, forward: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._watch.stage(name):
                return forward(*args, **kwargs)

        return timed


def _load(threads: int) -> tuple[Callable[[Settings], Result], dict[str, str]]:
    torch.set_num_threads(threads)
    return EagerPipeline(open_checkpoint(sys.argv[1])), EagerPipeline.versions()


if __name__ == "__main__":
    serve(_load)
