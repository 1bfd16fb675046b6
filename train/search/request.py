"""Request for the search of a student's structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from latentforge.measure.hardware import describe_machine
from latentforge.optimize.stage.request import MAX_BUDGET
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends
from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.settings import Request, check_incomplete
from latentforge.runtime.text import near_miss
from latentforge.runtime.validation import check_number, shown

__all__ = ["GOALS", "StructureRequest"]

GOALS = ("speedup", "latency", "parameters", "memory")
"""Fields of a request of which one is given."""

_MAX_SPEEDUP = 1000.0
_MAX_SIZE = 16_384  # pixels
_RUN_ANYWHERE = ("cpu", "openvino")  # targets


@dataclass(frozen=True, kw_only=True)
class StructureRequest:
    """Goal and means of a search; one of the goals is given.

    Attributes:
        speedup: of a denoising step, relative to the teacher's.
        latency: seconds of a denoising step, at most.
        parameters: of the student's UNet, at most.
        memory: bytes of its weights in the deployed engine, at most.
        target: backend that the student is for, a name of TARGETS; latency is measured on it.
        recipe: of the deployed engines, see OptimizeRequest.
        prompts: of the trajectories on which student and teacher are compared; those that come
            with the package if empty.
        settings: of the schedule that will be deployed, such as steps, where they differ from the
            checkpoint's defaults.
        size: side in pixels at which latency and errors are measured; None: the checkpoint's own.
        budget: seconds to keep to, by fewer states and structures; None sets no limit.
        work: folder that keeps engines, states, scores and the table of latencies, for further
            searches of the same checkpoint; None: a sibling of the student, deleted at the end.
        seed: of all random choices.
        overwrite: replace a student that is there.
        quiet: show no progress.

    Raises:
        SettingsError: see check_fields(); there is not one goal; or the target does not run here.
    """

    speedup: float | None = None
    latency: float | None = None
    parameters: int | None = None
    memory: int | None = None
    target: str = "cpu"
    recipe: str = "fp32"
    prompts: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    budget: float | None = 1200.0
    work: Path | None = None
    seed: int = 0
    overwrite: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_incomplete(cast("Request", self.settings), self.prompts)
        self._check_goal()
        if self.size is not None:
            check_number("size", self.size, 1, _MAX_SIZE)
        if self.budget is not None:
            check_number("budget", self.budget, 1, MAX_BUDGET)
        check_number("seed", self.seed, 0, 2**63 - 1)

    @property
    def goal(self) -> str:
        """Name of the goal, one of GOALS."""
        return next(name for name in GOALS if getattr(self, name) is not None)

    @property
    def is_timed(self) -> bool:
        """True if the goal is a time, for which latency is measured."""
        return self.goal in ("speedup", "latency")

    def limit(self, whole: float) -> float:
        """Return the largest cost by the goal, where the teacher's is ``whole``.

        Raises:
            SettingsError: the teacher is within it already.
        """
        value: float = getattr(self, self.goal)
        limit = whole / value if self.goal == "speedup" else value
        if limit >= whole:
            raise SettingsError(
                f"{self.goal} {value:g} is no goal: the checkpoint itself has {whole:.4g}"
            )
        return limit

    def check_target(self) -> None:
        """Check that the target's engines run on this machine.

        Raises:
            SettingsError: there is no such target, or they do not.
            BackendError: its backend is not installed.
        """
        if self.target not in TARGETS:
            raise SettingsError(f"no target {self.target!r}; {near_miss(self.target, TARGETS)}")
        backends.get(TARGETS[self.target].backend)
        if self.target not in _RUN_ANYWHERE and "gpu" not in describe_machine():
            raise SettingsError(
                f"latency is measured on the deployed engine, and {self.target} engines do not run "
                "on this machine: search where they do, or for another target"
            )

    def _check_goal(self) -> None:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(
                f"a search has one goal: give one of {', '.join(GOALS)}"
                + (f", not {' and '.join(given)}" if given else "")
            )
        value = getattr(self, given[0])
        low, high = (1.0, _MAX_SPEEDUP) if given[0] == "speedup" else (0.0, float(2**63))
        if not low < value <= high:
            raise SettingsError(f"{given[0]} is above {low:g}, not {shown(value)}")
