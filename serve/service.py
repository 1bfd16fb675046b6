"""Service: models in processes of their own, the scheduler before them, and the jobs of clients.

It lives in one event loop, and nothing in it waits while it changes state: a request is accepted,
a batch taken and a job ended in one go. The scheduler decides; the service moves messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from latentforge.runtime.backends import return_memory
from latentforge.runtime.errors import BackendError, LatentforgeError, SettingsError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.validation import check_number
from latentforge.serve.errors import ExpiredJobError, ModelUnavailableError, ServeError
from latentforge.serve.event_queue import EventQueue
from latentforge.serve.idempotency import IdempotencyStore
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    IgnoredText,
    Job,
    JobEvent,
    JobState,
    JobStore,
    Queued,
    Started,
    Stepped,
)
from latentforge.serve.keys import KeyRing, RateLimiter
from latentforge.serve.meter import ServiceMeter
from latentforge.serve.metrics import Metrics
from latentforge.serve.request import Batch, ImageRequest
from latentforge.serve.scheduler import BatchGains, JobChange, Limits, Scheduler
from latentforge.serve.worker.batch_timing import measured_rates
from latentforge.serve.worker.messages import (
    BatchDone,
    BatchEnd,
    BatchFailed,
    RawArray,
    RunBatch,
    StepDone,
)
from latentforge.serve.worker.replica import (
    Replica,
    ReplicaLostError,
    ReplicaState,
    WorkerLimits,
)

__all__ = ["ModelCard", "ModelSource", "Service", "ServiceOptions"]

_log = escaping_logger("latentforge.serve")

_TIDY_SECONDS = 5.0  # between two looks at what is kept too long

_ENDS = (Completed, Failed, Cancelled)
_READY = (ReplicaState.READY, ReplicaState.BUSY)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Engine directory to serve.

    Attributes:
        name: of the model in requests.
        directory: its engine directory.
        replicas: processes that run it.
        options: arguments of load() in these.
    """

    name: str
    directory: Path
    replicas: int = 1
    options: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Options of a service.

    Attributes:
        limits: of the queue.
        worker: times after which a process counts as hung.
        result_seconds: time for which results are kept.
        result_bytes: bytes of results that are kept.
        unavailable_seconds: time without any process after which a model's requests fail.
        measure_seconds: time that the measurement of batches may take per model at the start,
            where none is kept; 0 measures nothing.

    Raises:
        SettingsError: measure_seconds is no number from 0 to a million.
    """

    limits: Limits = Limits()
    worker: WorkerLimits = WorkerLimits()
    result_seconds: float = 600.0
    result_bytes: int = 1 << 28
    unavailable_seconds: float = 60.0
    measure_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_number("measure_seconds", self.measure_seconds, 0, 1e6)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelCard:
    """Model of a service.

    Attributes:
        source: engine directory.
        manifest: its manifest.
        replicas: processes that run it.
        open: set when these take requests, which is after the measurement of batches.
    """

    source: ModelSource
    manifest: Manifest
    replicas: tuple[Replica, ...]
    open: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def loaded(self) -> bool:
        """True while one of its processes has its engines loaded."""
        return any(replica.state in _READY for replica in self.replicas)

    @property
    def ready(self) -> bool:
        """True while one of its processes takes requests."""
        return self.open.is_set() and self.loaded

    @property
    def digest(self) -> str:
        """Start of the SHA-256 of the manifest, which has those of all files."""
        return hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest()[:12]


@dataclass(eq=False)
class _Slot:
    """Replica with its number in the scheduler.

    Attributes:
        number: unique among all models.
        model: its model.
        replica: the process.
        work: set when there may be something to run.
        batches: tasks of the batches that run.
    """

    number: int
    model: str
    replica: Replica
    work: asyncio.Event = field(default_factory=asyncio.Event)
    batches: set[asyncio.Task[None]] = field(default_factory=set)


class Service:
    """Models, their queues, and the jobs of clients.

    Args:
        sources: models; the first is the default one. Their names differ.
        options: of the service.
        ring: keys, whose limits hold.
        gains: batches that are worth it.
        metrics: where to record; new instruments if None.

    Attributes:
        models: models by name.
        metrics: instruments of the service.
        scheduler: the scheduler.

    Raises:
        SettingsError: two models have one name, or there is none.
        ManifestError: an engine directory does not match its manifest.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        *,
        options: ServiceOptions = ServiceOptions(),
        ring: KeyRing | None = None,
        gains: BatchGains | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        _check_names([source.name for source in sources])
        self.metrics = metrics if metrics is not None else Metrics.create()
        self._meter = ServiceMeter(self.metrics)
        self.models = {s.name: _card(s, options.worker, self._meter) for s in sources}
        ring = ring if ring is not None else KeyRing()
        self.scheduler = Scheduler(options.limits, gains, ring.limits)
        self._options = options
        self._limiter = RateLimiter(ring)
        self._store = JobStore(seconds=options.result_seconds, bytes=options.result_bytes)
        self._repeats = IdempotencyStore()
        self._readers: defaultdict[str, set[EventQueue]] = defaultdict(set)
        self._slots: list[_Slot] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._watch_gauges()

    @property
    def draining(self) -> bool:
        """True if no further requests are accepted."""
        return self.scheduler.draining

    # life

    async def start(self) -> None:
        """Start the processes of all models, let each run one step, and measure batches.

        Requests are accepted meanwhile, and wait.

        Raises:
            LatentforgeError: the engines of a model do not load; the error of load().
        """
        pairs = [(name, r) for name, card in self.models.items() for r in card.replicas]
        self._slots = [_Slot(number, name, r) for number, (name, r) in enumerate(pairs)]
        starting = [asyncio.ensure_future(slot.replica.start()) for slot in self._slots]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise
        if self._options.measure_seconds > 0 and self._options.limits.max_batch > 1:
            for card in self.models.values():  # one by one: two would slow each other
                await self._measure(card)
        for card in self.models.values():
            card.open.set()
        work = [*map(self._serve, self._slots), self._tidy()]
        self._tasks = [asyncio.create_task(part) for part in work]

    async def _tidy(self) -> None:
        """Forget results in time, also where no request comes, and let the system have their room.

        The C library keeps freed memory for what comes next: after a load that is nothing.
        """
        returned = 0
        while True:
            await asyncio.sleep(min(_TIDY_SECONDS, max(0.1, self._options.result_seconds / 2)))
            self._store.expire(time.time())
            if self._store.forgotten != returned and not self.scheduler.jobs:
                returned = self._store.forgotten
                await asyncio.to_thread(return_memory)

    async def _measure(self, card: ModelCard) -> None:
        """Let the scheduler know how many images are worth a batch on this machine."""
        with suppress(ReplicaLostError):  # it starts again, and runs images one by one
            rates = await measured_rates(
                card.replicas[0],
                card.manifest,
                max_batch=self._options.limits.max_batch,
                seconds=self._options.measure_seconds,
                options=card.source.options,
            )
            name, size = card.source.name, card.manifest.defaults
            gains = self.scheduler.gains.measured(name, size.height, size.width, rates)
            self.scheduler.gains = gains

    async def drain(self, timeout: float) -> None:
        """Accept no further requests, and wait until those accepted have ended.

        After ``timeout`` seconds the rest is cancelled.
        """
        self.scheduler.drain()
        waiting = asyncio.ensure_future(self._until_idle())
        try:
            await asyncio.wait({waiting}, timeout=timeout)
        finally:
            waiting.cancel()
        self._apply(self.scheduler.cancel_all("the server shuts down", self._now))

    async def close(self) -> None:
        """End the processes, and all jobs that have not ended."""
        self.scheduler.drain()
        self._apply(self.scheduler.cancel_all("the server shuts down", self._now))
        if self._deadline is not None:
            self._deadline.cancel()
        batches = [task for slot in self._slots for task in slot.batches]
        for task in (*self._tasks, *batches):
            task.cancel()
        await asyncio.gather(*self._tasks, *batches, return_exceptions=True)
        replicas = [replica for card in self.models.values() for replica in card.replicas]
        await asyncio.gather(*(replica.close() for replica in replicas))

    async def _until_idle(self) -> None:
        while self.scheduler.jobs:
            self._idle.clear()
            await self._idle.wait()

    # requests

    async def submit(
        self,
        request: ImageRequest,
        *,
        owner: str,
        deadline: float | None = None,
        idempotency: tuple[str, str] | None = None,
    ) -> Job:
        """Accept a request as a job.

        Args:
            request: to one of the models.
            owner: name of the API key.
            deadline: seconds from now after which it fails.
            idempotency: key of the request with a digest of its body; the job of an earlier
                request with the same is returned, unless it failed.

        Raises:
            ServeError: it is not accepted.
        """
        if idempotency is not None:
            if (repeated := self._repeated(owner, idempotency)) is not None:
                return repeated
        now, id = self._now, secrets.token_hex(16)
        try:
            changes = self._accepted(id, request, owner, deadline, now)
        except ServeError as error:
            self._meter.refuse(error)
            raise
        self._limiter.charge(owner, request.cost, now)
        self._meter.accept(id, now)
        job = Job(id=id, request=request, owner=owner, created=time.time())
        self._store.put(job, job.created)
        if idempotency is not None:
            self._repeats.remember(owner, *idempotency, id, now)
        self._apply(changes)
        self._set_deadline()
        self._wake()
        return self.get(id)

    def refusal(
        self, request: ImageRequest, *, owner: str, deadline: float | None = None
    ) -> ServeError | None:
        """Return the error that submit() would raise, and count it; None if it would accept.

        Args:
            request, owner, deadline: as for submit(), of a request without an idempotency key.
        """
        now = self._now
        end = None if deadline is None else now + deadline
        try:
            self._check(request, owner, now)
            self.scheduler.admit(request, owner=owner, deadline=end, now=now)
        except ServeError as error:
            self._meter.refuse(error)
            return error
        return None

    def get(self, id: str) -> Job:
        """Return a job as it stands.

        Raises:
            UnknownJobError, ExpiredJobError: there is none.
        """
        job = self._store.get(id, time.time())
        if job.state is not JobState.QUEUED:
            return job
        return replace(job, position=self.scheduler.position(id) or 0)

    def cancel(self, id: str) -> bool:
        """End a job; False if it has ended.

        Raises:
            UnknownJobError, ExpiredJobError: there is none.
        """
        self._store.get(id, time.time())
        changes = self.scheduler.cancel(id, "cancelled by the client", self._now)
        self._apply(changes)
        return bool(changes)

    async def events(self, id: str) -> AsyncGenerator[JobEvent, None]:
        """Yield the events of a job, from its start to its end.

        Past ones are shortened to what led to the present state, and a slow reader misses steps
        and previews, nothing else.

        Raises:
            UnknownJobError, ExpiredJobError: there is none.
        """
        reader = EventQueue(self.get(id).replay())
        self._readers[id].add(reader)
        try:
            event: JobEvent | None = None
            while not isinstance(event, _ENDS):
                event = await reader.next()
                yield event
        finally:
            self._readers[id].discard(reader)
            if not self._readers[id]:
                del self._readers[id]

    def _repeated(self, owner: str, idempotency: tuple[str, str]) -> Job | None:
        """Return the job of an earlier request with the same key, if it is worth repeating.

        One that failed is not: its client sends the request again so that it is tried again.
        """
        id = self._repeats.find(owner, *idempotency, self._now)
        if id is None:
            return None
        with suppress(ExpiredJobError):
            if (job := self.get(id)).state is not JobState.FAILED:
                return job
        self._repeats.forget(owner, idempotency[0])
        return None

    def _accepted(
        self, id: str, request: ImageRequest, owner: str, deadline: float | None, now: float
    ) -> Sequence[JobChange]:
        self._check(request, owner, now)
        end = None if deadline is None else now + deadline
        return self.scheduler.submit(id, request, owner=owner, deadline=end, now=now)

    def _check(self, request: ImageRequest, owner: str, now: float) -> None:
        self._check_available(request.model)
        self._limiter.check(owner, request.cost, now)

    def _check_available(self, model: str) -> None:
        """Refuse a request to a model whose processes are lost and do not come back."""
        slots = [slot for slot in self._slots if slot.model == model]
        if slots and all(slot.replica.lost_seconds > self._patience(slot) for slot in slots):
            raise ModelUnavailableError(
                f"{model} does not run: its process ended and does not come back; the log of the "
                "server says why",
                retry_after=self._options.worker.longest_pause,
            )

    # batches

    async def _serve(self, slot: _Slot) -> None:
        """Let a replica run what the scheduler has for it, until it is closed."""
        while True:
            if not await self._is_ready(slot):
                continue
            self._expire()
            slot.work.clear()
            batch = self.scheduler.next_batch(slot.model, slot.number, self._now)
            if batch is None:
                await slot.work.wait()
                continue
            self._started(batch)
            task = asyncio.create_task(self._run(slot, batch))
            slot.batches.add(task)
            task.add_done_callback(slot.batches.discard)

    async def _is_ready(self, slot: _Slot) -> bool:
        """Wait until a replica can run a batch; fail what waits if that takes too long."""
        if slot.replica.state in _READY:
            return True
        waiting = asyncio.ensure_future(slot.replica.ready())
        try:  # not wait_for(), which may lose a cancellation before Python 3.12
            done, _ = await asyncio.wait({waiting}, timeout=self._patience(slot))
        finally:
            waiting.cancel()
        if not done:
            self._give_up(slot.model)
        return bool(done)

    def _give_up(self, model: str) -> None:
        """Fail what waits for a model none of whose processes comes back."""
        try:
            self._check_available(model)
        except ModelUnavailableError as error:
            failed = Failed(error.code, str(error))
            self._apply(self.scheduler.unavailable(model, failed, self._now))

    async def _run(self, slot: _Slot, batch: Batch) -> None:
        """Run a batch on a replica, whatever becomes of it."""
        try:
            ready = slot.replica.state in _READY
            if not ready or not self.scheduler.is_needed(batch.id):  # since this task was made
                self.scheduler.stopped(batch.id, self._now)
                return
            end = await slot.replica.run(_order(batch), partial(self._stepped, batch))
            self._ended(batch, end)
        except ReplicaLostError:
            self._apply(self.scheduler.replica_lost(slot.number, self._now))
        except LatentforgeError as error:  # the order could not be sent
            self._apply(self.scheduler.failed(batch.id, str(error), self._now))
        finally:
            self._meter.end(batch)
            self._wake()

    def _started(self, batch: Batch) -> None:
        self._meter.start(batch, self._now)
        for id in dict.fromkeys(row.job for row in batch.rows):
            if self._store.get(id, time.time()).started is None:
                self._publish(id, Started())
        for id, position in self.scheduler.positions(batch.model).items():
            if self._readers.get(id):
                self._publish(id, Queued(position))

    def _stepped(self, batch: Batch, step: StepDone) -> None:
        pictures = () if step.previews is None else step.previews.parts
        changes = self.scheduler.stepped(batch.id, step.step, step.count, self._now, pictures)
        live = sum(len(c.event.images) for c in changes if isinstance(c.event, Stepped))
        self._meter.step(batch, step.step, live, self._now)
        self._apply(changes)

    def _ended(self, batch: Batch, end: BatchEnd) -> None:
        if isinstance(end, BatchDone):
            images = end.images.parts
            if len(images) != len(batch.rows):
                raise BackendError(f"{len(images)} images came for {len(batch.rows)} prompts")
            self._report_ignored(batch, end)
            self._apply(self.scheduler.finished(batch.id, images, self._now))
        elif isinstance(end, BatchFailed):
            self._apply(self.scheduler.failed(batch.id, end.message, self._now, end.code))
        else:
            self.scheduler.stopped(batch.id, self._now)

    def _report_ignored(self, batch: Batch, end: BatchDone) -> None:
        """Let jobs know which part of their prompts had no effect, once each."""
        for row, ends in zip(batch.rows, end.ignored, strict=True):
            with suppress(ExpiredJobError):  # it ended long ago, such as by a cancel
                job = self._store.get(row.job, time.time())
                if any(ends) and job.ignored is None and job.end is None:
                    self._publish(row.job, IgnoredText(*ends))

    # changes

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _patience(self, slot: _Slot) -> float:
        """Return the seconds that a lost process has to come back."""
        loaded = slot.replica.loaded
        return self._options.unavailable_seconds + (0.0 if loaded is None else 2 * loaded.seconds)

    def _apply(self, changes: Sequence[JobChange]) -> None:
        """Publish what changed, and let replicas stop what runs for nobody."""
        for change in changes:
            self._publish(change.job, change.event)
        for number, batch in self.scheduler.stops():
            self._slots[number].replica.cancel(batch)
        if any(isinstance(change.event, _ENDS) for change in changes):
            self._set_deadline()
        if not self.scheduler.jobs:
            self._idle.set()

    def _publish(self, id: str, event: JobEvent) -> None:
        now = time.time()
        job = self._store.get(id, now)
        self._meter.happen(job, event, self._now)
        self._store.put(job.after(event, now), now)
        for reader in self._readers.get(id, ()):
            self._meter.drop(reader.push(event))

    def _wake(self) -> None:
        for slot in self._slots:
            slot.work.set()

    def _expire(self) -> None:
        self._apply(self.scheduler.expire(self._now))

    def _set_deadline(self) -> None:
        """Arrange for the next deadline."""
        wake = self.scheduler.wake_at(self._now)
        if self._deadline is not None:
            if self._deadline.when() == wake and not self._deadline.cancelled():
                return
            self._deadline.cancel()
            self._deadline = None
        if wake is not None:
            self._deadline = asyncio.get_running_loop().call_at(wake, self._expire)

    def _watch_gauges(self) -> None:
        metrics, scheduler = self.metrics, self.scheduler
        for name, card in self.models.items():
            metrics.watch(metrics.waiting, partial(scheduler.depth, name), model=name)
            metrics.watch(metrics.running, partial(scheduler.active, name), model=name)
            metrics.watch(metrics.permits, partial(scheduler.held, name), model=name)
            loaded = partial(getattr, card, "loaded")
            metrics.watch(metrics.model_loaded, loaded, model=name, digest=card.digest)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise SettingsError("no model to serve: give an engine directory")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"two models are named {min(repeated)}: give each a name of its own")


def _card(source: ModelSource, limits: WorkerLimits, meter: ServiceMeter) -> ModelCard:
    replicas = tuple(
        Replica(
            source.directory,
            name=source.name if source.replicas == 1 else f"{source.name}/{index}",
            options=source.options,
            limits=limits,
            on_loss=partial(meter.lose, source.name),
        )
        for index in range(source.replicas)
    )
    manifest = Manifest.read(source.directory, hashes=False)  # each process compares them
    return ModelCard(source=source, manifest=manifest, replicas=replicas)


def _order(batch: Batch) -> RunBatch:
    images = batch.images or ()
    return RunBatch(
        batch=batch.id,
        settings=batch.settings,
        images=tuple(RawArray.of(image) for image in images),
        mask=None if batch.mask is None else RawArray.of(batch.mask),
        depth=None if batch.depths is None else RawArray.of(batch.depths),
        previews=batch.previews,
    )
