"""Result files: ``bench`` and ``eval`` write them, ``report`` draws them, ``compare`` compares two.

Units are seconds, bytes, joules and dB. An unknown value is None and a value that was not measured
is absent; zero never stands for a missing value.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.measure.pictures import data_url, difference_image
from latentforge.runtime.errors import ResultsError
from latentforge.runtime.files import read_file, staged_file
from latentforge.runtime.image import psnr
from latentforge.runtime.record import Record
from latentforge.runtime.validation import checked_path

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
    "Role",
    "TimedRun",
]

FORMAT = 2

Role = Literal["reference", "peer", "engines"]
"""Part of a participant in a benchmark: reference of the speedups, other software, or engines."""

_MAX_BYTES = 256 << 20

_LIMIT = 1e12  # no measured figure is larger, and arithmetic with such figures stays finite
_Figure = Annotated[float, msgspec.Meta(ge=-_LIMIT, le=_LIMIT)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=_LIMIT)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class ConfidenceInterval(Record, frozen=True, kw_only=True):
    """Estimate with its confidence interval; without bounds if the sample is too small for one.

    Attributes:
        level: probability that such an interval covers the true value, 0 to 1.
    """

    value: _Figure
    low: _Figure | None = None
    high: _Figure | None = None
    level: _Amount | None = None

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high, self.level)


class TimedRun(Record, frozen=True, kw_only=True):
    """One timed request.

    Attributes:
        seconds: by stage: text_encoder, denoiser, vae_decoder and so on, each summed over its
            calls; ``denoiser step`` is the median denoiser call, ``total`` the whole request.
        joules: energy of the whole machine, if it has meters.
    """

    seconds: Mapping[str, _Amount]
    joules: _Amount | None = None


class BenchResult(Record, frozen=True, kw_only=True):
    """Result of one benchmark participant: measured, failed or not installed.

    Attributes:
        name: unique within a file.
        role: ``reference`` is the participant that all speedups are relative to.
        status: ``missing`` if the participant's libraries are not installed.
        message: the error and its remedy, on one line.
        speed_class: ``A`` for the reference's image (same trajectory), ``B`` for a different one,
            None if no image could be compared.
        gate: the quality gate that a class B participant has passed, in words; empty if none.
        device: ``cpu`` or ``cuda``; empty in files of earlier versions.
        prepare_seconds: time to convert the checkpoint to the participant's own files.
        ready_seconds: from process start to loaded model, one value per start.
        first: the first request after a start; it is not counted among ``runs``.
        runs: interleaved with those of the other participants, so that equal positions are pairs.
        peak_memory: peak resident set, in bytes.
        device_memory: peak memory on GPUs, in bytes.
        file_bytes: size of the files that the participant loads.
        psnr: of the last image to the reference's, in dB; None for the reference itself.
        median: median seconds over ``runs`` by stage, and ``joules`` if the machine has meters.
        ratio: speedup over the reference by stage, from pairs of runs.
    """

    name: str
    role: Role
    status: Literal["ok", "failed", "missing"] = "ok"
    message: str = ""
    speed_class: Literal["A", "B"] | None = None
    gate: str = ""
    device: str = ""
    precision: str = ""
    versions: Mapping[str, str] = {}
    prepare_seconds: _Amount | None = None
    ready_seconds: tuple[_Amount, ...] = ()
    first: TimedRun | None = None
    runs: tuple[TimedRun, ...] = ()
    peak_memory: _Bytes | None = None
    device_memory: _Bytes | None = None
    file_bytes: _Bytes | None = None
    psnr: _Figure | None = None
    median: Mapping[str, _Amount] = {}
    ratio: Mapping[str, ConfidenceInterval] = {}

    @property
    def placement(self) -> str:
        """Device and precision, as far as they are known, such as ``cuda fp16``."""
        return " ".join(filter(None, [self.device, self.precision]))

    @property
    def relative_time(self) -> float:
        """Time of an image by which to rank the results of one file; infinite if unknown.

        It is relative to the reference: paired ratios are more reliable than seconds. It is in
        seconds if the file has no reference.
        """
        speedup = self.ratio.get("total")
        if speedup is not None and speedup.value > 0:
            return 1 / speedup.value
        return self.median.get("total", math.inf)


class Point(Record, frozen=True, kw_only=True):
    """Point of a scaling curve: one participant at one batch and image size, median seconds."""

    name: str
    batch: _Count
    height: _Count
    width: _Count
    total: _Amount | None = None
    denoiser_step: _Amount | None = None
    peak_memory: _Bytes | None = None
    message: str = ""


class LayerTiming(Record, frozen=True, kw_only=True):
    """Time of one layer of one component, summed over one image."""

    component: str
    layer: str
    operator: str
    seconds: _Amount


class ProfileTable(Record, frozen=True, kw_only=True):
    """Slowest layers of one participant; ``total`` is the seconds of all its layers."""

    name: str
    layers: tuple[LayerTiming, ...]
    total: _Amount


class Metric(Record, frozen=True, kw_only=True):
    """Value of one quality metric for one participant.

    Attributes:
        name: of the metric, such as ``psnr`` or ``fid``.
        subject: the participant whose images were scored.
        reference: what the images were compared with; empty for metrics without a reference.
        value: with the bounds ``low`` and ``high`` of its confidence interval at ``level``.
        images: number of the subject's images.
        network: the feature extractor, for metrics that use one.
        note: a caveat, such as too few images to compare with published values.
    """

    name: str
    subject: str
    value: _Figure
    low: _Figure | None = None
    high: _Figure | None = None
    level: _Amount | None = None
    images: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]
    better: Literal["higher", "lower"]
    unit: str = ""
    reference: str = ""
    network: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high, self.level)


class Picture(Record, frozen=True, kw_only=True):
    """Images of one request by several participants, and their differences to the first.

    Attributes:
        images: data URLs by participant.
        differences: data URLs of amplified absolute differences to the first image.
        psnr: to the first image, in dB.
    """

    prompt: str
    seed: int
    images: Mapping[str, str]
    differences: Mapping[str, str] = {}
    psnr: Mapping[str, _Figure] = {}

    @classmethod
    def of(cls, prompt: str, seed: int, pictures: Mapping[str, NDArray[np.float32]]) -> "Picture":
        """Encode images of shape (3, height, width) in -1..1, by participant.

        The first is the reference of the comparison. Images of another size than the first are
        left out.
        """
        reference = next(iter(pictures.values()))
        alike = {name: image for name, image in pictures.items() if image.shape == reference.shape}
        compared = dict(list(alike.items())[1:])
        return cls(
            prompt=prompt,
            seed=seed,
            images={name: data_url(image) for name, image in alike.items()},
            differences={
                n: data_url(difference_image(reference, image)) for n, image in compared.items()
            },
            psnr={n: psnr(reference, image, peak=2.0) for n, image in compared.items()},
        )


class Results(Record, frozen=True, kw_only=True):
    """Content of one result file.

    Attributes:
        command: the command line that repeats the measurement.
        date: ISO 8601, UTC.
        machine: description by key: cpu, cores, memory, system, gpu.
        settings: of the request that was measured, see runtime.settings.Settings.
        threads: per participant.
        method: how it was measured, in a few sentences.
    """

    format: int = FORMAT
    title: str
    command: str
    date: str
    machine: Mapping[str, str]
    settings: Mapping[str, Any] = {}
    threads: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 0
    method: str = ""
    entries: tuple[BenchResult, ...] = ()
    scaling: tuple[Point, ...] = ()
    profiles: tuple[ProfileTable, ...] = ()
    metrics: tuple[Metric, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a result file.

        Raises:
            ResultsError: the file is missing, is not a result file, is damaged, or has another
                format.
        """
        try:
            data = read_file(checked_path("a result file", path), _MAX_BYTES)
        except OSError as error:
            raise ResultsError(
                f"cannot read {path}: {error.strerror}; name a --json file of bench or eval"
            ) from error
        _check_format(data, path)
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ResultsError(f"{path} is damaged: {error}; measure again") from error

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with staged_file(path) as partial:
            partial.write_bytes(self.encode())

    def encode(self) -> bytes:
        """Return the content as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @property
    def reference(self) -> BenchResult | None:
        """Result that the speedups are relative to, if the file has one."""
        return next((entry for entry in self.entries if entry.role == "reference"), None)


def _check_interval(low: float | None, high: float | None, level: float | None) -> None:
    """Refuse an incomplete interval: bounds mean nothing without their level."""
    bounds = (low, high, level)
    if None in bounds and any(value is not None for value in bounds):
        raise ValueError("an interval needs low, high and level, or none of them")
    if level is not None and not 0 < level <= 1:
        raise ValueError(f"the level of an interval is a probability above 0, not {level}")


def _check_format(data: bytes, path: Path) -> None:
    """Refuse files that are not result files, and those of another format."""
    try:
        head = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{path} is not JSON: {error}; name a --json file of bench or eval"
        ) from error
    if not isinstance(head, dict) or "format" not in head or "machine" not in head:
        raise ResultsError(f"{path} is not a result file: name a --json file of bench or eval")
    if head["format"] != FORMAT:
        raise ResultsError(
            f"{path} has result format {head['format']!r} and this latentforge reads format "
            f"{FORMAT}: measure again with latentforge bench or eval, or use the version that "
            "wrote it"
        )
