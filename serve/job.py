"""Jobs: requests that were accepted, and the events in their lives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentforge.serve.errors import ExpiredJobError, UnknownJobError
from latentforge.serve.request import ImageRequest

__all__ = [
    "Cancelled",
    "Completed",
    "Failed",
    "ImageDone",
    "IgnoredText",
    "Job",
    "JobEvent",
    "JobState",
    "JobStore",
    "Queued",
    "Started",
    "Stepped",
]

Pixels = NDArray[np.uint8]

_RECORD = 4096  # bytes of a job without its texts and pictures, about


class JobState(str, Enum):
    """State of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True if nothing happens to the job any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class Queued:
    """Job that waits; position 0 is the next."""

    position: int


@dataclass(frozen=True)
class Started:
    """Job whose first image runs; again after a retry."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepped:
    """Denoising step of some of a job's images.

    Attributes:
        images: indices of these images.
        step: steps that they have completed, of ``count``.
        progress: part of the whole job that is done, from 0 to 1.
        previews: small pictures (h, w, 3) by index of the image; often none.
    """

    images: tuple[int, ...]
    step: int
    count: int
    progress: float = 0.0
    previews: Mapping[int, Pixels] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageDone:
    """Finished image (h, w, 3) of a job."""

    index: int
    pixels: Pixels


@dataclass(frozen=True)
class IgnoredText:
    """Ends of a job's prompts that the text encoders have no room for; empty where all is read."""

    prompt: str
    negative: str


@dataclass(frozen=True)
class Completed:
    """End of a job that has all its images."""


@dataclass(frozen=True)
class Failed:
    """End of a job with an error; see errors.job_error()."""

    code: str
    message: str


@dataclass(frozen=True)
class Cancelled:
    """End of a job that was cancelled, by its client or in a shutdown."""

    reason: str


JobEvent: TypeAlias = (
    Queued | Started | Stepped | IgnoredText | ImageDone | Completed | Failed | Cancelled
)

_ENDS: Mapping[type, JobState] = {
    Completed: JobState.COMPLETED,
    Failed: JobState.FAILED,
    Cancelled: JobState.CANCELLED,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Snapshot of an accepted request.

    Attributes:
        id: unguessable name.
        request: the request.
        owner: name of the API key that it came with.
        created, started, ended: seconds since the epoch.
        position: place in the queue when it last changed; 0 is the next.
        step: the last step event, with the latest preview of each image.
        ignored: parts of its prompts that had no effect, known with its first image.
        images: the finished images by index.
        end: event that ended the job.
    """

    id: str
    request: ImageRequest
    owner: str
    created: float
    started: float | None = None
    ended: float | None = None
    position: int = 0
    step: Stepped | None = None
    ignored: IgnoredText | None = None
    images: Mapping[int, Pixels] = field(default_factory=dict)
    end: Completed | Failed | Cancelled | None = None

    @property
    def state(self) -> JobState:
        """State that the events led to."""
        if self.end is not None:
            return _ENDS[type(self.end)]
        return JobState.QUEUED if self.started is None else JobState.RUNNING

    @property
    def progress(self) -> float:
        """Part that is done, from 0 to 1."""
        if self.state is JobState.COMPLETED:
            return 1.0
        return 0.0 if self.step is None else self.step.progress

    @property
    def bytes(self) -> int:
        """Bytes that it takes: its pictures, its texts, and some for the rest."""
        shown = self.step.previews if self.step is not None else {}
        pictures = (*self.images.values(), *shown.values())
        texts = sum(
            map(len, {*self.request.settings.prompts, *self.request.settings.negative_prompts})
        )
        return _RECORD + texts + self.request.bytes + sum(picture.nbytes for picture in pictures)

    def after(self, event: JobEvent, now: float) -> Job:
        """Return the job after an event, at ``now`` in seconds since the epoch."""
        if isinstance(event, Queued):
            return replace(self, position=event.position)
        if isinstance(event, Started):
            return replace(self, position=0, started=self.started or now)
        if isinstance(event, Stepped):
            shown = self.step.previews if self.step is not None else {}
            return replace(self, step=replace(event, previews={**shown, **event.previews}))
        if isinstance(event, IgnoredText):
            return replace(self, ignored=event)
        if isinstance(event, ImageDone):
            return replace(self, images={**self.images, event.index: event.pixels})
        return replace(self, end=event, ended=now, step=None)

    def replay(self) -> Iterator[JobEvent]:
        """Yield events that lead to this state, without steps and previews of the past."""
        if self.started is None:
            yield Queued(self.position)
        else:
            yield Started()
        if self.step is not None:
            yield self.step
        if self.ignored is not None:
            yield self.ignored
        for index, pixels in sorted(self.images.items()):
            yield ImageDone(index, pixels)
        if self.end is not None:
            yield self.end


class JobStore:
    """Jobs by id: all that run, and those that ended within a time and a number of bytes.

    Args:
        seconds: time for which the result of a job is kept.
        bytes: bytes of ended jobs that are kept; the oldest give way.
        expired: ids of jobs no longer kept to remember.

    Attributes:
        forgotten: ended jobs that are no longer kept.
    """

    def __init__(
        self, *, seconds: float = 600.0, bytes: int = 1 << 28, expired: int = 10_000
    ) -> None:
        self._seconds = seconds
        self._bytes = bytes
        self._remembered = expired
        self._running: dict[str, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._held = 0
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    @property
    def bytes(self) -> int:
        """Bytes of ended jobs."""
        return self._held

    def put(self, job: Job, now: float) -> None:
        """Add a job, or replace it by a later snapshot, at ``now`` in seconds since the epoch."""
        if job.end is None:
            self._running[job.id] = job
            return
        self._running.pop(job.id, None)
        if (earlier := self._ended.pop(job.id, None)) is not None:
            self._held -= earlier.bytes
        self._ended[job.id] = job
        self._held += job.bytes
        self.expire(now)

    def get(self, id: str, now: float) -> Job:
        """Return a job.

        Raises:
            UnknownJobError: there was none of this id.
            ExpiredJobError: it is no longer kept.
        """
        self.expire(now)
        if (job := self._running.get(id) or self._ended.get(id)) is not None:
            return job
        if id in self._expired:
            raise ExpiredJobError(
                f"the result of this job was kept for {self._seconds:g} seconds at most: send the "
                "request again"
            )
        raise UnknownJobError("no such job: its id is in the answer to POST /v1/jobs")

    def running(self) -> tuple[Job, ...]:
        """Return the jobs that have not ended."""
        return tuple(self._running.values())

    def expire(self, now: float) -> None:
        """Forget the jobs that ended too long ago, and the oldest of too many; not the last."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            old = oldest.ended is not None and now - oldest.ended >= self._seconds
            if not old and (self._held <= self._bytes or len(self._ended) == 1):
                return
            self._forget(oldest)

    def _forget(self, job: Job) -> None:
        del self._ended[job.id]
        self._held -= job.bytes
        self.forgotten += 1
        self._expired[job.id] = None
        if len(self._expired) > self._remembered:
            self._expired.popitem(last=False)
