"""Traces by OpenTelemetry's API, where it is installed; otherwise nothing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

propagate: ModuleType | None
trace: ModuleType | None
try:
    propagate = importlib.import_module("opentelemetry.propagate")
    trace = importlib.import_module("opentelemetry.trace")
except ImportError:
    propagate = trace = None

__all__ = ["describe_span", "request_span", "trace_id"]


@contextmanager
def request_span(name: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Open the span of a request, within that of the caller if its headers name one.

    The span is None without OpenTelemetry. Which spans are exported, and where to, is set up by
    OpenTelemetry's own variables.
    """
    if trace is None or propagate is None:
        yield None
        return
    context = propagate.extract(headers)
    tracer = trace.get_tracer("latentforge.serve")
    with tracer.start_as_current_span(name, context, kind=trace.SpanKind.SERVER) as span:
        yield span


def describe_span(span: Any, method: str, route: str, status: int) -> None:
    """Name a span by its route, and say how the request ended; nothing for None."""
    if span is None or trace is None:
        return
    span.update_name(f"{method} {route}")
    span.set_attributes(
        {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    )
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)


def trace_id(headers: Mapping[str, str]) -> str | None:
    """Return the trace that a caller's ``traceparent`` names, for logs."""
    parts = headers.get("traceparent", "").split("-")
    valid = len(parts) == 4 and len(parts[1]) == 32 and set(parts[1]) <= set("0123456789abcdef")
    return parts[1] if valid else None
