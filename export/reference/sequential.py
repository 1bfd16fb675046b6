"""Loading of a pipeline's modules in turn, on machines that cannot hold all of them."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from latentforge.export.checkpoint import Checkpoint

__all__ = ["SequentialModules"]

_METHODS = ("encode", "decode")  # an autoencoder is called by these, not by forward()


class SequentialModules:
    """Modules of a checkpoint of which at most one has its weights in memory.

    A module's weights are read when it is called, in place of those of the previous one. A
    pipeline calls its modules one after the other, so that each is read about once.

    Attributes:
        modules: the modules by part of the pipeline.
    """

    def __init__(
        self, checkpoint: Checkpoint, loaders: Mapping[str, Callable[[Checkpoint], nn.Module]]
    ) -> None:
        self._checkpoint = checkpoint
        self._loaders = loaders
        self._current = ""
        self.modules: dict[str, nn.Module] = {}
        for part, load in loaders.items():
            self.modules[part] = self._hooked(part, load(checkpoint))

    def _hooked(self, part: str, module: nn.Module) -> nn.Module:
        """Free a module's weights, and read them again before each call."""

        def read(*_: object) -> None:
            self._read(part)

        _free(module)
        module.register_forward_pre_hook(read)
        for name in _METHODS:
            if method := getattr(module, name, None):
                setattr(module, name, _after(read, method))
        return module

    def _read(self, part: str) -> None:
        if self._current == part:
            return
        if self._current:
            _free(self.modules[self._current])
        self._current = ""
        with torch.inference_mode(False):  # weights outlive the run that needs them first
            loaded = self._loaders[part](self._checkpoint)
            weights = zip(self.modules[part].parameters(), loaded.parameters(), strict=True)
            for weight, value in weights:
                weight.data = value.data
        self._current = part


def _free(module: nn.Module) -> None:
    """Replace weights by a zero that is broadcast to their shape; buffers are small and stay."""
    with torch.inference_mode(False):
        for weight in module.parameters():
            weight.data = weight.data.new_zeros(()).expand(weight.shape)
    gc.collect()  # modules hold reference cycles


def _after(first: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        first()
        return method(*args, **kwargs)

    return called
