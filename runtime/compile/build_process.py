"""Build of one engine in a process of its own.

A build takes gigabytes, and a library that runs out of memory ends its process: the caller must not
share either. As a program, this module reads a BuildOrder as JSON from standard input, and writes
JSON lines (runtime/process.py) to standard output:

    {"activity": "optimizing", "done": 0, "total": 1}      progress, any number of times
    {"device": {}, "seconds": 1.5, "peak_memory": N}       a BuiltEngine; the process ends
    {"error": "BackendError", "message": "why"}            in place of it; the process ends
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec

from latentforge.runtime import backends, errors
from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import BackendError, LatentforgeError
from latentforge.runtime.isolation import child_environment, program_command
from latentforge.runtime.machine import peak_memory
from latentforge.runtime.manifest import Component
from latentforge.runtime.process import kill, parse_message, send, take_stdout
from latentforge.runtime.record import Record

__all__ = ["BuildOrder", "BuiltEngine", "build", "main"]

_MIN_INTERVAL = 0.05  # seconds between two progress messages: more would not be visible


class BuildOrder(Record, frozen=True, kw_only=True):
    """Order to build one engine from the graph onnx into the file target, both paths."""

    onnx: str
    target: str
    component: Component  # description of the engine, with the backend and its options


class BuiltEngine(Record, frozen=True, kw_only=True):
    """Result of a build, with what the engine is bound to: see Backend.compile()."""

    device: dict[str, str]
    seconds: float
    peak_memory: int  # of the build's process, in bytes


def build(order: BuildOrder, report: backends.Report) -> BuiltEngine:
    """Build an engine in another process and wait for it, reporting its progress.

    Raises:
        LatentforgeError: the backend's own error, or a BackendError if the process died.
    """
    command = program_command("latentforge.runtime.compile.build_process")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=child_environment(),
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the process died: see _raise_died()
                process.stdin.write(msgspec.json.encode(order).decode())
                process.stdin.close()
            with at_forced_end(lambda: kill(process)):
                answer = _read_answer(process.stdout, report)
        finally:
            process.stdout.close()  # so that a process that still writes ends
            if sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
        return _result(answer) if answer else _raise_died(process.returncode, log, order)


def _read_answer(lines: Iterable[str], report: backends.Report) -> dict[str, Any] | None:
    """Report the progress messages, and return the first other message."""
    for message in map(parse_message, lines):
        if message is None or "activity" not in message:
            return message
        report(message["activity"], message["done"], message["total"])
    return None


def _result(answer: dict[str, Any]) -> BuiltEngine:
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return msgspec.convert(answer, BuiltEngine)


def _raise_died(status: int, log: IO[str], order: BuildOrder) -> BuiltEngine:
    """Raise a BackendError about a process that ended without an answer."""
    log.seek(0)
    lines = log.read().strip().splitlines() or ["no message"]
    name = Path(order.target).stem
    if status in (-signal.SIGKILL, -signal.SIGABRT) or "bad_alloc" in lines[-1]:
        raise BackendError(
            f"the build of {name} was ended by the system, most likely {backends.NO_MEMORY}"
        )
    raise BackendError(f"the build of {name} ended early ({status}): {lines[-1]}")


def main() -> None:
    """Build the engine that standard input orders."""
    answer = partial(send, take_stdout())
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildOrder)
        answer(_compile(order, _throttled(answer)))
    except LatentforgeError as error:
        answer({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        answer({"error": "BackendError", "message": backends.NO_MEMORY})
    except OSError as error:
        message = f"{error.filename or order.target}: {error.strerror or error}"
        answer({"error": "TargetError", "message": message})


def _compile(order: BuildOrder, report: backends.Report) -> dict[str, Any]:
    start, part = time.perf_counter(), order.component
    compile_graph = backends.get(part.backend).compile
    target = Path(order.target)
    onnx = backends.unlinked_graph(Path(order.onnx), part, target.parent)
    with naming_full_disk(target), onnx as graph:
        device = compile_graph(graph, target, part, part.options, report)
    seconds = round(time.perf_counter() - start, 2)
    built = BuiltEngine(device=dict(device), seconds=seconds, peak_memory=peak_memory())
    return dict(msgspec.to_builtins(built))


def _throttled(answer: Callable[[dict[str, Any]], None]) -> backends.Report:
    """Return a report that skips progress too fast to be visible, but never the last unit."""
    last = 0.0

    def report(activity: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _MIN_INTERVAL or done == total:
            last = now
            answer({"activity": activity, "done": done, "total": total})

    return report


if __name__ == "__main__":
    main()
