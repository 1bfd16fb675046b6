"""Refusals of a full queue, before a request has an ASGI cycle.

A server with many times its load does little but refuse. A task, a cycle and a chain of coroutines
for each request would take most of the time of that, from the cores that its workers need.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from latentforge.serve.http.body import check_media_type
from latentforge.serve.http.context import MODEL, OWNER, TEXT, Context
from latentforge.serve.http.endpoint import Endpoint, TextRequest
from latentforge.serve.http.middleware import (
    Authenticate,
    RequestMiddleware,
    first_values,
    key_of,
)
from latentforge.serve.keys import ANYONE

__all__ = ["RefusingApp"]


@dataclass(frozen=True, kw_only=True)
class RefusingApp:
    """Application that can refuse a request that has come completely, without a cycle.

    It refuses only for what submit() of the service raises. All else, such as a wrong key, a wrong
    body or a repetition, has no answer here, and its cycle answers it.

    Attributes:
        app: answers all other requests.
        context: of the endpoints.
        endpoints: those that have parse(), by URL.
        authenticate: checks keys; None if the server has none.
    """

    app: RequestMiddleware
    context: Context
    endpoints: Mapping[bytes, Endpoint]
    authenticate: Authenticate | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as an ASGI application."""
        await self.app(scope, receive, send)

    def may_refuse(self, url: bytes) -> bool:
        """Return True if a POST request to a URL could be refused: others wait."""
        service = self.context.service
        return url in self.endpoints and service.scheduler.waiting > 0 and not service.draining

    def refusal(self, scope: Scope, url: bytes, body: bytes) -> Response | None:
        """Return the answer to a request that is refused, and record it; None for a cycle's.

        Args:
            scope: of the request; one that is refused gets the entries that endpoints add.
            url: for which may_refuse() is True.
            body: all of it.
        """
        start, headers, endpoint = time.perf_counter(), first_values(scope), self.endpoints[url]
        if not self._applies(scope, headers, body):
            return None
        try:
            check_media_type(headers, "application/json")
            owner = self._owner(headers)
            text = endpoint.parse(body) if endpoint.parse is not None else None
            error = None if text is None else self.context.refusal(text, owner)
        except Exception:  # which the cycle meets too, and answers
            return None
        if text is None or error is None:
            return None
        scope.update(self._entries(endpoint, text, owner))
        return self.app.refuse(scope, headers, error, time.perf_counter() - start)

    def _applies(self, scope: Scope, headers: Mapping[str, str], body: bytes) -> bool:
        """Return False for a repetition, a body that is too large, and a page of another site."""
        if "idempotency-key" in headers or len(body) > self.context.options.body.bytes:
            return False
        return self.app.admits(scope, headers)

    def _owner(self, headers: Mapping[str, str]) -> str:
        return ANYONE if self.authenticate is None else self.authenticate(key_of(headers))

    def _entries(self, endpoint: Endpoint, text: TextRequest, owner: str) -> Scope:
        entries: Scope = {"route": endpoint, MODEL: text.images.model}
        if self.authenticate is not None:
            entries[OWNER] = owner
        if self.context.options.log_prompts:
            entries[TEXT] = text.images.prompt
        return entries
