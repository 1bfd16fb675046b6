"""Service without engines or processes, of the contract that the endpoints rely on."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from latentforge.runtime.manifest import Manifest
from latentforge.serve.errors import DrainingError, QueueFullError
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    ImageDone,
    Job,
    JobEvent,
    JobStore,
    Queued,
    Started,
    Stepped,
)
from latentforge.serve.request import ImageRequest


@dataclass
class Model:
    manifest: Manifest
    ready: bool = True


@dataclass
class InProcessService:
    """Runs each job by itself: an image's colour is its seed's, after so many seconds a step."""

    models: Mapping[str, Model]
    step_seconds: float = 0.001
    limit: int = 100
    draining: bool = False
    store: JobStore = field(default_factory=JobStore)
    steps: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    log: dict[str, list[JobEvent]] = field(default_factory=dict)
    keys: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    async def submit(
        self,
        request: ImageRequest,
        *,
        owner: str,
        deadline: float | None,
        idempotency: tuple[str, str] | None,
    ) -> Job:
        if self.draining:
            raise DrainingError("shuts down", retry_after=3)
        if len(self.store.running()) >= self.limit:
            raise QueueFullError("the queue is full", retry_after=2)
        if idempotency is not None and (owner, idempotency[0]) in self.keys:
            return self.get(self.keys[owner, idempotency[0]][1])
        job = Job(id=uuid.uuid4().hex, request=request, owner=owner, created=time.time())
        if idempotency is not None:
            self.keys[owner, idempotency[0]] = (idempotency[1], job.id)
        self.store.put(job, time.time())
        self.log[job.id] = []
        await self._happen(job.id, Queued(0))
        self.tasks[job.id] = asyncio.create_task(self._run(job.id, request, deadline))
        return self.get(job.id)

    async def _run(self, id: str, request: ImageRequest, deadline: float | None) -> None:
        await self._happen(id, Started())
        end = time.monotonic() + (deadline or 1e9)
        settings = request.settings
        for step in range(settings.steps):
            await asyncio.sleep(self.step_seconds)
            if time.monotonic() > end:
                await self._happen(id, Failed("deadline_exceeded", "too late"))
                return
            self.steps[id] = step + 1
            small = np.full((4, 4, 3), step, np.uint8)
            shown = {0: small} if request.previews > step else {}
            await self._happen(
                id,
                Stepped(
                    images=(0,),
                    step=step + 1,
                    count=settings.steps,
                    progress=(step + 1) / settings.steps,
                    previews=shown,
                ),
            )
        for index, seed in enumerate(settings.seeds):
            pixels = np.full((settings.height, settings.width, 3), seed % 256, np.uint8)
            await self._happen(id, ImageDone(index, pixels))
        await self._happen(id, Completed())

    async def _happen(self, id: str, event: JobEvent) -> None:
        self.store.put(self.get(id).after(event, time.time()), time.time())
        self.log[id].append(event)
        async with self.changed:
            self.changed.notify_all()

    async def events(self, id: str) -> AsyncIterator[JobEvent]:
        place = 0
        while True:
            async with self.changed:
                while len(self.log[id]) <= place:
                    await self.changed.wait()
            for event in self.log[id][place:]:
                place += 1
                yield event
                if isinstance(event, Completed | Failed | Cancelled):
                    return

    def get(self, id: str) -> Job:
        return self.store.get(id, time.time())

    def cancel(self, id: str) -> bool:
        if self.get(id).end is not None:
            return False
        self.tasks[id].cancel()
        asyncio.ensure_future(self._happen(id, Cancelled("by the client")))
        return True
