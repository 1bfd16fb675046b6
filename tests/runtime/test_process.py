"""JSON lines of a child process: messages alone reach the parent, whatever libraries print."""

import subprocess
import sys

import pytest

from latentforge.runtime.process import parse_message

NOISY_CHILD = """
import ctypes, os
print("before")
from latentforge.runtime.process import send, take_stdout
with take_stdout() as out:
    print("python prints", flush=True)
    os.write(1, b"a library prints\\n")
    ctypes.CDLL(None).puts(b"C prints")
    ctypes.CDLL(None).fflush(None)
    send(out, {"text": "one\\ntwo", "number": 1.5})
    send(out, {})
"""


def test_messages_are_apart_from_what_libraries_print() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NOISY_CHILD], capture_output=True, text=True, check=True
    )
    first, *lines = ended.stdout.splitlines()
    assert first == "before"
    assert [parse_message(line) for line in lines] == [{"text": "one\ntwo", "number": 1.5}, {}]
    assert sorted(ended.stderr.splitlines()) == ["C prints", "a library prints", "python prints"]


@pytest.mark.parametrize("line", ["", "loading ...", "[1]", "1", "null", b"\xff\xfe", b"{"])
def test_lines_that_are_no_message(line: str | bytes) -> None:
    assert parse_message(line) is None
