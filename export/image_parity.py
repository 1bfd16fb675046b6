"""Comparison of an image by exported engines with that of diffusers' own pipeline and scheduler."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import family_of
from latentforge.export.modules import quiet
from latentforge.export.reference.devices import without_tf32
from latentforge.export.reference.eager import EagerPipeline
from latentforge.export.schedulers import SCHEDULERS
from latentforge.measure.bench.placement import Placement
from latentforge.measure.hardware import fit_together
from latentforge.runtime.errors import CheckpointError, GateError, SettingsError
from latentforge.runtime.image import SAME_IMAGE_PSNR, psnr, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Result
from latentforge.runtime.profiling import PROMPT
from latentforge.runtime.progress import Progress
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.settings import Request, Settings, resolve
from latentforge.runtime.text import one_line

__all__ = ["ImageParity", "ImageReference", "check_image"]

_STEPS = 5  # the fewest in which multistep samplers reach their order in between start and end
_SIDE = 128  # pixels of each side, where sizes are free
_LARGE = 512 * 512  # pixels from which a step takes long on a CPU
_STEPS_LARGE = 2

Array = NDArray[np.float32]
Run = Callable[[Settings, Array | None], Result]
"""(settings, initial latents or None) -> result."""


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """Reference that the image of a checkpoint's engines is compared with.

    Attributes:
        checkpoint: the checkpoint.
        own_scheduler: diffusers runs the checkpoint's own scheduler; otherwise the one that the
            engines' default sampler corresponds to.
        height: of the image in pixels; 0 for a small image.
        width: likewise.
        device: where diffusers runs, in float32.
    """

    checkpoint: Checkpoint
    own_scheduler: bool
    height: int = 0
    width: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class ImageParity:
    """Difference between the engines' image and the reference.

    Attributes:
        figures: ``latents_psnr`` and ``psnr`` (of the pixels), in dB.
        reference: diffusers' classes and the request, in values that JSON can hold.
    """

    figures: Mapping[str, float]
    reference: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """Line for the user."""
        name = "{pipeline} with {scheduler}".format(**self.reference)
        turns = "; memory is short: its modules were loaded in turn"
        text = f"image: {self.figures['psnr']:.1f} dB to that of diffusers' {name}"
        return text + turns * self.reference["sequential"]


def check_image(
    directory: Path, reference: ImageReference, run_in_torch: Run, progress: Progress
) -> ImageParity:
    """Compare an image by the engines, with their default sampler, with that of diffusers.

    Seed, prompt and initial noise are the same. Of the three possible causes of a difference,
    engines are wrong if the runtime's loop over torch modules gives another image than over
    engines; the sampler is wrong if the images are equal with a plain one; and otherwise it is the
    loop or its schedule. Where memory is short, diffusers' modules are loaded in turn, so that it
    needs no more than the export itself.

    Args:
        directory: the exported engines.
        reference: how diffusers makes its image.
        run_in_torch: the runtime's loop over torch modules.
        progress: shows the steps of the engines.

    Raises:
        CheckpointError: diffusers cannot run the checkpoint.
        GateError: the images differ; the message names the cause.
    """
    comparison = _ImageComparison(directory, reference, progress)
    settings, latents = comparison.settings, comparison.latents
    result = comparison.run_engines(settings)
    figures = _figures(comparison.run_diffusers(settings), result)
    if not _same(figures):
        differ = not _same(_figures(run_in_torch(settings, latents), result))
        raise GateError(comparison.message(comparison.cause(engines=differ), figures))
    return ImageParity(figures=figures, reference=comparison.description)


class _ImageComparison:
    """Engines and diffusers' pipeline of one checkpoint, and the request that both run."""

    def __init__(self, directory: Path, reference: ImageReference, progress: Progress) -> None:
        manifest = Manifest.read(directory, hashes=False)
        self._directory = directory
        self._reference = reference
        self._progress = progress
        self.settings = _settings(manifest, reference)
        self.latents = _initial_latents(manifest, self.settings)
        self._plain_sampler = "ddim" if isinstance(manifest.schedule, Schedule) else "edm_euler"
        on_cpu = reference.device == "cpu"
        self._sequential = on_cpu and not _fit_together(reference.checkpoint)

    @cached_property
    def _eager(self) -> EagerPipeline:
        """diffusers' pipeline, loaded after the engines have run and left the memory."""
        return EagerPipeline(
            self._reference.checkpoint,
            sequential=self._sequential,
            placement=Placement(self._reference.device),
        )

    @property
    def description(self) -> dict[str, Any]:
        """diffusers' classes and the request."""
        return {
            "pipeline": self._eager.pipeline_class(self.latents),
            "scheduler": self._eager.own_scheduler_class
            if self._reference.own_scheduler
            else SCHEDULERS[self.settings.sampler].scheduler,
            "own_scheduler": self._reference.own_scheduler,
            "sequential": self._sequential,
            "sampler": self.settings.sampler,
            "steps": self.settings.steps,
            "height": self.settings.height,
            "width": self.settings.width,
        }

    def run_engines(self, settings: Settings) -> Result:
        with load(self._directory, hashes=False, low_memory=True, example_images=True) as pipeline:
            return pipeline.run(settings, image=self.latents, report=self._progress.step)

    def run_diffusers(self, settings: Settings) -> Result:
        """Run diffusers' pipeline: with the settings' sampler, if that is not the default one."""
        own = self._reference.own_scheduler and settings.sampler == self.settings.sampler
        image = None if self.latents is None else torch.from_numpy(self.latents)
        try:
            with quiet(), warnings.catch_warnings(), without_tf32(self._reference.device):
                warnings.simplefilter("ignore")
                return self._eager(settings, image=image, own_scheduler=own)
        except Exception as error:  # of any class: the configurations are the checkpoint's
            raise CheckpointError(
                f"diffusers' {self._name} cannot run {self._reference.checkpoint.name}: "
                f"{one_line(error)}"
            ) from error

    def cause(self, *, engines: bool) -> str:
        """Return the cause of a difference.

        Args:
            engines: True if the loop gives another image over torch modules than over engines.
        """
        if engines:
            return "the engines differ from torch"
        plain = replace(self.settings, sampler=self._plain_sampler)
        if _same(_figures(self.run_diffusers(plain), self.run_engines(plain))):
            return f"sampler {self.settings.sampler} does not follow scheduler_config.json"
        return "the denoising loop or its schedule differs from diffusers"

    def message(self, cause: str, figures: Mapping[str, float]) -> str:
        return (
            f"{cause}: latents and image are {figures['latents_psnr']:.1f} and "
            f"{figures['psnr']:.1f} dB from those of diffusers' {self._name}, and must reach "
            f"{SAME_IMAGE_PSNR['fp32']:g} dB: please report this checkpoint"
        )

    @property
    def _name(self) -> str:
        """diffusers' classes in words."""
        return "{pipeline} with {scheduler}".format(**self.description)


def _fit_together(checkpoint: Checkpoint) -> bool:
    """Return True if a checkpoint's modules fit into memory together, in float32."""
    folders = {component.folder for component in family_of(checkpoint).plan(checkpoint).components}
    return bool(fit_together([4 * checkpoint.parameters(folder) for folder in folders]))


def _settings(manifest: Manifest, reference: ImageReference) -> Settings:
    """Return the request: few steps with the default sampler, but as many as it needs."""
    unit = manifest.latent.downscale * manifest.latent.multiple
    height, width = (
        fixed or max(min(default, _SIDE) // unit, 1) * unit
        for fixed, default in (
            (reference.height, manifest.defaults.height),
            (reference.width, manifest.defaults.width),
        )
    )
    steps, sampler = _STEPS_LARGE if height * width >= _LARGE else _STEPS, manifest.defaults.sampler
    try:
        SAMPLERS[sampler].plan(manifest.schedule, steps)
    except SettingsError:  # squeezed samplers have a minimum
        steps = manifest.defaults.steps
    request: Request = {"steps": steps, "seed": 0, "height": height, "width": width}
    return resolve(manifest.defaults, PROMPT, request)


def _initial_latents(manifest: Manifest, settings: Settings) -> Array | None:
    """Return latents for a refiner to start from, since diffusers has no text to image for it."""
    if "aesthetic_score" not in manifest.conditioning.time_ids:
        return None
    latent = manifest.latent
    sides = (side // latent.downscale for side in (settings.height, settings.width))
    shape = (1, latent.channels, *sides)
    return np.random.default_rng(settings.seed).standard_normal(shape, np.float32)


def _figures(reference: Result, result: Result) -> dict[str, float]:
    pixels = [to_array(images) for images in (reference.images, result.images)]
    return {
        "latents_psnr": psnr(reference.latents, result.latents),
        "psnr": psnr(*pixels, peak=2.0),
    }


def _same(figures: Mapping[str, float]) -> bool:
    return all(value >= SAME_IMAGE_PSNR["fp32"] for value in figures.values())
