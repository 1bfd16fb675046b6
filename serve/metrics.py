"""Metrics in Prometheus's format: base units, and neither prompts nor keys in labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "Metrics", "RejectionReason"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

RejectionReason = Literal["full", "quota", "deadline", "drain", "unavailable"]
"""Reason for which a request was not accepted."""

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Instruments of one server, in a registry of their own.

    Attributes:
        requests: HTTP requests that were answered, by route, model and status.
        request_seconds: time from a request to the end of its answer, by route.
        running, waiting: images that run now, and that wait, by model.
        permits: batches that hold a worker, also those that run for nobody, by model.
        queue_seconds: time that an image waited before its batch began, by model.
        e2e_seconds: time from the acceptance of a job to its end, by model and end.
        step_seconds: time of a step of a batch, by model.
        batch_size: rows of a batch, by model.
        images: finished images by model.
        jobs: jobs that ended, by model and end.
        rejected: requests that were not accepted, by reason.
        cancelled: jobs that were cancelled, by stage: queued or running.
        wasted_steps: steps of rows whose job had ended, by model.
        preview_dropped: previews that a reader was too slow for.
        worker_restarts: starts of a worker after its first, by model.
        model_loaded: 1 while a model's worker is ready, by model.
        open_streams: event streams that are being sent.
    """

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter
    request_seconds: Histogram
    running: Gauge
    waiting: Gauge
    permits: Gauge
    queue_seconds: Histogram
    e2e_seconds: Histogram
    step_seconds: Histogram
    batch_size: Histogram
    images: Counter
    jobs: Counter
    rejected: Counter
    cancelled: Counter
    wasted_steps: Counter
    preview_dropped: Counter
    worker_restarts: Counter
    model_loaded: Gauge
    open_streams: Gauge
    _requests: dict[tuple[str, str, int], tuple[Counter, Histogram]] = field(default_factory=dict)

    @classmethod
    def create(cls) -> Metrics:
        """Return instruments without values, beside those of the process."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        instruments = {
            name: kind(f"latentforge_{name}", text, labels, registry=registry)
            for name, (kind, text, labels) in _INSTRUMENTS.items()
        }
        return cls(registry=registry, **instruments)

    def watch(self, gauge: Gauge, read: Callable[[], float], **labels: str) -> None:
        """Let a gauge read its value when the metrics are asked for."""
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def count_request(self, route: str, model: str, status: int, seconds: float) -> None:
        """Record an HTTP request that was answered within some seconds."""
        kept = self._requests.get((route, model, status))
        if kept is None:  # finding a child by its labels takes longer than counting
            counter = self.requests.labels(route=route, model=model, status=str(status))
            kept = counter, self.request_seconds.labels(route=route)
            self._requests[route, model, status] = kept
        kept[0].inc()
        kept[1].observe(seconds)

    def exposition(self) -> bytes:
        """Return all values in Prometheus's text format."""
        return generate_latest(self.registry)


def _histogram(
    buckets: tuple[float, ...],
) -> Callable[..., Histogram]:
    def made(
        name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry
    ) -> Histogram:
        return Histogram(name, text, labels, registry=registry, buckets=buckets)

    return made


_MODEL = ("model",)
_INSTRUMENTS: Mapping[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "requests": (Counter, "HTTP requests that were answered", ("route", "model", "status")),
    "request_seconds": (_histogram(_SECONDS), "Time of HTTP requests", ("route",)),
    "running": (Gauge, "Images that run now", _MODEL),
    "waiting": (Gauge, "Images that wait", _MODEL),
    "permits": (Gauge, "Batches that hold a worker", _MODEL),
    "queue_seconds": (_histogram(_SECONDS), "Time an image waited for its batch", _MODEL),
    "e2e_seconds": (_histogram(_SECONDS), "Time from a job's acceptance to its end", _MODEL),
    "step_seconds": (_histogram(_STEP_SECONDS), "Time of a step of a batch", _MODEL),
    "batch_size": (_histogram(_ROWS), "Rows of a batch", _MODEL),
    "images": (Counter, "Finished images", _MODEL),
    "jobs": (Counter, "Jobs that ended", ("model", "end")),
    "rejected": (Counter, "Requests that were not accepted", ("reason",)),
    "cancelled": (Counter, "Jobs that were cancelled", ("stage",)),
    "wasted_steps": (Counter, "Steps of rows whose job had ended", _MODEL),
    "preview_dropped": (Counter, "Previews that a reader was too slow for", ()),
    "worker_restarts": (Counter, "Starts of a worker after its first", _MODEL),
    "model_loaded": (Gauge, "1 while a model's worker is ready", ("model", "digest")),
    "open_streams": (Gauge, "Event streams that are being sent", ()),
}
