"""Where the time goes: by stage for every image, by layer on request."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from latentforge.runtime.backends import LayerTime

__all__ = ["Profile", "Stopwatch", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Seconds of one image run: each call of each stage, and all of it together."""

    stages: Mapping[str, tuple[float, ...]]
    total: float

    @property
    def seconds(self) -> dict[str, float]:
        """The sum of each stage; ``sampler`` is what no engine accounts for."""
        sums = {name: sum(calls) for name, calls in self.stages.items()}
        return {**sums, "sampler": max(0.0, self.total - sum(sums.values()))}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())
        return f"{self.total:.3f} s ({parts})"


class Stopwatch:
    """Collects what becomes Timings; counts only the time inside its own blocks."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, list[float]] = defaultdict(list)
        self._total = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one call of a stage."""
        start = time.perf_counter()
        yield
        self._stages[name].append(time.perf_counter() - start)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block towards the total; a caller's pause between is not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._total += time.perf_counter() - start

    def timings(self) -> Timings:
        """What has been measured so far."""
        return Timings({name: tuple(calls) for name, calls in self._stages.items()}, self._total)


@dataclass(frozen=True)
class Profile:
    """Layers by the time they took, hottest first, and the seconds of all of them together."""

    layers: tuple[LayerTime, ...]
    total: float

    @classmethod
    def of(cls, layers: Iterable[LayerTime]) -> "Profile":
        """Sort the layers and sum their time."""
        hottest = sorted(layers, key=lambda layer: layer.seconds, reverse=True)
        return cls(tuple(hottest), sum(layer.seconds for layer in hottest))

    def top(self, count: int) -> "Profile":
        """The hottest layers, with their shares of the whole."""
        return Profile(self.layers[:count], self.total)

    def __str__(self) -> str:
        lines = [f"{'ms':>9}  {'share':>6}  {'operator':<22}  layer"]
        for layer in self.layers:
            share = layer.seconds / self.total if self.total else 0.0
            lines.append(
                f"{layer.seconds * 1e3:9.2f}  {share:6.1%}  {layer.operator:<22}  {layer.name}"
            )
        return "\n".join(lines)
