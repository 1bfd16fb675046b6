"""Verification of engine directories: file hashes, loading, and an image of one step."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from latentforge.runtime import sampling
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import SAME_IMAGE_PSNR, psnr, to_array
from latentforge.runtime.loader import EngineLoader, load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import DenoisingStep, Pipeline, Result
from latentforge.runtime.profiling import PROMPT
from latentforge.runtime.settings import Settings
from latentforge.runtime.shapes import ANY

__all__ = ["compare", "trial", "trial_settings", "verify"]

_MAX_PIXELS = 256
_MIN_PSNR = 20.0  # dB between backends, for precisions without a bound in SAME_IMAGE_PSNR


@checked_arguments
def verify(directory: Path) -> Iterator[str]:
    """Verify an engine directory, yielding a line for each check that passes.

    The checks are file sizes and hashes, loading every engine, and an image of one step.

    Raises:
        ManifestError: the directory does not match its manifest.
        BackendError: an engine does not load or run on this machine.
        GateError: the image has a single colour.
    """
    manifest = Manifest.read(directory)
    files = list(manifest.files)
    size = sum(entry.bytes for entry in files)
    yield f"files: {len(files)} with the right size and sha256, {size / 1e6:.1f} MB"
    loader = EngineLoader(manifest=manifest, directory=directory, low_memory=True)
    for name, component in manifest.components.items():
        loader(name, {}).session.close()
        yield f"{name}: loads on {component.backend}, {component.precision}"
    if all(name in manifest.components for name in manifest.required_components):
        yield _one_step(directory)


def compare(source: Path, directory: Path) -> dict[str, float]:
    """Compare an image of one step by compiled engines with that of their source.

    Args:
        source: engine directory that was compiled; its image is the reference.
        directory: compiled engines.

    Returns:
        ``latents_psnr`` and ``psnr`` (of the pixels), in dB.

    Raises:
        DeviceError: one of them needs a device that this machine lacks.
        ManifestError: one of them lacks a component.
        GateError: the images differ more than backends may.
    """
    with load(directory, hashes=False, low_memory=True, example_images=True) as pipeline:
        candidate = trial(pipeline, steps=1)
        precision = pipeline.manifest.components["denoiser"].precision
    with load(source, hashes=False, low_memory=True, example_images=True) as pipeline:
        reference = pipeline.run(candidate.settings)
    pixels = [to_array(result.images) for result in (reference, candidate)]
    figures = {
        "latents_psnr": psnr(reference.latents, candidate.latents),
        "psnr": psnr(*pixels, peak=2.0),
    }
    minimum = SAME_IMAGE_PSNR.get(precision, _MIN_PSNR)
    for name, value in figures.items():
        if not value >= minimum:  # NaN fails, too
            raise GateError(
                f"{name} of one step is {value:.1f} dB to the image of {source}, and {precision} "
                f"engines must reach {minimum:g} dB"
            )
    return figures


def trial(
    pipeline: Pipeline,
    *,
    steps: int,
    height: int = 0,
    width: int = 0,
    report: Callable[[DenoisingStep], None] | None = None,
) -> Result:
    """Generate a small image, which runs every engine of text to image: see trial_settings()."""
    settings = trial_settings(pipeline, steps=steps, height=height, width=width)
    return pipeline.run(settings, report=report)


def trial_settings(pipeline: Pipeline, *, steps: int, height: int = 0, width: int = 0) -> Settings:
    """Return settings that any engines support, for an image no larger than necessary.

    Args:
        pipeline: its engines may be built for certain sizes only.
        steps: of Euler's method, which suits every schedule and model.
        height: in pixels; 0 for a size that the engines are built for, or at most 256.
        width: in pixels, likewise.
    """
    manifest = pipeline.manifest
    unit = manifest.latent.downscale * manifest.latent.multiple
    limit = max(_MAX_PIXELS, unit)
    sides = manifest.latent.image_sizes(pipeline.engines["denoiser"].component)
    built = [0 if side == ANY else side.opt for side in sides[0]] if sides else [0, 0]
    defaults = (manifest.defaults.height, manifest.defaults.width)
    height, width = (
        size or built_size or min(default, limit) // unit * unit
        for size, built_size, default in zip((height, width), built, defaults, strict=True)
    )
    return pipeline.settings(
        PROMPT,
        sampler=sampling.plain(manifest.schedule),
        steps=steps,
        seed=0,
        height=height,
        width=width,
        unaccelerated=True,
    )


def _one_step(directory: Path) -> str:
    with load(directory, hashes=False, low_memory=True, example_images=True) as pipeline:
        result = trial(pipeline, steps=1)
    if np.ptp(to_array(result.images)) == 0:
        raise GateError(
            f"{directory}: the image of one step has a single colour: export and compile it again"
        )
    return (
        f"image: one step runs in {result.timings.total:.2f} s, {result.images[0].size[0]} px wide"
    )
