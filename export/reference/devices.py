"""Placement of torch's modules on a device, and times that a GPU's queue does not falsify."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latentforge.measure.bench.placement import DEVICES, Placement
from latentforge.runtime.errors import DeviceError, SettingsError
from latentforge.runtime.text import near_miss
from latentforge.runtime.timings import Stopwatch

__all__ = [
    "DeviceClock",
    "autotuned",
    "placed",
    "require_device",
    "single_precision_noise",
    "without_tf32",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def placed(module: nn.Module, placement: Placement) -> nn.Module:
    """Return a module on the device and in the precision of a placement.

    Raises:
        DeviceError: torch finds no such device.
    """
    if placement.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"{placement}: torch {torch.__version__} finds no CUDA GPU here")
    # diffusers' own to() warns of modules to keep in float32 even where a class has none
    return nn.Module.to(module, placement.device, _DTYPES[placement.precision])


def require_device(device: str) -> None:
    """Refuse a device for torch that does not exist, or that torch does not find here.

    Raises:
        SettingsError: there is no such device.
        DeviceError: torch finds no GPU.
    """
    if device not in DEVICES:
        raise SettingsError(f"no device {device!r}: {near_miss(device, DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device cuda: torch {torch.__version__} finds no CUDA GPU here; leave --device out to "
            "run torch on the CPU"
        )


@contextmanager
def without_tf32(device: str) -> Iterator[None]:
    """Context manager in which a GPU computes float32 in full: TF32 has ten bits of fraction.

    On the CPU, which has no TF32, nothing is set.
    """
    if device == "cpu":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def autotuned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled with max-autotune.

    Its outputs are copied: the CUDA graph writes those of the next call to the same memory.
    """
    compiled = torch.compile(function, mode="max-autotune")

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        made = compiled(*args, **kwargs)
        return tuple(part.clone() for part in made) if isinstance(made, tuple) else made

    return run


@contextmanager
def single_precision_noise() -> Iterator[None]:
    """Context manager in which torch.randn draws half precision numbers in float32, then rounds.

    torch draws other numbers in half precision, and so another image.
    """
    randn = torch.randn

    def draw(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        if dtype in (torch.float16, torch.bfloat16):
            return randn(*args, dtype=torch.float32, **kwargs).to(dtype)
        return randn(*args, dtype=dtype, **kwargs)

    torch.randn = draw
    try:
        yield
    finally:
        torch.randn = randn


class DeviceClock:
    """Clock of calls on a device.

    A GPU runs behind the host: its calls are timed by events in its own queue, and read once at
    the end, so that timing does not hold it up.
    """

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        self._events: list[tuple[str, Any, Any]] = []

    def timed(self, forward: Callable[..., Any], watch: Stopwatch, stage: str) -> Any:
        """Return a function whose calls are timed as a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._stage(watch, stage):
                return forward(*args, **kwargs)

        return timed

    def finish(self, watch: Stopwatch) -> None:
        """Wait for the device, and add the calls that it timed."""
        if not self.is_gpu:
            return
        torch.cuda.synchronize()
        for stage, start, end in self._events:
            watch.add(stage, start.elapsed_time(end) / 1000)
        self._events.clear()

    @contextmanager
    def _stage(self, watch: Stopwatch, stage: str) -> Iterator[None]:
        if not self.is_gpu:
            with watch.stage(stage):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((stage, start, end))
