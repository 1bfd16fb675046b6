"""Simulation of a server in virtual time: clients, the scheduler, and replicas of known cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from latentforge.runtime.settings import Settings
from latentforge.serve.errors import QueueFullError
from latentforge.serve.job import Completed, Failed
from latentforge.serve.request import Batch, ImageRequest
from latentforge.serve.scheduler import BatchGains, JobChange, Limits, Scheduler
from latentforge.serve.turns import Turns

PIXEL = np.zeros((1, 1, 3), np.uint8)

SETTINGS = Settings(
    prompts=("",),
    sampler="ddim",
    steps=10,
    guidance_scale=1.0,
    guidance_rescale=0.0,
    height=512,
    width=512,
    seed=0,
)


def image_request(images: int = 1, model: str = "m", **changes: object) -> ImageRequest:
    """A request of some images whose cost is 10 each unless changed."""
    return ImageRequest(
        model=model,
        shared=replace(SETTINGS, **changes),  # type: ignore[arg-type]
        prompt="an apple",
        negative=None,
        seeds=tuple(range(images)),
    )


@dataclass(frozen=True)
class Cost:
    """Seconds of a step of a batch: fixed + per_row * rows, for a row of 512 x 512 pixels."""

    fixed: float
    per_row: float

    def seconds(self, batch: Batch) -> float:
        pixels = batch.key.settings.height * batch.key.settings.width / 512**2
        return self.fixed + self.per_row * len(batch.rows) * pixels

    def gains(self, model: str = "m") -> BatchGains:
        rates = {size: size / (self.fixed + self.per_row * size) for size in (1, 2, 4, 8, 16)}
        return BatchGains().measured(model, 512, 512, rates)


@dataclass
class Outcome:
    """Life of one job: when it was sent, and when and how it ended."""

    sent: float
    cost: float
    ended: float | None = None
    status: str = "accepted"

    @property
    def seconds(self) -> float:
        assert self.ended is not None
        return self.ended - self.sent


@dataclass
class Run:
    """Batch on a replica, and the steps that it had."""

    batch: Batch
    step: int = 0


@dataclass
class Simulation:
    """Clients and replicas around a scheduler; time passes from event to event."""

    cost: Cost
    limits: Limits = field(default_factory=Limits)
    replicas: int = 1
    now: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, self.cost.gains())
        self.outcomes: dict[str, Outcome] = {}
        self.batches: list[Batch] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._stopping: set[int] = set()
        self._stepping: set[int] = set()
        self._runs: list[dict[int, Run]] = [{} for _ in range(self.replicas)]
        self._turns = [Turns() for _ in range(self.replicas)]

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def send(
        self, time: float, request: ImageRequest, owner: str = "me", seconds: float | None = None
    ) -> str:
        """Let a request arrive at a time, and return the name of its job."""
        job = f"job{len(self.outcomes)}"
        self.outcomes[job] = Outcome(time, request.cost)
        self.at(time, lambda: self._arrive(job, request, owner, seconds))
        return job

    def run(self) -> None:
        """Let all happen."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            self._note(self.scheduler.expire(self.now))
            action()

    def _arrive(self, job: str, request: ImageRequest, owner: str, seconds: float | None) -> None:
        deadline = None if seconds is None else self.now + seconds
        try:
            self.scheduler.submit(job, request, owner=owner, deadline=deadline, now=self.now)
        except QueueFullError:
            self.outcomes[job].status = "refused"
        self._start()
        if deadline is not None:
            self.at(deadline, lambda: None)

    def _start(self) -> None:
        for replica, runs in enumerate(self._runs):
            while (batch := self.scheduler.next_batch("m", replica, self.now)) is not None:
                self.batches.append(batch)
                runs[batch.id] = Run(batch)
                self._turns[replica].add(batch.id)
            self._step(replica)

    def _step(self, replica: int) -> None:
        """Let a replica do a step of the batch whose turn it is."""
        turns = self._turns[replica]
        if not turns or replica in self._stepping:
            return
        self._stepping.add(replica)
        run = self._runs[replica][turns.next()]
        seconds = self.cost.seconds(run.batch)
        turns.ran(run.batch.id, seconds)
        run.step += 1
        self.at(self.now + seconds, lambda: self._stepped(replica, run))

    def _stepped(self, replica: int, run: Run) -> None:
        self._stepping.discard(replica)
        batch, steps = run.batch, run.batch.settings.steps
        self._note(self.scheduler.stepped(batch.id, run.step, steps, self.now))
        self._stopping.update(batch for _, batch in self.scheduler.stops())
        if batch.id in self._stopping:
            self.scheduler.stopped(batch.id, self.now)
            self._ended(replica, batch)
        elif run.step == steps:
            self._note(self.scheduler.finished(batch.id, [PIXEL] * len(batch.rows), self.now))
            self._ended(replica, batch)
        self._step(replica)

    def _ended(self, replica: int, batch: Batch) -> None:
        del self._runs[replica][batch.id]
        self._turns[replica].remove(batch.id)
        self._start()

    def _note(self, changes: Sequence[JobChange]) -> None:
        for change in changes:
            if isinstance(change.event, Completed | Failed):
                outcome = self.outcomes[change.job]
                assert outcome.ended is None
                outcome.ended = self.now
                completed = isinstance(change.event, Completed)
                outcome.status = "completed" if completed else change.event.code

    def having(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.status == status]


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
