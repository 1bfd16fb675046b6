"""Events on their way to one reader: steps are merged for a slow one, and nothing else is lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from latentforge.serve.job import JobEvent, Queued, Stepped

__all__ = ["EventQueue"]


class EventQueue:
    """Events of one job for one reader.

    Args:
        events: those of the past.
    """

    def __init__(self, events: Iterable[JobEvent]) -> None:
        self._events = deque(events)
        self._arrived = asyncio.Event()
        self._arrived.set()

    def push(self, event: JobEvent) -> Sequence[object]:
        """Add an event, and return the previews that it displaces."""
        dropped: Sequence[object] = ()
        if isinstance(event, Stepped | Queued) and self._events:
            last = self._events[-1]
            if isinstance(last, Stepped) and isinstance(event, Stepped):
                dropped = [last.previews[index] for index in last.previews.keys() & event.previews]
                event = replace(event, previews={**last.previews, **event.previews})
            if type(last) is type(event):
                self._events.pop()
        self._events.append(event)
        self._arrived.set()
        return dropped

    async def next(self) -> JobEvent:
        """Wait for the next event and return it."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()
