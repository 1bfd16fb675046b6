"""Worker process: loads the engines of one model and makes images, batch after batch.

Two batches run in turns, a step of one and a step of the other: see turns.py.

Started by Replica as ``program.py SOCKET LIFELINE``, two inherited file descriptors. It has one
thread: messages are read between two steps, so that a limit of memory holds for a run and nothing
competes with it.

It ends when the server does. The kernel sees to that: the lifeline is a pipe that the server holds
open, and its end raises a signal whose default action ends the process, also in the middle of a
library's call.
"""

import fcntl
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import numpy as np

from latentforge.runtime.backends import NO_MEMORY, return_memory
from latentforge.runtime.compile.verify import trial
from latentforge.runtime.errors import BackendError, LatentforgeError, SettingsError
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import DenoisingStep, Pipeline
from latentforge.runtime.settings import Settings
from latentforge.runtime.text import one_line
from latentforge.serve.turns import Turns
from latentforge.serve.worker import messages

__all__ = ["is_preview_due", "main"]

_REPORT_SECONDS = 0.05  # between two steps that are reported
_PIECE = 1 << 20  # bytes of one read
_QUOTING = "latentforge.runtime.conditioning.tokenizer"  # its warnings quote prompts


class _Channel:
    """Socket to the server: orders in, answers out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = messages.FrameReader(messages.Order)
        self._orders: deque[messages.Order] = deque()

    def send(self, answer: messages.Answer) -> None:
        self._connection.sendall(messages.frame(answer))

    def receive(self) -> messages.Order:
        """Return the next order; EOFError once the server is gone."""
        while not self._orders:
            self._read()
        return self._orders.popleft()

    def arrived(self) -> Iterator[messages.Order]:
        """Yield the orders that have arrived, without waiting for one."""
        while select.select([self._connection], [], [], 0)[0]:
            self._read()
        while self._orders:
            yield self._orders.popleft()

    def _read(self) -> None:
        piece = self._connection.recv(_PIECE)
        if not piece:
            raise EOFError
        self._orders.extend(self._reader.feed(piece))


def main() -> None:
    """Serve the batches that arrive on the socket until the server closes it."""
    descriptor, lifeline = map(int, sys.argv[1:3])
    _end_with(lifeline)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all at once: the server decides
    logging.getLogger(_QUOTING).setLevel(logging.ERROR)
    channel = _Channel(socket.socket(fileno=descriptor))
    with suppress(EOFError, ConnectionError):
        if (pipeline := _load(channel)) is not None:
            _Runs(channel, pipeline).serve()


def _end_with(lifeline: int) -> None:
    """Let the end of a pipe raise SIGIO, which ends this process."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([lifeline], [], [], 0)[0]:  # it ended before the signal was set up
        raise SystemExit(1)


def _load(channel: _Channel) -> Pipeline | None:
    """Load the engines that the first order names, and run one step; None if that fails."""
    start, order = time.perf_counter(), channel.receive()
    if not isinstance(order, messages.LoadEngines):
        raise BackendError(f"a worker process got {type(order).__name__} before its engines")
    try:
        pipeline = _warm(order)
    except (LatentforgeError, MemoryError, OSError) as error:
        known = isinstance(error, LatentforgeError)
        kind = type(error).__name__ if known else "BackendError"
        channel.send(messages.LoadFailed(error=kind, message=_message(error)))
        return None
    seconds = time.perf_counter() - start
    channel.send(messages.EnginesLoaded(seconds=seconds, versions=pipeline.versions()))
    return pipeline


def _warm(order: messages.LoadEngines) -> Pipeline:
    """Load the engines, and those of the acceleration plan, and run one step."""
    pipeline = load(order.directory, example_images=True, **order.options)  # type: ignore[arg-type]
    trial(pipeline, steps=1)
    pipeline.example_images = False  # for the trial: a client's request has an image, or fails
    if (plan := pipeline.manifest.acceleration) is not None:
        for name in (plan.variant, *(["denoiser_cached"] if plan.cached_steps else [])):
            pipeline.load_engine(name)
    return pipeline


@dataclass(eq=False)
class _BatchRun:
    """Batch that runs.

    Attributes:
        order: its order.
        start: time at which it arrived.
        reported: time at which a step was last reported; 0 before the first.
        steps: its steps, once it has begun.
        last: the last of these so far.
    """

    order: messages.RunBatch
    start: float
    reported: float = 0.0
    steps: Iterator[DenoisingStep] | None = None
    last: DenoisingStep | None = None


class _Runs:
    """Batches that run, a step at a time, and orders that are read between the steps."""

    def __init__(self, channel: _Channel, pipeline: Pipeline) -> None:
        self._channel = channel
        self._pipeline = pipeline
        self._runs: dict[int, _BatchRun] = {}
        self._turns = Turns()

    def serve(self) -> None:
        """Run what arrives; EOFError once the server is gone."""
        while True:
            for order in self._channel.arrived() if self._runs else [self._channel.receive()]:
                self._obey(order)
            if self._runs:
                self._step(self._runs[self._turns.next()])

    def _obey(self, order: messages.Order) -> None:
        if isinstance(order, messages.Ping):
            self._channel.send(messages.Pong())
        if isinstance(order, messages.RunBatch):
            self._runs[order.batch] = _BatchRun(order, time.perf_counter())
            self._turns.add(order.batch)
        if (
            isinstance(order, messages.CancelBatch)
            and (run := self._runs.get(order.batch)) is not None
        ):
            steps = 0 if run.last is None else run.last.index + 1
            self._end(messages.BatchStopped(batch=order.batch, steps=steps))

    def _step(self, run: _BatchRun) -> None:
        """Do one step of a batch, or decode its images, and answer."""
        start, batch = time.perf_counter(), run.order.batch
        answer = self._answer(run)
        self._turns.ran(batch, time.perf_counter() - start)
        self._report(run, answer) if isinstance(answer, messages.StepDone) else self._end(answer)

    def _report(self, run: _BatchRun, step: messages.StepDone) -> None:
        """Report a step, unless another was a moment ago: messages may cost more than steps."""
        now = time.perf_counter()
        shown = step.previews is not None or step.step == step.count
        if shown or now - run.reported >= _REPORT_SECONDS:
            run.reported = now
            self._channel.send(step)

    def _answer(
        self, run: _BatchRun
    ) -> messages.StepDone | messages.BatchDone | messages.BatchFailed:
        try:
            if run.steps is None:
                run.steps = _steps(self._pipeline, run.order)
            if (step := next(run.steps, None)) is None:
                return _images(self._pipeline, run)
            run.last = step
            return _progress(self._pipeline, run.order, step)
        except Exception as error:
            return _failure(run.order, error)

    def _end(self, answer: messages.BatchEnd) -> None:
        del self._runs[answer.batch]
        self._turns.remove(answer.batch)
        self._channel.send(answer)


def _failure(order: messages.RunBatch, error: Exception) -> messages.BatchFailed:
    """Return the answer about a batch that an error ended."""
    if not isinstance(error, LatentforgeError | MemoryError):
        traceback.print_exc()  # a fault of the program, which the server's log shows
    return_memory()
    message = _message(error)
    exhausted = NO_MEMORY in message
    code = "invalid_value" if isinstance(error, SettingsError) else "generation_failed"
    return messages.BatchFailed(
        batch=order.batch, code="out_of_memory" if exhausted else code, message=message
    )


def _steps(pipeline: Pipeline, order: messages.RunBatch) -> Iterator[DenoisingStep]:
    return pipeline.steps(
        order.settings,
        image=[image.array for image in order.images] or None,
        mask=None if order.mask is None else order.mask.array,
        depth_map=None if order.depth is None else order.depth.array,
    )


def _images(pipeline: Pipeline, run: _BatchRun) -> messages.BatchDone:
    """Decode the images after the last step."""
    assert run.last is not None  # there is no run without steps
    result = run.last.result()
    pixels = np.stack([np.asarray(image) for image in result.images])
    return messages.BatchDone(
        batch=run.order.batch,
        images=messages.RawArray.of(pixels),
        ignored=_ignored(pipeline, run.order.settings),
        seconds=time.perf_counter() - run.start,
        stages=result.timings.stages,
    )


def _ignored(pipeline: Pipeline, settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return the ends of each image's prompts that the text encoders have no room for."""
    names = {encoder.tokenizer for encoder in pipeline.manifest.conditioning.encoders}
    used = [pipeline.tokenizers[name] for name in names]

    @cache
    def end(text: str) -> str:
        return next(filter(None, (tokenizer.ignored(text) for tokenizer in used)), "")

    negatives = settings.negative_prompts if settings.uses_guidance else ()
    texts = zip_longest(settings.prompts, negatives, fillvalue="")
    return tuple((end(prompt), end(negative)) for prompt, negative in texts)


def _progress(
    pipeline: Pipeline, order: messages.RunBatch, step: DenoisingStep
) -> messages.StepDone:
    previews = None
    mapped = pipeline.manifest.preview is not None
    if mapped and is_preview_due(step.index, step.count, order.previews):
        previews = np.stack([np.asarray(image) for image in step.quick_preview()])
    return messages.StepDone(
        batch=order.batch,
        step=step.index + 1,
        count=step.count,
        previews=None if previews is None else messages.RawArray.of(previews),
    )


def is_preview_due(index: int, count: int, previews: int) -> bool:
    """Return True after the steps whose previews divide a run evenly; never after the last.

    Args:
        index: 0 after the first of ``count`` steps.
        count: steps of the run.
        previews: that are wanted; fewer if there are not as many steps.
    """
    parts = previews + 1
    crossed = (index + 1) * parts // count > index * parts // count
    return crossed and index + 1 < count


def _message(error: BaseException) -> str:
    """Return the message of an error on one line."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    return one_line(error, limit=None if isinstance(error, LatentforgeError) else 300)


if __name__ == "__main__":
    main()
