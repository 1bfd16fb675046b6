"""Engines and their peers on one request: what ``latentforge bench`` does, as a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.bench.study import Study, run
from latentforge.measure.results import Results
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.machine import available_cores, fit_together
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import Request, Settings, resolve

__all__ = ["PROMPT", "benchmark"]

PROMPT = "a photo of a cat"


def benchmark(
    engines: Sequence[Path],
    *,
    against: Sequence[str] = (),
    checkpoint: str | None = None,
    pythons: Mapping[str, str] | None = None,
    prompt: str = PROMPT,
    request: Request | None = None,
    batches: Sequence[int] = (),
    sizes: Sequence[int] = (),
    layers: bool = False,
    plain: bool = False,
    repeats: int = 5,
    threads: int = 0,
    alone: bool = False,
    folder: Path | None = None,
    command: str = "",
    quiet: bool = True,
) -> Results:
    """Time engine directories of one model, and peers on the checkpoint that they came from.

    Args:
        engines: directories; the first one's defaults fill in the request.
        against: names of measure.peers.PEERS. The first is the reference of all ratios; without
            peers the first of the engines is.
        checkpoint: for the peers, if not the one that the engines name.
        pythons: interpreters of peers that live in another environment, by name.
        batches, sizes, layers, repeats, folder: see measure.bench.study.Study.
        plain: leave aside the plans of engines, which otherwise follow them, as class B.
        threads: of each participant; 0 for every core.
        alone: have only one participant in memory at a time, even if there is room for all.

    Raises:
        SettingsError: no such peer, or a number out of range.
        CheckpointError: there is no such checkpoint.
    """
    if not 1 <= repeats <= 1000:
        raise SettingsError(f"repeats is a whole number from 1 to 1000, not {repeats}")
    manifest = Manifest.read(engines[0])
    settings = resolve(manifest.defaults, prompt, {"seed": 0, **(request or {})})
    source = checkpoint or manifest.source.checkpoint
    peers = _peers(against, source, settings, pythons or {}) if against else []
    participants = _distinct([*peers, *_named(engines, plain=plain)])
    largest = max(Manifest.read(path, hashes=False).size for path in engines)
    together = bool(fit_together([largest] * len(participants)))  # peers load the same weights
    study = Study(
        participants=[replace(participants[0], role="reference"), *participants[1:]],
        settings=settings,
        latent=manifest.latent,
        threads=threads or available_cores(),
        repeats=repeats,
        batches=batches,
        sizes=sizes,
        layers=layers,
        together=together and not alone,
        folder=folder,
        title=f"{manifest.name}: engines and their peers" if against else manifest.name,
        command=command,
    )
    return run(study, quiet=quiet)


def _peers(
    names: Sequence[str], checkpoint: str, settings: Settings, pythons: Mapping[str, str]
) -> list[Participant]:
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.measure.peers import participant

    model = open_checkpoint(checkpoint).path
    sampler, steps = settings.sampler, settings.steps
    return [
        participant(name, model, sampler=sampler, steps=steps, python=pythons.get(name))
        for name in names
    ]


def _named(engines: Sequence[Path], *, plain: bool) -> list[Participant]:
    """Each under its folder's name, or its whole path where two are called the same."""
    names = [path.resolve().name for path in engines]
    return [
        Participant.of(
            path,
            name if names.count(name) == 1 else str(path).strip("/").replace("/", "-"),
            plain=plain,
        )
        for path, name in zip(engines, names, strict=True)
    ]


def _distinct(participants: Sequence[Participant]) -> list[Participant]:
    """The same, with a number behind a name that was there before: A against A is worth a look."""
    seen: Counter[str] = Counter()
    distinct = []
    for participant in participants:
        seen[participant.name] += 1
        number = seen[participant.name]
        name = participant.name if number == 1 else f"{participant.name}-{number}"
        distinct.append(replace(participant, name=name))
    return distinct
