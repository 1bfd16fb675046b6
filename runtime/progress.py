"""Progress display: bars on a terminal, plain lines elsewhere, and no long silence in either.

Calls into native libraries report nothing for minutes, so a thread keeps the clocks of the bars
going, and elsewhere prints a line about the part that is still running.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TextIO

from tqdm import tqdm

from latentforge.runtime.text import duration_text, printable

if TYPE_CHECKING:
    from latentforge.runtime.generation import DenoisingStep

__all__ = ["Progress"]


_TICK = 1.0  # seconds between two looks of the thread
_LINE_SECONDS = 5.0  # between two lines about the inside of a part, at least
_SILENT_SECONDS = 20.0  # without a line, at most


@dataclass(frozen=True)
class _Inside:
    """Progress within a part: its activity, units done and in total, and when it began."""

    activity: str
    done: int
    total: int
    since: float

    def text(self, now: float) -> str:
        """Return the units done, and the time that the others will take at this pace."""
        line = f"{self.activity} {self.done}/{self.total}"
        if not 0 < self.done < self.total:
            return line
        left = (now - self.since) * (self.total - self.done) / self.done
        return f"{line}, {duration_text(left)} left"


class Progress:
    """Counter of the parts of a long job, shown on standard error.

    Args:
        total: number of parts.
        quiet: show nothing, which is the default for library calls.
    """

    def __init__(self, total: int, *, quiet: bool = True) -> None:
        terminal = sys.stderr.isatty()
        self._lines = not quiet and not terminal
        stream = _unescaped(sys.stderr)
        disabled = quiet or not terminal
        self._bar = tqdm(total=total, file=stream, disable=disabled, bar_format=_FORMAT)
        self._done = 0
        self._since = self._printed = time.perf_counter()
        self._end: float | None = None
        self._description = ""
        self._inside: _Inside | None = None
        self._inner: tqdm[NoReturn] | None = None
        self._lock = threading.RLock()
        self._pulse = None if quiet else _Pulse(self._beat)

    @contextmanager
    def part(self, description: str) -> Iterator[None]:
        """Show a description while the block runs, and count the part if it succeeds."""
        description = printable(description)
        with self._lock:
            self._bar.set_description(description)
            self._since = time.perf_counter()
            self._description = description
        try:
            yield
        finally:
            self._close_part()
        self._count(description)

    def within(self, activity: str, done: int, total: int) -> None:
        """Show the progress within the current part: in a second bar, or on lines in between."""
        activity = printable(activity)
        with self._lock:
            last, now = self._inside, time.perf_counter()
            same = last is not None and last.activity == activity
            since = last.since if last and same else now if last else self._since
            self._inside = _Inside(activity, done, total, since)
            if not self._bar.disable:
                self._show_inner(self._inside)
            elif self._lines and self._description and now - self._printed >= _LINE_SECONDS:
                self._print_inside(now)

    def count_within(self, done: int, total: int) -> None:
        """Show the progress within the current part, under its own description."""
        self.within(self._description, done, total)

    def step(self, step: DenoisingStep) -> None:
        """Show a denoising step of the current part: see Pipeline.run()."""
        self.within("step", step.index + 1, step.count)

    def inner(self, total: int) -> Progress:
        """Return a counter of the parts of the current part, which shows them within it."""
        return _InnerProgress(self, total)

    def resize(self, total: int) -> None:
        """Change the number of parts, once it is known better."""
        self._bar.total = total

    def expect(self, seconds: float) -> None:
        """Show the time left, of a job that is expected to take so many seconds from now."""
        self._end = time.perf_counter() + seconds

    def advance(self, description: str, total: int) -> None:
        """Count one of many small parts; lines are printed at most once per second."""
        self._bar.total = total
        last = self._done + 1 == total
        self._count(description, quiet=not last and time.perf_counter() - self._since < 1)

    def _count(self, description: str, *, quiet: bool = False) -> None:
        description = printable(description)
        with self._lock:
            self._done += 1
            self._bar.set_description(description)
            self._bar.update()
            if not quiet:
                seconds = time.perf_counter() - self._since
                self._since = time.perf_counter()
                self._print(f"{self._place(self._done)} {description} ({seconds:.1f} s)")

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        with self._lock:
            if self._lines or not self._bar.disable:
                tqdm.write(printable(text), file=_unescaped(sys.stderr))
                self._printed = time.perf_counter()

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._pulse is not None:
            self._pulse.stop()
        self._close_part()
        self._bar.close()

    def _place(self, number: int) -> str:
        return f"[{number}/{self._bar.total}]"

    def _print(self, line: str) -> None:
        if self._lines:
            print(line, file=sys.stderr, flush=True)
            self._printed = time.perf_counter()

    def _print_inside(self, now: float) -> None:
        """Print a line about the part that is running."""
        place, seconds = self._place(self._done + 1), now - self._since
        inside = f": {self._inside.text(now)}" if self._inside else ""
        line = f"{place} {self._description}{inside}, still running after {seconds:.0f} s"
        self._print(line + self._time_left())

    def _time_left(self) -> str:
        left = 0.0 if self._end is None else self._end - time.perf_counter()
        return f"; {duration_text(left)} left in all" if left > 0 else ""

    def _beat(self) -> None:
        """Keep the clocks of the bars going, or end a silence."""
        with self._lock:
            now = time.perf_counter()
            if not self._bar.disable:
                self._bar.set_postfix_str(self._time_left().removeprefix("; "), refresh=False)
                self._bar.refresh()
                if self._inner is not None:
                    self._inner.refresh()
            elif self._description and now - self._printed >= _SILENT_SECONDS:
                self._print_inside(now)

    def _show_inner(self, inside: _Inside) -> None:
        if self._inner is None:
            stream = _unescaped(sys.stderr)
            self._inner = tqdm(
                total=inside.total, file=stream, leave=False, position=1, bar_format=_INNER
            )
        self._inner.total = inside.total
        self._inner.set_description(f"  {inside.activity[:26]}", refresh=False)
        self._inner.update(inside.done - self._inner.n)

    def _close_part(self) -> None:
        with self._lock:
            self._description, self._inside = "", None
            if self._inner is not None:
                self._inner.close()
                self._inner = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _InnerProgress(Progress):
    """Counter of the parts of one part of another progress."""

    def __init__(self, outer: Progress, total: int) -> None:
        super().__init__(total, quiet=True)
        self._outer = outer
        self._total = total

    @contextmanager
    def part(self, description: str) -> Iterator[None]:
        """Show a description while the block runs, and count the part if it succeeds."""
        self._outer.within(description, self._done, self._total)
        with super().part(description):
            yield
        self._outer.within(description, self._done, self._total)

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        self._outer.note(text)


def _unescaped(stream: TextIO) -> TextIO:
    """Return the stream under one that escapes what a bar needs to move the cursor."""
    inner: TextIO = getattr(stream, "unescaped", stream)
    return inner


class _Pulse:
    """Thread that calls a function every second until it is stopped."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK):
            self._beat()


_FORMAT = "{desc:<28} {bar:24} {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_INNER = "{desc:<28} {bar:24} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
