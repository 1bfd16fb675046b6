"""Refusals of a full queue on real sockets: without an ASGI cycle they are as with one."""

import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, complete_engines, served

from latentforge.serve.http.body import BodyLimits
from latentforge.serve.http.connection import BoundedConnection
from latentforge.serve.http.context import Context, HttpOptions
from latentforge.serve.http.middleware import RequestMiddleware
from latentforge.serve.keys import ApiKey, KeyRing, digest_of
from latentforge.serve.logs import FIELDS
from latentforge.serve.scheduler import Limits
from latentforge.serve.service import ModelSource, Service, ServiceOptions

GENERATIONS, JOBS, WEB = "/v1/images/generations", "/v1/jobs", "/sdapi/v1/txt2img"
TEXT = b'{"prompt": "a"}'
RING = KeyRing(
    {
        "plain": ApiKey(sha256=digest_of("p")),
        "slow": ApiKey(sha256=digest_of("s"), rate=1e-3, burst=100),
        "few": ApiKey(sha256=digest_of("f"), queued=1),
    }
)


class Impatient(BoundedConnection):
    """Connection whose times are short."""

    head_seconds = 0.3
    read_seconds = 0.3


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_engines(tmp_path_factory.mktemp("refusal"))


def full_server(
    engines: Path,
    ring: KeyRing | None = None,
    connection: type[BoundedConnection] = BoundedConnection,
    jobs: int = 1,
    **options: Any,
) -> Any:
    """Return a server without workers, whose queue is full of this many jobs that never run."""

    def context() -> Context:
        few = ServiceOptions(limits=Limits(queue_jobs=jobs))
        source = ModelSource(name="handmade", directory=engines)
        service = Service([source], options=few, ring=ring)
        bounds = HttpOptions(body=BodyLimits(bytes=100_000, chunk_seconds=0.5), log_prompts=True)
        return Context(service=service, metrics=service.metrics, options=bounds)

    keys = None if ring is None else ring.owner
    return served(context, connection, start=False, authenticate=keys, **options)


@pytest.fixture
def full(engines: Path) -> Iterator[Served]:
    with full_server(engines) as server, server.client() as client:
        assert client.post(JOBS, json={"prompt": "a"}).status_code == 202
        yield server


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the requests that have an ASGI cycle."""
    paths: list[str] = []
    handled = RequestMiddleware.__call__

    async def counted(self: RequestMiddleware, scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        await handled(self, scope, receive, send)

    monkeypatch.setattr(RequestMiddleware, "__call__", counted)
    return paths


def asking(
    path: str = GENERATIONS, body: bytes = TEXT, *lines: str, length: int | None = None
) -> bytes:
    """Return a request, with further lines in its head."""
    size = f"content-length: {len(body) if length is None else length}"
    head = [f"POST {path} HTTP/1.1", "host: a", "content-type: application/json", *lines, size]
    return "\r\n".join([*head, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    head = asking(body=b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def answers(connection: socket.socket, count: int) -> list[tuple[bytes, bytes]]:
    """Return the heads and bodies of the next answers."""
    found, data = [], b""
    while len(found) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head)
        length = int(size[1]) if size else 0
        if end and len(rest) >= length:
            found.append((head, rest[:length]))
            data = rest[length:]
            continue
        piece = connection.recv(1 << 16)
        assert piece, (data, found)
        data += piece
    assert not data
    return found


def answer_to(server: Served, *parts: bytes) -> tuple[bytes, bytes]:
    """Return the answer to a request that is sent in parts."""
    with connected(server) as connection:
        for number, part in enumerate(parts):
            time.sleep(0.05 * bool(number))
            connection.sendall(part)
        return answers(connection, 1)[0]


def status_and_code(answer: tuple[bytes, bytes]) -> tuple[int, str]:
    head, body = answer
    return int(head.split()[1]), json.loads(body)["error"]["code"]


FULL = (503, "queue_full")


@pytest.mark.parametrize("path", [GENERATIONS, JOBS, WEB])
def test_refusals_are_those_of_a_cycle(
    full: Served, cycles: list[str], caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """The bytes, the metrics and the lines of the log are the same but for the id and the times."""
    caplog.set_level(logging.INFO)
    request = asking(path, TEXT, "x-request-id: mine", "traceparent: 00-" + "a" * 32 + "-b-01")
    labels = {"route": path, "model": "handmade", "status": "503"}
    counts = []
    found: list[tuple[bytes, bytes]] = []
    for parts in ((request,), (request[:-3], request[-3:])):
        found.append(answer_to(full, *parts))
        wait_for(lambda: len(refusals(caplog)) == len(found))
        counts.append(
            (
                full.value("latentforge_requests_total", **labels),
                full.value("latentforge_request_seconds_count", route=path),
                full.value("latentforge_rejected_total", reason="full"),
            )
        )
    assert cycles == [path]  # the second has one
    (early, early_body), (late, late_body) = (
        (re.sub(rb"date: [^\r]*", b"", head), body) for head, body in found
    )
    assert (early, early_body) == (late, late_body)
    assert b"x-request-id: mine" in early and b"retry-after: " in early
    assert counts[0][0] == 1 and counts[0][2] == 1
    assert counts[1] == tuple(count + 1 for count in counts[0])
    first, second = refusals(caplog)
    assert first.pop("seconds") < 1 and second.pop("seconds") < 1
    assert first == second and first["prompt"] == "a" and first["trace"] == "a" * 32


def refusals(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    fields = [dict(getattr(record, FIELDS, {})) for record in caplog.records]
    return [entry for entry in fields if entry.get("status") == 503]


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_that_would_be_accepted_are(engines: Path, cycles: list[str]) -> None:
    """A queue with some work refuses what does not fit, and a body is read once more for the rest.

    The connection stays open after each of them.
    """
    with full_server(engines, jobs=3) as server, connected(server) as connection:
        statuses = []
        for _ in range(5):
            connection.sendall(asking(JOBS))
            ((head, _),) = answers(connection, 1)
            statuses.append(int(head.split()[1]))
            assert b"connection: close" not in head
        assert statuses == [202, 202, 202, 503, 503]
    assert cycles == [JOBS] * 3


def test_pipelined_requests_are_answered_in_order(full: Served, cycles: list[str]) -> None:
    live = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"
    with connected(full) as connection:
        for count in (1, 2):  # the connection stays open
            connection.sendall(asking() * 3 + live + asking(WEB) + live)
            statuses = [int(head.split()[1]) for head, _ in answers(connection, 6)]
            assert statuses == [503, 503, 503, 200, 503, 200]
            assert cycles == ["/livez", WEB, "/livez"] * count  # what waits for its turn has one
        connection.sendall(asking() + live[:-2])
        answers(connection, 1)
        connection.sendall(live[-2:])
        assert answers(connection, 1)[0][0].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("parts", "early"),
    [
        ((chunked(TEXT[:5], TEXT[5:], b""),), True),
        ((chunked(TEXT[:5]), chunked(TEXT[5:], b"").partition(b"\r\n\r\n")[2]), False),
        ((asking()[:9], asking()[9:]), True),
        ((asking(body=b"", length=len(TEXT)), TEXT), False),
        ((asking(GENERATIONS, TEXT, "connection: close"),), False),
        ((asking().replace(b"HTTP/1.1", b"HTTP/1.0"),), False),
        ((asking(GENERATIONS + "?a=b"),), False),
        ((asking(GENERATIONS, TEXT, "idempotency-key: k"),), False),
    ],
)
def test_ways_to_send_a_request(
    full: Served, cycles: list[str], parts: tuple[bytes, ...], early: bool
) -> None:
    assert status_and_code(answer_to(full, *parts)) == FULL
    assert bool(cycles) != early


def test_clients_that_wait_to_send_are_asked_to(full: Served) -> None:
    with connected(full) as connection:
        head = asking(GENERATIONS, b"", "expect: 100-continue", length=len(TEXT))
        connection.sendall(head)
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(TEXT)
        assert status_and_code(answers(connection, 1)[0]) == FULL
        connection.sendall(head + TEXT)
        assert connection.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert status_and_code(answers(connection, 1)[0]) == FULL


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (asking(body=b'{"prompt": 1}'), 400),
        (asking(body=b"{"), 400),
        (asking(body=b'{"prompt": "a", "size": "8000x8000"}'), 400),
        (asking(body=b'{"prompt": "a", "model": "none"}'), 404),
        (asking(body=b'{"prompt": "' + b"a" * 100_000 + b'"}'), 413),
        (asking().replace(b"application/json", b"text/plain"), 415),
        (asking().replace(b"host: a", b"host: b"), 403),
        (asking(GENERATIONS, TEXT, "sec-fetch-site: cross-site"), 403),
        (asking("/v1/models"), 405),
    ],
)
def test_all_other_errors_come_first(engines: Path, request_: bytes, status: int) -> None:
    with full_server(engines, hosts=frozenset({"a", "127.0.0.1"})) as server:
        answer_to(server, asking(JOBS))
        assert status_and_code(answer_to(server, request_))[0] == status
        assert status_and_code(answer_to(server, asking())) == FULL


def test_too_many_connections_come_first(engines: Path) -> None:
    with full_server(engines, connections=1) as server, connected(server) as connection:
        connection.sendall(asking(JOBS))
        answers(connection, 1)
        busy = answer_to(server, asking())
        assert status_and_code(busy) == (503, "busy") and b"connection: close" in busy[0]


def test_keys_and_their_limits_come_first(engines: Path, cycles: list[str]) -> None:
    def with_key(key: str, body: bytes = TEXT, *lines: str) -> tuple[bytes, bytes]:
        return answer_to(server, asking(JOBS, body, f"authorization: Bearer {key}", *lines))

    with full_server(engines, RING, jobs=3) as server:
        assert b" 202 " in with_key("s")[0]
        accepted = with_key("f", TEXT, "idempotency-key: k")
        assert status_and_code(with_key("f")) == (429, "rate_limit_exceeded")  # its second
        assert b" 202 " in with_key("p")[0]
        cycles.clear()
        assert status_and_code(with_key("p")) == FULL
        assert status_and_code(with_key("f")) == (429, "rate_limit_exceeded")
        assert not cycles and server.value("latentforge_rejected_total", reason="quota") == 2
        assert status_and_code(with_key("wrong")) == (401, "invalid_api_key")
        assert status_and_code(answer_to(server, asking())) == (401, "invalid_api_key")
        large = b'{"prompt": "a", "num_inference_steps": 900, "n": 10}'
        assert status_and_code(with_key("s", large)) == (400, "invalid_value")
        repeated = with_key("f", TEXT, "idempotency-key: k")
        assert json.loads(repeated[1])["id"] == json.loads(accepted[1])["id"]


def test_clients_that_leave(full: Served) -> None:
    """One that leaves in its body is counted as such, and one that was refused is not."""

    def count(status: int) -> float:
        labels = {"route": GENERATIONS, "model": "", "status": str(status)}
        found = full.value("latentforge_requests_total", **labels)
        return found + full.value("latentforge_requests_total", **{**labels, "model": "handmade"})

    with connected(full) as connection:
        connection.sendall(asking()[:-3])
        time.sleep(0.05)
    wait_for(lambda: count(499) == 1)
    with connected(full) as connection:
        connection.sendall(asking())
    wait_for(lambda: count(503) == 1)
    with connected(full) as connection:  # damaged in the same piece of data
        connection.sendall(chunked(TEXT[:5]) + b"zz\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    wait_for(lambda: count(499) == 2)
    assert status_and_code(answer_to(full, asking())) == FULL


def test_a_server_that_shuts_down_closes_connections(full: Served) -> None:
    with connected(full) as connection:
        connection.sendall(asking())
        assert status_and_code(answers(connection, 1)[0]) == FULL
        full.call(full.context.service.scheduler.drain)
        connection.sendall(asking())
        answer = answers(connection, 1)[0]
        assert status_and_code(answer) == (503, "draining") and b"connection: close" in answer[0]
        connection.settimeout(2)  # sooner than the end of a connection at rest
        assert not connection.recv(1)


def test_connections_at_rest_are_not_cut_off_as_slow(engines: Path) -> None:
    with full_server(engines, connection=Impatient) as server, connected(server) as connection:
        for status in (b" 202 ", b" 503 ", b" 503 "):
            connection.sendall(asking(JOBS))
            assert status in answers(connection, 1)[0][0]
            time.sleep(2 * Impatient.head_seconds)
        connection.sendall(asking(JOBS) + asking(JOBS)[:20])  # a head that never ends
        assert b" 503 " in answers(connection, 1)[0][0]
        assert not connection.recv(1)
