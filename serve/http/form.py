"""Multipart forms, read in memory: no part becomes a temporary file."""

from __future__ import annotations

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from latentforge.serve.errors import BadRequestError

__all__ = ["parse_form"]

_MAX_PARTS = 32
_MAX_TEXT = 1 << 20  # bytes of a field that is no file


def parse_form(body: bytes, content_type: str) -> dict[str, Any]:
    """Return the fields of a form: text, and bytes of files; lists where a name is repeated.

    Raises:
        BadRequestError: it is damaged or incomplete, or has too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise BadRequestError("the form has no boundary in its content-type")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise BadRequestError(f"the form cannot be read: {error}") from error
    if not parts.complete:
        raise BadRequestError("the form ends too early: send all of it")
    return parts.fields


class _Parts:
    """Parts of a form, as they are found.

    Attributes:
        fields: contents by name.
        complete: True once the form has ended.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.complete = False
        self._count = 0
        self._content = bytearray()
        self._header, self._value = bytearray(), bytearray()
        self._options: dict[bytes, bytes] = {}

    def callbacks(self) -> Any:
        """Return the functions that the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to("_header"),
            "on_header_value": self._add_to("_value"),
            "on_header_end": self._end_header,
            "on_part_data": self._add_to("_content"),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _add_to(self, name: str) -> Any:
        def add(data: bytes, start: int, end: int) -> None:
            getattr(self, name).extend(data[start:end])

        return add

    def _begin(self) -> None:
        self._count += 1
        if self._count > _MAX_PARTS:
            raise BadRequestError(f"the form has more than {_MAX_PARTS} parts: send fewer")
        self._content, self._options = bytearray(), {}

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            _, self._options = parse_options_header(self._value.decode("latin-1"))
        self._header, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        if b"name" not in self._options:
            raise BadRequestError("a part of the form has no name")
        name = _text(self._options[b"name"], "a name")
        content: Any = bytes(self._content)
        if b"filename" not in self._options:
            if len(content) > _MAX_TEXT:
                raise BadRequestError(f"{name:.100} is too long", param=name[:100])
            content = _text(content, f"{name:.100}")
        earlier = self.fields.get(name)
        if earlier is not None:
            content = [*(earlier if isinstance(earlier, list) else [earlier]), content]
        self.fields[name] = content

    def _finish(self) -> None:
        self.complete = True


def _text(content: bytes, what: str) -> str:
    """Return text in UTF-8.

    Raises:
        BadRequestError: it is none.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRequestError(f"{what} in the form is not UTF-8") from error
