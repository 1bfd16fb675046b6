"""Comparison of exported components with torch, on inputs recorded from a denoising run."""

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
from latentforge.export.reference.devices import without_tf32
from latentforge.runtime.backends import LayerTime
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import CheckpointError, GateError
from latentforge.runtime.image import psnr, relative_error
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds
from latentforge.runtime.text import one_line

__all__ = [
    "MAX_RELATIVE_ERROR",
    "LazyModules",
    "ComponentRecording",
    "TorchSession",
    "check_parity",
]

MAX_RELATIVE_ERROR = 1e-3
"""Largest allowed difference of an fp32 engine from torch, relative to the largest output."""

_COLLECTED = 64 << 20
"""Bytes of weights from which a search for reference cycles is worth its half second."""

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass
class ComponentRecording:
    """Inputs of a component during a denoising run, and torch's outputs.

    Attributes:
        runs: feeds and outputs of each run, by tensor name.
    """

    runs: list[tuple[Feeds, Outputs]] = field(default_factory=list)


class LazyModules:
    """Torch modules of a checkpoint, with at most one in memory.

    A denoising run uses the components one after the other, so only the weights of the largest
    have to fit into memory.

    Attributes:
        device: of torch, where the modules run.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._name = ""
        self._module: nn.Module | None = None
        self._bytes = 0  # counted when loaded: an export empties the weights

    def get(self, plan: ComponentPlan) -> nn.Module:
        """Return the module of a component, loading it in place of the previous one if needed."""
        if self._module is None or self._name != plan.name:
            self.free()
            module = plan.load(self._checkpoint)
            self._module = module if self.device == "cpu" else nn.Module.to(module, self.device)
            self._name = plan.name
            self._bytes = sum(weight.nbytes for weight in self._module.state_dict().values())
        return self._module

    def free(self) -> None:
        """Free the module in memory; a small one may remain until Python's next collection."""
        self._module = None
        if self._bytes >= _COLLECTED:
            gc.collect()  # modules hold reference cycles
        self._bytes = 0


class TorchSession:
    """Session that runs a component in torch and records its inputs and outputs."""

    def __init__(self, plan: ComponentPlan, modules: LazyModules) -> None:
        self.plan = plan
        self.recording = ComponentRecording()
        self._modules = modules

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        module, device = self._modules.get(self.plan), self._modules.device
        tensors = {
            name: torch.from_numpy(np.require(feeds[name], requirements="W")).to(device)
            for name in self.plan.inputs
        }
        try:
            with torch.inference_mode(), without_tf32(device):
                values = module(**tensors)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.plan.name} does not run in torch by its config.json: {one_line(error)}"
            ) from error
        values = values if isinstance(values, tuple) else (values,)
        outputs = {
            name: value.cpu().numpy() for name, value in zip(self.plan.outputs, values, strict=True)
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
    """Run an exported component on recorded inputs and compare its outputs with torch's.

    Args:
        name: of the component.
        component: its manifest entry.
        directory: the engine directory.
        recording: inputs, and torch's outputs for them.

    Returns:
        ``max_relative_error``, the largest difference divided by the largest output, and
        ``psnr`` in dB.

    Raises:
        GateError: the error is above MAX_RELATIVE_ERROR.
    """
    # One row per run and no repacked weights: less memory, and the same operators.
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
    if not worst <= MAX_RELATIVE_ERROR:  # also true for NaN
        raise GateError(
            f"{name}: the engine differs from torch by {worst:.1e} of its largest output, but at "
            f"most {MAX_RELATIVE_ERROR:.0e} is allowed: please report this checkpoint"
        )
    return {"max_relative_error": worst, "psnr": float(lowest)}
