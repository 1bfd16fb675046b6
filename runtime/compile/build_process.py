"""One engine, built in a process of its own.

A build takes gigabytes, and a library that runs out of memory ends its process: neither is to be
the caller's. ``python -m latentforge.runtime.compile.build_process`` reads a
BuildOrder as JSON from standard input, and writes JSON lines (runtime/process.py) to standard
output: progress, and finally a BuiltEngine or an error.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec

from latentforge.runtime import backends, errors
from latentforge.runtime.errors import BackendError, LatentforgeError
from latentforge.runtime.machine import peak_memory
from latentforge.runtime.manifest import Component
from latentforge.runtime.process import send, take_stdout
from latentforge.runtime.record import Record

__all__ = ["BuiltEngine", "BuildOrder", "build", "main"]

_EVERY = 0.05  # seconds between two reports: more nobody can see


class BuildOrder(Record, frozen=True, kw_only=True):
    """What to build: component.backend says by whom, and component.options how."""

    onnx: str
    target: str
    component: Component


class BuiltEngine(Record, frozen=True, kw_only=True):
    """What came of it: what the engine is bound to, and what making it took, in bytes."""

    device: dict[str, str]
    seconds: float
    peak_memory: int


def build(order: BuildOrder, report: backends.Report) -> BuiltEngine:
    """Build an engine in a process of its own.

    Raises:
        LatentforgeError: the backend's own error, or a BackendError when the process died.
    """
    command = [sys.executable, "-m", "latentforge.runtime.compile.build_process"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the answer that is missing says why
                process.stdin.write(msgspec.json.encode(order).decode())
                process.stdin.close()
            answer = _answer(process.stdout, report)
        finally:
            process.stdout.close()  # which ends one that still wants to say something
            if sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
        return _built(answer) if answer else _dead(process.returncode, said, order)


def _answer(lines: IO[str], report: backends.Report) -> dict[str, Any] | None:
    """The last line, once the others are passed on."""
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "doing" not in message:
            return message
        report(message["doing"], message["done"], message["total"])
    return None


def _built(answer: dict[str, Any]) -> BuiltEngine:
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return msgspec.convert(answer, BuiltEngine)


def _dead(status: int, said: IO[str], order: BuildOrder) -> BuiltEngine:
    """Say what is known of a process that ended without an answer."""
    said.seek(0)
    words = said.read().strip().splitlines() or ["no message"]
    name = Path(order.target).stem
    if status in (-signal.SIGKILL, -signal.SIGABRT) or "bad_alloc" in words[-1]:
        raise BackendError(
            f"the build of {name} was ended by the system, most likely {backends.NO_MEMORY}"
        )
    raise BackendError(f"the build of {name} ended early ({status}): {words[-1]}")


def main() -> None:
    """Build what standard input asks for."""
    tell = partial(send, take_stdout())
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildOrder)
        tell(_work(order, _patient(tell)))
    except LatentforgeError as error:
        tell({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        tell({"error": "BackendError", "message": backends.NO_MEMORY})
    except OSError as error:
        message = f"{error.filename or order.target}: {error.strerror or error}"
        tell({"error": "TargetError", "message": message})


def _work(order: BuildOrder, report: backends.Report) -> dict[str, Any]:
    start = time.perf_counter()
    component = order.component
    backend = backends.get(component.backend)
    device = backend.compile(
        Path(order.onnx), Path(order.target), component, component.options, report
    )
    built = BuiltEngine(
        device=dict(device),
        seconds=round(time.perf_counter() - start, 2),
        peak_memory=peak_memory(),
    )
    return dict(msgspec.to_builtins(built))


def _patient(tell: Callable[[dict[str, Any]], None]) -> backends.Report:
    """Reports that come too fast to be seen are left out, but for the last of each kind."""
    last = 0.0

    def report(doing: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY or done == total:
            last = now
            tell({"doing": doing, "done": done, "total": total})

    return report


if __name__ == "__main__":
    main()
