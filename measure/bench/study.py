"""All that ``latentforge bench`` measures, as one Results."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from latentforge.measure.bench.interleaved import Array, Measured, measure
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import (
    BenchResult,
    LayerTiming,
    Picture,
    Point,
    ProfileTable,
    Results,
)
from latentforge.runtime.backends import LayerTime
from latentforge.runtime.loader import load
from latentforge.runtime.machine import described
from latentforge.runtime.manifest import Latent
from latentforge.runtime.progress import Progress
from latentforge.runtime.rng import Generator
from latentforge.runtime.settings import Settings

__all__ = ["Study", "noise", "run"]

_MOST_LAYERS = 500
_POINT_REPEATS = 3  # at most: a curve shows its own noise


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be measured.

    Attributes:
        participants: the first is the reference.
        latent: of the model, for the noise that participants start from.
        batches, sizes: images at once, and sides in pixels, of the points beside the request's own.
        layers: whether to tell what each layer of the engine directories takes.
        together: keep all participants loaded, see turns.measure().
        folder: where participants keep what they convert.
    """

    participants: Sequence[Participant]
    settings: Settings
    latent: Latent
    threads: int
    repeats: int = 5
    batches: Sequence[int] = ()
    sizes: Sequence[int] = ()
    layers: bool = False
    together: bool = True
    folder: Path | None = None
    title: str = "latentforge bench"
    command: str = ""


def run(study: Study, *, quiet: bool = True) -> Results:
    """Measure the request itself, then the points of its curves, then the layers."""
    asked = _asked(study)  # first, since a size that is none should not cost the work
    measured = _measured(study, study.settings, study.repeats, quiet)
    ran = [entry for entry in measured.entries if entry.status == "ok"]
    return Results(
        title=study.title,
        command=study.command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=described(),
        settings=asdict(study.settings),
        threads=study.threads,
        method=_method(study),
        entries=measured.entries,
        scaling=tuple(_scaling(study, asked, ran, quiet)) if asked else (),
        profiles=tuple(_profiles(study, ran, quiet)) if study.layers else (),
        pictures=tuple(_pictures(study.settings, measured)),
    )


def noise(settings: Settings, latent: Latent) -> Array:
    """What torch draws of the seed: (n, channels, h, w), of unit variance."""
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    return Generator(settings.seed).randn((settings.count, latent.channels, height, width))


def _measured(study: Study, settings: Settings, repeats: int, quiet: bool) -> Measured:
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


def _method(study: Study) -> str:
    start = "all stay loaded" if study.together else "each is started anew for every turn"
    return (
        f"Every participant is a process of its own with {study.threads} threads. They take turns, "
        f"{start}, and the run after a start is kept apart from the {study.repeats} that count. "
        "Times are medians; ratios are medians over pairs of neighbouring runs, with a 95 % "
        "bootstrap interval. Peak memory counts mapped pages of files."
    )


def _asked(study: Study) -> list[Settings]:
    """The requests of the curves' points."""
    batches = [replace(study.settings, images_per_prompt=batch) for batch in study.batches]
    return batches + [replace(study.settings, height=s, width=s) for s in study.sizes]


def _scaling(
    study: Study, asked: Sequence[Settings], ran: Sequence[BenchResult], quiet: bool
) -> Iterator[Point]:
    """The request's own point is known already."""
    names = {entry.name for entry in ran}
    able = replace(study, participants=[c for c in study.participants if c.name in names])
    yield from (_point(study.settings, entry) for entry in ran)
    for settings in asked:
        if settings != study.settings:
            measured = _measured(able, settings, min(study.repeats, _POINT_REPEATS), quiet)
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


def _profiles(study: Study, ran: Sequence[BenchResult], quiet: bool) -> Iterator[ProfileTable]:
    names = {entry.name for entry in ran}
    able = [c for c in study.participants if c.is_engines and c.name in names]
    with Progress(len(able), quiet=quiet) as progress:
        for participant in able:
            with progress.part(f"{participant.name}: layers"):
                yield _profile(participant, study)


def _profile(participant: Participant, study: Study) -> ProfileTable:
    engines, threads = Path(participant.model), study.threads
    with load(engines, hashes=False, threads=threads, profile=True) as pipeline:
        pipeline.run(study.settings)
        profile = pipeline.layers()
    return ProfileTable(
        name=participant.name,
        layers=tuple(map(_layer, profile.top(_MOST_LAYERS).layers)),
        total=profile.total,
    )


def _layer(layer: LayerTime) -> LayerTiming:
    component, _, name = layer.name.partition("/")
    return LayerTiming(
        component=component, layer=name, operator=layer.operator, seconds=layer.seconds
    )


def _pictures(settings: Settings, measured: Measured) -> Iterator[Picture]:
    """The first picture of the request by everybody, beside the reference's."""
    first = {name: pictures[0] for name, pictures in measured.pictures.items()}
    if measured.entries[0].name in first:
        yield Picture.of(settings.prompts[0], settings.seed, first)
