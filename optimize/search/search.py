"""Search for an acceleration plan: what ``latentforge build --fast`` does.

The search looks for the fastest plan whose images pass a gate: fewer steps at timesteps chosen for
the model, guidance on some of the steps, cached steps between full ones, and self-attention with
fewer keys. Images are compared at equal seeds with those of the unaccelerated engines and the
manifest's own schedule.

Trying many plans on one set of images favours plans that suit these images by chance. So there are
three sets of prompts and seeds. The first selects a plan. The second confirms it; a plan that fails
there is dropped, and the next one is selected. The third is generated once, for the plan that was
confirmed, and gives the figures that the manifest reports: no choice depends on it. Finally the
plan is timed against the unaccelerated engines with interleaved runs, and it is kept only if the
lower confidence bound of its speedup is above 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.conclusion import finding
from latentforge.measure.formatting import level
from latentforge.measure.quality.inputs import MetricInputs, load_metric_inputs
from latentforge.measure.quality.request import EvalRequest
from latentforge.measure.results import ConfidenceInterval
from latentforge.optimize.search.cached_step import STAGE as CACHED_STEP_STAGE
from latentforge.optimize.search.costs import measure_costs
from latentforge.optimize.search.engines import SearchEngines
from latentforge.optimize.search.image_set import ImageSet, single_image_requests
from latentforge.optimize.search.plan_gate import PlanGate
from latentforge.optimize.search.reduced_attention import STAGE as REDUCED_ATTENTION_STAGE
from latentforge.optimize.search.request import SearchRequest
from latentforge.optimize.search.space import (
    UNACCELERATED,
    Costs,
    PlanCandidate,
    Variant,
    fastest_passing,
    list_candidates,
)
from latentforge.optimize.search.step_schedules import StepSchedules
from latentforge.optimize.timing import rounded, speedup_figures, time_engines
from latentforge.runtime import sampling
from latentforge.runtime.files import scratch_folder
from latentforge.runtime.manifest import AccelerationPlan, Manifest, Stage
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["STAGE", "STAGES", "SearchOutcome", "accelerate", "is_faster", "summary_lines"]

STAGE = "search"
"""Name of the stage in the history of a manifest."""

STAGES = (CACHED_STEP_STAGE, REDUCED_ATTENTION_STAGE, STAGE)
"""Stages that a search may add to the history."""

_MIN_GAIN = 1.1  # estimated speedup below which a plan is not worth another image
_MOVES = 2  # timesteps tried per plan that may be judged
_MANIFEST_NAMES = {"perceptual": "distance"}


def accelerate(directory: Path, request: SearchRequest, *, quiet: bool = True) -> Manifest:
    """Search a plan for engines and write it into their manifest, which has none otherwise.

    Args:
        directory: staged engines; components that the plan needs are added.
        request: gate, prompts and effort.
        quiet: show no progress.

    Returns:
        The manifest that was written, with a history entry of the search in any case.

    Raises:
        SettingsError: the gate cannot be measured.
        BackendError: the engines do not run on this machine.
    """
    start = time.perf_counter()
    gate = request.plan_gate
    with (
        scratch_folder(directory, "plans") as work,
        Progress(request.effort + 6, quiet=quiet) as progress,
        SearchEngines(directory, work) as engines,
    ):
        outcome = _PlanSearch(engines, request, gate, progress).run()
        if outcome.plan is not None:
            engines.publish(outcome.variant)
    stage = Stage.ended(STAGE, start, {"gate": str(gate), **outcome.record})
    manifest = Manifest.read(directory, hashes=False)
    manifest = msgspec.structs.replace(
        manifest, acceleration=outcome.plan, history=(*manifest.history, stage)
    )
    manifest.write(directory)
    return manifest


def is_faster(speedup: ConfidenceInterval) -> bool:
    """Return True if the lower confidence bound of a speedup exists and is above 1."""
    return finding(speedup) == "faster"


def summary_lines(manifest: Manifest) -> Iterator[str]:
    """Yield the outcome of the last search as lines of text."""
    stage = next(stage for stage in reversed(manifest.history) if stage.name == STAGE)
    options, plan = stage.options, manifest.acceleration
    count, gate = len(options["plans"]), options["gate"]
    if plan is None:
        yield f"no plan, and the engines stay unaccelerated: {_reason(options)}"
        return
    figures = plan.measured
    yield f"plan: {options['plan']} ({plan.sampler}); {count} plans were judged by {gate}"
    yield (
        f"images {figures['speedup']:.2f}x faster than unaccelerated "
        f"({figures['speedup_low']:.2f} to {figures['speedup_high']:.2f}, "
        f"{level(figures['speedup_level'])} interval), class B"
    )
    shown = (f"{k} {v:.4g}" for k, v in figures.items() if not k.startswith("speedup"))
    yield f"on prompts and seeds that no choice depended on: {', '.join(shown)}"
    for failure in options["report"]["failures"]:
        yield (
            f"WARNING: on these images the plan misses its gate ({failure}): judge more images, "
            "such as --gate images=16"
        )


def _reason(options: Mapping[str, Any]) -> str:
    """Return why a search found no plan."""
    count, gate = len(options["plans"]), options["gate"]
    if speedup := options.get("speedup"):
        interval = ConfidenceInterval(**speedup)
        low = "unknown" if interval.low is None else f"{interval.low:.2f}"
        return (
            f"{options['candidate']} passes {gate}, but its speedup of {interval.value:.2f} is not "
            f"certain to be above 1 (lower bound {low}): time more pairs with --repeats"
        )
    if options["confirmation"]:
        return f"none of the {count} plans that were judged passes {gate} on both sets of images"
    return f"none of the {count} plans that were judged passes {gate}"


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """Outcome of a search.

    Attributes:
        plan: with its figures; None if no plan is good enough and faster.
        variant: engines that the plan needs.
        record: everything that was tried, for the manifest's history.
    """

    plan: AccelerationPlan | None
    variant: Variant
    record: Mapping[str, Any]


class _PlanSearch:
    """Search over the plans of one engine directory; run() does all of it."""

    def __init__(
        self, engines: SearchEngines, request: SearchRequest, gate: PlanGate, progress: Progress
    ) -> None:
        self._engines, self._request, self._gate = engines, request, gate
        self._progress = progress
        images = gate.images.images
        requests = single_image_requests(engines.manifest.defaults, request.prompts, 3 * images)
        metrics = _metrics(request, requests[0])
        self._selection, self._confirmation, self._report = (
            ImageSet(requests[start : start + images], metrics)
            for start in range(0, 3 * images, images)
        )
        moves = _MOVES * request.effort
        self._schedules = StepSchedules(
            partial(engines.pipeline, UNACCELERATED), self._selection.requests, moves=moves
        )
        self._selected: dict[PlanCandidate, dict[str, Any]] = {}
        self._confirmed: dict[PlanCandidate, dict[str, Any]] = {}

    def run(self) -> SearchOutcome:
        """Generate the reference, estimate the time of all plans, and find the fastest good one."""
        self._generate("reference images", self._selection)
        with self._progress.part("seconds of a step"):
            results = self._selection.reference
            costs, variants = measure_costs(self._engines, results, self._progress.note)
        best = self._find(self._worthwhile(costs, variants), costs)
        if best is None:
            return self._outcome(None, UNACCELERATED, {})
        report = self._judge("report", best, self._report)
        speedup = self._time(best)
        details = {
            "candidate": str(best),
            "report": report,
            "speedup": msgspec.to_builtins(speedup),
        }
        if not is_faster(speedup):
            return self._outcome(None, UNACCELERATED, details)
        plan = msgspec.structs.replace(self._plan(best), measured=self._figures(report, speedup))
        return self._outcome(plan, best.variant, {**details, "plan": str(best)})

    def _worthwhile(self, costs: Costs, variants: Sequence[Variant]) -> list[PlanCandidate]:
        """Return the plans that are estimated to save enough time."""
        unaccelerated = median(r.timings.total for r in self._selection.reference)
        request = self._selection.requests[0]
        return [
            candidate
            for candidate in list_candidates(request.steps, variants, guided=request.uses_guidance)
            if costs.seconds(candidate) * _MIN_GAIN < unaccelerated
        ]

    def _find(self, candidates: Sequence[PlanCandidate], costs: Costs) -> PlanCandidate | None:
        """Return the fastest plan that is selected by the first set and confirmed by the second."""
        effort = self._request.effort
        while best := fastest_passing(candidates, costs.seconds, self._select, tries=effort):
            self._confirmed[best] = self._judge("confirm", best, self._confirmation)
            if not self._confirmed[best]["failures"]:
                return best
            candidates = [other for other in candidates if not other.saves_as_much(best)]
        return None

    def _select(self, candidate: PlanCandidate) -> bool:
        """Return True if a plan passes the gate on the first set."""
        if candidate not in self._selected:
            self._selected[candidate] = self._judge("", candidate, self._selection)
            failures = self._selected[candidate]["failures"]
            self._progress.note(f"  {candidate}: {failures[0] if failures else 'passes'}")
        return not self._selected[candidate]["failures"]

    def _judge(self, purpose: str, candidate: PlanCandidate, images: ImageSet) -> dict[str, Any]:
        """Return the figures of a plan on a set of images, and the thresholds that they miss."""
        if purpose:
            self._generate(f"{purpose}: reference images", images)
        with self._progress.part(f"{purpose}: {candidate}" if purpose else str(candidate)):
            plan, pipeline = self._plan(candidate), self._engines.pipeline(candidate.variant)
            figures = images.figures(pipeline, plan, self._progress.count_within)
        return {**rounded(figures), "failures": list(self._gate.failures(figures))}

    def _plan(self, candidate: PlanCandidate) -> AccelerationPlan:
        """Return a candidate as a plan, with the sampler and timesteps found for its steps."""
        sampler, timesteps = self._schedules.find(candidate.steps)
        schedule = self._engines.manifest.schedule
        noise_plan = sampling.noise_plan(sampler, schedule, candidate.steps, timesteps)
        levels = [interval.start for interval in noise_plan.intervals]
        return candidate.plan(sampler, timesteps, levels)

    def _time(self, candidate: PlanCandidate) -> ConfidenceInterval:
        """Return the paired speedup of a plan over the unaccelerated engines."""
        plan, folder = self._plan(candidate), self._engines.folder(candidate.variant)
        with self._progress.part(f"interleaved timing: {candidate}"):
            self._engines.close()
            return _speedup(
                self._engines.directory, folder, plan, self._confirmation.requests[0], self._request
            )

    def _figures(self, report: Mapping[str, Any], speedup: ConfidenceInterval) -> dict[str, float]:
        """Return the figures that a manifest reports for its plan."""
        figures = {
            _MANIFEST_NAMES.get(name, name): value
            for name, value in report.items()
            if name != "failures"
        }
        images = self._gate.images.images
        return {**rounded(speedup_figures(speedup)), **figures, "images": images}

    def _outcome(
        self, plan: AccelerationPlan | None, variant: Variant, details: Mapping[str, Any]
    ) -> SearchOutcome:
        record = {
            "plan": "",
            "plans": _rows(self._selected),
            "confirmation": _rows(self._confirmed),
            "timesteps": self._schedules.record(),
            **details,
        }
        return SearchOutcome(plan=plan, variant=variant, record=record)

    def _generate(self, activity: str, images: ImageSet) -> None:
        if images.reference:
            return
        with self._progress.part(activity):
            images.generate_reference(
                self._engines.pipeline(UNACCELERATED), self._progress.count_within
            )


def _metrics(request: SearchRequest, settings: Settings) -> MetricInputs:
    size = (settings.height, settings.width)
    return load_metric_inputs(EvalRequest(network=request.network), size, request.accuracies)


def _rows(judged: Mapping[PlanCandidate, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"plan": str(candidate), **figures} for candidate, figures in judged.items()]


def _speedup(
    engines: Path, folder: Path, plan: AccelerationPlan, settings: Settings, request: SearchRequest
) -> ConfidenceInterval:
    """Time a plan, whose engines lie in ``folder``, against the unaccelerated engines."""
    manifest = Manifest.read(folder, hashes=False)
    msgspec.structs.replace(manifest, acceleration=plan).write(folder)
    results = time_engines(
        [
            Participant.of(engines, "unaccelerated", unaccelerated=True),
            Participant.of(folder, "plan"),
        ],
        [manifest.size] * 2,
        settings,
        repeats=request.repeats,
    )
    return results["plan"].ratio["total"]
