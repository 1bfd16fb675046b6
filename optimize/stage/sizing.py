"""Sizes of gate, calibration and timing that keep to a budget of time.

A recipe's numbers are wanted. If they take longer than the budget, they are reduced in the order
of _REDUCTIONS, one value after the other, until they fit. Numbers that the request gives are never
reduced, nor is the size of the images. The last values are the floor: they still prove that the
engines make the same image, and are taken even if they exceed the budget.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.durations import ImageCost, RunSize, Workload, durations
from latentforge.optimize.stage.job import OptimizeJob
from latentforge.runtime import sampling
from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.settings import Request, resolve
from latentforge.runtime.text import duration_text

__all__ = ["FLOOR", "Sizing", "fit", "fit_alike", "with_size"]

_REDUCTIONS = (
    ("sensitivity_steps", (2, 1)),
    ("timed_steps", (8, 4, 2)),
    ("images", (2, 1)),
    ("prompts", (2, 1)),
    ("samples", (32, 16, 8)),
    ("repeats", (2, 1)),
    ("steps", (40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4)),
    ("samples", (4, 2)),
    ("sensitivity_steps", (0,)),
)
"""Names of a RunSize and the values to try, in order: first what proves least for its time."""

FLOOR: Mapping[str, int] = {name: values[-1] for name, values in _REDUCTIONS}
"""Smallest values of a RunSize by name."""

_NAMES: Mapping[str, str] = {
    "sensitivity_steps": "steps for each layer's sensitivity",
    "timed_steps": "steps of timed images",
    "images": "images of the gate",
    "prompts": "calibration prompts",
    "samples": "calibration calls",
    "repeats": "timed pairs",
    "steps": "steps of each image",
}


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Sizes that were chosen for a budget, with the prediction of their time.

    Attributes:
        budget: seconds of the whole command.
        reserved: seconds of them that other stages take.
        shares: number of optimizations that share the rest.
        cost: of an image, as it was measured.
        wanted: by the recipes and the request.
        chosen: the sizes.
        parts: predicted seconds by part.
    """

    budget: float
    reserved: float
    shares: int
    cost: ImageCost
    wanted: RunSize
    chosen: RunSize
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Predicted seconds of all parts."""
        return sum(self.parts.values())

    @property
    def reduced(self) -> dict[str, tuple[int, int]]:
        """Wanted and chosen values of those that differ."""
        pairs = {name: (getattr(self.wanted, name), getattr(self.chosen, name)) for name in _NAMES}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def record(self) -> dict[str, Any]:
        """Return the sizing in values that JSON can hold, for the history."""
        return {
            "budget": round(self.budget, 3),
            "reserved": round(self.reserved, 1),
            "reduced": {name: list(pair) for name, pair in self.reduced.items()},
            "predicted": {name: round(seconds, 1) for name, seconds in self.parts.items()},
        }

    def lines(self) -> Iterator[str]:
        """Describe the prediction, what was reduced, and a budget that is exceeded."""
        parts = ", ".join(f"{name} {duration_text(s)}" for name, s in self.parts.items())
        yield f"about {duration_text(self.seconds)}: {parts}"
        if self.reduced:
            changes = ", ".join(f"{_NAMES[n]} {a} -> {b}" for n, (a, b) in self.reduced.items())
            yield f"reduced for the budget of {duration_text(self.budget)}: {changes}"
        if self.reserved + self.shares * self.seconds > self.budget:
            others = f" with the {duration_text(self.reserved)} of other stages" * bool(
                self.reserved
            )
            yield (
                f"that{others} is over the budget of {duration_text(self.budget)}: numbers that "
                "were given are kept, and a smaller gate would prove too little"
            )


def fit(job: OptimizeJob, cost: ImageCost, budget: float) -> OptimizeJob:
    """Return a job that keeps to a budget in seconds, as nearly as its floor allows."""
    wanted, reserved, shares = RunSize.of(job), job.request.reserved, job.request.shares
    sized, parts = job, durations(Workload.of(job), cost)
    for size in _smaller(job, wanted):
        if reserved + shares * sum(parts.values()) <= budget:
            break
        sized = with_size(job, size)
        parts = durations(Workload.of(sized), cost)
    sizing = Sizing(
        budget=budget,
        reserved=reserved,
        shares=shares,
        wanted=wanted,
        chosen=RunSize.of(sized),
        cost=cost,
        parts=parts,
    )
    return replace(sized, sizing=sizing)


def fit_alike(job: OptimizeJob, sizing: Sizing) -> OptimizeJob:
    """Return a job in the sizes that were chosen for another job on the same source."""
    sized = with_size(job, sizing.chosen)
    parts = durations(Workload.of(sized), sizing.cost)
    parts.pop("references")  # they are kept
    return replace(sized, sizing=replace(sizing, parts=parts))


def _smaller(job: OptimizeJob, size: RunSize) -> Iterator[RunSize]:
    """Yield smaller and smaller sizes."""
    fixed = _given(job)
    for name, values in _REDUCTIONS:
        for value in values:
            usable = name != "steps" or _is_plannable(job, value)
            if name not in fixed and value < getattr(size, name) and usable:
                size = replace(size, **{name: value})
                size = replace(size, timed_steps=min(size.timed_steps, size.steps))
                yield size


def _given(job: OptimizeJob) -> set[str]:
    """Return the names of the sizes that the request gives explicitly."""
    request = job.request
    given = {
        "steps": "steps" in request.settings or "timesteps" in request.settings,
        "images": any(gate.startswith("images=") for gate in request.gate),
        "prompts": request.calibration_prompts is not None,
        "repeats": request.repeats is not None,
    }
    given["timed_steps"] = given["steps"]
    return {name for name, is_given in given.items() if is_given}


def _is_plannable(job: OptimizeJob, steps: int) -> bool:
    """Return True if the sampler has a plan of so many steps: some have a minimum."""
    try:
        request = cast("Request", {**job.request.settings, "steps": steps})
        settings = resolve(job.manifest.defaults, "", request)
        sampling.noise_plan(settings.sampler, job.manifest.schedule, steps)
    except LatentforgeError:
        return False
    return True


def with_size(job: OptimizeJob, size: RunSize) -> OptimizeJob:
    """Return a job with these sizes."""
    settings = dict(job.request.settings)
    if size.steps != job.steps:
        settings["steps"] = size.steps
    repeats = size.repeats if job.is_timed else job.request.repeats
    steps_timed = size.timed_steps if job.is_timed else None
    return replace(
        job,
        request=replace(job.request, settings=settings, repeats=repeats),
        recipes={name: _resized(recipe, size) for name, recipe in job.recipes.items()},
        steps_timed=steps_timed,
    )


def _resized(recipe: Recipe, size: RunSize) -> Recipe:
    gate, calibration, sensitivity = recipe.gate, recipe.calibration, recipe.sensitivity
    if recipe.needs_calibration:
        calibration = msgspec.structs.replace(
            calibration,
            prompts=min(calibration.prompts, size.prompts),
            samples=min(calibration.samples, size.samples),
        )
    if sensitivity is not None and recipe.measures_layers:
        steps = min(sensitivity.steps, size.sensitivity_steps)
        sensitivity = msgspec.structs.replace(sensitivity, steps=steps) if steps else None
    return msgspec.structs.replace(
        recipe,
        gate=msgspec.structs.replace(gate, images=min(gate.images, size.images)),
        calibration=calibration,
        sensitivity=sensitivity,
    )
