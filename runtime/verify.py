"""Is an engine directory sound, here and now?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import to_array
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline

__all__ = ["verify"]


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
        Engine.load(name, component, directory, {}).session.close()
        yield f"{name}: loads on {component.backend}, {component.precision}"
    if all(name in manifest.components for name in manifest.needed):
        yield _one_step(directory)


def _one_step(directory: Path) -> str:
    with Pipeline.load(directory, hashes=False) as pipeline:
        result = pipeline("a photo of a cat", sampler="euler", steps=1, seed=0)
    picture = to_array(result.images)
    if np.ptp(picture) == 0:
        raise GateError(f"{directory}: one step gives an image of a single colour")
    return (
        f"image: one step runs in {result.timings.total:.2f} s, {result.images[0].size[0]} px wide"
    )
