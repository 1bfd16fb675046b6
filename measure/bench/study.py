"""Everything that ``latentforge bench`` measures, as one Results."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from latentforge.measure.bench import REPEATS
from latentforge.measure.bench.interleaved import Array, Measured, measure
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.formatting import level
from latentforge.measure.hardware import describe_machine
from latentforge.measure.results import (
    BenchResult,
    LayerTiming,
    Picture,
    Point,
    ProfileTable,
    Results,
)
from latentforge.measure.statistics import interval_level
from latentforge.runtime.backends import LayerTime
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Latent
from latentforge.runtime.progress import Progress
from latentforge.runtime.rng import NoiseSource
from latentforge.runtime.settings import Settings

__all__ = ["Study", "method", "noise", "run"]

_MAX_LAYERS = 500
_MAX_POINT_REPEATS = 3  # a curve shows its own noise


@dataclass(frozen=True, kw_only=True)
class Study:
    """Plan of a benchmark.

    Attributes:
        participants: the first is the reference.
        latent: the model's latent space, for the initial noise.
        repeats: timed runs per participant; points of curves have at most three.
        batches: further points, by images per prompt.
        sizes: further points, by image side in pixels.
        layers: profile the layers of the engine directories.
        together: keep all participants loaded, see interleaved.measure().
        folder: for the files that participants convert.
    """

    participants: Sequence[Participant]
    settings: Settings
    latent: Latent
    threads: int
    repeats: int = REPEATS
    batches: Sequence[int] = ()
    sizes: Sequence[int] = ()
    layers: bool = False
    together: bool = True
    folder: Path | None = None
    title: str = "latentforge bench"
    command: str = ""


def run(study: Study, *, quiet: bool = True) -> Results:
    """Measure the request, then the points of its curves, then the layers."""
    points = _point_settings(study)  # first: an impossible size must fail before the work
    measured = _measure(study, study.settings, study.repeats, quiet)
    completed = [entry for entry in measured.entries if entry.status == "ok"]
    return Results(
        title=study.title,
        command=study.command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=describe_machine(),
        settings=asdict(study.settings),
        threads=study.threads,
        method=method(study.threads, study.repeats, together=study.together),
        entries=measured.entries,
        scaling=tuple(_scaling(study, points, completed, quiet)) if points else (),
        profiles=tuple(_profiles(study, completed, quiet)) if study.layers else (),
        pictures=tuple(_pictures(study.settings, measured)),
    )


def noise(settings: Settings, latent: Latent) -> Array:
    """Return what torch draws from the seed: (n, channels, h, w), of unit variance."""
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    return NoiseSource(settings.seeds).randn((settings.count, latent.channels, height, width))


def method(threads: int, repeats: int, *, together: bool) -> str:
    """Return how a benchmark of ``repeats`` runs measures, in sentences for its readers."""
    if together:
        start = "All models stay loaded, and one untimed run precedes the timed ones"
    else:
        start = "Its process is restarted before each timed run, with one untimed run in between"
    if repeats == 1:
        intervals = "A single run has no confidence interval"
    else:
        intervals = (
            "Confidence intervals of medians come from order statistics; their level with "
            f"{repeats} runs is {level(interval_level(repeats))}"
        )
    return (
        f"Each participant has its own process with {threads} threads, and its timed runs "
        f"({repeats}) are interleaved with those of the others. {start}. Times are medians; "
        f"speedups are medians of the ratios of neighbouring runs. {intervals}. Peak memory "
        "includes mapped files."
    )


def _measure(study: Study, settings: Settings, repeats: int, quiet: bool) -> Measured:
    return measure(
        study.participants,
        settings,
        threads=study.threads,
        repeats=repeats,
        together=study.together,
        noise=noise(settings, study.latent),
        folder=study.folder,
        quiet=quiet,
    )


def _point_settings(study: Study) -> list[Settings]:
    batches = [replace(study.settings, images_per_prompt=batch) for batch in study.batches]
    return batches + [replace(study.settings, height=s, width=s) for s in study.sizes]


def _scaling(
    study: Study, points: Sequence[Settings], completed: Sequence[BenchResult], quiet: bool
) -> Iterator[Point]:
    """Yield the points of the curves; that of the request itself has been measured already."""
    names = {entry.name for entry in completed}
    able = replace(study, participants=[p for p in study.participants if p.name in names])
    yield from (_point(study.settings, entry) for entry in completed)
    for settings in points:
        if settings != study.settings:
            repeats = min(study.repeats, _MAX_POINT_REPEATS)
            measured = _measure(able, settings, repeats, quiet)
            yield from (_point(settings, entry) for entry in measured.entries)


def _point(settings: Settings, entry: BenchResult) -> Point:
    return Point(
        name=entry.name,
        batch=settings.count,
        height=settings.height,
        width=settings.width,
        total=entry.median.get("total"),
        denoiser_step=entry.median.get("denoiser step"),
        peak_memory=entry.peak_memory,
        message=entry.message,
    )


def _profiles(
    study: Study, completed: Sequence[BenchResult], quiet: bool
) -> Iterator[ProfileTable]:
    names = {entry.name for entry in completed}
    able = [p for p in study.participants if p.is_engines and p.name in names]
    with Progress(len(able), quiet=quiet) as progress:
        for participant in able:
            with progress.part(f"{participant.name}: layers"):
                yield _profile(participant, study)


def _profile(participant: Participant, study: Study) -> ProfileTable:
    engines, threads = Path(participant.model), study.threads
    with load(
        engines, hashes=False, threads=threads, profile=True, example_images=True
    ) as pipeline:
        pipeline.run(study.settings)
        profile = pipeline.layers()
    return ProfileTable(
        name=participant.name,
        layers=tuple(map(_layer, profile.top(_MAX_LAYERS).layers)),
        total=profile.total,
    )


def _layer(layer: LayerTime) -> LayerTiming:
    component, _, name = layer.name.partition("/")
    return LayerTiming(
        component=component, layer=name, operator=layer.operator, seconds=layer.seconds
    )


def _pictures(settings: Settings, measured: Measured) -> Iterator[Picture]:
    """Yield the first image of every participant, compared with the reference's."""
    first = {name: pictures[0] for name, pictures in measured.pictures.items()}
    if measured.entries[0].name in first:
        yield Picture.of(settings.prompts[0], settings.seeds[0], first)
