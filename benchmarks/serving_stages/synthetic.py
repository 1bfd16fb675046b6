"""Engines of known cost: each call of the denoiser takes a set time, and computes nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from latentforge.runtime.files import hash_file
from latentforge.runtime.manifest import Component, Manifest

__all__ = ["StepCost", "synthetic_engines"]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Time of a denoising step, in microseconds: ``call`` and, for each image, ``row``."""

    call: int = 10_000
    row: int = 5_000

    def images_per_second(self, steps: int, batch: int) -> float:
        """Return the images per second of batches that follow on each other without a pause."""
        return batch / (steps * (self.call + self.row * batch) * 1e-6)


def synthetic_engines(engines: Path, folder: Path, cost: StepCost) -> Path:
    """Write engines of known cost, with everything else as other engines have it.

    Args:
        engines: engine directory whose tokenizers, signatures and settings are taken.
        folder: where to write the directory ``synthetic``.
        cost: of a step.
    """
    source, target = Manifest.read(engines), folder / "synthetic"
    target.mkdir(parents=True)
    for tokenizer in source.tokenizers.values():
        (target / tokenizer.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(engines / tokenizer.file, target / tokenizer.file)
    names = source.required_components
    parts = {name: _null(source.components[name], target, name, cost) for name in names}
    manifest = msgspec.structs.replace(
        source, name="synthetic", components=parts, acceleration=None, history=(), quality={}
    )
    manifest.write(target)
    return target


def _null(component: Component, target: Path, name: str, cost: StepCost) -> Component:
    """Return a component of the same signature that computes nothing, and write its file."""
    (target / f"{name}.null").write_bytes(b"")
    options = {"call_us": cost.call, "row_us": cost.row} if name == "denoiser" else {}
    return Component(
        file=f"{name}.null",
        sha256=hash_file(target / f"{name}.null"),
        bytes=0,
        backend="null",
        precision="fp32",
        inputs=component.inputs,
        outputs=component.outputs,
        options=options,
    )
