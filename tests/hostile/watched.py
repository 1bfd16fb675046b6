"""Runs of numbered cases in a forked process that is watched for crashes, hangs and memory."""

import json
import os
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest

from latentforge.runtime.errors import LatentforgeError

__all__ = ["Outcome", "failures", "numbered", "watched"]

SECONDS = 20.0
"""Time limit of a case, in seconds of a processor: other programs may slow it down."""

MEMORY = 2 << 30
"""Most bytes that a case may add to the resident memory of its process."""

_WAIT, _LONGEST = 5.0, 300.0
"""Seconds between two looks at a case, and those in which it must end however busy the machine."""

_ADDRESSES = 8 << 30
_MAX_MESSAGE = 1000


@dataclass(frozen=True)
class Outcome:
    """End of a case.

    Attributes:
        index: number of the case.
        end: ``works``, ``refused``, or the way in which it failed.
        detail: the message, or the traceback of a failure.
        seconds: of a processor, in all threads.
        memory: bytes of resident memory that the case added at its peak.
        limit: most seconds of a processor that it may take.
    """

    index: int
    end: str
    detail: str
    seconds: float
    memory: int
    limit: float = SECONDS

    @property
    def failed(self) -> bool:
        """True unless the case worked or was refused, in time and without much memory."""
        slow = self.seconds > self.limit or self.memory > MEMORY
        return slow or self.end not in ("works", "refused")


def failures(outcomes: Sequence[Outcome], name: Callable[[int], str]) -> list[str]:
    """Return a line for each case that failed, with its name."""
    return [
        f"{each.index} {name(each.index)}: {each.end} ({each.seconds:.1f} s, "
        f"{each.memory >> 20} MiB): {each.detail[-600:]}"
        for each in outcomes
        if each.failed
    ]


def numbered(few: range, *, full: int) -> pytest.MarkDecorator:
    """Return a mark of a test that has `indices`: a few of its cases, or, slowly, the first ones.

    Args:
        few: cases of the quick test.
        full: number of cases of the slow one.
    """
    marks = [pytest.mark.slow, pytest.mark.timeout(3000)]
    sets = [pytest.param(few, id="few"), pytest.param(range(full), id="full", marks=marks)]
    return pytest.mark.parametrize("indices", sets)


def watched(
    run: Callable[[int], object], indices: Sequence[int], *, limit: float = SECONDS
) -> Iterator[Outcome]:
    """Run cases in a forked process, and yield how each ended.

    A process that crashes or hangs is replaced, and the cases after it go on in the next.

    Args:
        run: the case of an index; it is refused with a LatentforgeError.
        indices: the cases.
        limit: most seconds of a processor that a case may take.
    """
    remaining = list(indices)
    while remaining:
        for outcome in _process(run, tuple(remaining), limit):
            remaining.remove(outcome.index)
            yield replace(outcome, limit=limit)


def _process(
    run: Callable[[int], object], indices: Sequence[int], limit: float
) -> Iterator[Outcome]:
    """Yield outcomes of one process, up to a case that ends it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads of libraries
        child = os.fork()
    if child == 0:
        os.close(reader)
        _serve(run, indices, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        try:
            yield from _outcomes(lines, child, indices, limit)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _outcomes(lines: Any, child: int, indices: Sequence[int], limit: float) -> Iterator[Outcome]:
    for index in indices:
        start, before = time.monotonic(), _processor_seconds(child)
        ready = False
        while not ready and not _hangs(time.monotonic() - start, child, before, limit):
            ready = bool(select.select([lines], [], [], _WAIT)[0])
        line = lines.readline() if ready else b""
        if not line:
            end = "crashes" if ready else "hangs"
            yield Outcome(index, end, "", _processor_seconds(child) - before, 0)
            return
        yield Outcome(**json.loads(line))


def _hangs(waited: float, child: int, before: float, limit: float) -> bool:
    return waited > _LONGEST or _processor_seconds(child) - before > limit + _WAIT


def _processor_seconds(pid: int) -> float:
    """Return the seconds that a process has computed, in all threads."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(run: Callable[[int], object], indices: Sequence[int], writer: int) -> None:
    """Run the cases, and write a line for each; this never returns."""
    try:
        _limit_addresses()
        for index in indices:
            line = json.dumps(asdict(_outcome(run, index))).encode() + b"\n"
            os.write(writer, line)
    finally:
        os._exit(0)


def _outcome(run: Callable[[int], object], index: int) -> Outcome:
    before, start = _reset_peak(), time.process_time()
    try:
        run(index)
        end, detail = "works", ""
    except LatentforgeError as error:
        detail = str(error)
        short = len(detail) <= _MAX_MESSAGE and detail.isprintable()
        end = "refused" if short else "has a message of several lines, or a long one"
        detail = detail[:_MAX_MESSAGE]
    except BaseException:
        end, detail = "foreign", traceback.format_exc()[-2000:]
    detail = detail.encode(errors="replace").decode()
    return Outcome(index, end, detail, time.process_time() - start, _memory("VmHWM") - before)


def _limit_addresses() -> None:
    """Let a runaway allocation fail in this process, and leave the machine its memory."""
    limit = _memory("VmSize") + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reset_peak() -> int:
    """Start a new peak of resident memory, and return the memory of now in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10
