"""Search stage: from a checkpoint to a student, whose structure is the best within a limit.

1. The teacher is exported, and states of its own trajectories are recorded (states.py).
2. Latency is measured on the deployed engine, and a model of it is fitted (latency/).
3. The error that each choice makes alone is measured (student_errors.py), and how well these add
   up. Structures of the front by both join the fit of the latency.
4. A knapsack gives the whole Pareto front of sums (knapsack.py); an evolution by true errors
   repairs what does not add up (evolution.py).
5. The best are timed; the student is the one of the least error whose measured latency is within
   the limit. It is compared with others (structure_comparison.py), and a page shows all (page.py).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from latentforge.export.checkpoint import DEMO
from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.measure.hardware import describe_machine
from latentforge.measure.prompts import read_prompts
from latentforge.measure.statistics import spearman
from latentforge.optimize.graph_io import DENOISER
from latentforge.optimize.recipe import read_recipe
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import check_target
from latentforge.runtime.progress import Progress
from latentforge.runtime.text import duration_text
from latentforge.train.search.baselines import list_baselines
from latentforge.train.search.clock import Clock
from latentforge.train.search.knapsack import pareto_front
from latentforge.train.search.latency.measure import (
    LatencyPlan,
    count_costs,
    random_structures,
)
from latentforge.train.search.latency.study import LatencyStudy
from latentforge.train.search.latency.table import LatencyTable
from latentforge.train.search.page import render_search
from latentforge.train.search.problem import (
    Cost,
    Problem,
    latency_cost,
    smallest_cost,
    weight_cost,
)
from latentforge.train.search.request import StructureRequest
from latentforge.train.search.search_record import ModelCheck, SearchRecord
from latentforge.train.search.states import States
from latentforge.train.search.structure_comparison import StructureComparison
from latentforge.train.search.student_errors import (
    ChoiceScores,
    ErrorFile,
    StudentErrors,
    measure_scores,
    run_state,
    single_choices,
)
from latentforge.train.search.student_images import StudentImages
from latentforge.train.search.student_selection import Selection
from latentforge.train.search.teacher import Teacher
from latentforge.train.search.variants import WHOLE, Variants
from latentforge.train.search.work import SearchWork
from latentforge.train.student.inherit import student_module
from latentforge.train.student.writer import STUDENT, write_student
from latentforge.train.teacher_work import work_folder

__all__ = ["search"]

_PARTS = 8  # of the progress, and two more where latency is measured

_PROMPTS = 4
_IMAGES = 16  # that structures are compared on, at most
_MIN_STATES = 4
_TURNS = 5  # pairs of steps that a structure is timed with
_HELD_OUT = 20  # random structures that the latency model is judged by
_MORE_FITTED = 40  # random structures that it is fitted to, at most, beyond the number of costs
_FRONT = (0.7, 0.85, 0.95, 1.0, 1.05, 1.2, 1.5)  # of the limit: structures that join the fit
_REFITS = 2
_CHECKED = 20  # random structures that sums of scores are checked on
_EVOLVED = 120  # errors that an evolution measures, about

_MIN_SPEARMAN = 0.9
"""Rank correlation of sums of scores, below which greedy removal with true errors takes part."""


_BYTES = {"fp32": 4.0, "fp16": 2.0, "int4-weights": 0.5}
"""Bytes of a parameter by precision; all others take one."""


@checked_arguments
def search(checkpoint: str, target: Path, request: StructureRequest) -> SearchRecord:
    """Search a student of a checkpoint, and write it.

    Args:
        checkpoint: a diffusers directory, a hub id, or ``demo``.
        target: the checkpoint to write; it appears complete or not at all.
        request: goal and means.

    Returns:
        The record that the student has as search.json, beside its page search.html.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has no space to search.
        SettingsError: the goal is met already, or nothing reaches it; or a table of latencies in
            the work folder is of another machine.
        BackendError: the target's engines do not run here.
        GateError: the exported teacher differs from torch, or no student is as fast as predicted.
        TargetError: the student or the work folder cannot be written.
    """
    request.check_target()
    check_target(target, overwrite=request.overwrite, kind=STUDENT)
    teacher = Teacher.open(checkpoint)
    with (
        work_folder(target, request.work, "search") as folder,
        Progress(_PARTS + 2 * request.is_timed, quiet=request.quiet) as progress,
    ):
        work = SearchWork(folder, teacher.checkpoint, request)
        return _StudentSearch(teacher, request, work, progress).run(target)


class _StudentSearch:
    """One search; run() does all of it."""

    def __init__(
        self, teacher: Teacher, request: StructureRequest, work: SearchWork, progress: Progress
    ) -> None:
        self._teacher, self._request, self._work = teacher, request, work
        self._progress = progress
        self._clock = Clock(request.budget)
        self._random = np.random.default_rng(request.seed)
        self._images = 0

    def run(self, target: Path) -> SearchRecord:
        """Search, write the student, and return the record."""
        request = self._request
        if request.budget is not None:
            self._progress.expect(request.budget)
        with self._progress.part("export of the teacher"):
            engines = self._work.engines()
        states = self._recorded_states(engines)
        with Variants(
            engines, request.target, request.recipe, self._work.folder, sites=self._teacher.sites
        ) as variants:
            study = self._latency_study(variants) if request.is_timed else None
            variants.close()  # the teacher in torch needs the memory
            errors = self._student_errors(states)
            cost = latency_cost(study.model) if study is not None else self._weight_cost(errors)
            limit = self._limit(cost)  # refuses goals out of reach, before what takes long
            scores = self._scores(errors)
            sums = self._check_sums(errors, scores)
            if study is not None:
                cost = self._refined_cost(study, scores)
                limit = self._limit(cost)
            problem = Problem(sites=self._teacher.sites, cost=cost, limit=limit, score=scores.error)
            selection = Selection(problem, errors, variants, self._progress, self._clock)
            greedy = not sums.spearman >= _MIN_SPEARMAN
            with self._progress.part("choice of the student"):
                baselines = list_baselines(problem, errors, self._random)
                for each in baselines:
                    errors(each.structure)  # they take part in the search
                selection.choose(self._random, timed=request.is_timed, greedy=greedy)
            with self._progress.part("comparison with other structures"):
                comparison = StructureComparison(problem, selection, baselines)
                variants.close()
                self._draw(comparison, engines, errors)
        with self._progress.part("the student"):
            record = self._record(errors.states, study, sums, comparison, variants)
            self._write(target, errors, record, comparison)
        return record

    # measuring

    def _recorded_states(self, engines: Path) -> States:
        """Return states of the teacher: all that there is time for."""
        prompts = self._request.prompts or _default_prompts(self._teacher.checkpoint.name, _PROMPTS)
        with self._progress.part("runs of the teacher"):
            return self._work.states(
                engines,
                prompts,
                self._request.settings,
                self._progress.count_within,
                self._clock.during(0.2),
            )

    def _latency_study(self, variants: Variants) -> LatencyStudy:
        """Measure latencies as many as there is time for, and fit a model to them."""
        table = LatencyTable(self._work.latencies(), variants.setting)
        with self._progress.part("latency of structures"):
            seconds, plan = 0.0, LatencyPlan.of(variants, fitted=_MORE_FITTED, held_out=_HELD_OUT)
            for first in [s for s in plan.structures if s not in table][:2]:
                start = self._clock.elapsed  # of the second, as the first loads the whole engine
                variants.measure([first], repeats=_TURNS, report=table.add)
                seconds = self._clock.elapsed - start
            fitted = self._work.decided(
                "structures", lambda: self._affordable_fits(variants, seconds)
            )
            plan = LatencyPlan.of(variants, fitted=fitted, held_out=_HELD_OUT)
            study = LatencyStudy(variants, table, repeats=_TURNS)
            study.measure(plan, self._progress.inner(study.missing(plan)))
        self._progress.note(f"  latency: {study.model.errors}")
        return study

    def _refined_cost(self, study: LatencyStudy, scores: ChoiceScores) -> Cost:
        """Return the cost by a model that is also fitted to structures of its own front.

        They are where it has to hold, and random structures are unlike them.
        """
        sites = self._teacher.sites
        with self._progress.part("latency of the front"):
            for _ in range(_REFITS):
                cost = latency_cost(study.model)
                front = pareto_front(sites, cost.saved, scores.error)
                targets = [self._request.limit(cost.whole) * ratio for ratio in _FRONT]
                nearest = [
                    min(front, key=lambda p: abs(cost.total(p.structure) - seconds)).structure
                    for seconds in targets
                ]
                plan = study.with_fitted(nearest)
                study.measure(plan, self._progress.inner(study.missing(plan)))
        self._progress.note(f"  latency, with the front: {study.model.errors}")
        return latency_cost(study.model)

    def _affordable_fits(self, variants: Variants, seconds: float) -> int:
        """Return the number of structures to fit to: one for each cost at least."""
        costs = count_costs(variants)
        low, high = _HELD_OUT + costs, _HELD_OUT + costs + _MORE_FITTED
        return self._clock.affordable(0.4, seconds, low, high) - _HELD_OUT

    def _student_errors(self, states: States) -> StudentErrors:
        """Load the teacher in torch, and decide on how many states students are compared."""
        teacher = self._teacher
        planned = len(single_choices(teacher.sites)) + _CHECKED + _EVOLVED

        def decide() -> int:
            run_state(teacher.network, teacher.plan, states.states[0])  # the first is slow
            start = self._clock.elapsed
            run_state(teacher.network, teacher.plan, states.states[0])
            seconds = self._clock.elapsed - start
            return self._clock.affordable(0.5, planned * seconds, _MIN_STATES, len(states.states))

        with self._progress.part("importance of channels and heads"):
            states = states.fewer(self._work.decided("states", decide))
            importance = teacher.importance(states)
        self._progress.note(f"  students are compared with the teacher on {states}")
        file = ErrorFile(self._work.errors(states))
        return StudentErrors(teacher.plan, teacher.network, importance, states, file)

    def _scores(self, errors: StudentErrors) -> ChoiceScores:
        with self._progress.part("errors of choices"):
            return measure_scores(errors, self._teacher.sites, self._progress.count_within)

    def _check_sums(self, errors: StudentErrors, scores: ChoiceScores) -> ModelCheck:
        """Return sums of scores beside true errors, on random structures."""
        structures = random_structures(self._teacher.sites, _CHECKED, self._request.seed + 1)
        points = []
        with self._progress.part("errors of random structures"):
            for structure in structures:
                points.append((scores.total(structure), errors(structure)))
                self._progress.count_within(len(points), len(structures))
        correlation = spearman(*zip(*points, strict=True))
        note = f"rank correlation {correlation:.3f} on {len(points)} random structures"
        if not correlation >= _MIN_SPEARMAN:
            note += f": below {_MIN_SPEARMAN}, so greedy removal with true errors took part"
        self._progress.note(f"  sums of errors: {note}")
        return ModelCheck.of(points, note)

    # goals

    def _limit(self, cost: Cost) -> float:
        """Return the largest cost by the goal, if a structure is predicted to be within it."""
        goal, limit = self._request.goal, self._request.limit(cost.whole)
        smallest = smallest_cost(self._teacher.sites, cost)
        if smallest > limit:
            raise SettingsError(
                f"nothing reaches {goal} {getattr(self._request, goal):g}: the smallest "
                f"structure has {smallest:.4g} of {cost.whole:.4g}, "
                f"{cost.whole / smallest:.2f} times less"
            )
        return limit

    def _weight_cost(self, errors: StudentErrors) -> Cost:
        """Return the cost in parameters, or in bytes of the deployed engine."""
        if self._request.goal == "parameters":
            return weight_cost(errors.parameters)
        precision = read_recipe(self._request.recipe).precision_of(DENOISER)
        return weight_cost(errors.parameters, _BYTES.get(precision, 1.0))

    # results

    def _draw(self, comparison: StructureComparison, engines: Path, errors: StudentErrors) -> None:
        """Draw images of the structures that are compared, as many as there is time for."""
        name, settings = self._teacher.checkpoint.name, self._request.settings
        prompts = self._request.prompts or _default_prompts(name, _IMAGES, seed=1)
        start = self._clock.elapsed
        StudentImages(engines, errors, prompts[:1], settings)(WHOLE)
        seconds = (self._clock.elapsed - start) * len(comparison.compared)
        self._images = self._clock.affordable(0.9, seconds, 0, min(_IMAGES, len(prompts)))
        if self._images:
            comparison.draw(StudentImages(engines, errors, prompts[: self._images], settings))
        else:
            self._progress.note("  no time is left to compare images: give a longer --budget")

    def _record(
        self,
        states: States,
        study: LatencyStudy | None,
        sums: ModelCheck,
        comparison: StructureComparison,
        variants: Variants,
    ) -> SearchRecord:
        request, checkpoint = self._request, self._teacher.checkpoint
        latency = None
        if study is not None:
            latency = ModelCheck.of(study.model.points, str(study.model.errors))
        setting = msgspec.to_builtins(variants.setting)
        libraries = setting.pop("libraries")
        goal = {request.goal: f"{getattr(request, request.goal):g}"}
        budget = {} if request.budget is None else {"budget": duration_text(request.budget)}
        return SearchRecord(
            checkpoint=checkpoint.name,
            sha256=checkpoint.sha256("unet"),
            request={**goal, **budget, "seed": str(request.seed)},
            setting={**setting, **libraries},
            machine=describe_machine(),
            states=str(states),
            points=comparison.points,
            matches=comparison.matches,
            images=self._images,
            latency=latency,
            errors=sums,
            words=comparison.compared[1].structure.words(self._teacher.sites),
            seconds=self._clock.elapsed,
        )

    def _write(
        self,
        target: Path,
        errors: StudentErrors,
        record: SearchRecord,
        comparison: StructureComparison,
    ) -> None:
        """Write the student with its record and page."""
        teacher, chosen = self._teacher, SearchedStructure(choices=record.chosen.choices)
        student = student_module(teacher.network.model, chosen, errors.importance)
        content = msgspec.to_builtins(record)
        write_student(
            teacher.checkpoint,
            student,
            target,
            content,
            render_search(record, comparison.shown),
            overwrite=self._request.overwrite,
        )


def _default_prompts(checkpoint: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """Return typical prompts of a checkpoint, of the demo its own; others for another seed."""
    if checkpoint != DEMO:
        return tuple(read_prompts()[seed * _PROMPTS :][:count])
    from latentforge.export.demo import prompts

    return tuple(prompts(count, seed=seed))
