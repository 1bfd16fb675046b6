"""Socket of the server."""

import asyncio
import socket

import pytest

from latentforge.runtime.errors import SettingsError
from latentforge.serve.http.server import listen


def test_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY each would wait 40 ms for an acknowledgement."""
    options: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def scenario() -> None:
        with listen("127.0.0.1", 0) as bound:
            async with await asyncio.start_server(answer, sock=bound):
                reader, writer = await asyncio.open_connection(*bound.getsockname())
                await reader.read()
                writer.close()

    asyncio.run(scenario())
    assert options and options[0]


def test_an_address_that_is_used_is_refused() -> None:
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(SettingsError, match="choose another --port"):
            listen(*bound.getsockname())
