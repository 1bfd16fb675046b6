"""Limits of the queue, and of the owner of a key in it."""

from dataclasses import dataclass

from latentforge.runtime.annotations import check_fields
from latentforge.runtime.validation import check_count, check_number

__all__ = ["Limits", "OwnerLimits"]

_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one server.

    Attributes:
        queue_seconds: longest wait that a request is accepted for, by the measured throughput.
        queue_jobs: jobs of one model that may wait.
        queue_bytes: bytes of the pictures of all requests that have not ended.
        max_batch: most images that run together; fewer if more are not measured to be faster.
        interleave: True if a short batch may run in turn with a long one on the same replica.
        aging_seconds: wait for a turn after which a job has one before others of its owner.
        retry_seconds: Retry-After as long as no throughput has been measured.

    Raises:
        SettingsError: a limit is out of range.
    """

    queue_seconds: float = 60.0
    queue_jobs: int = 1000
    queue_bytes: int = 1 << 30
    max_batch: int = 8
    interleave: bool = True
    aging_seconds: float = 30.0
    retry_seconds: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("queue_seconds", self.queue_seconds, 0, _DAY)
        check_count("queue_jobs", self.queue_jobs, 1_000_000)
        check_count("queue_bytes", self.queue_bytes, 1 << 50)
        check_count("max_batch", self.max_batch, 1024)
        check_number("aging_seconds", self.aging_seconds, 0, _DAY)
        check_number("retry_seconds", self.retry_seconds, 0, _DAY)


@dataclass(frozen=True, kw_only=True)
class OwnerLimits:
    """Limits of one owner; None for no limit.

    Attributes:
        concurrent: jobs that run at once; further ones wait.
        queued: jobs that wait; further ones are refused.

    Raises:
        SettingsError: a limit is out of range.
    """

    concurrent: int | None = None
    queued: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("concurrent", "queued"):
            if (limit := getattr(self, name)) is not None:
                check_count(name, limit, 1_000_000)
