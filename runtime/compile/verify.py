"""Is an engine directory sound, here and now?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentforge.runtime.equivalence import SAME_IMAGE_PSNR
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load, load_component
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.settings import Settings
from latentforge.runtime.shapes import ANY

__all__ = ["compare", "trial", "trial_settings", "verify"]

_PIXELS = 256
_ALIKE = 20.0  # dB that pictures of other precisions reach at least by another backend
_PROMPT = "a photo of a cat"


def verify(directory: Path) -> Iterator[str]:
    """Check an engine directory part by part, giving one line for each that is sound.

    Hashes, then every engine by loading it, then an image of one step.

    Raises:
        ManifestError: the directory is not what its manifest says.
        BackendError: an engine does not load or run on this machine.
        GateError: the image is of one colour.
    """
    manifest = Manifest.read(directory)
    files = list(manifest.files)
    size = sum(entry.bytes for entry in files)
    yield f"files: {len(files)} with the right size and sha256, {size / 1e6:.1f} MB"
    for name, component in manifest.components.items():
        load_component(manifest, name, directory).session.close()
        yield f"{name}: loads on {component.backend}, {component.precision}"
    if all(name in manifest.components for name in manifest.required_components):
        yield _one_step(directory)


def compare(source: Path, directory: Path) -> dict[str, float]:
    """A picture of one step by the engines of two directories, and how close they are.

    Returns:
        ``latents_psnr`` and ``psnr`` (of the pixels), in dB.

    Raises:
        DeviceError: one of them needs a device that is not here.
        ManifestError: one of them lacks a component.
        GateError: they are farther apart than backends may be.
    """
    with load(directory, hashes=False, low_memory=True) as pipeline:
        ours = trial(pipeline, steps=1)
        precision = pipeline.manifest.components["denoiser"].precision
    with load(source, hashes=False, low_memory=True) as pipeline:
        theirs = pipeline.run(ours.settings)
    pixels = [to_array(result.images) for result in (theirs, ours)]
    close = {
        "latents_psnr": psnr(theirs.latents, ours.latents),
        "psnr": psnr(*pixels, peak=2.0),
    }
    needed = SAME_IMAGE_PSNR.get(precision, _ALIKE)
    for name, value in close.items():
        if not value >= needed:
            raise GateError(
                f"{name} of one step is {value:.1f} dB to the picture of {source}, and {precision} "
                f"engines have to reach {needed:g}"
            )
    return close


def trial(pipeline: Pipeline, *, steps: int, height: int = 0, width: int = 0) -> Result:
    """A small image that takes every engine of text to image: see trial_settings()."""
    settings = trial_settings(pipeline, steps=steps, height=height, width=width)
    return pipeline.run(settings)  # whatever schedule engines were calibrated for


def trial_settings(pipeline: Pipeline, *, steps: int, height: int = 0, width: int = 0) -> Settings:
    """A request that any engines can fulfil, and no larger than need be.

    Args:
        pipeline: of engines that may be built for some sizes alone.
        steps: of Euler's method, which every schedule and model can do.
        height, width: in pixels; 0 for what the engines are built for, or 256 at most.
    """
    manifest = pipeline.manifest
    unit = manifest.latent.downscale * manifest.latent.multiple
    limit = max(_PIXELS, unit)
    sides = manifest.latent.image_sizes(pipeline.engines["denoiser"].component)
    built = [0 if side == ANY else side.opt for side in sides[0]] if sides else [0, 0]
    usual = (manifest.defaults.height, manifest.defaults.width)
    tall, wide = (
        given or size or min(default, limit) // unit * unit
        for given, size, default in zip((height, width), built, usual, strict=True)
    )
    return pipeline.settings(
        _PROMPT, sampler="euler", steps=steps, seed=0, height=tall, width=wide, unaccelerated=True
    )


def _one_step(directory: Path) -> str:
    with load(directory, hashes=False, low_memory=True) as pipeline:
        result = trial(pipeline, steps=1)
    picture = to_array(result.images)
    if np.ptp(picture) == 0:
        raise GateError(f"{directory}: one step gives an image of a single colour")
    return (
        f"image: one step runs in {result.timings.total:.2f} s, {result.images[0].size[0]} px wide"
    )
