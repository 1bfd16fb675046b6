"""Measurement of a service: what happens to jobs and batches, as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latentforge.serve.errors import (
    DrainingError,
    ModelUnavailableError,
    QueueFullError,
    QuotaError,
    ServeError,
)
from latentforge.serve.job import Cancelled, Completed, Failed, ImageDone, Job, JobEvent, JobState
from latentforge.serve.metrics import Metrics, RejectionReason
from latentforge.serve.request import Batch

__all__ = ["ServiceMeter"]

_REASONS: dict[type[ServeError], RejectionReason] = {
    QueueFullError: "full",
    QuotaError: "quota",
    DrainingError: "drain",
    ModelUnavailableError: "unavailable",
}


@dataclass(frozen=True)
class ServiceMeter:
    """Recorder of events in the instruments of a server.

    Attributes:
        metrics: the instruments.
        accepted: time at which each open job was accepted.
        stepped: number and time of the last step of each batch that runs, or of its start.
    """

    metrics: Metrics
    accepted: dict[str, float] = field(default_factory=dict)
    stepped: dict[int, tuple[int, float]] = field(default_factory=dict)

    def refuse(self, error: ServeError) -> None:
        """Record a request that was not accepted."""
        if (reason := _REASONS.get(type(error))) is not None:
            self.metrics.rejected.labels(reason=reason).inc()

    def accept(self, job: str, now: float) -> None:
        """Record a request that was."""
        self.accepted[job] = now

    def start(self, batch: Batch, now: float) -> None:
        """Record the start of a batch."""
        self.stepped[batch.id] = (0, now)
        self.metrics.batch_size.labels(model=batch.model).observe(len(batch.rows))
        waits = self.metrics.queue_seconds.labels(model=batch.model)
        for row in batch.rows:
            if (accepted := self.accepted.get(row.job)) is not None:
                waits.observe(now - accepted)

    def step(self, batch: Batch, step: int, live: int, now: float) -> None:
        """Record that a batch has done ``step`` steps, and runs for some rows' jobs."""
        earlier, then = self.stepped.get(batch.id, (step - 1, now))
        self.stepped[batch.id] = (step, now)
        steps = max(1, step - earlier)
        self.metrics.step_seconds.labels(model=batch.model).observe((now - then) / steps)
        if live < len(batch.rows):
            wasted = self.metrics.wasted_steps.labels(model=batch.model)
            wasted.inc(steps * (len(batch.rows) - live))

    def end(self, batch: Batch) -> None:
        """Record the end of a batch."""
        self.stepped.pop(batch.id, None)

    def happen(self, job: Job, event: JobEvent, now: float) -> None:
        """Record an event of a job; ``job`` is as it was before."""
        model = job.request.model
        if isinstance(event, ImageDone):
            self.metrics.images.labels(model=model).inc()
        if isinstance(event, Cancelled):
            stage = "queued" if job.state is JobState.QUEUED else "running"
            self.metrics.cancelled.labels(stage=stage).inc()
        if isinstance(event, Completed | Failed | Cancelled):
            end = job.after(event, now).state.value
            self.metrics.jobs.labels(model=model, end=end).inc()
            seconds = now - self.accepted.pop(job.id, now)
            self.metrics.e2e_seconds.labels(model=model).observe(seconds)

    def lose(self, model: str) -> None:
        """Record a process of a model that was lost, and starts again."""
        self.metrics.worker_restarts.labels(model=model).inc()

    def drop(self, previews: Sequence[object]) -> None:
        """Record previews that a reader was too slow for."""
        self.metrics.preview_dropped.inc(len(previews))
