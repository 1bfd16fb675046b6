"""Does the engine compute what torch computes? Recorded inputs, both sides, one figure."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.types import ComponentPlan
from latentforge.runtime.backends import LayerTime
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import psnr, relative_error
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds

__all__ = [
    "MAX_RELATIVE_ERROR",
    "LazyModules",
    "ComponentRecording",
    "TorchSession",
    "check_parity",
]

MAX_RELATIVE_ERROR = 1e-3
"""The most that an fp32 engine may differ from torch, as a fraction of the largest output."""

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass
class ComponentRecording:
    """What went into a component during a denoising run, and what came out of torch."""

    runs: list[tuple[Feeds, Outputs]] = field(default_factory=list)


class LazyModules:
    """The torch modules of a checkpoint, one in memory at a time.

    A denoising run uses the components one after the other, so the weights of the largest
    are all that has to fit.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._name = ""
        self._module: nn.Module | None = None

    def get(self, plan: ComponentPlan) -> nn.Module:
        """Load the module of a component, letting go of the one before."""
        if self._module is None or self._name != plan.name:
            self.free()
            self._module = plan.load(self._checkpoint)
            self._name = plan.name
        return self._module

    def free(self) -> None:
        """Let go of the module in memory."""
        self._module = None
        gc.collect()  # modules refer to themselves


class TorchSession:
    """A Session that runs a component in torch and keeps what it saw."""

    def __init__(self, plan: ComponentPlan, modules: LazyModules) -> None:
        self.plan = plan
        self.recording = ComponentRecording()
        self._modules = modules

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        module = self._modules.get(self.plan)
        with torch.inference_mode():
            values = module(
                **{
                    name: torch.from_numpy(np.require(feeds[name], requirements="W"))
                    for name in self.plan.inputs
                }
            )
        values = values if isinstance(values, tuple) else (values,)
        outputs = {
            name: value.numpy() for name, value in zip(self.plan.outputs, values, strict=True)
        }
        self.recording.runs.append((dict(feeds), outputs))
        return outputs

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        self._modules.free()


def check_parity(
    name: str, component: Component, directory: Path, recording: ComponentRecording
) -> dict[str, float]:
    """Run the exported component on recorded inputs and compare with torch's outputs.

    Returns:
        max_relative_error, the largest difference as a fraction of the largest output, and
        psnr in dB.

    Raises:
        GateError: the error is above MAX_RELATIVE_ERROR.
    """
    # One row at a time and weights as they lie: less memory, and the same operators.
    engine = Engine.load(name, component, directory, {}, max_rows=1, low_memory=True)
    worst, lowest = 0.0, np.inf
    for feeds, expected in recording.runs:
        shared = {key: value for key, value in feeds.items() if key == "timestep"}
        rows = {key: value for key, value in feeds.items() if key not in shared}
        outputs = engine.run(rows, shared)
        for key, reference in expected.items():
            worst = float(np.maximum(worst, relative_error(reference, outputs[key])))
            lowest = min(lowest, psnr(reference, outputs[key]))
    engine.session.close()
    if not worst <= MAX_RELATIVE_ERROR:  # which NaN is not either
        raise GateError(
            f"{name}: the engine differs from torch by {worst:.1e} of its largest output, and "
            f"{MAX_RELATIVE_ERROR:.0e} is allowed: please report this checkpoint"
        )
    return {"max_relative_error": worst, "psnr": float(lowest)}
