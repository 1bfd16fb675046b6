"""Engines and their peers on one request: what ``latentforge bench`` does, as a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from latentforge.runtime.bench.contender import Contender
from latentforge.runtime.bench.study import Study, run
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.machine import available_cores, fit_together
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.results import Results
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
        against: names of export.peers.PEERS. The first is the reference of all ratios; without
            peers the first of the engines is.
        checkpoint: for the peers, if not the one that the engines name.
        pythons: interpreters of peers that live in another environment, by name.
        batches, sizes, layers, repeats, folder: see runtime.bench.study.Study.
        plain: leave aside the plans of engines, which otherwise follow them, as class B.
        threads: of each contender; 0 for every core.
        alone: have only one contender in memory at a time, even if there is room for all.

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
    contenders = _distinct([*peers, *_named(engines, plain=plain)])
    largest = max(Manifest.read(path, hashes=False).size for path in engines)
    together = bool(fit_together([largest] * len(contenders)))  # peers load the same weights
    study = Study(
        contenders=[replace(contenders[0], role="reference"), *contenders[1:]],
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
) -> list[Contender]:
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.peers import contender

    model = open_checkpoint(checkpoint).path
    sampler, steps = settings.sampler, settings.steps
    return [
        contender(name, model, sampler=sampler, steps=steps, python=pythons.get(name))
        for name in names
    ]


def _named(engines: Sequence[Path], *, plain: bool) -> list[Contender]:
    """Each under its folder's name, or its whole path where two are called the same."""
    names = [path.resolve().name for path in engines]
    return [
        Contender.of(
            path,
            name if names.count(name) == 1 else str(path).strip("/").replace("/", "-"),
            plain=plain,
        )
        for path, name in zip(engines, names, strict=True)
    ]


def _distinct(contenders: Sequence[Contender]) -> list[Contender]:
    """The same, with a number behind a name that was there before: A against A is worth a look."""
    seen: Counter[str] = Counter()
    distinct = []
    for contender in contenders:
        seen[contender.name] += 1
        number = seen[contender.name]
        name = contender.name if number == 1 else f"{contender.name}-{number}"
        distinct.append(replace(contender, name=name))
    return distinct
