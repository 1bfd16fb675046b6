"""Replica of a model: a worker process that is started, watched, ended and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from latentforge.runtime import errors
from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import BackendError, LatentforgeError
from latentforge.runtime.isolation import child_environment, program_command
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.text import one_line
from latentforge.runtime.validation import check_number
from latentforge.serve.worker import messages

__all__ = ["Replica", "ReplicaLostError", "ReplicaState", "WorkerLimits"]

_log = escaping_logger("latentforge.serve")

_PIECE = 1 << 16  # bytes of one read of a log
_LAST_LINES = 20  # of a worker's standard error, for the reason of its end
_PROGRAM = "latentforge.serve.worker.program"


class ReplicaLostError(BackendError):
    """End of a worker process, with what ran in it."""


class ReplicaState(str, Enum):
    """State of a replica."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    LOST = "lost"  # waits to start again
    CLOSED = "closed"


_RUNS = (ReplicaState.READY, ReplicaState.BUSY)


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Times after which a worker counts as hung, and pauses before it starts again, in seconds.

    Attributes:
        load: longest time until the engines are loaded and have run one step.
        step: longest time without an answer while a batch runs. The first step includes the text
            encoders, and the decoder follows the last.
        ping: time between two questions to a worker without a batch.
        first_pause: before it starts again; doubled with each loss in a row.
        longest_pause: limit of that.

    Raises:
        SettingsError: one is no number from 0.01 to a million.
    """

    load: float = 1800.0
    step: float = 300.0
    ping: float = 5.0
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("load", "step", "ping", "first_pause", "longest_pause"):
            check_number(name, getattr(self, name), 0.01, 1e6)

    def pause(self, losses: int) -> float:
        """Return the pause after this many losses in a row."""
        return min(self.longest_pause, self.first_pause * 2.0 ** min(losses - 1, 30))


@dataclass(eq=False)
class _RunningBatch:
    """Batch that runs: the caller's function for steps, and its end."""

    report: Callable[[messages.StepDone], None]
    end: asyncio.Future[messages.BatchEnd]


class _Worker(asyncio.Protocol):
    """One life of the process: its messages, and the moment of the last one.

    Attributes:
        loaded: set when its engines are loaded.
        ended: set when its socket has closed.
        last_answer: time of the event loop.
        running: the batches that run, by number.
        fault: why the process must be killed; empty if it ended by itself.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[messages.EnginesLoaded] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.last_answer = loop.time()
        self.running: dict[int, _RunningBatch] = {}
        self.fault = ""
        self._loop = loop
        self._reader = messages.FrameReader(messages.Answer)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.last_answer = self._loop.time()
        try:
            for answer in self._reader.feed(data):
                self._take(answer)
        except BackendError as error:
            self.disconnect(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def send(self, order: messages.Order) -> None:
        if self._transport is not None:
            self._transport.write(messages.frame(order))

    def disconnect(self, fault: str = "") -> None:
        self.fault = self.fault or fault
        if self._transport is not None:
            self._transport.abort()

    def _take(self, answer: messages.Answer) -> None:
        if isinstance(answer, messages.EnginesLoaded) and not self.loaded.done():
            self.loaded.set_result(answer)
        if isinstance(answer, messages.LoadFailed) and not self.loaded.done():
            kind = getattr(errors, answer.error, BackendError)
            self.loaded.set_exception(kind(answer.message))
        running = self.running.get(getattr(answer, "batch", -1))
        if running is None:
            return
        if isinstance(answer, messages.StepDone):
            running.report(answer)
        if isinstance(answer, messages.BatchEnd) and not running.end.done():
            running.end.set_result(answer)


@dataclass(eq=False)
class _Process:
    """Process of a worker, with the ends of what connects it to this one.

    Attributes:
        process: the process.
        worker: its messages.
        lifeline: pipe whose end ends the process.
        reason: why it ended, once it has.
        lines: the last of what it printed.
    """

    process: asyncio.subprocess.Process
    worker: _Worker
    lifeline: int
    reason: asyncio.Future[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    @classmethod
    async def start(cls) -> _Process:
        """Start the program and connect to it.

        Raises:
            ReplicaLostError: the system starts no further process.
        """
        try:
            return await cls._start()
        except OSError as error:
            raise ReplicaLostError(f"no process could be started: {error}") from error

    @classmethod
    async def _start(cls) -> _Process:
        loop = asyncio.get_running_loop()
        with ExitStack() as passed, ExitStack() as failed:
            ours, its = socket.socketpair()
            failed.enter_context(ours)
            passed.enter_context(its)
            read, write = os.pipe()
            failed.callback(os.close, write)
            passed.callback(os.close, read)
            transport, worker = await loop.create_connection(_Worker, sock=ours)
            failed.callback(transport.abort)
            process = await _started(its.fileno(), read)
            failed.pop_all()
        return cls(process, worker, write, loop.create_future())

    async def drain_log(self, name: str) -> None:
        """Pass what libraries print on to the log, until the process ends."""
        assert self.process.stdout is not None
        while piece := await self.process.stdout.read(_PIECE):
            for line in piece.decode(errors="replace").splitlines():
                text = one_line(line, limit=1000)
                self.lines.append(text)
                _log.warning("%s: %s", name, text)

    async def end(self) -> int:
        """Kill the process if it still runs, free what connects it, and return its status."""
        self.worker.disconnect()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        status = await self.process.wait()
        os.close(self.lifeline)
        return status


async def _started(connection: int, lifeline: int) -> asyncio.subprocess.Process:
    """Start the program, in a group of its own: an interrupt from the keyboard is not for it."""
    return await asyncio.create_subprocess_exec(
        *program_command(_PROGRAM, str(connection), str(lifeline)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(),
        pass_fds=(connection, lifeline),
        start_new_session=True,
    )


class Replica:
    """Model in a process of its own, which runs batches; several at once in turns.

    Use it in one event loop: start(), then run() batch after batch, and close().

    Args:
        directory: the engine directory.
        name: for the log.
        options: arguments of load() in the process.
        limits: times after which it counts as hung.
        on_loss: called after each loss of a process.

    Attributes:
        state: present state.
        losses: processes that ended on their own, or hung and were killed.
        last_error: reason of the last of them; empty if there was none.
        loaded: what the present process answered when it was ready.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "worker",
        options: Mapping[str, bool | int | float | str | None] | None = None,
        limits: WorkerLimits = WorkerLimits(),
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self.state = ReplicaState.STARTING
        self.losses = 0
        self.last_error = ""
        self.loaded: messages.EnginesLoaded | None = None
        self._name = name
        self._limits = limits
        self._on_loss = on_loss
        self._order = messages.LoadEngines(
            directory=str(directory.absolute()), options=dict(options or {})
        )
        self._ready = asyncio.Event()
        self._process: _Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._row = 0  # losses in a row
        self._lost_since: float | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None between two of them."""
        return None if self._process is None else self._process.process.pid

    async def start(self) -> None:
        """Start the process, load its engines and run one step.

        Raises:
            LatentforgeError: the engines do not load; the error of load(). Nothing runs then.
        """
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(first))
        try:
            await asyncio.wait((first, self._supervisor), return_when="FIRST_COMPLETED")
            await (first if first.done() else self._supervisor)
        except BaseException:
            await self.close()
            raise

    async def ready(self) -> None:
        """Wait until a process has its engines loaded.

        Raises:
            ReplicaLostError: the replica is closed.
        """
        await self._ready.wait()
        if self.state is ReplicaState.CLOSED:
            raise ReplicaLostError("the server is shutting down")

    async def run(
        self, order: messages.RunBatch, report: Callable[[messages.StepDone], None]
    ) -> messages.BatchEnd:
        """Run a batch and return its end, calling ``report`` after each step.

        A task that is cancelled in here ends the process: nothing else tells it at once.

        Raises:
            ReplicaLostError: the process ended or hung. Another starts by itself: see ready().
        """
        process = self._process
        if process is None or self.state not in _RUNS:
            raise ReplicaLostError(f"{self._name} is {self.state.value}, not ready")
        worker, loop = process.worker, asyncio.get_running_loop()
        running = worker.running[order.batch] = _RunningBatch(report, loop.create_future())
        worker.last_answer = loop.time()
        self._become(ReplicaState.BUSY)
        try:
            worker.send(order)
            await asyncio.wait((running.end, worker.ended), return_when="FIRST_COMPLETED")
        except asyncio.CancelledError:
            self._become(ReplicaState.LOST)
            worker.disconnect("its batch was abandoned")
            raise
        finally:
            del worker.running[order.batch]
        if not running.end.done():
            raise ReplicaLostError(await asyncio.shield(process.reason))
        self._row = 0
        if self.state is ReplicaState.BUSY and not worker.running:
            self._become(ReplicaState.READY)
        return running.end.result()

    def cancel(self, batch: int) -> None:
        """Stop a batch after the step that runs; run() returns BatchStopped, or its end."""
        if self._process is not None and self.state is ReplicaState.BUSY:
            self._process.worker.send(messages.CancelBatch(batch=batch))

    @property
    def silence(self) -> float:
        """Seconds since the last message of the process; 0 if none runs."""
        if self._process is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._process.worker.last_answer

    @property
    def lost_seconds(self) -> float:
        """Seconds since the process was lost; 0 if there is one, or before the first."""
        if self._lost_since is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._lost_since

    async def close(self) -> None:
        """End the process at once. A batch that runs raises ReplicaLostError."""
        self._become(ReplicaState.CLOSED)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None

    def _become(self, state: ReplicaState) -> None:
        """Change the state, and wake those who wait for it."""
        self.state = state
        if state in _RUNS:
            self._lost_since = None
        elif state is ReplicaState.LOST and self._lost_since is None:
            self._lost_since = asyncio.get_running_loop().time()
        waits = state not in (*_RUNS, ReplicaState.CLOSED)
        self._ready.clear() if waits else self._ready.set()

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep a process running, until this task is cancelled."""
        while True:
            try:
                await self._live(first)
            except LatentforgeError as error:
                self.last_error = str(error)
                if not first.done():
                    first.set_exception(error)
                    return
            self.losses, self._row = self.losses + 1, self._row + 1
            self._on_loss()
            pause = self._limits.pause(self._row)
            _log.error("%s: %s; starts again in %.1f s", self._name, self.last_error, pause)
            await asyncio.sleep(pause)

    async def _live(self, first: asyncio.Future[None]) -> None:
        """Start a process, and watch it until it has ended; its end is in last_error.

        Raises:
            LatentforgeError: its engines do not load.
        """
        self._become(ReplicaState.STARTING)
        self._process = process = await _Process.start()
        log = asyncio.create_task(process.drain_log(self._name))
        try:
            process.worker.send(self._order)
            self.loaded = await self._load(process.worker)
            self._become(ReplicaState.READY)
            if not first.done():
                first.set_result(None)
            await self._watch(process.worker)
        finally:
            if self.state is not ReplicaState.CLOSED:
                self._become(ReplicaState.LOST)
            self._process = None
            await _completed(self._bury(process, log))

    async def _bury(self, process: _Process, log: asyncio.Task[None]) -> None:
        """End a process, and note why it ended."""
        status = await process.end()
        await log
        closed = "the server is shutting down" if self.state is ReplicaState.CLOSED else ""
        fault = process.worker.fault or closed
        self.last_error = fault or _reason(status, process.lines)
        process.reason.set_result(self.last_error)

    async def _load(self, worker: _Worker) -> messages.EnginesLoaded:
        """Wait until the engines are loaded."""
        await asyncio.wait(
            (worker.loaded, worker.ended),
            timeout=self._limits.load,
            return_when="FIRST_COMPLETED",
        )
        if worker.loaded.done():
            return worker.loaded.result()
        if worker.ended.done():
            raise ReplicaLostError("the process ended while it loaded its engines")
        raise ReplicaLostError(
            f"the engines were not loaded within {self._limits.load:g} s: raise --load-timeout"
        )

    async def _watch(self, worker: _Worker) -> None:
        """Wait until the process ends, or must be killed because it does not answer."""
        limits = self._limits
        tick = min(limits.ping, limits.step / 4)
        while not worker.ended.done():
            if self.silence > limits.step:
                worker.disconnect(f"the process did not answer for {limits.step:g} s: killed")
                return
            if not worker.running:
                worker.send(messages.Ping())
            await asyncio.wait((worker.ended,), timeout=tick)


async def _completed(work: Coroutine[Any, Any, None]) -> None:
    """Do work to its end, also where this task is cancelled meanwhile: it is cancelled then."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def _reason(status: int, lines: deque[str]) -> str:
    """Return why a process ended, by its status and what it printed last."""
    if status == -signal.SIGKILL:
        return "the process was killed by the system, which happens when memory runs out"
    last = lines[-1] if lines else "no output"
    if status < 0:
        return f"the process ended by {signal.Signals(-status).name}: {last[:300]}"
    return f"the process ended with status {status}: {last[:300]}"
