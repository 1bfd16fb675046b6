"""Traces and log lines of requests."""

import json
import logging
import sys

import pytest

from latentforge.serve import tracing
from latentforge.serve.logs import FIELDS, JsonLines, TextLines

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


def record(**fields: object) -> logging.LogRecord:
    found = logging.LogRecord("latentforge", logging.INFO, "x.py", 1, "a\nb\x1b[31m", (), None)
    setattr(found, FIELDS, fields)
    return found


def test_lines_of_json_are_single_and_complete() -> None:
    line = JsonLines().format(record(status=200, model=None))
    assert "\n" not in line and "\x1b" not in line
    found = json.loads(line)
    assert found["status"] == 200 and found["level"] == "info" and "model" not in found


def test_lines_of_text_are_single() -> None:
    line = TextLines().format(record(status=200))
    assert "\n" not in line and "\x1b" not in line and line.endswith("status=200")


def test_errors_have_their_traceback() -> None:
    found = record()
    try:
        raise ValueError("no")
    except ValueError:
        found.exc_info = sys.exc_info()
    assert "ValueError: no" in json.loads(JsonLines().format(found))["traceback"]


@pytest.mark.parametrize("header", ["", "x", f"00-{TRACE}", f"00-{TRACE[:-1]}/-b7-01"])
def test_traces_that_are_none(header: str) -> None:
    assert tracing.trace_id({"traceparent": header}) is None


def test_the_trace_of_the_caller_is_logged() -> None:
    assert tracing.trace_id(HEADERS) == TRACE


def test_without_opentelemetry_there_is_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    with tracing.request_span("GET", HEADERS) as span:
        tracing.describe_span(span, "GET", "/x", 200)
    assert span is None


def test_a_span_continues_the_trace_of_the_caller() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace

    trace.set_tracer_provider(sdk.TracerProvider())
    with tracing.request_span("GET", HEADERS) as span:
        tracing.describe_span(span, "GET", "/x", 503)
    assert f"{span.context.trace_id:032x}" == TRACE and span.name == "GET /x"
    assert not span.status.is_ok
