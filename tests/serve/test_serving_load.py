"""Benchmarks of servers: their client, engines of known cost, and short runs of all of them."""

import asyncio
import json
import os
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import serving_peers
from serving_stages.client import Answer, Client, closed_load, open_load
from serving_stages.figures import Figure, as_json, as_table
from serving_stages.load import ServerLoad, fairness, overhead, overload, refusals, soak
from serving_stages.peer_servers import OURS, PeerFolders
from serving_stages.server_process import latentforge_server
from serving_stages.synthetic import StepCost, synthetic_engines

from latentforge.runtime.loader import load

pytest.importorskip("uvicorn")

COST = StepCost(call=3000, row=2000)


# The client


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


@contextmanager
def answering(*parts: bytes, requests: int = 2) -> Iterator[Client]:
    """Give a client of a server that answers in parts, 50 ms apart, and closes its connections."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            for _ in range(requests):
                if not self.request.recv(10_000):
                    return
                for index, part in enumerate(parts):
                    time.sleep(0.05 * bool(index))
                    self.request.sendall(part)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        client = Client("127.0.0.1", server.server_address[1])
        yield client
        client.close()
        server.shutdown()
        thread.join()


def test_an_answer_is_timed_to_its_last_byte_as_the_kernel_received_it() -> None:
    async def ask(client: Client, pause: float) -> Answer:
        waiting = asyncio.ensure_future(client.get("/"))
        await asyncio.sleep(0.01)
        time.sleep(pause)  # nobody reads the answer
        return await waiting

    async def work(client: Client) -> list[Answer]:
        return [await ask(client, pause) for pause in (0.0, 0.6, 0.0)]  # the third reconnects

    with answering(HEAD + b"ab", b"cd") as client:
        found = asyncio.run(work(client))
    for answer in found:
        assert (answer.status, answer.body) == ("200", b"abcd")
        assert 0.045 < answer.seconds < (0.5 if sys.platform == "linux" else 2)


@pytest.mark.parametrize(
    ("parts", "status"),
    [((HEAD, b"ab"), "EOFError"), ((b"HTTP/1.1 200 OK\r\n\r\nab",), "ValueError")],
)
def test_answers_that_are_none(parts: tuple[bytes, ...], status: str) -> None:
    with answering(*parts, requests=1) as client:
        assert asyncio.run(client.get("/")).status == status


def test_a_server_that_is_not_there() -> None:
    assert asyncio.run(Client("127.0.0.1", 9).get("/")).status == "ConnectionRefusedError"


def test_loads_send_as_fast_as_they_should() -> None:
    with answering(HEAD + b"ab", b"cd") as client:
        closed = asyncio.run(closed_load(lambda _: client.get("/"), 4, 0.4))
        opened = asyncio.run(open_load(lambda _: client.get("/"), 100, 0.5))
    assert 4 <= len(closed.times("200")) <= 40 and closed.elapsed >= 0.4
    assert 25 <= len(opened.times("200")) <= 80 and opened.in_time <= len(opened.times("200"))
    assert closed.summary()["answers"]["200"]["p50"] > 0.045
    answers = sum(map(len, opened.seconds.values()))  # one may meet a connection being closed
    assert len(opened.lag) == answers and opened.own_cpu > 0


def test_clients_that_are_refused_wait_a_moment() -> None:
    async def refuse(number: int) -> Answer:
        return Answer(status="503" if number % 2 else "200", seconds=0.001)

    found = asyncio.run(closed_load(refuse, 1, 0.3))
    assert 1 <= len(found.times("503")) <= 2 <= len(found.times("200"))


# Figures


def test_figures_are_held_to_their_limits() -> None:
    rows = [
        Figure(text="late", value=51.0, unit=" ms", limit=50),
        Figure(text="goodput", value=0.94, limit=0.9, at_least=True),
        Figure(text="capacity", value=123.4, unit=" images/s"),
    ]
    assert [row["kept"] for row in as_json(rows)] == [False, True, None]
    assert as_table(rows).splitlines()[2:] == [
        "| late | 51 ms | at most 50 ms | **no** |",
        "| goodput | 0.94 | at least 0.9 | yes |",
        "| capacity | 123 images/s |  |  |",
    ]


# Engines of known cost, and runs


@pytest.fixture(scope="module")
def synthetic(null_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_engines(null_engines, tmp_path_factory.mktemp("cost"), COST)


def test_engines_have_their_cost(synthetic: Path) -> None:
    steps, batch = 10, 4
    with load(synthetic) as pipe:
        start = time.perf_counter()
        pipe("a", images_per_prompt=batch, steps=steps, guidance_scale=1.0)
        seconds = time.perf_counter() - start
    assert 1 <= seconds * COST.images_per_second(steps, batch) / batch < 3


@contextmanager
def loaded(engines: Path, log: Path, *options: str) -> Iterator[ServerLoad]:
    fields = {"num_inference_steps": 10, "guidance_scale": 1.0, "unaccelerated": True}
    with latentforge_server(engines, log, "--measure-seconds", "0", *options) as server:
        client = Client.of(server.url)
        yield ServerLoad(server=server, client=client, fields=fields, name="it")
        client.close()


def test_an_overload_is_measured(synthetic: Path, tmp_path: Path) -> None:
    sizes = {"calm": 0.5, "seconds": 1.0, "times": 10.0, "clients": 4, "queue": 0.5}
    with loaded(synthetic, tmp_path / "log", "--queue-seconds", "0.5") as requests:
        over = asyncio.run(overload(requests, **sizes))
    kept = {figure.text: figure.is_kept for figure in over.figures}
    assert kept["it: statuses besides 200 and 503"]
    assert kept["it: running + waiting + permits afterwards"]
    counts, logged = over.details["overload"]["answers"], over.details["server_log"]
    assert {status: found["count"] for status, found in logged.items()} == {
        status: found["count"] for status, found in counts.items()
    }
    assert counts["503"]["count"] > counts["200"]["count"] > 0
    assert logged["503"]["p50"] < counts["503"]["p50"]  # what the server itself takes
    assert over.details["rows_of_a_batch"] == 1


def test_the_processor_time_of_refusals_is_counted(synthetic: Path, tmp_path: Path) -> None:
    with loaded(synthetic, tmp_path / "log", "--queue-seconds", "0.5") as requests:
        found = asyncio.run(refusals(requests.asking(num_inference_steps=900), 100, 1.0))
        with pytest.raises(RuntimeError, match="not all requests were refused"):
            asyncio.run(refusals(requests.asking(num_inference_steps=1), 20, 0.5))
    assert [figure.unit for figure in found.figures] == [" ms", " ms"]
    assert all(0 < figure.value < 50 for figure in found.figures)
    assert set(found.details["answers"]) == {"503"}


def test_fairness_overhead_and_many_requests_are_measured(synthetic: Path, tmp_path: Path) -> None:
    with loaded(synthetic, tmp_path / "log") as requests, load(synthetic) as pipe:
        added = asyncio.run(overhead(requests, pipe, 3))
        fair = asyncio.run(fairness(requests, 1, 0.0))
        many = asyncio.run(soak(requests, 40, 4))
    assert fair.details["beside"]["count"] == 20 and added.details["pipe"]["count"] == 3
    assert {figure.text: figure.is_kept for figure in many.figures}["it: 40 requests: failed"]
    assert many.details["memory_bytes"][0] > 10e6


def test_servers_are_compared_in_rounds(
    null_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same server twice is as fast as itself, and one that ends is named with its reason."""
    broken_server = serving_peers.Contender(
        name="broken", kind=OURS, command=lambda _: (sys.executable, "-c", "exit('no such model')")
    )
    monkeypatch.setattr(serving_peers, "_theirs", lambda *_: [broken_server])
    engines = [null_engines, tmp_path / "again"]
    engines[1].symlink_to(null_engines)
    arguments = ["--output", str(tmp_path), "--seconds", "1", "--rounds", "2", "--clients", "2"]
    assert serving_peers.main([*map(str, engines), *arguments]) == 0
    found = json.loads((tmp_path / "serving_peers.json").read_text())["servers"]
    assert found["broken"]["failed"] == "no such model"
    assert 0.3 < found["latentforge-again"]["ratio"]["median"] < 3
    assert len(found["latentforge-handmade"]["rounds"]) == 2
    rows = (tmp_path / "serving_peers.md").read_text().splitlines()
    assert rows[3].startswith("| latentforge serve (`latentforge-again`) |")
    assert rows[-1] == "broken: no such model"


def test_converted_models_belong_to_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"1")
    folders = PeerFolders(environments=tmp_path, models=tmp_path, checkpoint=checkpoint)
    before = folders.model
    assert folders.model == before
    os.utime(checkpoint / "weights", (1, 1))
    assert folders.model != before
