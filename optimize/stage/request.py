"""Request for the optimize stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from latentforge.optimize.recipe import MAX_PROMPTS
from latentforge.optimize.targets import TARGETS, Target
from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.settings import Request, check_incomplete
from latentforge.runtime.text import near_miss
from latentforge.runtime.validation import (
    check_count,
    check_number,
    check_optional_count,
    shown,
)

__all__ = ["MAX_BUDGET", "MAX_REPEATS", "REPEATS", "OptimizeRequest"]

REPEATS = 3
"""Default number of timed pairs of images."""

MAX_REPEATS = 1000

MAX_BUDGET = 10_000_000
"""Largest budget in seconds: some months."""


@dataclass(frozen=True, kw_only=True)
class OptimizeRequest:
    """Options of the optimize stage.

    Attributes:
        recipe: name of a recipe that comes with the package, or path of a TOML file.
        target: backend to optimize for, a name of TARGETS.
        gate: thresholds as NAME=VALUE, in place of the recipe's.
        prompts: of the gate, then of the calibration; those that come with the package if empty.
        calibration_prompts: number of prompts to calibrate with; the recipe's if None.
        settings: of the schedule that will be deployed, such as steps and sampler, where they
            differ from the manifest's defaults. Calibration, gate and timing use it.
        repeats: pairs of images that are timed; 0 disables timing. None: REPEATS, or as many as the
            budget allows.
        budget: seconds to keep to, by smaller gates and calibrations; None sets no limit. See
            sizing.py for what is reduced.
        reserved: seconds of the budget that other stages take.
        shares: number of optimizations that share the rest of it.
        overwrite: replace an existing engine directory.
        quiet: show no progress.
    """

    recipe: str = "fp32"
    target: str = "cpu"
    gate: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    calibration_prompts: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    repeats: int | None = None
    budget: float | None = None
    reserved: float = 0.0
    shares: int = 1
    overwrite: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_incomplete(cast("Request", self.settings), self.prompts)
        if self.repeats != 0:
            check_optional_count("repeats", self.repeats, MAX_REPEATS)
        check_optional_count("calibration_prompts", self.calibration_prompts, MAX_PROMPTS)
        check_count("shares", self.shares, len(TARGETS))
        check_number("reserved", self.reserved, 0, MAX_BUDGET)
        if self.budget is not None and not 0 < self.budget <= MAX_BUDGET:
            raise SettingsError(
                f"budget is a number of seconds up to {MAX_BUDGET}, not {shown(self.budget)}"
            )

    @property
    def pairs(self) -> int:
        """Pairs of images that are timed."""
        return REPEATS if self.repeats is None else self.repeats

    @property
    def target_entry(self) -> Target:
        """Entry of TARGETS.

        Raises:
            SettingsError: there is no such target.
        """
        if self.target not in TARGETS:
            raise SettingsError(f"no target {self.target!r}; {near_miss(self.target, TARGETS)}")
        return TARGETS[self.target]
