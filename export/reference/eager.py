"""Reference images from diffusers' own pipelines, for the same settings.

As a program, ``eager [compile] JOB``, it is a benchmark participant, in eager mode or with
torch.compile: see measure/bench/worker.py.
"""

import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.reference.devices import (
    DeviceClock,
    autotuned,
    placed,
    single_precision_noise,
)
from latentforge.export.reference.sequential import SequentialModules
from latentforge.export.schedulers import SCHEDULERS, diffusers_scheduler, schedule_of, with_class
from latentforge.measure.bench.placement import Placement
from latentforge.measure.bench.protocol import BenchJob
from latentforge.measure.bench.worker import ServedModel, serve
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.example import example_depth_map, example_image
from latentforge.runtime.image import from_array
from latentforge.runtime.pipeline import Result
from latentforge.runtime.settings import Settings
from latentforge.runtime.timings import Stopwatch

__all__ = ["EagerPipeline"]


class EagerPipeline:
    """diffusers pipelines of a checkpoint's family, by default in float32 on the CPU.

    They take the runtime's settings and return its results and timings. Noise is drawn on the CPU
    in float32, whatever they compute in, so that all participants share it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        sequential: bool = False,
        placement: Placement | None = None,
    ) -> None:
        """Load the modules of a checkpoint.

        Args:
            checkpoint: the checkpoint.
            sequential: keep the weights of at most one module in memory; on the CPU alone.
            placement: device and precision.
        """
        placement = placement or Placement()
        if sequential and placement != Placement():
            raise SettingsError(f"modules are loaded in turn on cpu:fp32 alone, not {placement}")
        self._clock = DeviceClock(placement.device)
        self._without_gradients: Any = torch.inference_mode
        family = family_of(checkpoint)
        plan = family.plan(checkpoint)
        own = checkpoint.config("scheduler", "scheduler_config.json")
        scheduler = family.scheduler(with_class(own, checkpoint.index))
        self._config = {k: v for k, v in scheduler.items() if not k.startswith("_")}
        self._scheduler_file = scheduler
        self.own_scheduler_class = str(scheduler.get("_class_name"))
        self._index = checkpoint.index
        self._reference = family.reference
        loaders = {component.part: component.module for component in plan.components}
        self._parts: dict[str, Any] = (
            dict(SequentialModules(checkpoint, loaders).modules)
            if sequential
            else {part: placed(load(checkpoint), placement) for part, load in loaders.items()}
        )
        for name in plan.tokenizers:
            self._parts[name] = CLIPTokenizer.from_pretrained(checkpoint.path / name)
        self._conditioning = plan.conditioning
        if plan.conditioning.noise_augmentation is not None:
            noise = checkpoint.config("low_res_scheduler", "scheduler_config.json")
            self._parts["low_res_scheduler"] = diffusers.DDPMScheduler.from_config(noise)
        self._shrink = 1 if plan.conditioning.encodes_images else plan.latent.downscale
        self._texts = [encoder.component for encoder in plan.conditioning.encoders]

    def __call__(
        self,
        settings: Settings,
        *,
        image: Image.Image | torch.Tensor | None = None,
        mask: Image.Image | torch.Tensor | None = None,
        depth_map: Image.Image | None = None,
        own_scheduler: bool = False,
    ) -> Result:
        """Run one request, with the noise and the timesteps that the runtime uses for it.

        Args:
            settings: of the request.
            image: start image, or latents (batch, channels, h, w), for image to image; a model that
                needs an image gets the example image if there is none.
            mask: area to repaint, for inpainting.
            depth_map: of the image, likewise for a model that needs one.
            own_scheduler: use the checkpoint's scheduler as it is configured, and the timesteps
                that it computes, in place of the settings' sampler.
        """
        size = settings.height, settings.width
        if image is None and self._conditioning.requires_image:
            image = example_image(*(side // self._shrink for side in size))
        if depth_map is None and "depth" in self._conditioning.channels:
            depth_map = example_depth_map(*size)
        if image is None and "mask" in self._conditioning.channels:
            image, mask = torch.full((1, 3, *size), 0.5), torch.ones((1, 1, *size))
        scheduler = self._own_scheduler() if own_scheduler else self._scheduler(settings.sampler)
        pipe = self._pipeline(scheduler, image, mask)
        watch = Stopwatch()
        with watch.running(), self._without_gradients(), single_precision_noise():
            given = {"image": image, "mask_image": mask, "depth_map": _depth_tensor(depth_map)}
            with self._timed(watch):
                latents = pipe(**self._arguments(settings, pipe, given)).images
            with watch.stage("vae_decoder"):
                images = self._decode(latents, upcast=hasattr(pipe, "upcast_vae"))
        return Result(
            images=from_array(images),
            latents=latents.float().cpu().numpy(),
            timings=watch.timings(),
            settings=settings,
        )

    def compile(self) -> None:
        """Compile every module with torch.compile, on its first run at each size.

        On a GPU the UNet and the VAE are compiled with max-autotune, which searches kernels and
        records CUDA graphs.
        """
        for part in self._texts:
            self._parts[part].compile()
        unet, vae = self._parts["unet"], self._parts["vae"]
        if self._clock.is_gpu:
            self._without_gradients = torch.no_grad  # as diffusers' users run it, with CUDA graphs
            unet.forward = autotuned(unet.forward)
            vae.decode = autotuned(vae.decode)
        else:
            unet.compile()
            vae.decode = torch.compile(vae.decode)

    def pipeline_class(self, image: Any = None, mask: Any = None) -> str:
        """Return the name of diffusers' class for the task that an image and a mask make.

        Raises:
            SettingsError: diffusers has none.
        """
        kinds = self._reference
        whole = image is None and "mask" in self._conditioning.channels
        if mask is not None or whole:
            name = kinds.inpaint
        elif image is not None or self._conditioning.requires_image:
            name = kinds.image
        else:
            name = kinds.text
        if name is None:
            raise SettingsError("diffusers has no pipeline for this task of this model")
        return name

    @property
    def bytes(self) -> int:
        """Size of the weights in memory."""
        modules = (self._parts[part] for part in (*self._texts, "unet", "vae"))
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    def _pipeline(self, scheduler: Any, image: Any, mask: Any) -> Any:
        """Return the pipeline for a task, with the modules that its signature names."""
        kind = getattr(diffusers, self.pipeline_class(image, mask))
        parts = {**self._parts, "scheduler": scheduler}
        arguments: dict[str, Any] = {}
        for key, parameter in inspect.signature(kind.__init__).parameters.items():
            if key in parts:
                arguments[key] = parts[key]
            elif isinstance(self._index.get(key), int):  # or a boolean; components are lists
                arguments[key] = self._index[key]
            elif key != "self" and parameter.default is parameter.empty:
                arguments[key] = None  # a safety checker, the refiner's first text encoder
        if "safety_checker" in arguments:
            arguments["requires_safety_checker"] = False
        pipe: Any = kind(**arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _own_scheduler(self) -> Any:
        """Return the checkpoint's scheduler, with the family's corrections of its configuration."""
        return diffusers_scheduler(self.own_scheduler_class, self._config)

    def _scheduler(self, sampler: str) -> Any:
        """Return the diffusers scheduler that corresponds to a sampler.

        Its begin index is set to 0. By default it looks up the first step by its timestep, which is
        ambiguous where Karras levels of a cosine schedule contain a timestep twice.
        """
        row = SCHEDULERS[sampler]
        scheduler = getattr(diffusers, row.scheduler).from_config(self._config, **row.options)
        plan = scheduler.set_timesteps

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            plan(*args, **kwargs)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)

        scheduler.set_timesteps = functools.wraps(plan)(set_timesteps)
        return scheduler

    def _arguments(
        self, settings: Settings, pipe: Any, images: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the settings under diffusers' names, as far as the pipeline accepts them."""
        arguments = {
            "prompt": list(settings.prompts),
            "negative_prompt": list(settings.negative_prompts) or None,
            "num_images_per_prompt": settings.images_per_prompt,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_rescale": settings.guidance_rescale,
            "image_guidance_scale": settings.image_guidance_scale,
            "noise_level": settings.noise_level,
            "height": settings.height,
            "width": settings.width,
            "generator": _generators(settings),
            "output_type": "latent",
            **images,
            "strength": settings.strength,
            "denoising_start": settings.denoising_start,
            "denoising_end": settings.denoising_end,
            "original_size": settings.original_size,
            "crops_coords_top_left": settings.crop,
            "target_size": settings.target_size,
            "aesthetic_score": settings.aesthetic_score,
            "negative_aesthetic_score": settings.negative_aesthetic_score,
        }
        if timesteps := SCHEDULERS[settings.sampler].timesteps:
            arguments["timesteps"] = timesteps(schedule_of(self._scheduler_file), settings.steps)
        accepted = inspect.signature(pipe.__call__).parameters
        return {name: value for name, value in arguments.items() if name in accepted}

    def _decode(
        self, latents: torch.Tensor, *, upcast: bool
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        vae = self._parts["vae"]
        if upcast and vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.to(torch.float32)  # as pipelines of XL do for values beyond half precision
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        mean, deviation = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
        if mean is not None and deviation is not None:  # as the pipelines of XL do
            factor, shift = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (deviation, mean))
            latents = latents * factor + shift
        pixels: torch.Tensor = vae.decode(latents).sample
        return pixels.float().cpu().numpy()

    @contextmanager
    def _timed(self, watch: Stopwatch) -> Iterator[None]:
        """Context manager that times the text encoders and the UNet, until the device is done."""
        stages = {**dict.fromkeys(self._texts, "text_encoder"), "unet": "denoiser"}
        with ExitStack() as stack:
            for part, stage in stages.items():
                module = self._parts[part]
                stack.callback(_restore_forward, module, vars(module).get("forward"))
                module.forward = self._clock.timed(module.forward, watch, stage)
            yield
        self._clock.finish(watch)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the versions of the libraries that make the images."""
        return {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}


def _generators(settings: Settings) -> torch.Generator | list[torch.Generator]:
    generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
    return generators if isinstance(settings.seed, tuple) else generators[0]


def _depth_tensor(depth_map: Image.Image | None) -> torch.Tensor | None:
    return None if depth_map is None else torch.from_numpy(np.array([depth_map], np.float32))


def _restore_forward(module: Any, own: Any) -> None:
    del module.forward
    if own is not None:  # compiled
        module.forward = own


def _load(job: BenchJob) -> ServedModel:
    torch.set_num_threads(job.threads)
    placement = Placement(job.device, job.precision)
    pipeline = EagerPipeline(open_checkpoint(job.model), placement=placement)
    if "compile" in sys.argv[1:-1]:
        if job.folder:  # otherwise compiled code lies where other users may write, in /tmp
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(job.folder) / "compiled"))
        pipeline.compile()
    ready = {
        "versions": pipeline.versions(),
        "precision": job.precision,
        "bytes": pipeline.bytes,
    }
    return pipeline, ready


if __name__ == "__main__":
    serve(_load)
