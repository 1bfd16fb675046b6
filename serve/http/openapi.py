"""Description of the API by OpenAPI 3.1, from the table of endpoints and their records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from latentforge.runtime.version import __version__
from latentforge.serve.http.endpoint import Endpoint
from latentforge.serve.http.envelope import ErrorEnvelope

__all__ = ["describe"]

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")


def describe(endpoints: Sequence[Endpoint], *, keys: bool) -> dict[str, Any]:
    """Return the description as JSON values.

    Args:
        endpoints: all endpoints.
        keys: True if the server needs a key.
    """
    records: dict[Any, None] = {ErrorEnvelope: None}
    for endpoint in endpoints:
        for record in (endpoint.body, endpoint.query, endpoint.answer, endpoint.refusal):
            if record is not None:
                records[record] = None
    schemas, components = msgspec.json.schema_components(records, ref_template=_REFERENCE)
    by_record = dict(zip(records, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        described = _Operation(endpoint, by_record, components)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = described.document(keys)
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "latentforge", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": bearer}},
    }


class _Operation:
    """Description of one endpoint.

    Args:
        endpoint: the endpoint.
        schemas: reference to the schema of each record.
        components: the schemas.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        schemas: Mapping[Any, dict[str, Any]],
        components: Mapping[str, Any],
    ) -> None:
        self._endpoint = endpoint
        self._schemas = schemas
        self._components = components

    def document(self, keys: bool) -> dict[str, Any]:
        """Return the operation object."""
        endpoint = self._endpoint
        document: dict[str, Any] = {
            "summary": endpoint.summary,
            "operationId": _identifier(endpoint),
            "tags": [endpoint.group],
            "parameters": [*self._path_parameters(), *self._query(), *self._headers()],
            "responses": self._responses(keys),
        }
        if endpoint.body is not None:
            document["requestBody"] = self._body()
        if keys and not endpoint.open:
            document["security"] = [{"key": []}]
        return document

    def _path_parameters(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARAMETER.findall(self._endpoint.path)
        ]

    def _query(self) -> list[dict[str, Any]]:
        if self._endpoint.query is None:
            return []
        schema = self._components[self._endpoint.query.__name__]
        required = schema.get("required", [])
        return [
            {"name": name, "in": "query", "required": name in required, "schema": kind}
            for name, kind in schema["properties"].items()
        ]

    def _headers(self) -> list[dict[str, Any]]:
        if not self._endpoint.idempotent:
            return []
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[!-~]+$"}
        text = "repetitions with the same key and body are one request"
        return [{"name": "Idempotency-Key", "in": "header", "schema": schema, "description": text}]

    def _body(self) -> dict[str, Any]:
        endpoint = self._endpoint
        kind = "multipart/form-data" if endpoint.form else "application/json"
        schema = self._schemas[endpoint.body]
        if endpoint.form and endpoint.body is not None:
            schema = _binary(self._components[endpoint.body.__name__])
        return {"required": True, "content": {kind: {"schema": schema}}}

    def _responses(self, keys: bool) -> dict[str, Any]:
        endpoint = self._endpoint
        errors = {*endpoint.errors, 500, *([401] if keys and not endpoint.open else [])}
        responses = {str(status): self._failure(status) for status in sorted(errors)}
        return {str(endpoint.status): self._success(), **responses}

    def _success(self) -> dict[str, Any]:
        endpoint = self._endpoint
        content: dict[str, Any] = {endpoint.media_type: {}}
        if endpoint.answer is not None:
            content = {endpoint.media_type: {"schema": self._schemas[endpoint.answer]}}
        if endpoint.streams:
            content["text/event-stream"] = {}
        return {"description": endpoint.summary, "content": content}

    def _failure(self, status: int) -> dict[str, Any]:
        record = self._endpoint.refusal if status == 503 else None
        schema = self._schemas[record or ErrorEnvelope]
        content = {"application/json": {"schema": schema}}
        return {"description": HTTPStatus(status).phrase, "content": content}


def _identifier(endpoint: Endpoint) -> str:
    """Return a name of the operation that no other one has."""
    words = re.sub(r"\W+", "_", endpoint.path).strip("_")
    return f"{endpoint.method.lower()}_{words}"


def _binary(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a form, whose files are bytes instead of base64."""
    properties = {name: _as_file(kind) for name, kind in schema["properties"].items()}
    return {**schema, "properties": properties}


def _as_file(kind: dict[str, Any]) -> dict[str, Any]:
    parts = [kind, *kind.get("anyOf", [])]
    encoded = any(part.get("contentEncoding") == "base64" for part in parts)
    return {"type": "string", "format": "binary"} if encoded else kind
