"""JSON lines between a parent process and a child: one message is one JSON object on a line.

The child's standard output carries messages and nothing else: take_stdout() sends everything that
libraries print there, from any language, to standard error instead.

Used by compile/build_process.py and measure/bench/worker.py. The programs in measure/peers have a
copy in measure/peers/serving.py: they run in environments where latentforge is not installed.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["parse_message", "send", "take_stdout"]


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
