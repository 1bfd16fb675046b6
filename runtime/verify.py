"""Is an engine directory sound, here and now?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import to_array
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline, Result

__all__ = ["trial", "verify"]

_PIXELS = 256
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
        Engine.load(name, component, directory, {}, low_memory=True).session.close()
        yield f"{name}: loads on {component.backend}, {component.precision}"
    if all(name in manifest.components for name in manifest.needed):
        yield _one_step(directory)


def trial(pipeline: Pipeline, *, steps: int, height: int = 0, width: int = 0) -> Result:
    """A small image that takes every engine of text to image: a large one only takes longer.

    Args:
        pipeline: of engines that may be fixed to a size.
        steps: of Euler's method, which every schedule and model can do.
        height, width: in pixels; 0 for what the engines are fixed to, or 256 at most.
    """
    manifest, unet = pipeline.manifest, pipeline.engines["unet"].component
    unit = manifest.latent.downscale * manifest.latent.multiple
    limit = max(_PIXELS, unit)
    sides = []
    for given, default, size in (
        (height, manifest.defaults.height, unet.inputs["sample"].shape[2]),
        (width, manifest.defaults.width, unet.inputs["sample"].shape[3]),
    ):
        fixed = size * manifest.latent.downscale if isinstance(size, int) else 0
        sides.append(given or fixed or min(default, limit) // unit * unit)
    settings = pipeline.settings(
        _PROMPT, sampler="euler", steps=steps, seed=0, height=sides[0], width=sides[1]
    )
    return pipeline.run(settings)  # whatever schedule engines were calibrated for


def _one_step(directory: Path) -> str:
    with Pipeline.load(directory, hashes=False, low_memory=True) as pipeline:
        result = trial(pipeline, steps=1)
    picture = to_array(result.images)
    if np.ptp(picture) == 0:
        raise GateError(f"{directory}: one step gives an image of a single colour")
    return (
        f"image: one step runs in {result.timings.total:.2f} s, {result.images[0].size[0]} px wide"
    )
