"""JSON lines between a parent process and a child: one message is one JSON object on a line.

The child's standard output carries messages and nothing else: take_stdout() sends everything that
libraries print there, from any language, to standard error instead.

Used by compile/build_process.py and measure/bench/worker.py. The programs in measure/peers have a
copy in measure/peers/serving.py: they run in environments where latentforge is not installed.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["kill", "parse_message", "send", "take_stdout"]

_DYING_SECONDS = 2.0


def take_stdout() -> TextIO:
    """Return the process's standard output for messages; file descriptor 1 becomes standard error.

    Closing the returned file ends the stream. Python's ``sys.stdout`` stays usable, and writes to
    standard error from then on.
    """
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def send(out: TextIO, message: Mapping[str, Any]) -> None:
    """Write one message and flush it."""
    print(json.dumps(message), file=out, flush=True)


def parse_message(line: str | bytes) -> dict[str, Any] | None:
    """Return the message on a line, or None if the line is not a JSON object."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def kill(process: subprocess.Popen[Any], *, group: bool = False) -> None:
    """Kill a child process, or the group that it leads, and wait until it writes no more."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    with suppress(subprocess.TimeoutExpired):  # as where a file system does not answer
        process.wait(_DYING_SECONDS)
