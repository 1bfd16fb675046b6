"""Request for the search of an acceleration plan, and the checks before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentforge.measure.hardware import describe_machine
from latentforge.measure.quality.inputs import Accuracy
from latentforge.optimize.search.plan_gate import PlanGate
from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.settings import check_incomplete
from latentforge.runtime.validation import checked_path, shown

__all__ = ["MIN_REPEATS", "SearchRequest", "check_search"]

MIN_REPEATS = 6
"""Fewest timed pairs: six bound the median speedup at a level of 96.9 %, four only of 87.5 %."""

_MAX_COUNT = 1000
_LITE0 = "efficientnet-lite0"
_RUN_ANYWHERE = ("cpu", "openvino", "auto")  # targets


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Request for the search of an acceleration plan.

    Attributes:
        gate: thresholds as NAME=VALUE: fields of Gate, and names of ``accuracies`` with the
            percentage points that they may lose; DEFAULT_GATE if empty.
        prompts: of the images that select, confirm and report the plan, in this order and
            repeated as needed; those that come with the package if empty.
        accuracies: functions that count the correct images of a gallery, by the name that a gate
            and the manifest use.
        network: perceptual distance of two images: an ONNX file of feature maps, or
            efficientnet-lite0.
        effort: number of plans whose images are judged, at most.
        repeats: pairs of images that are timed, MIN_REPEATS or more.
    """

    gate: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    network: str | None = None
    effort: int = 24
    repeats: int = MIN_REPEATS

    def __post_init__(self) -> None:
        check_fields(self)
        check_incomplete({}, self.prompts)
        for name, lowest in (("effort", 1), ("repeats", MIN_REPEATS)):
            value = getattr(self, name)
            if not lowest <= value <= _MAX_COUNT:
                raise SettingsError(
                    f"{name} of a search is a number from {lowest} to {_MAX_COUNT}, not "
                    f"{shown(value)}"
                )

    @property
    def plan_gate(self) -> PlanGate:
        """Parsed gate.

        Raises:
            SettingsError: see PlanGate.parse().
        """
        return PlanGate.parse(self.gate, network=self.network, accuracies=self.accuracies)

    def __str__(self) -> str:
        gate = self.plan_gate
        return (
            f"judge up to {self.effort} plans by {gate.images.images} images each, and take the "
            f"fastest with {gate}"
        )


def check_search(request: SearchRequest, target: str) -> None:
    """Check a request before engines are built for a target.

    Raises:
        SettingsError: the gate is invalid or needs a missing file, or the engines cannot run on
            this machine.
    """
    _ = request.plan_gate
    network = request.network
    if network not in (None, _LITE0) and not checked_path("network", network).is_file():
        raise SettingsError(f"no network {request.network}: give an ONNX file, or {_LITE0}")
    if target not in _RUN_ANYWHERE and "gpu" not in describe_machine():
        raise SettingsError(
            f"a plan is chosen by measuring, and {target} engines do not run on this machine: "
            "build them where they do, or without --fast"
        )
