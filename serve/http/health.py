"""Health, metrics, and the description of the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from latentforge.runtime.record import Record
from latentforge.serve.http.context import Context
from latentforge.serve.http.endpoint import Endpoint
from latentforge.serve.http.envelope import Json
from latentforge.serve.metrics import CONTENT_TYPE

__all__ = ["HealthEndpoints"]

_GROUP = "Server"


class LiveAnswer(Record, frozen=True, kw_only=True):
    """State of the process, which never depends on its load."""

    live: bool = True


class ReadyAnswer(Record, frozen=True, kw_only=True):
    """State of the models: ready once each has run one step, and its batches are measured."""

    ready: bool
    draining: bool
    models: dict[str, bool]


class ModelReadyAnswer(Record, frozen=True, kw_only=True):
    """State of one model."""

    name: str
    ready: bool


@dataclass(frozen=True)
class HealthEndpoints:
    """Endpoints for those who operate the server; health needs no key."""

    context: Context

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoints."""
        get: dict[str, Any] = {"method": "GET", "group": _GROUP, "open": True}
        live = {path: self.live for path in ("/livez", "/healthz", "/v2/health/live")}
        ready = {path: self.ready for path in ("/readyz", "/v2/health/ready")}
        return (
            *(
                Endpoint(
                    path=path, handler=handler, answer=LiveAnswer,
                    summary="Answer while the process works.", **get,
                )
                for path, handler in live.items()
            ),
            *(
                Endpoint(
                    path=path, handler=handler, answer=ReadyAnswer, refusal=ReadyAnswer,
                    errors=(503,), summary="Say if requests are accepted.", **get,
                )
                for path, handler in ready.items()
            ),
            Endpoint(
                path="/v2/models/{model}/ready", handler=self.model_ready,
                answer=ModelReadyAnswer, refusal=ModelReadyAnswer, errors=(404, 503),
                summary="Say if a model is loaded.", **get,
            ),
            Endpoint(
                path="/metrics", handler=self.metrics, media_type="text/plain",
                summary="Return metrics in Prometheus's format.", method="GET", group=_GROUP,
            ),
        )  # fmt: skip

    async def live(self, request: Request) -> ASGIApp:
        """Answer GET /livez."""
        return Json(LiveAnswer())

    async def ready(self, request: Request) -> ASGIApp:
        """Answer GET /readyz."""
        service = self.context.service
        models = {name: model.ready for name, model in service.models.items()}
        ready = all(models.values()) and not service.draining
        answer = ReadyAnswer(ready=ready, draining=service.draining, models=models)
        return Json(answer, 200 if ready else 503, {} if ready else {"retry-after": "5"})

    async def model_ready(self, request: Request) -> ASGIApp:
        """Answer GET /v2/models/{model}/ready."""
        name, model = self.context.model(request.path_params["model"])
        ready = model.ready and not self.context.service.draining
        return Json(ModelReadyAnswer(name=name, ready=ready), 200 if ready else 503)

    async def metrics(self, request: Request) -> ASGIApp:
        """Answer GET /metrics."""
        return Response(self.context.metrics.exposition(), media_type=CONTENT_TYPE)
