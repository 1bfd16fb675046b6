"""What was measured, as data: bench and eval write it, report draws it, compare judges two of it.

Seconds, bytes, joules and dB throughout. What is not known is None, and what was not measured is
absent; nothing is ever zero for want of a figure.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import ResultsError
from latentforge.runtime.files import staged_file
from latentforge.runtime.image import data_url, difference, psnr
from latentforge.runtime.record import Record

__all__ = [
    "FORMAT",
    "BenchResult",
    "ConfidenceInterval",
    "LayerTiming",
    "Metric",
    "Picture",
    "Point",
    "ProfileTable",
    "Results",
    "TimedRun",
]

FORMAT = 1

_MAX_BYTES = 256 << 20


class ConfidenceInterval(Record, frozen=True, kw_only=True):
    """A figure with its 95 % confidence interval; no bounds where there is too little to tell."""

    value: float
    low: float | None = None
    high: float | None = None


class TimedRun(Record, frozen=True, kw_only=True):
    """One request. ``seconds`` are by stage: text_encoder, unet, denoiser step, vae_decoder, total."""

    seconds: Mapping[str, float]
    joules: float | None = None


class BenchResult(Record, frozen=True, kw_only=True):
    """One participant of a benchmark, be it that it ran, failed, or isn't there.

    Attributes:
        name: unique among the entries.
        role: ``reference`` is what the ratios compare with.
        status: ``missing`` where it isn't installed.
        message: what went wrong and what to do, in one line.
        speed_class: ``A`` draws the reference's picture, ``B`` another one; None before a picture.
        gate: the gate that another picture has passed, in words; empty where none has judged it.
        prepare_seconds: what turning the checkpoint into its own files took.
        ready_seconds: from the start of the process to the loaded model, for every start.
        first: the first request after a start, kept apart from ``runs``.
        runs: in turn with those of the other participants, so that equal places make pairs.
        peak_memory: bytes resident at most.
        device_memory: bytes on the GPU at most.
        file_bytes: what it loads.
        psnr: of its last picture to the reference's, in dB.
        median: seconds by stage over ``runs``, and ``joules`` where the machine tells.
        ratio: by stage, how many times faster than the reference, paired.
    """

    name: str
    role: Literal["reference", "peer", "ours"]
    status: Literal["ok", "failed", "missing"] = "ok"
    message: str = ""
    speed_class: Literal["A", "B"] | None = None
    gate: str = ""
    precision: str = ""
    versions: Mapping[str, str] = {}
    prepare_seconds: float | None = None
    ready_seconds: tuple[float, ...] = ()
    first: TimedRun | None = None
    runs: tuple[TimedRun, ...] = ()
    peak_memory: int | None = None
    device_memory: int | None = None
    file_bytes: int | None = None
    psnr: float | None = None
    median: Mapping[str, float] = {}
    ratio: Mapping[str, ConfidenceInterval] = {}

    @property
    def slowness(self) -> float:
        """What to rank the entries of one file by: the time of an image as a share of the
        reference's, which pairs tell better than seconds do; seconds where there is no reference.
        """
        paired = self.ratio.get("total")
        if paired is not None and paired.value > 0:
            return 1 / paired.value
        return self.median.get("total", math.inf)


class Point(Record, frozen=True, kw_only=True):
    """One participant at one size and batch: a point of a scaling curve. Seconds are medians."""

    name: str
    batch: int
    height: int
    width: int
    total: float | None = None
    denoiser_step: float | None = None
    peak_memory: int | None = None
    message: str = ""


class LayerTiming(Record, frozen=True, kw_only=True):
    """One layer of one component over a whole image."""

    component: str
    layer: str
    operator: str
    seconds: float


class ProfileTable(Record, frozen=True, kw_only=True):
    """The hottest layers of a participant, and the seconds of all its layers together."""

    name: str
    layers: tuple[LayerTiming, ...]
    total: float


class Metric(Record, frozen=True, kw_only=True):
    """One figure of quality.

    Attributes:
        name: of the metric, such as ``psnr`` or ``fid``.
        subject: whose pictures.
        reference: what they were compared with; empty where the metric needs nothing.
        value: with ``low`` and ``high``, its 95 % confidence interval.
        images: how many of the subject went in.
        better: which way is good.
        network: whose features, where it takes some.
        note: a caveat in words, such as too few images to compare with other people's figures.
    """

    name: str
    subject: str
    value: float
    low: float | None = None
    high: float | None = None
    images: int
    better: Literal["higher", "lower"]
    unit: str = ""
    reference: str = ""
    network: str = ""
    note: str = ""


class Picture(Record, frozen=True, kw_only=True):
    """One request's picture by several, as data URLs by name, and how far each is from the first.

    ``differences`` are pictures too, of what is 0 where they are equal, made visible.
    """

    prompt: str
    seed: int
    images: Mapping[str, str]
    differences: Mapping[str, str] = {}
    psnr: Mapping[str, float] = {}

    @classmethod
    def of(cls, prompt: str, seed: int, pictures: Mapping[str, NDArray[np.float32]]) -> "Picture":
        """Pictures (3, height, width) in -1..1 by name; the first is what others are compared with.

        What is of another size than the first is left out.
        """
        theirs = next(iter(pictures.values()))
        alike = {name: mine for name, mine in pictures.items() if mine.shape == theirs.shape}
        others = dict(list(alike.items())[1:])
        return cls(
            prompt=prompt,
            seed=seed,
            images={name: data_url(mine) for name, mine in alike.items()},
            differences={name: data_url(difference(theirs, mine)) for name, mine in others.items()},
            psnr={name: psnr(theirs, mine, peak=2.0) for name, mine in others.items()},
        )


class Results(Record, frozen=True, kw_only=True):
    """One measurement, whole.

    Attributes:
        command: what repeats it.
        date: ISO 8601, UTC.
        machine: words about it, by what they tell: cpu, cores, memory, system, gpu.
        settings: the request that was timed, see settings.Settings.
        threads: each participant may use.
        method: how it was measured, in a sentence or two.
    """

    format: int = FORMAT
    title: str
    command: str
    date: str
    machine: Mapping[str, str]
    settings: Mapping[str, Any] = {}
    threads: int = 0
    method: str = ""
    entries: tuple[BenchResult, ...] = ()
    scaling: tuple[Point, ...] = ()
    profiles: tuple[ProfileTable, ...] = ()
    metrics: tuple[Metric, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a file that write() made.

        Raises:
            ResultsError: it is missing, no such file, damaged, or of another version.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ResultsError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > _MAX_BYTES:
            raise ResultsError(f"{path} is larger than results are: name what bench or eval wrote")
        _check_format(data, path)
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ResultsError(f"{path}: {error}; measure again") from error

    def write(self, path: Path) -> None:
        """Write the whole file or nothing."""
        with staged_file(path) as partial:
            partial.write_bytes(self.encode())

    def encode(self) -> bytes:
        """The same as JSON text, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @property
    def reference(self) -> BenchResult | None:
        """What the ratios compare with, if anything was timed."""
        return next((entry for entry in self.entries if entry.role == "reference"), None)


def _check_format(data: bytes, path: Path) -> None:
    """Tell a file of another version from one that is damaged."""
    try:
        head = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON: {error}; name what bench or eval wrote") from error
    if not isinstance(head, dict) or "format" not in head or "machine" not in head:
        raise ResultsError(f"{path} holds no results: name a file that bench or eval wrote")
    if head["format"] != FORMAT:
        raise ResultsError(
            f"{path} is of format {head['format']!r} and this latentforge reads {FORMAT}: "
            "measure again, or use the version that wrote it"
        )
