"""Scheduler: accepted requests wait, run in batches, and end, each exactly once.

It knows nothing of processes and clocks: every method is given the time, in seconds of a clock
that never goes back, and returns what it changed. A job ends as a whole: an image runs on for
nobody if its job has ended, until the batch ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentforge.serve.errors import (
    DeadlineError,
    DrainingError,
    GenerationError,
    QueueFullError,
    QuotaError,
    WorkerLostError,
)
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    ImageDone,
    JobEvent,
    Queued,
    Stepped,
)
from latentforge.serve.request import Batch, BatchKey, ImageRequest, Row
from latentforge.serve.scheduler.gains import BatchGains
from latentforge.serve.scheduler.limits import Limits, OwnerLimits
from latentforge.serve.scheduler.queues import FairQueue, Flow, Taken
from latentforge.serve.scheduler.throughput import Throughput

__all__ = ["OUT_OF_MEMORY", "JobChange", "Scheduler"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class JobChange:
    """Event of one job."""

    job: str
    event: JobEvent


OUT_OF_MEMORY = "out_of_memory"
"""Code of a batch that failed because memory ran out."""

Changes = tuple[JobChange, ...]

_NO_LIMITS = OwnerLimits()


@dataclass(eq=False)
class _Entry:
    """Job that has not ended.

    Attributes:
        request: the request.
        owner: name of its key.
        arrived: seconds, when it was accepted.
        deadline: seconds, when it fails.
        parts: part of each image that is done, from 0 to 1.
        done: indices of the finished images.
        losses: how often each image was lost with its process.
        shown: previews of each image that were due so far.
    """

    request: ImageRequest
    owner: str
    arrived: float
    deadline: float | None
    parts: dict[int, float] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    losses: dict[int, int] = field(default_factory=dict)
    shown: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Running:
    """Batch on a replica.

    Attributes:
        batch: the batch.
        replica: number of the replica.
        alone: True if nothing may run beside it, since its image failed in company.
        part: part that is done, from 0 to 1.
        stopping: True once it runs for nobody and that was reported.
    """

    batch: Batch
    replica: int
    alone: bool = False
    part: float = 0.0
    stopping: bool = False

    @property
    def cost(self) -> float:
        """Work of all its rows."""
        return self.batch.key.row_cost * len(self.batch.rows)

    @property
    def remaining(self) -> float:
        """Work that is not done."""
        return self.cost * (1 - self.part)


class Scheduler:
    """Queues and batches of all models of a server.

    Args:
        limits: of the queue.
        gains: batches that are worth it.
        owners: limits by name of the owner.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        gains: BatchGains | None = None,
        owners: Mapping[str, OwnerLimits] | None = None,
    ) -> None:
        self.limits = limits if limits is not None else Limits()
        self.gains = gains if gains is not None else BatchGains()
        self.draining = False
        self._owners = dict(owners or {})
        self._queues: dict[str, FairQueue] = {}
        self._jobs: dict[str, _Entry] = {}
        self._batches: dict[int, _Running] = {}
        self._replicas: dict[int, str] = {}
        self.throughput = Throughput()
        self._next = 0

    # what there is

    @property
    def waiting(self) -> int:
        """Number of images that wait."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def running(self) -> int:
        """Number of images that run for somebody."""
        return sum(len(self._live(running)) for running in self._batches.values())

    @property
    def permits(self) -> int:
        """Number of batches that hold a replica, those that run for nobody included."""
        return len(self._batches)

    @property
    def jobs(self) -> int:
        """Number of jobs that have not ended."""
        return len(self._jobs)

    def depth(self, model: str) -> int:
        """Return the number of images of one model that wait."""
        return len(self._queue(model))

    def active(self, model: str) -> int:
        """Return the number of images of one model that run for somebody."""
        return sum(len(self._live(running)) for running in self._of(model))

    def held(self, model: str) -> int:
        """Return the number of batches of one model that hold a replica."""
        return len(self._of(model))

    def positions(self, model: str) -> dict[str, int]:
        """Return the position of each job of a model that waits: see position()."""
        waiting = sorted(self._queue(model), key=lambda flow: flow.arrived)
        return {job: place for place, job in enumerate(dict.fromkeys(f.job for f in waiting))}

    def position(self, job: str) -> int | None:
        """Return the number of jobs that came before and wait too; None if it does not wait."""
        entry = self._jobs.get(job)
        return None if entry is None else self.positions(entry.request.model).get(job)

    def is_needed(self, batch: int) -> bool:
        """Return True if a batch runs for somebody."""
        running = self._batches.get(batch)
        return running is not None and bool(self._live(running))

    def expected_wait(self, model: str) -> float | None:
        """Return the seconds until a further request would run; None before a measurement."""
        rate = self._rate(model)
        return None if rate is None else (self._queue(model).cost + self._remaining(model)) / rate

    # from clients

    def submit(
        self, job: str, request: ImageRequest, *, owner: str, deadline: float | None, now: float
    ) -> Changes:
        """Accept a request as a job that nobody used the id of.

        Args:
            job: its id.
            request: the request.
            owner: name of its key.
            deadline: time at which it fails.
            now: seconds.

        Raises:
            DrainingError: the server shuts down.
            QueueFullError: it would wait for too long.
            QuotaError: too many jobs of the owner wait.
        """
        self.admit(request, owner=owner, deadline=deadline, now=now)
        entry = _Entry(request=request, owner=owner, arrived=now, deadline=deadline)
        self._jobs[job] = entry
        self._queue(request.model).add(self._flow(job, request.rows(job)))
        return (JobChange(job, Queued(self.position(job) or 0)),)

    def cancel(self, job: str, reason: str, now: float) -> Changes:
        """End a job; nothing changes if it has ended."""
        return self._end(job, Cancelled(reason)) if job in self._jobs else ()

    def cancel_all(self, reason: str, now: float) -> Changes:
        """End all jobs."""
        return _joined(self.cancel(job, reason, now) for job in list(self._jobs))

    def drain(self) -> None:
        """Accept no further requests."""
        self.draining = True

    def admit(
        self, request: ImageRequest, *, owner: str, deadline: float | None, now: float
    ) -> None:
        """Refuse a request that submit() would not accept; nothing changes.

        Raises:
            DrainingError, QueueFullError, QuotaError: as submit().
        """
        if self.draining:
            raise DrainingError(
                "the server shuts down: try again in a moment",
                retry_after=self.limits.retry_seconds,
            )
        queue, owned = self._queue(request.model), self._owner(owner)
        waiting = queue.jobs_of(owner)
        if owned.queued is not None and waiting >= owned.queued:
            raise QuotaError(
                f"{waiting} requests of this key wait, and {owned.queued} may: wait for one to end",
                retry_after=self._retry_after(request.model),
            )
        if queue.jobs >= self.limits.queue_jobs:
            raise self._full(request.model, f"{self.limits.queue_jobs} requests wait already")
        if request.bytes and (held := self._held_bytes()) + request.bytes > self.limits.queue_bytes:
            raise self._full(request.model, f"requests hold {held:,} bytes of pictures already")
        self._admit_wait(request, owner, deadline, now)

    def _admit_wait(
        self, request: ImageRequest, owner: str, deadline: float | None, now: float
    ) -> None:
        """Refuse a request that would wait for too long, by what has been measured so far."""
        rate, limit = self._rate(request.model), self.limits.queue_seconds
        before = self._queue(request.model).work_before(owner, request.cost)
        if rate is None or not before:
            return
        wait = (before + self._remaining(request.model)) / rate
        if wait > limit:
            raise self._full(request.model, f"it would start in about {wait:.0f} seconds")
        if deadline is not None and now + wait + request.cost / rate > deadline:
            raise self._full(request.model, "it would not be done at its deadline")

    def _held_bytes(self) -> int:
        return sum(entry.request.bytes for entry in self._jobs.values())

    def _full(self, model: str, reason: str) -> QueueFullError:
        wait = self._retry_after(model)
        return QueueFullError(
            f"the queue is full ({reason}): try again in {wait:.0f} seconds", retry_after=wait
        )

    def _retry_after(self, model: str) -> float:
        """Return the seconds until a quarter of what waits has run, at least 1."""
        wait = self.expected_wait(model)
        return self.limits.retry_seconds if wait is None else max(1.0, wait / 4)

    # to and from replicas

    def next_batch(self, model: str, replica: int, now: float) -> Batch | None:
        """Return what a replica runs next; None if nothing may run.

        It may run a batch already, if that goes on for at least twice as long as the next would
        take: the replica then does the steps of both in turn. Call expire() before: what is late
        runs on otherwise.

        Args:
            model: model of the replica.
            replica: its number, unique among those of all models.
            now: seconds.
        """
        self._replicas[replica] = model
        beside = [running for running in self._batches.values() if running.replica == replica]
        if len(beside) >= (2 if self.limits.interleave else 1) or any(r.alone for r in beside):
            return None
        allowed = partial(self._allowed, beside[0] if beside else None)
        taken = self._queue(model).take(self._batch_size, allowed, now)
        if not taken:
            if not beside:
                self.throughput.end(replica)
            return None
        batch = self._batch(taken)
        self._batches[batch.id] = _Running(batch, replica, taken[0][0].alone)
        self.throughput.begin(replica, now)
        return batch

    def _batch(self, taken: Taken) -> Batch:
        self._next += 1
        return Batch(
            id=self._next,
            key=taken[0][0].key,
            rows=tuple(row for _, row in taken),
            mask=taken[0][0].request.mask,
            previews=max(flow.request.previews for flow, _ in taken),
        )

    def stepped(
        self,
        batch: int,
        step: int,
        count: int,
        now: float,
        previews: Sequence[Pixels | None] = (),
    ) -> Changes:
        """Note that a batch completed ``step`` of ``count`` steps, with previews of its rows.

        A job gets as many of them as it wants, spread over the steps.
        """
        running = self._batches.get(batch)
        if running is None:
            return ()
        self._advance(running, step / (count + 1), now)  # the decoder comes after the steps
        pictures = dict(zip(running.batch.rows, previews, strict=False))
        by_job: dict[str, list[Row]] = {}
        for row in self._live(running):
            by_job.setdefault(row.job, []).append(row)
            self._jobs[row.job].parts[row.index] = running.part
        return tuple(
            JobChange(job, self._step_event(job, rows, step, count, pictures))
            for job, rows in by_job.items()
        )

    def _step_event(
        self,
        job: str,
        rows: Sequence[Row],
        step: int,
        count: int,
        pictures: Mapping[Row, Pixels | None],
    ) -> Stepped:
        entry = self._jobs[job]
        due = min(entry.request.previews, step * (entry.request.previews + 1) // count)
        shown = {
            row.index: picture
            for row in rows
            if (picture := pictures.get(row)) is not None and entry.shown.get(row.index, 0) < due
        }
        entry.shown.update(dict.fromkeys(shown, due))
        return Stepped(
            images=tuple(row.index for row in rows),
            step=step,
            count=count,
            progress=sum(entry.parts.values()) / entry.request.count,
            previews=shown,
        )

    def finished(self, batch: int, images: Sequence[Pixels], now: float) -> Changes:
        """Note that a batch is done, with the image of each of its rows."""
        if (running := self._batches.get(batch)) is None:
            return ()
        self._advance(running, 1.0, now)
        self.throughput.measure(running.batch.model, running.replica)
        self._release(running)
        return _joined(
            self._image_done(row, pixels)
            for row, pixels in zip(running.batch.rows, images, strict=True)
        )

    def failed(
        self, batch: int, message: str, now: float, code: str = GenerationError.code
    ) -> Changes:
        """Note that the engines refused a batch, on a replica that goes on.

        Of several rows each runs again alone, so that only the one that is the reason fails. If
        memory was, the next batches are smaller.
        """
        if (running := self._batches.get(batch)) is None:
            return ()
        self._release(running)
        rows, count = self._live(running), len(running.batch.rows)
        if count > 1:
            self._retry_alone(rows)
            if code == OUT_OF_MEMORY:
                self.gains = self.gains.below(count, *_size(running.batch.key))
            return ()
        return _joined(self._end(row.job, Failed(code, message)) for row in rows)

    def stopped(self, batch: int, now: float) -> None:
        """Note that a replica gave up a batch that ran for nobody."""
        if (running := self._batches.get(batch)) is not None:
            self._release(running)
            self._retry_alone(self._live(running))

    def replica_lost(self, replica: int, now: float) -> Changes:
        """Note that the process of a replica is gone; what ran there runs once more, each alone."""
        self._replicas.pop(replica, None)
        self.throughput.end(replica)
        lost = [running for running in self._batches.values() if running.replica == replica]
        for running in lost:
            self._release(running)
        return _joined(self._lost(row) for running in lost for row in running.batch.rows)

    def expire(self, now: float) -> Changes:
        """End the jobs whose deadline is now or was before, those that run too."""
        late = [
            job
            for job, entry in self._jobs.items()
            if entry.deadline is not None and entry.deadline <= now
        ]
        message = "not done at the deadline: allow more time, or ask for fewer steps or images"
        return _joined(self._end(job, Failed(DeadlineError.code, message)) for job in late)

    def unavailable(self, model: str, error: Failed, now: float) -> Changes:
        """End all jobs of a model that wait, since it has no replica and gets none."""
        jobs = {flow.job for flow in self._queue(model)}
        return _joined(self._end(job, error) for job in sorted(jobs))

    def stops(self) -> tuple[tuple[int, int], ...]:
        """Return (replica, batch) of the batches that run for nobody, each once."""
        idle = [
            running
            for running in self._batches.values()
            if not running.stopping and not self._live(running)
        ]
        for running in idle:
            running.stopping = True
        return tuple((running.replica, running.batch.id) for running in idle)

    def wake_at(self, now: float) -> float | None:
        """Return the time of the next deadline, when expire() is due; None if there is none."""
        deadlines = [e.deadline for e in self._jobs.values() if e.deadline is not None]
        return max(now, min(deadlines)) if deadlines else None

    # inside

    def _queue(self, model: str) -> FairQueue:
        return self._queues.setdefault(model, FairQueue(self.limits.aging_seconds))

    def _owner(self, name: str) -> OwnerLimits:
        return self._owners.get(name, _NO_LIMITS)

    def _flow(self, job: str, rows: Iterable[Row], *, alone: bool = False) -> Flow:
        entry = self._jobs[job]
        return Flow(job, entry.owner, entry.request, entry.arrived, deque(rows), alone)

    def _rate(self, model: str) -> float | None:
        """Return the sure cost per second of all replicas; None before a measurement."""
        rate = self.throughput.sure(model)
        replicas = sum(name == model for name in self._replicas.values())
        return None if rate is None else rate * max(1, replicas)

    def _remaining(self, model: str) -> float:
        """Return the work that runs and is not done."""
        return sum(running.remaining for running in self._of(model))

    def _of(self, model: str) -> list[_Running]:
        batches = self._batches.values()
        return [running for running in batches if running.batch.model == model]

    def _batch_size(self, key: BatchKey) -> int:
        return min(self.gains.batch_size(*_size(key)), self.limits.max_batch)

    def _allowed(self, beside: _Running | None, flow: Flow, taken: Taken) -> bool:
        """Return True if an image may join a batch, which runs beside another or none."""
        return self._is_short(beside, flow, taken) and self._has_permit(flow, taken)

    def _is_short(self, beside: _Running | None, flow: Flow, taken: Taken) -> bool:
        """Return True for an image of another kind that takes half as long as what runs, at most.

        Images of the same kind gain more from a batch of their own, later.
        """
        cost = flow.key.row_cost
        if beside is None:
            return True
        if flow.alone or cost > beside.batch.key.row_cost / 2:
            return False
        return cost * (len(taken) + 1) <= beside.remaining / 2

    def _has_permit(self, flow: Flow, taken: Taken) -> bool:
        """Return True if a job may run beside those of its owner that do."""
        limit = self._owner(flow.owner).concurrent
        if limit is None:
            return True
        live = {row.job for running in self._batches.values() for row in self._live(running)}
        live |= {chosen.job for chosen, _ in taken}
        own = {job for job in live if self._jobs[job].owner == flow.owner}
        return flow.job in own or len(own) < limit

    def _advance(self, running: _Running, part: float, now: float) -> None:
        """Note that a batch is done to a further part."""
        self.throughput.report(running.replica, running.cost * (part - running.part), now)
        running.part = part

    def _release(self, running: _Running) -> None:
        """Let a replica go. The time until its next batch counts, if one waits."""
        del self._batches[running.batch.id]
        others = any(other.replica == running.replica for other in self._batches.values())
        if not others and not len(self._queue(running.batch.model)):
            self.throughput.end(running.replica)

    def _live(self, running: _Running) -> list[Row]:
        """Return the rows of a batch whose jobs have not ended."""
        return [row for row in running.batch.rows if row.job in self._jobs]

    def _image_done(self, row: Row, pixels: Pixels) -> Changes:
        entry = self._jobs.get(row.job)
        if entry is None:
            return ()
        entry.done.add(row.index)
        entry.parts[row.index] = 1.0
        done = (JobChange(row.job, ImageDone(row.index, pixels)),)
        complete = len(entry.done) == entry.request.count
        return done + self._end(row.job, Completed()) if complete else done

    def _lost(self, row: Row) -> Changes:
        entry = self._jobs.get(row.job)
        if entry is None:
            return ()
        losses = entry.losses[row.index] = entry.losses.get(row.index, 0) + 1
        if losses > 1:
            message = "the process of the model ended twice during this request: change the request"
            return self._end(row.job, Failed(WorkerLostError.code, message))
        self._retry_alone([row])
        return ()

    def _retry_alone(self, rows: Iterable[Row]) -> None:
        for row in rows:
            entry = self._jobs[row.job]
            entry.parts.pop(row.index, None)
            self._queue(entry.request.model).add(self._flow(row.job, [row], alone=True))

    def _end(self, job: str, event: Completed | Failed | Cancelled) -> Changes:
        entry = self._jobs.pop(job)
        self._queue(entry.request.model).discard(job, entry.owner)
        return (JobChange(job, event),)


def _size(key: BatchKey) -> tuple[str, int, int]:
    return key.model, key.settings.height, key.settings.width


def _joined(changes: Iterable[Changes]) -> Changes:
    return tuple(change for each in changes for change in each)
