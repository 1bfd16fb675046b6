"""Let participants take turns, and make an entry of what each took."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.bench.protocol import BenchJob, MissingError, Participant, Process
from latentforge.measure.bench.statistics import medians, ratios
from latentforge.measure.results import BenchResult, TimedRun
from latentforge.runtime.equivalence import SAME_PICTURE
from latentforge.runtime.errors import BackendError
from latentforge.runtime.image import psnr
from latentforge.runtime.machine import meters
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["Measured", "measure", "require_all_ok"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An entry for every participant, and the pictures, (n, 3, height, width), of those that ran."""

    entries: tuple[BenchResult, ...]
    pictures: Mapping[str, Array]


def measure(
    participants: Sequence[Participant],
    settings: Settings,
    *,
    threads: int,
    repeats: int = 5,
    together: bool = True,
    noise: Array | None = None,
    folder: Path | None = None,
    quiet: bool = True,
) -> Measured:
    """Let participants take turns, A B A B, so that a drifting machine hits all alike.

    A participant that fails is an entry that says so; the others go on.

    Args:
        participants: the first is what the others are compared with.
        settings: one request.
        threads: each may use.
        repeats: counted runs of each; one more comes first after every start and is kept apart.
        together: keep all loaded; without it a participant is started anew for each of its turns, so
            that one at a time has to fit in memory.
        noise: (n, channels, h, w) of unit variance, for participants that draw none like torch's.
        folder: where participants keep what they convert; a temporary one if None.
        quiet: show no progress.
    """
    total = len(participants) * (repeats + 2 if together else 3 * repeats)
    with ExitStack() as stack, Progress(total, quiet=quiet) as progress:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latentforge-")))
        if noise is not None:
            np.save(place / "noise.npy", noise)
        players = [
            _Runner(
                participant, _job(participant, settings, threads, place, folder or place), threads
            )
            for participant in participants
        ]
        (_all_loaded if together else _one_loaded)(players, repeats, progress)
        return _measured(players)


def require_all_ok(measured: Measured) -> Measured:
    """The same, where every participant has to have run.

    Raises:
        BackendError: one of them has not.
    """
    for entry in measured.entries:
        if entry.status != "ok":
            raise BackendError(f"{entry.name}: {entry.message}")
    return measured


def _job(
    participant: Participant, settings: Settings, threads: int, place: Path, folder: Path
) -> Path:
    own = folder / participant.name
    own.mkdir(parents=True, exist_ok=True)
    path = place / f"{participant.name}.json"
    BenchJob(
        model=participant.model,
        settings=replace(settings, **participant.plan),
        threads=threads,
        picture=str(path.with_suffix(".npy")),
        noise=str(place / "noise.npy"),
        folder=str(own),
        scheduler=participant.scheduler,
    ).write(path)
    return path


class _Runner:
    """A participant, and what is known of it so far. A failure is noted, and it plays no more."""

    def __init__(self, participant: Participant, job: Path, threads: int) -> None:
        self.participant = participant
        self.failure: BackendError | None = None
        self._job = job
        self._threads = threads
        self._meters = meters()
        self._process: Process | None = None
        self._known: dict[str, Any] = {}
        self._ready: list[float] = []
        self._first: TimedRun | None = None
        self._runs: list[TimedRun] = []

    def start(self) -> None:
        """Start its process and wait until it has loaded."""
        with self._noting():
            process = Process(self.participant, self._job, threads=self._threads)
            self._process = process
            self._ready.append(process.ready_seconds)
            if process.prepared is not None:
                self._known["prepare_seconds"] = process.prepared
            self._known["versions"] = dict(process.ready.get("versions", {}))
            self._known["precision"] = process.ready.get("precision", "")
            self._known["file_bytes"] = process.ready.get("bytes")

    def run(self, *, counted: bool) -> None:
        """One turn."""
        with self._noting():
            assert self._process is not None
            taken = self._process.run(self._meters)
            if counted:
                self._runs.append(taken)
            self._first = self._first or taken
            self._note_most("peak_memory", self._process.peak_memory or None)
            self._note_most("device_memory", self._process.device_memory)

    def stop(self) -> None:
        """End its process, if it has one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _note_most(self, key: str, value: int | None) -> None:
        if value is not None:
            self._known[key] = max(value, self._known.get(key, 0))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Do what is in the block; where that fails, note it and end the process."""
        try:
            yield
        except BackendError as error:
            self.failure = error
            self.stop()

    @property
    def picture(self) -> Array | None:
        """Its last one."""
        path = self._job.with_suffix(".npy")
        if self.failure is not None or not path.exists():
            return None
        picture: Array = np.load(path)
        return picture

    @property
    def runs(self) -> Sequence[TimedRun]:
        """Those that count."""
        return () if self.failure else self._runs

    def entry(self, reference: "_Runner", close: float | None) -> BenchResult:
        """What it took beside the reference, and how close their pictures are, in dB."""
        head: dict[str, Any] = {"name": self.participant.name, "role": self.participant.role}
        head |= {"ready_seconds": tuple(self._ready), **self._known}
        if self.failure is not None:
            return BenchResult(**head, **self._told(self.failure))
        kind = (
            _speed_class(close, self._known["precision"])
            if self.participant.same_trajectory
            else "B"
        )
        return BenchResult(
            **head,
            speed_class=kind,
            gate=self.participant.gate if kind == "B" else "",
            first=self._first,
            runs=tuple(self._runs),
            psnr=close,
            median=medians(self._runs),
            ratio=ratios(reference.runs, self._runs) if reference.runs else {},
        )

    def _told(self, failure: BackendError) -> dict[str, Any]:
        if isinstance(failure, MissingError):
            return {"status": "missing", "message": f"{failure}; {self.participant.install}"}
        return {"status": "failed", "message": str(failure)}


def _picture_psnr(reference: Array | None, picture: Array | None) -> float | None:
    if reference is None or picture is None or reference.shape != picture.shape:
        return None
    return psnr(reference, picture, peak=2.0)


def _speed_class(close: float | None, precision: str) -> Literal["A", "B"] | None:
    """A: the same picture, as far as the precision can give it."""
    if close is None:
        return None
    return "A" if close >= SAME_PICTURE.get(precision, SAME_PICTURE["fp32"]) else "B"


def _all_loaded(players: Sequence[_Runner], repeats: int, progress: Progress) -> None:
    with ExitStack() as stack:
        for player in players:
            stack.callback(player.stop)
            with progress.part(f"{player.participant.name}: load"):
                player.start()
        for turn in range(repeats + 1):
            for player in players:
                if player.failure is None:
                    with progress.part(f"{player.participant.name}: image"):
                        player.run(counted=turn > 0)


def _one_loaded(players: Sequence[_Runner], repeats: int, progress: Progress) -> None:
    """The run after each start is not counted."""
    for _ in range(repeats):
        for player in players:
            if player.failure is None:
                _one_turn(player, progress)


def _one_turn(player: _Runner, progress: Progress) -> None:
    try:
        with progress.part(f"{player.participant.name}: load"):
            player.start()
        for counted in (False, True):
            if player.failure is None:
                with progress.part(f"{player.participant.name}: image"):
                    player.run(counted=counted)
    finally:
        player.stop()


def _measured(players: Sequence[_Runner]) -> Measured:
    reference, pictures = players[0], {p.participant.name: p.picture for p in players}
    theirs = pictures[reference.participant.name]
    return Measured(
        entries=tuple(
            player.entry(reference, _picture_psnr(theirs, pictures[player.participant.name]))
            for player in players
        ),
        pictures={name: picture for name, picture in pictures.items() if picture is not None},
    )
