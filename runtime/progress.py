"""Progress display: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Counter of the parts of a long job, shown on standard error.

    Args:
        total: number of parts.
        quiet: show nothing, which is the default for library calls.
    """

    def __init__(self, total: int, *, quiet: bool = True) -> None:
        terminal = sys.stderr.isatty()
        self._lines = not quiet and not terminal
        self._bar = tqdm(total=total, disable=quiet or not terminal, bar_format=_FORMAT)
        self._done = 0
        self._since = time.perf_counter()
        self._inner: tqdm[NoReturn] | None = None

    @contextmanager
    def part(self, description: str) -> Iterator[None]:
        """Show a description while the block runs, and count the part if it succeeds."""
        self._bar.set_description(description)
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._close_inner()
        self._count(description)

    def within(self, description: str, done: int, total: int) -> None:
        """Show the progress within the current part, in a second bar."""
        if self._bar.disable:
            return
        if self._inner is None:
            self._inner = tqdm(total=total, leave=False, position=1, bar_format=_FORMAT)
        self._inner.total = total
        self._inner.set_description(f"  {description[:26]}", refresh=False)
        self._inner.update(done - self._inner.n)

    def advance(self, description: str, total: int) -> None:
        """Count one of many small parts; lines are printed at most once per second."""
        self._bar.total = total
        last = self._done + 1 == total
        self._count(description, quiet=not last and time.perf_counter() - self._since < 1)

    def _count(self, description: str, *, quiet: bool = False) -> None:
        self._done += 1
        self._bar.set_description(description)
        self._bar.update()
        if not quiet:
            seconds = time.perf_counter() - self._since
            self._since = time.perf_counter()
            if self._lines:
                line = f"[{self._done}/{self._bar.total}] {description} ({seconds:.1f} s)"
                print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        if self._lines or not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._close_inner()
        self._bar.close()

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FORMAT = "{desc:<28} {bar:24} {n_fmt}/{total_fmt} [{elapsed}]"
