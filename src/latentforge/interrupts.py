"""Ctrl-C and SIGTERM, also while a library's call does not return.

Python runs signal handlers between two steps of the main thread, and a graph whose loop never ends
keeps that thread in a call of ONNX Runtime, say. So another thread reads the signals too, and ends
the process by force if it has not ended in time.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

__all__ = ["handle", "report"]

GRACE = 5.0
"""Seconds from a signal to the end by force."""

STATUS = 130
"""Exit status of an interrupted command."""

_SAME = 0.25  # seconds: a second signal by then is the first one again, as ``timeout`` sends it
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_reported = threading.Lock()  # held from the message on, which is printed once


def handle(*, forced: bool) -> None:
    """Turn SIGTERM into a KeyboardInterrupt, as Python does for SIGINT.

    Args:
        forced: the process is the command's own. It handles the first signal alone, and ends by
            force GRACE seconds after it, or at a second one.
    """
    if not forced:
        signal.signal(signal.SIGTERM, _raise_interrupt)
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _First())


def report(interrupt: KeyboardInterrupt) -> int:
    """Print that the command was interrupted, once, and return the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not change the message
    if _reported.acquire(blocking=False):
        print(
            _message(signal.SIGTERM if interrupt.args else signal.SIGINT, _left(interrupt)),
            file=sys.stderr,
            flush=True,
        )
    return STATUS


def _message(number: int, left: str = "nothing was left behind") -> str:
    cause = " by SIGTERM" if number == signal.SIGTERM else ""
    return f"latentforge: interrupted{cause}; {left}"


def _left(interrupt: KeyboardInterrupt) -> str:
    """Return which files an interrupted command leaves."""
    folder = getattr(interrupt, "folder", None)  # of a WorkInterrupt, imported late
    return f"the same command goes on from {folder}" if folder else "nothing was left behind"


def _raise_interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(*(("by SIGTERM",) if number == signal.SIGTERM else ()))


class _First:
    """Handler of the first signal; the later ones are for the thread alone."""

    def __init__(self) -> None:
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._came:
            self._came = True
            _raise_interrupt(number, frame)


def _watch(reader: int) -> None:
    """Wait for a signal, and then for the second or for GRACE to pass; this never returns."""
    first = _next(reader, None) or signal.SIGINT
    start = time.monotonic()
    time.sleep(_SAME)
    while _next(reader, 0.0):
        pass
    _next(reader, start + GRACE - time.monotonic())
    _end(first)


def _next(reader: int, seconds: float | None) -> int | None:
    """Return the next signal of _NUMBERS that comes within so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            return None
        if (number := os.read(reader, 1)[0]) in _NUMBERS:
            return number


def _end(number: int) -> NoReturn:
    """Clean up in place of the main thread, print the message unless it has, and exit."""
    cleanups = sys.modules.get("latentforge.runtime.cleanups")  # until then there is nothing
    if cleanups is not None and hasattr(cleanups, "clean_up"):
        cleanups.clean_up()
    if _reported.acquire(blocking=False) and select.select([], [2], [], 1.0)[1]:
        erase = "\r\x1b[K" if os.isatty(2) else ""  # a bar that is being drawn
        os.write(2, f"{erase}{_message(number)}\n".encode())  # Python's stream may be locked
    os._exit(STATUS)
