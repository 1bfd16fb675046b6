"""Application: all endpoints, behind the middleware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from latentforge.serve.http.capabilities import CapabilityEndpoints
from latentforge.serve.http.context import Context
from latentforge.serve.http.endpoint import Endpoint
from latentforge.serve.http.envelope import answer_of, handlers
from latentforge.serve.http.health import HealthEndpoints
from latentforge.serve.http.jobs import JobEndpoints
from latentforge.serve.http.middleware import Authenticate, RequestMiddleware, guarded
from latentforge.serve.http.openai import OpenAIEndpoints
from latentforge.serve.http.openapi import describe
from latentforge.serve.http.page import page_routes
from latentforge.serve.http.refusal import RefusingApp
from latentforge.serve.http.sdapi import WebUIEndpoints
from latentforge.serve.http.share import ShareEndpoints
from latentforge.serve.http.sse import ClientGoneError
from latentforge.serve.logs import RequestLog

__all__ = ["create_app"]

_POLLED = frozenset(
    {"/livez", "/readyz", "/healthz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)


def create_app(
    context: Context,
    *,
    authenticate: Authenticate | None = None,
    hosts: frozenset[str] | None = None,
    connections: int = 1 << 16,
) -> RefusingApp:
    """Return the server's application.

    Args:
        context: service and options.
        authenticate: checks keys; None if the server has none.
        hosts: names of the server that requests may have; None for any.
        connections: most that may be open.
    """
    endpoints = all_endpoints(context)
    document = msgspec.json.encode(describe(endpoints, keys=authenticate is not None))

    async def description(request: Request) -> Response:
        return Response(document, media_type="application/json")

    routes = {endpoint: _route(endpoint, authenticate) for endpoint in endpoints}
    pages = [*page_routes(), *ShareEndpoints(context).routes()]  # which need no key
    app = Starlette(
        routes=[*routes.values(), Route("/openapi.json", description), *pages],
        exception_handlers=handlers(),
    )
    app.router.redirect_slashes = False
    fixed = {(e.method, e.path): r for e, r in routes.items() if "{" not in e.path}
    return RefusingApp(
        app=RequestMiddleware(
            _FixedPaths(app, fixed),
            context.metrics,
            RequestLog(quiet=_POLLED),
            hosts,
            connections=connections,
            vital=_POLLED,
        ),
        context=context,
        endpoints={e.path.encode(): e for e in endpoints if e.parse is not None},
        authenticate=authenticate,
    )


@dataclass(frozen=True)
class _FixedPaths:
    """Application that calls endpoints of a fixed path itself, and leaves all else to another.

    Starlette's layers around an endpoint cost as much as all that is done to refuse a request.

    Attributes:
        app: answers all else.
        routes: endpoints by method and path.
    """

    app: ASGIApp
    routes: Mapping[tuple[str, str], Route]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as an ASGI application."""
        route = self.routes.get((scope["method"], scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            answer = await route.endpoint(request)
        except ClientGoneError:
            raise
        except Exception as error:
            answer = await answer_of(request, error)
        await answer(scope, receive, send)


def all_endpoints(context: Context) -> tuple[Endpoint, ...]:
    """Return all endpoints of the API."""
    return (
        *OpenAIEndpoints(context).endpoints(),
        *JobEndpoints(context).endpoints(),
        *CapabilityEndpoints(context).endpoints(),
        *ShareEndpoints(context).endpoints(),
        *WebUIEndpoints(context).endpoints(),
        *HealthEndpoints(context).endpoints(),
    )


def _route(endpoint: Endpoint, authenticate: Authenticate | None) -> Route:
    handler = endpoint.handler
    if authenticate is not None and not endpoint.open:
        handler = guarded(handler, authenticate)
    return Route(endpoint.path, handler, methods=[endpoint.method])
