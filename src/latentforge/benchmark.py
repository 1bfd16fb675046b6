"""Benchmark of engine directories and other software: ``latentforge bench`` as a function."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentforge.measure.bench import REPEATS
from latentforge.measure.bench.placement import Placement
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.bench.study import Study, run
from latentforge.measure.hardware import available_threads, fit_together
from latentforge.measure.peers import find_peer, participant, peer_name
from latentforge.measure.results import Results
from latentforge.runtime.annotations import check_fields, checked_arguments
from latentforge.runtime.errors import DeviceError, SettingsError
from latentforge.runtime.isolation import child_environment
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profiling import PROMPT
from latentforge.runtime.settings import Request, Settings, resolve
from latentforge.runtime.validation import check_count, check_items, check_threads

__all__ = ["BenchRequest", "benchmark", "diffusers_scheduler"]


_MAX_REPEATS = 1000
_MAX_POINT = 16_384
_PROBE_SECONDS = 120
_PROBE = """
import sys
sys.path[:] = filter(None, sys.path)  # the working directory must not be imported from
import torch
print(torch.cuda.is_available())
"""
_CORRECTED_OPTIONS: Sequence[str] = ("steps_offset", "clip_sample")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """Options of a benchmark.

    Attributes:
        engines: engine directories of one model; the first one's defaults complete the request.
        against: peers, keys of measure.peers.PEERS, those in torch with ``@DEVICE:PRECISION`` or
            else in the device and precision of the first engine directory. The first is the
            reference of all speedups; without peers, the first engine directory is.
        checkpoint: for the peers, if not the one that the engines come from.
        pythons: interpreters of peers that have their own environment, by peer.
        prompt: of every image.
        settings: the settings that differ from the defaults; the seed is 0 unless set.
        batches: further points of curves, by images per prompt.
        sizes: further points of curves, by image side in pixels.
        layers: profile the layers of the engines.
        unaccelerated: ignore the acceleration plans of engines, which are otherwise followed
            (class B).
        repeats: timed runs per participant.
        threads: per participant; 0 for LATENTFORGE_THREADS of them, or all cores.
        one_at_a_time: load only one participant at a time even if all fit into memory.
        folder: keep the files that peers convert here; a temporary folder if None.
        command: the command line that repeats the benchmark.
    """

    engines: Sequence[Path]
    against: Sequence[str] = ()
    checkpoint: str | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    prompt: str = PROMPT
    settings: Request = field(default_factory=lambda: Request())
    batches: Sequence[int] = ()
    sizes: Sequence[int] = ()
    layers: bool = False
    unaccelerated: bool = False
    repeats: int = REPEATS
    threads: int = 0
    one_at_a_time: bool = False
    folder: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.engines, str | Path):
            object.__setattr__(self, "engines", (self.engines,))
        check_fields(self)
        if not self.engines:
            raise SettingsError("engines must be one or several paths, not none")
        for name in ("batches", "sizes"):
            check_items(name, getattr(self, name), partial(check_count, max=_MAX_POINT))
        check_count("repeats", self.repeats, _MAX_REPEATS)
        check_threads(self.threads)


@checked_arguments
def benchmark(request: BenchRequest, *, quiet: bool = True) -> Results:
    """Time engine directories of one model, and peers on the checkpoint that they come from.

    Args:
        request: what to measure.
        quiet: show no progress.

    Raises:
        SettingsError: there is no such peer, or a setting is out of range.
        CheckpointError: there is no such checkpoint.
    """
    manifest = Manifest.read(request.engines[0])
    settings = resolve(manifest.defaults, request.prompt, {"seed": 0, **request.settings})
    if isinstance(settings.seed, tuple):
        raise SettingsError("bench draws all images of a run from one seed: give one, not a list")
    checkpoint = request.checkpoint or manifest.source.checkpoint
    placement = Placement.of(manifest)
    peers = _peers(request, checkpoint, settings, placement) if request.against else []
    participants = _with_unique_names([*peers, *_engine_participants(request)])
    study = Study(
        participants=[replace(participants[0], role="reference"), *participants[1:]],
        settings=settings,
        latent=manifest.latent,
        threads=request.threads or available_threads(),
        repeats=request.repeats,
        batches=request.batches,
        sizes=request.sizes,
        layers=request.layers,
        together=not request.one_at_a_time and _fit(request.engines, len(participants)),
        folder=request.folder,
        title=f"{manifest.name}: engines and peers" if request.against else manifest.name,
        command=request.command,
    )
    return run(study, quiet=quiet)


def diffusers_scheduler(checkpoint: Path, sampler: str, steps: int) -> Mapping[str, Any]:
    """Return the diffusers scheduler that a sampler corresponds to.

    diffusers' pipelines correct the scheduler options of some older checkpoints when they load
    them. A scheduler that a peer creates from another one's configuration is not corrected, so that
    the corrected options are part of the result.

    Args:
        checkpoint: a directory in diffusers' layout.
        sampler: a key of export.schedulers.SCHEDULERS.
        steps: number of steps, which samplers with their own timesteps depend on.

    Returns:
        The class (``name``), arguments for its from_config (``options``) and, for samplers with
        their own timesteps, ``timesteps``.

    Raises:
        CheckpointError: the checkpoint's scheduler is missing or not supported.
    """
    from latentforge.export.checkpoint import read_json
    from latentforge.export.schedulers import SCHEDULERS, corrected, schedule_of

    counterpart = SCHEDULERS[sampler]
    config = read_json(checkpoint / "scheduler" / "scheduler_config.json")
    if "XL" not in read_json(checkpoint / "model_index.json").get("_class_name", ""):
        config = corrected(config)
    options = {key: config[key] for key in _CORRECTED_OPTIONS if key in config}
    scheduler: dict[str, Any] = {
        "name": counterpart.scheduler,
        "options": {**options, **counterpart.options},
    }
    if counterpart.timesteps:
        scheduler["timesteps"] = counterpart.timesteps(schedule_of(config), steps)
    return scheduler


def _peers(
    request: BenchRequest, checkpoint: str, settings: Settings, placement: Placement
) -> list[Participant]:
    from latentforge.export.checkpoint import open_checkpoint

    foreign = [name for name in request.against if find_peer(name).is_foreign]
    model = open_checkpoint(checkpoint).path
    scheduler = diffusers_scheduler(model, settings.sampler, settings.steps) if foreign else {}
    peers = [
        participant(
            name,
            model,
            scheduler=scheduler if name in foreign else {},
            python=request.pythons.get(name, request.pythons.get(peer_name(name))),
            default=placement,
        )
        for name in request.against
    ]
    for peer in peers:
        _require_device(peer)
    return peers


def _require_device(peer: Participant) -> None:
    """Refuse a GPU that is missing before anything is started.

    Raises:
        DeviceError: the peer's interpreter has no torch that sees a GPU.
    """
    if peer.placement.device != "cuda":
        return  # peers that take no device have the CPU
    try:
        asked = subprocess.run(
            [peer.command[0], "-c", _PROBE],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # its start will say what is wrong with this interpreter
    if asked.returncode == 0 and asked.stdout.strip() != "True":
        name = peer_name(peer.name)
        raise DeviceError(
            f"{name}@{peer.placement}: torch finds no CUDA GPU here; to compare on the CPU, write "
            f"{name}@cpu:fp32"
        )


def _engine_participants(request: BenchRequest) -> list[Participant]:
    """Name each after its folder, or after its whole path if folders share a name."""
    names = [path.resolve().name for path in request.engines]
    return [
        Participant.of(
            path,
            name if names.count(name) == 1 else str(path).strip("/").replace("/", "-"),
            unaccelerated=request.unaccelerated,
        )
        for path, name in zip(request.engines, names, strict=True)
    ]


def _with_unique_names(participants: Sequence[Participant]) -> list[Participant]:
    """Number repeated names: comparing a participant with itself shows the noise of a benchmark."""
    counts: Counter[str] = Counter()
    unique = []
    for entry in participants:
        counts[entry.name] += 1
        number = counts[entry.name]
        name = entry.name if number == 1 else f"{entry.name}-{number}"
        unique.append(replace(entry, name=name))
    return unique


def _fit(engines: Sequence[Path], count: int) -> bool:
    """Return True if all participants fit into memory; peers load the same weights as engines."""
    largest = max(Manifest.read(path, hashes=False).size for path in engines)
    return bool(fit_together([largest] * count))
