"""Checks of the options and figures of a stage that readers of a history rely on.

Readers are descriptions of directories, messages with the command that rebuilds them, and stages.
Options that none of them reads may have any value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from latentforge.runtime.errors import ManifestError

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.manifest import Stage

__all__ = ["OTHER_STAGES", "check_stage"]

_T = TypeVar("_T")


class _Reference(msgspec.Struct, frozen=True):
    pipeline: str
    scheduler: str
    own_scheduler: bool
    sampler: str
    steps: int
    height: int
    width: int


class _Layer(msgspec.Struct, frozen=True):
    name: str
    error: float
    bytes: float
    seconds: float
    kept_float: bool


class _Settings(msgspec.Struct, frozen=True):
    precision: Mapping[str, str] = {}


class _Sizing(msgspec.Struct, frozen=True):
    reduced: Mapping[str, tuple[int | float | str, int | float | str]]
    budget: float | None = None


class _Options(msgspec.Struct, frozen=True):
    """Types of the options that every stage may have."""

    recipe: str = ""
    target: str = ""
    source: str = ""
    height: str | int = ""
    width: str | int = ""
    batch: str | int = ""
    backends: Mapping[str, str] = {}
    reference: _Reference | str | None = None
    settings: _Settings = _Settings()
    layers: Sequence[_Layer] = ()
    candidates: Mapping[str, Mapping[str, Any]] = {}
    sizing: _Sizing | None = None


class _Selection(msgspec.Struct, frozen=True):
    reference: str
    chosen: Mapping[str, str]
    ratios: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, str]


class _Search(msgspec.Struct, frozen=True):
    gate: str
    plan: str
    plans: Sequence[Any]


class _Compilation(msgspec.Struct, frozen=True):
    backends: Mapping[str, str]
    options: Mapping[str, Any]


class _Estimate(msgspec.Struct, frozen=True):
    seconds: float
    memory: float


class _Build(msgspec.Struct, frozen=True):
    estimated: _Estimate
    predicted_seconds: float | None = None


class _Candidate(msgspec.Struct, frozen=True):
    speedup: float
    psnr: float


class _Failures(msgspec.Struct, frozen=True):
    failures: Sequence[str]


_STAGES: Mapping[str, type] = {
    "build": _Build,
    "select": _Selection,
    "search": _Search,
    "compile": _Compilation,
}
"""Options that stages of these names have besides."""

OTHER_STAGES = frozenset({"build", "compile", "export", "search", "select"})
"""Stages that do not edit graphs. A stage of any other name is read like that of optimize."""

_COMPILED = ("bytes_before", "bytes_after", "build_seconds", "build_memory")
_GRAPH = ("bytes_before", "bytes_after", "nodes_before", "nodes_after")
_TIMED = ("speedup", "denoiser_step_speedup", "memory_before", "memory_after")
_INTERVAL = ("speedup_low", "speedup_high", "speedup_level")


def check_stage(stage: Stage) -> None:
    """Check what readers expect of a stage's options and figures.

    Raises:
        ManifestError: an option or a figure is missing, or has another type.
    """
    options = _read(stage, stage.options, _Options)
    if options.sizing is not None and options.sizing.reduced and options.sizing.budget is None:
        raise ManifestError(f"history: {stage.name}: sizing has no budget")
    if stage.name in _STAGES:
        _read(stage, stage.options, _STAGES[stage.name])
    if ("recipe" in stage.options) != ("target" in stage.options) and _edits_graphs(stage):
        raise ManifestError(f"history: {stage.name}: recipe and target come together")
    if stage.name == "export" and isinstance(options.reference, str):
        raise ManifestError("history: export: reference is an object")
    _check_candidates(stage, options)
    _check_figures(stage, options)


def _edits_graphs(stage: Stage) -> bool:
    return stage.name not in OTHER_STAGES


def _read(stage: Stage, value: object, record: type[_T]) -> _T:
    try:
        return msgspec.convert(value, record)
    except (msgspec.ValidationError, ValueError) as error:
        raise ManifestError(f"history: {stage.name}: {error}") from error


def _check_candidates(stage: Stage, options: _Options) -> None:
    for figures in options.candidates.values():
        _read(stage, figures, _Failures if "failures" in figures else _Candidate)
        if figures.get("failures") == []:
            raise ManifestError(f"history: {stage.name}: a candidate has no failures")
    if options.candidates and not isinstance(stage.options.get("chosen"), str):
        raise ManifestError(f"history: {stage.name}: chosen is missing")


def _check_figures(stage: Stage, options: _Options) -> None:
    if stage.name == "export" and options.reference is not None:
        _require(stage, "image", ())
    if stage.name == "build":
        _require(stage, "build", ("peak_memory",))
    if stage.name == "compile":
        if not {"source", "target"} & stage.options.keys():
            raise ManifestError("history: compile: source or target is missing")
        for name in options.backends:
            _require(stage, name, _COMPILED)
    for name, figures in stage.measured.items():
        if name == "image":
            _check_image(stage, figures)
        elif "bytes_before" in figures and stage.name != "compile":
            _require(stage, name, (*_GRAPH, *(["max_relative_error"] * ("psnr" in figures))))
        if figures.get("bytes_before", 1) <= 0:
            raise ManifestError(f"history: {stage.name}: {name}: bytes_before is not positive")


def _check_image(stage: Stage, figures: Mapping[str, float]) -> None:
    if _edits_graphs(stage) and "psnr" in figures:
        _require(stage, "image", ("images",))
        _read(stage, stage.options, _Judged)
    if "speedup" in figures:
        _require(stage, "image", _TIMED)
        if figures["speedup"] <= 0:
            raise ManifestError(f"history: {stage.name}: speedup is not positive")
    if "speedup_low" in figures:
        _require(stage, "image", _INTERVAL)


class _Judged(msgspec.Struct, frozen=True):
    settings: Mapping[str, Any]


def _require(stage: Stage, name: str, keys: Sequence[str]) -> None:
    figures = stage.measured.get(name)
    missing = [key for key in keys if figures is None or key not in figures]
    if missing or figures is None:
        raise ManifestError(f"history: {stage.name}: {name} has no measured {[*missing, name][0]}")
