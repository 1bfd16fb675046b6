"""Engines with a plan of cheaper evaluations: what ``latentforge build --fast`` does.

The fastest plan is searched that is good enough by a gate: fewer steps at timesteps made for the
model, guidance on a part of them, shallow steps between full ones, attention with fewer keys. What
is compared are pictures of equal seeds, against those of the exact engines with the manifest's own
schedule. A plan that was chosen on some prompts and seeds has to pass on others too, and is then
timed beside the exact engines.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality.inputs import MetricInputs, load_metric_inputs
from latentforge.measure.quality.metrics import compare_pairs, decibels
from latentforge.measure.quality.request import EvalRequest
from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.search.cached_step import STAGE as SPLIT
from latentforge.optimize.search.cached_step import add_cached_step
from latentforge.optimize.search.reduced_attention import LEAST, add_reduced
from latentforge.optimize.search.reduced_attention import STAGE as REDUCE
from latentforge.optimize.search.space import (
    UNACCELERATED,
    Costs,
    PlanCandidate,
    Variant,
    candidates,
    fastest,
)
from latentforge.optimize.search.timesteps import Found, Timesteps, search
from latentforge.runtime import sampling
from latentforge.runtime.errors import BackendError, ManifestError, SettingsError
from latentforge.runtime.history import stage_record
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.machine import available_cores, described, fit_together
from latentforge.runtime.manifest import AccelerationPlan, Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings, resolve

__all__ = ["POINTS", "STAGE", "STAGES", "USUAL", "SearchRequest", "PlanGate", "accelerate", "check"]
__all__ += ["summary_lines"]

STAGE = "search"
"""Its name in a manifest's history."""

STAGES = (SPLIT, REDUCE, STAGE)
"""Those that a search may leave there."""

POINTS = ("colour", "retrieval")
"""Shares of the demo's pictures that a gate may hold to those of the exact engines."""

USUAL = "psnr=20"
"""What a plan has to reach where nobody says: what 8-bit engines have to."""

_IMAGES_OF_SHARES = 128  # of fewer, one picture is worth a point
_SEARCHED = 4  # pictures that timesteps are made for
_MANY = 50  # steps that few are to come near, at least
_MOVES = 2  # timesteps tried for each plan that may be judged
_LEAST_GAIN = 1.1  # below which a plan is not worth another picture
_LEVELS = (0, 1)  # where a UNet is cut: deeper ones save too little
_COST_STEPS, _COST_RUNS = 4, 3
_SURE = "dpmpp_2m"  # of many steps: of second order, and every schedule has it
_DEMO = "demo"
_LITE0 = "efficientnet-lite0"
_HERE = ("cpu", "openvino", "auto")  # targets that run anywhere
_SHOWN = {"perceptual": "distance"}

Array = NDArray[np.float32]
Note = Callable[[int, int], None]
"""Told how many of how many are done."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What is asked of the search.

    Attributes:
        gate: thresholds as NAME=VALUE, see FastGate; USUAL if none is given.
        prompts: a text file, one a line; the demo's own or those of the package if None.
        retrieval: the demo's training pictures, see measure.quality.request.EvalRequest.
        network: what tells how far pictures are apart, see measure.quality.request.EvalRequest.
        effort: plans that are judged at most.
        repeats: pairs of images that are timed.
    """

    gate: Sequence[str] = ()
    prompts: Path | None = None
    retrieval: Path | None = None
    network: str | None = None
    effort: int = 24
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("effort", "repeats"):
            if not 1 <= getattr(self, name) <= 1000:
                raise SettingsError(f"{name} of a search is a number from 1 to 1000: give one")

    def __str__(self) -> str:
        gate = PlanGate.of(self.gate, self.network)
        return (
            f"judge up to {self.effort} plans by {gate.pictures.images} images each, and take the "
            f"fastest with {gate}"
        )


@dataclass(frozen=True, kw_only=True)
class PlanGate:
    """What a plan has to reach.

    Attributes:
        pictures: against those of the exact engines.
        points: how many of a hundred pictures a share may lose, by name.
    """

    pictures: Gate
    points: Mapping[str, float]

    @classmethod
    def of(cls, settings: Sequence[str], network: str | None = None) -> PlanGate:
        """The gate of some NAME=VALUE: those of Gate, and names of POINTS.

        Raises:
            SettingsError: no such name, or no number.
        """
        own = [text for text in settings if text.partition("=")[0] in POINTS]
        points = {name: _number(name, value) for name, _, value in (t.partition("=") for t in own)}
        images = _IMAGES_OF_SHARES if points else Gate().images
        try:
            gate = Gate(images=images, network=network).with_overrides(
                text for text in settings if text not in own
            )
        except SettingsError as error:
            raise SettingsError(f"{error}; of the demo also {' and '.join(POINTS)}") from error
        if gate.max_relative_error is not None:
            raise SettingsError("max_relative_error is of engines: judge a plan by its pictures")
        if not gate.thresholds and not points:
            gate = gate.with_overrides([USUAL])
        return cls(pictures=gate, points=points)

    def failures(self, figures: Mapping[str, float]) -> Iterator[str]:
        """What is not reached, each in a few words."""
        yield from self.pictures.failures({"image": figures})
        for name, allowed in self.points.items():
            lost = 100 * (figures[f"{name}_exact"] - figures[name])
            if not lost <= allowed + 1e-9:
                yield f"image: {name} loses {lost:.3g} points and may lose {allowed:g}"

    def __str__(self) -> str:
        thresholds = [f"{name} {value:g}" for name, value in self.pictures.thresholds.items()]
        points = [f"{name} within {value:g} points" for name, value in self.points.items()]
        return ", ".join([*thresholds, *points])


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise SettingsError(f"gate: {name} is how many points of 0 to 100 may be lost, not {value}")
    return number


def check(fast: SearchRequest, checkpoint: str, target: str) -> None:
    """Refuse what could not be judged, before engines are made of a checkpoint for a target.

    Raises:
        SettingsError: the gate sees by something that is missing, or nothing can run here.
    """
    gate = PlanGate.of(fast.gate, fast.network)
    read_prompts(fast.prompts)
    if gate.points and checkpoint != _DEMO:
        name = next(iter(gate.points))
        raise SettingsError(f"gate {name} is of the demo's pictures: take psnr, ssim or perceptual")
    if "retrieval" in gate.points and not _is_package(fast.retrieval):
        raise SettingsError(
            "gate retrieval needs --retrieval: the folder package of the unpacked npm package "
            "emoji-datasource-google 16.0.0"
        )
    if fast.network not in (None, _LITE0) and not Path(str(fast.network)).is_file():
        raise SettingsError(f"no network {fast.network}: name an ONNX file, or {_LITE0}")
    if target not in _HERE and "gpu" not in described():
        raise SettingsError(
            f"a plan is chosen by measuring, and {target} engines do not run on this machine: "
            "build them where they do, or without --fast"
        )


def _is_package(folder: Path | None) -> bool:
    return folder is not None and (folder / "emoji.json").is_file()


def accelerate(directory: Path, fast: SearchRequest, *, quiet: bool = True) -> Manifest:
    """Search a plan for engines, and write it into their manifest; they stay exact without one.

    Args:
        directory: engines that are staged; components that the plan takes are added.
        fast: what is asked.
        quiet: show no progress.

    Raises:
        SettingsError: the gate asks for what cannot be judged here.
        BackendError: the engines do not run on this machine.
    """
    start = time.perf_counter()
    gate = PlanGate.of(fast.gate, fast.network)
    work = directory / "plans"
    work.mkdir()
    try:
        with (
            Progress(fast.effort + 4, quiet=quiet) as progress,
            _Engines(directory, work) as engines,
        ):
            seeker = _Search(engines, fast, gate, progress)
            seeker.run()
            folder, plan = seeker.folder, seeker.chosen
            if plan is not None and folder != directory:
                _move(folder, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    stage = stage_record(STAGE, start, {"gate": str(gate), **seeker.record()})
    manifest = Manifest.read(directory, hashes=False)
    manifest = msgspec.structs.replace(
        manifest, acceleration=plan, history=(*manifest.history, stage)
    )
    manifest.write(directory)
    return manifest


def summary_lines(manifest: Manifest) -> Iterator[str]:
    """What came of the search, line by line."""
    stage = next(stage for stage in reversed(manifest.history) if stage.name == STAGE)
    tried, gate = stage.options["plans"], stage.options["gate"]
    plan = manifest.acceleration
    if plan is None:
        yield f"no plan of {len(tried)} that were judged passes {gate}: the engines stay exact"
        return
    figures = plan.measured
    yield f"plan: {stage.options['plan']} ({plan.sampler}); {len(tried)} were judged by {gate}"
    yield (
        f"images {figures['speedup']:.2f}x faster than exact ({figures['speedup_min']:.2f} to "
        f"{figures['speedup_max']:.2f} over pairs), class B"
    )
    shown = (f"{k} {v:.4g}" for k, v in figures.items() if not k.startswith("speedup"))
    yield f"on prompts and seeds that it was not chosen by: {', '.join(shown)}"


def _move(folder: Path, directory: Path) -> None:
    """Put a variant's files in the place of the exact ones, which it has among them."""
    files = [entry.file for entry in Manifest.read(folder, hashes=False).files]
    for file in (*files, "manifest.json"):
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).replace(directory / file)


class _Engines:
    """The engines and their variants, made when they are first asked for, one loaded at a time."""

    def __init__(self, directory: Path, work: Path) -> None:
        self.directory = directory
        self.manifest = Manifest.read(directory, hashes=False)
        self._work = work
        self._folders = {UNACCELERATED: directory}
        self._loaded: tuple[Variant, Pipeline] | None = None

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines that are loaded."""
        if self._loaded is not None:
            self._loaded[1].close()
        self._loaded = None

    @property
    def variants(self) -> list[Variant]:
        """Those that could be made: of graphs, and with less attention where there is much."""
        if self.manifest.components["denoiser"].backend != "onnxruntime":
            return [UNACCELERATED]
        usual, down = self.manifest.defaults, self.manifest.latent.downscale
        much = (usual.height // down) * (usual.width // down) >= LEAST
        return [
            Variant(level=level, reduced=reduced)
            for reduced in ((False, True) if much else (False,))
            for level in (None, *_LEVELS)
        ]

    def folder(self, variant: Variant) -> Path:
        """Where a variant lies.

        Raises:
            SettingsError: the graph cannot be changed so.
        """
        if variant not in self._folders:
            name = str(variant).replace(", ", "-").replace(" ", "-")
            place = self._work / name
            place.mkdir()
            if variant.reduced:  # of a UNet that is cut already: both give the feature then
                add_reduced(self.folder(replace(variant, reduced=False)), place)
            else:
                add_cached_step(self.directory, place, level=variant.level or 0)
            self._folders[variant] = place
        return self._folders[variant]

    def pipeline(self, variant: Variant) -> Pipeline:
        """A variant, loaded."""
        if self._loaded is None or self._loaded[0] != variant:
            self.close()
            self._loaded = (variant, load(self.folder(variant), hashes=False))
        return self._loaded[1]


class _PictureSet:
    """Requests, and what the exact engines draw.

    Attributes:
        drawn: by the exact engines, once draw() was called.
    """

    def __init__(self, requests: Sequence[Settings], judges: MetricInputs) -> None:
        self.requests = requests
        self.drawn: list[Result] = []
        self._judges = judges

    def draw(self, pipeline: Pipeline, note: Note) -> list[Result]:
        """Draw the reference."""
        self.drawn = _drawn(pipeline, self.requests, note)
        return self.drawn

    def figures(self, pipeline: Pipeline, plan: AccelerationPlan, note: Note) -> dict[str, float]:
        """What a plan's pictures are beside the reference's."""
        results = _drawn(pipeline, [r.with_plan(plan) for r in self.requests], note)
        exact, pictures = ([r.images[0] for r in some] for some in (self.drawn, results))
        rows = compare_pairs(exact, pictures, self._judges.distances)
        errors = rows.pop("error")
        figures = {
            "psnr": float(decibels(errors.mean())),
            "psnr_worst": float(decibels(errors).min()),
            "latents_psnr": psnr(
                *(np.stack([r.latents for r in s]) for s in (self.drawn, results))
            ),
            **{name: float(values.mean()) for name, values in rows.items()},
        }
        texts = [request.prompts[0] for request in self.requests]
        for name, share in self._judges.accuracies.items():
            figures[name] = share(pictures, texts) / len(texts)
            figures[f"{name}_exact"] = share(exact, texts) / len(texts)
        return figures


def _drawn(pipeline: Pipeline, requests: Sequence[Settings], note: Note) -> list[Result]:
    results = []
    for request in requests:
        results.append(pipeline.run(request))
        note(len(results), len(requests))
    return results


class _Search:
    """The search, and what it has found.

    Attributes:
        chosen: the plan with its figures, if there is one.
        folder: where its engines lie.
    """

    def __init__(
        self, engines: _Engines, fast: SearchRequest, gate: PlanGate, progress: Progress
    ) -> None:
        self.chosen: AccelerationPlan | None = None
        self.folder = engines.directory
        self._engines, self._fast, self._gate, self._progress = engines, fast, gate, progress
        images = gate.pictures.images
        requests = _requests(engines.manifest, fast, 2 * images)
        judges = _judges(engines.manifest, fast, requests)
        self._chosen_by = _PictureSet(requests[:images], judges)
        self._proven_by = _PictureSet(requests[images:], judges)
        self._name = ""
        self._what = ""
        self._limit: list[Array] = []
        self._found: dict[int, Found] = {}
        self._tried: dict[PlanCandidate, dict[str, Any]] = {}

    def run(self) -> None:
        """Draw the reference, measure what steps cost, and look for the fastest plan."""
        with self._part("exact pictures"):
            drawn = self._chosen_by.draw(self._engines.pipeline(UNACCELERATED), self._within)
        with self._part("what a step takes"):
            costs, variants = self._costs(drawn)
        usual, request = median(r.timings.total for r in drawn), self._chosen_by.requests[0]
        left = [
            each
            for each in candidates(request.steps, variants, guided=request.uses_guidance)
            if costs.seconds(each) * _LEAST_GAIN < usual
        ]
        self._look(left, costs.seconds)

    def record(self) -> dict[str, Any]:
        """What was tried, for the manifest's history."""
        return {
            "plan": self._name,
            "plans": [{"plan": str(each), **how} for each, how in self._tried.items()],
            "timesteps": [
                {"steps": steps, **asdict(found), "timesteps": list(found.timesteps)}
                for steps, found in sorted(self._found.items())
            ],
        }

    def _look(
        self, left: Sequence[PlanCandidate], seconds: Callable[[PlanCandidate], float]
    ) -> None:
        """Until one that was chosen is good enough on other prompts, too."""
        while best := fastest(left, seconds, self._passes, tries=self._fast.effort):
            figures = self._proof(best)
            if not list(self._gate.failures(figures)):
                return self._settle(best, figures)
            left = [each for each in left if not each.spares(best)]

    def _passes(self, candidate: PlanCandidate) -> bool:
        if candidate not in self._tried:
            with self._part(str(candidate)):
                figures = self._chosen_by.figures(*self._planned(candidate), self._within)
            failures = list(self._gate.failures(figures))
            self._tried[candidate] = {**_rounded(figures), "failures": failures}
            self._progress.note(f"  {candidate}: {failures[0] if failures else 'good enough'}")
        return not self._tried[candidate]["failures"]

    def _proof(self, best: PlanCandidate) -> dict[str, float]:
        """How it does on prompts and seeds that it was not chosen by."""
        with self._part(f"proof: {best}"):
            if not self._proven_by.drawn:
                self._proven_by.draw(self._engines.pipeline(UNACCELERATED), self._within)
            return self._proven_by.figures(*self._planned(best), self._within)

    def _settle(self, best: PlanCandidate, figures: Mapping[str, float]) -> None:
        """Time the plan beside the exact engines, and keep it if it is faster."""
        _, plan = self._planned(best)
        folder = self._engines.folder(best.variant)
        with self._part(f"timing, in turns: {best}"):
            self._engines.close()
            timed = _timed(self._engines.directory, folder, plan, self._settings, self._fast)
        if timed["speedup"] > 1:
            shown = {_SHOWN.get(name, name): value for name, value in figures.items()}
            measured = _rounded({**timed, **shown, "images": self._gate.pictures.images})
            self.chosen = msgspec.structs.replace(plan, measured=measured)
            self.folder, self._name = folder, str(best)

    @property
    def _settings(self) -> Settings:
        return self._proven_by.requests[0]

    # what plans are made of

    def _planned(self, candidate: PlanCandidate) -> tuple[Pipeline, AccelerationPlan]:
        """A candidate as a plan, with timesteps made for the model, and what follows it."""
        sampler, timesteps = self._timesteps(candidate.steps)
        schedule = self._engines.manifest.schedule
        plan = sampling.noise_plan(sampler, schedule, candidate.steps, timesteps)
        levels = [interval.start for interval in plan.intervals]
        made = candidate.plan(sampler, timesteps, levels)
        return self._engines.pipeline(candidate.variant), made

    def _timesteps(self, steps: int) -> tuple[str, Timesteps]:
        """Those nearest to many steps; of as many steps as the reference's, its own."""
        usual = self._chosen_by.requests[0]
        if steps == usual.steps:
            return usual.sampler, ()
        if steps not in self._found:
            moves = _MOVES * self._fast.effort
            schedule = self._engines.manifest.schedule
            self._found[steps] = search(schedule, steps, self._distance, moves=moves)
        return self._found[steps].sampler, self._found[steps].timesteps

    def _distance(self, sampler: str, timesteps: Timesteps) -> float:
        """Of final latents from those of many steps, squared and on average."""
        pipeline = self._engines.pipeline(UNACCELERATED)
        some = self._chosen_by.requests[:_SEARCHED]
        if not self._limit:
            many = max(_MANY, 2 * some[0].steps)
            self._limit = [_latents(pipeline, r, sampler=_SURE, steps=many) for r in some]
        ours = [_latents(pipeline, r, sampler=sampler, timesteps=timesteps) for r in some]
        return float(np.square(np.stack(ours) - np.stack(self._limit)).mean())

    def _costs(self, drawn: Sequence[Result]) -> tuple[Costs, list[Variant]]:
        """What steps of each variant take, of those variants that can be made."""
        request = self._chosen_by.requests[0]
        calls: dict[tuple[Variant, bool, bool], float] = {}
        made = []
        for variant in self._engines.variants:
            try:
                pipeline = self._engines.pipeline(variant)
            except (ManifestError, SettingsError) as error:
                self._progress.note(f"  without {variant}: {error}")
                continue
            calls |= _calls(pipeline, variant, request)
            made.append(variant)
        fixed = median(r.timings.total - sum(r.timings.stages["denoiser"]) for r in drawn)
        return Costs(fixed=fixed, calls=calls), made

    # what people see

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        self._what = what
        with self._progress.part(what):
            yield

    def _within(self, done: int, total: int) -> None:
        self._progress.within(self._what, done, total)


def _calls(
    pipeline: Pipeline, variant: Variant, request: Settings
) -> dict[tuple[Variant, bool, bool], float]:
    """Seconds of a step by whether it is guided and shallow: the least, as others only add."""
    steps = replace(
        request,
        sampler="euler",
        steps=_COST_STEPS,
        cached_steps=() if variant.level is None else tuple(range(1, _COST_STEPS)),
        variant="denoiser_reduced" if variant.reduced else "denoiser",
    )
    found = {}
    for guided in (True, False) if request.uses_guidance else (True,):
        settings = replace(steps, guidance_interval=None if guided else (0.0, 0.0))
        runs = [pipeline.run(settings).timings.stages for _ in range(_COST_RUNS)]
        for stage, shallow in (("denoiser", False), ("denoiser_cached", True)):
            if stage in runs[0]:
                found[variant, guided, shallow] = min(min(run[stage]) for run in runs)
    return found


def _latents(pipeline: Pipeline, request: Settings, **changes: Any) -> Array:
    """The final ones of a request with another schedule, not decoded."""
    *_, last = pipeline.stream(request.prompts[0], seed=request.seed, **changes)
    return last.latents


def _requests(manifest: Manifest, fast: SearchRequest, count: int) -> list[Settings]:
    """As many of one image each, every one of a seed of its own."""
    if fast.prompts is None and manifest.source.checkpoint == _DEMO:
        from latentforge.export.demo import prompts

        texts = prompts(count, 0)
    else:
        texts = read_prompts(fast.prompts)
    return [
        resolve(manifest.defaults, text, {"seed": seed, "unaccelerated": True})
        for seed, text in enumerate(islice(cycle(texts), count))
    ]


def _judges(manifest: Manifest, fast: SearchRequest, requests: Sequence[Settings]) -> MetricInputs:
    from latentforge.accuracies import demo_accuracies

    texts = [request.prompts[0] for request in requests]
    return load_metric_inputs(
        EvalRequest(network=fast.network, retrieval=fast.retrieval),
        (requests[0].height, requests[0].width),
        demo_accuracies(manifest.source.checkpoint, texts, fast.retrieval),
    )


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def _timed(
    exact: Path, folder: Path, plan: AccelerationPlan, settings: Settings, fast: SearchRequest
) -> dict[str, float]:
    """How many times faster a plan is than the exact engines, in turns with them."""
    manifest = Manifest.read(folder, hashes=False)
    msgspec.structs.replace(manifest, acceleration=plan).write(folder)
    together = fit_together([manifest.size] * 2)
    if together is None:
        raise BackendError("too little memory is free to time these engines: close other programs")
    measured = measure(
        [Participant.of(exact, "exact", unaccelerated=True), Participant.of(folder, "plan")],
        settings,
        threads=available_cores(),
        repeats=fast.repeats,
        together=together,
    )
    usual, ours = require_all_ok(measured).entries
    pairs = zip(usual.runs, ours.runs, strict=True)
    ratios = [a.seconds["total"] / b.seconds["total"] for a, b in pairs]
    return {
        "speedup": ours.ratio["total"].value,
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
    }
