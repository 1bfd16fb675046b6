"""Records of measured latencies."""

from collections.abc import Mapping, Sequence
from math import inf
from statistics import median
from typing import Annotated

import msgspec

from latentforge.export.models.searched_structure import Choice
from latentforge.measure.results import ConfidenceInterval
from latentforge.measure.statistics import median_interval
from latentforge.runtime.errors import ResultsError
from latentforge.runtime.record import Record

__all__ = ["PRECISION", "Latency", "MeasuredStructure", "StepSetting"]

PRECISION = 0.01
"""Half the width of a ratio's interval, relative to it, at which it is precise."""

_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Latency(Record, frozen=True, kw_only=True):
    """Measured time of a step by a structure's engine, beside that of the whole UNet's.

    Attributes:
        seconds: of the structure's engine.
        whole: of the whole UNet's engine in the same turns.
        ratio: of both, structure / whole, with the interval of the median of the turns' ratios.
    """

    seconds: _Seconds
    whole: _Seconds
    ratio: ConfidenceInterval

    def __post_init__(self) -> None:
        if self.ratio.value <= 0:
            raise ResultsError(f"a ratio of latencies has to be positive, not {self.ratio.value}")

    @classmethod
    def of(cls, turns: Sequence[tuple[float, float]]) -> "Latency":
        """Return the latency of turns, each the seconds of the whole UNet's engine and its own.

        All figures are medians. The two sides of a turn are neighbours in time, so that other load
        and the clock's changes meet both; a turn in which they meet one alone is an outlier. The
        least seconds of each side would need a moment without other load for both of them.
        """
        ratio = median_interval([own / whole for whole, own in turns])
        whole, seconds = (median(side) for side in zip(*turns, strict=True))
        return cls(seconds=seconds, whole=whole, ratio=ratio)

    @property
    def is_precise(self) -> bool:
        """True if the ratio's interval is so narrow that further turns would hardly help."""
        return _half_width(self.ratio) <= PRECISION

    @property
    def deviation(self) -> float:
        """Standard deviation of the ratio, relative to it: a quarter of its interval's width."""
        return min(_half_width(self.ratio), 1.0) / 2


def _half_width(interval: ConfidenceInterval) -> float:
    """Return half the width of an interval, relative to its value."""
    if interval.low is None or interval.high is None:
        return inf
    return (interval.high - interval.low) / 2 / interval.value


class MeasuredStructure(Record, frozen=True, kw_only=True):
    """Structure, by its choices, and its latency."""

    choices: Mapping[str, Choice]
    latency: Latency


class StepSetting(Record, frozen=True, kw_only=True):
    """Engines, machine and size that a latency holds for.

    Attributes:
        engines: sha256 of the exported denoiser and its weights.
        target: name in TARGETS.
        recipe: name of a recipe, or path of its file with a hash.
        height, width: of the image in pixels.
        rows: of a run; guidance takes two.
        threads: of the engine.
        processor: model name of the processor.
        gpu: names of the GPUs, if the target runs on one.
        libraries: versions by name.
    """

    engines: str
    target: str
    recipe: str
    height: int
    width: int
    rows: int
    threads: int
    processor: str
    gpu: str
    libraries: Mapping[str, str]

    def difference(self, here: "StepSetting") -> str:
        """Return the first property that differs here, in words; empty if none does."""
        there, now = self._flat(), here._flat()
        for name in (*there, *now):
            if there.get(name) != now.get(name):
                return f"{name} {there.get(name) or 'none'} (here {now.get(name) or 'none'})"
        return ""

    def _flat(self) -> dict[str, object]:
        fields = msgspec.structs.asdict(self)
        return {**{k: v for k, v in fields.items() if k != "libraries"}, **self.libraries}
