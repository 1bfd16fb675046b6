"""Measurements of a running server: overhead, overload, fairness, and many requests."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from latentforge.measure.statistics import median_interval
from latentforge.runtime.pipeline import Pipeline
from serving_stages.client import (
    Answer,
    Client,
    Outcomes,
    closed_load,
    open_load,
    percentile,
    quantiles,
)
from serving_stages.figures import Figure
from serving_stages.server_process import ServerProcess

__all__ = ["LoadResult", "ServerLoad", "fairness", "overhead", "overload", "refusals", "soak"]

_SETTLE = 1.0  # seconds after a load
_PAUSE = 0.02  # seconds between runs of a pair: threads of the last one go to sleep
_SMALL, _SMALL_STEPS, _HUGE_STEPS, _HUGE_IMAGES = 20, 4, 200, 10
_SAMPLES = 20  # of memory
_SETTINGS = {"num_inference_steps": "steps"}  # of a pipeline, by the field of a request


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """Result of one measurement: figures for the table, and all else that was found."""

    figures: tuple[Figure, ...]
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServerLoad:
    """Requests to a server, each for one image with a prompt and a seed of its own.

    Attributes:
        server: the process.
        client: of it.
        fields: of each request.
        name: of the model, for the table.
    """

    server: ServerProcess
    client: Client
    fields: Mapping[str, Any]
    name: str

    def asking(self, **fields: Any) -> ServerLoad:
        """Return the same with further fields in each request."""
        return replace(self, fields={**self.fields, **fields})

    def image(self, number: int, **changes: Any) -> asyncio.Future[Answer]:
        """Ask for an image."""
        fields = json.dumps({**self.fields, **changes}).encode() if changes else self._fields
        body = b'{"prompt": "%d red apples", "seed": %d, %b' % (number, number, fields[1:])
        return self.client.send(self.client.posting("/v1/images/generations", body))

    @cached_property
    def _fields(self) -> bytes:
        return json.dumps(self.fields).encode()

    def idle(self) -> Figure:
        """Return what the server counts although there is nothing to do."""
        metrics, names = self.server.metrics(), ("running", "waiting", "permits")
        text = f"{self.name}: {' + '.join(names)} afterwards"
        return Figure(text=text, value=sum(metrics[name] for name in names), limit=0)


async def overhead(load: ServerLoad, pipe: Pipeline, pairs: int) -> LoadResult:
    """Compare images over HTTP with those of the engines in this process, pair by pair."""
    settings = {_SETTINGS.get(name, name): value for name, value in load.fields.items()}
    offset = load.server.log.stat().st_size
    http: list[float] = []
    direct: list[float] = []

    async def over_http(number: int) -> None:
        answer = await load.image(number)
        if answer.status != "200":
            raise RuntimeError(f"the server answered {answer.status}: {answer.body[:300]!r}")
        http.append(answer.seconds)

    async def in_process(number: int) -> None:
        start = time.perf_counter()
        pipe(f"{number} red apples", seed=number, **settings)
        direct.append(time.perf_counter() - start)

    for number in range(pairs + 2):
        order = (over_http, in_process) if number % 2 else (in_process, over_http)
        for run in order:
            await run(number)
            await asyncio.sleep(_PAUSE)
    logged = load.server.logged(offset)["200"]
    return _overhead(load.name, http[2:], direct[2:], logged[2:])  # the first ones allocate


def _overhead(name: str, http: list[float], direct: list[float], logged: list[float]) -> LoadResult:
    pipe = statistics.median(direct)
    added = median_interval([a - b for a, b in zip(http, direct, strict=True)])
    text = f"{name}: an image over HTTP less one of `pipe()`, median of {len(http)} pairs"
    limit = 3 + 0.01 * 1000 * pipe
    return LoadResult(
        figures=(
            Figure(text=f"{name}: an image of `pipe()`", value=1000 * pipe, unit=" ms"),
            Figure(text=text, value=1000 * added.value, unit=" ms", limit=limit),
        ),
        details={
            "http": quantiles(http),
            "server_log": quantiles(logged),
            "pipe": quantiles(direct),
            "added_seconds": {"low": added.low, "median": added.value, "high": added.high},
            "level": added.level,
        },
    )


async def overload(
    load: ServerLoad, *, calm: float, seconds: float, times: float, clients: int, queue: float
) -> LoadResult:
    """Send many times as many requests as the server can answer, and watch those it accepts.

    The capacity is that of calm times before and after, as the speed of many machines drifts.

    Args:
        load: the requests.
        calm: seconds of each of them.
        seconds: of the overload.
        times: rate of the requests, in capacities.
        clients: that find the capacity.
        queue: longest wait of an accepted request, as the server was started with.
    """
    server = load.server
    await closed_load(load.image, clients, calm / 4)  # allocates what batches need
    before = await closed_load(load.image, clients, calm)
    rows = _rows_of_a_batch(server)
    memory, offset, cpu = server.memory(), server.log.stat().st_size, server.cpu()
    over = await open_load(load.image, times * before.rate, seconds)
    await asyncio.sleep(_SETTLE)
    logged, idle, cpu = server.logged(offset), load.idle(), server.cpu() - cpu
    growth = 100 * (server.memory() / memory - 1)
    after = await closed_load(load.image, clients, calm)
    capacity = (before.in_time + after.in_time) / (before.elapsed + after.elapsed)
    figures = _overload_figures(load, capacity, over, logged, queue + rows / capacity)
    grown = Figure(text=f"{load.name}: growth of memory", value=growth, unit=" %", limit=5)
    return LoadResult(
        figures=(*figures, idle, grown),
        details={
            "calm": [before.summary(), after.summary()],
            "overload": over.summary(),
            "server_log": {status: quantiles(values) for status, values in logged.items()},
            "rows_of_a_batch": rows,
            "server_cpu_seconds": round(cpu, 2),
            "memory_bytes": [memory, server.memory()],
        },
    )


def _overload_figures(
    load: ServerLoad,
    capacity: float,
    over: Outcomes,
    logged: Mapping[str, list[float]],
    longest: float,
) -> tuple[Figure, ...]:
    name, refused = load.name, over.times("503")
    others = len([1 for status in over.seconds if status not in ("200", "503")])
    own = percentile(logged["503"], 99) if "503" in logged else 0.0
    late = percentile(refused, 99) if refused else 0.0
    accepted = percentile(over.times("200"), 99) if over.times("200") else float("inf")
    return (
        Figure(text=f"{name}: capacity", value=capacity, unit=" images/s"),
        Figure(
            text=f"{name}: goodput / capacity", value=over.rate / capacity, limit=0.9, at_least=True
        ),
        Figure(text=f"{name}: rejections, p99", value=1000 * late, unit=" ms", limit=50),
        Figure(text=f"{name}: the same by the server's log", value=1000 * own, unit=" ms"),
        Figure(text=f"{name}: accepted, p99", value=accepted, unit=" s", limit=longest),
        Figure(text=f"{name}: statuses besides 200 and 503", value=others, limit=0),
        Figure(text=f"{name}: cores that the clients took", value=over.own_cpu / over.elapsed),
    )


def _rows_of_a_batch(server: ServerProcess) -> float:
    """Return the images of an average batch so far."""
    found = server.metrics()
    return found["batch_size_sum"] / found["batch_size_count"]


async def refusals(load: ServerLoad, rate: float, seconds: float) -> LoadResult:
    """Send requests to a server that has no place for them, and count the processor time.

    Two requests hold the place: one runs, and one waits for longer than the queue is long.

    Args:
        load: the requests, each of which runs for longer than this takes.
        rate: requests per second.
        seconds: of the load.

    Raises:
        RuntimeError: a request was not refused.
    """
    await load.image(0, num_inference_steps=1)  # so that the server knows its speed
    holders = [asyncio.ensure_future(load.image(number)) for number in range(2)]
    await asyncio.sleep(_SETTLE)
    cpu = load.server.cpu()
    found = await open_load(load.image, rate, seconds)
    cpu = load.server.cpu() - cpu
    for task in holders:
        task.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    if set(found.seconds) != {"503"}:
        raise RuntimeError(f"not all requests were refused: {sorted(found.seconds)}")
    each, name = 1000 / len(found.times("503")), f"{load.name}: processor time of a refusal"
    return LoadResult(
        figures=(
            Figure(text=f"{name}, the server's", value=cpu * each, unit=" ms"),
            Figure(text=f"{name}, the client's", value=found.own_cpu * each, unit=" ms"),
        ),
        details={**found.summary(), "server_cpu_seconds": round(cpu, 2)},
    )


async def fairness(load: ServerLoad, rounds: int, gap: float) -> LoadResult:
    """Send small requests, alone and beside a huge one, in turns.

    Args:
        load: the requests.
        rounds: of both.
        gap: seconds between two small requests.
    """
    alone: list[float] = []
    beside: list[float] = []
    for number in range(rounds):
        alone += await _small(load, gap)
        huge = {"n": _HUGE_IMAGES, "num_inference_steps": _HUGE_STEPS}
        task = asyncio.ensure_future(load.image(number, **huge))
        await asyncio.sleep(_SETTLE)
        beside += await _small(load, gap)
        if task.done():
            raise RuntimeError(f"the huge request ended too soon: {task.result().status}")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(_SETTLE)
    ratio = percentile(beside, 95) / percentile(alone, 95)
    how = f"{gap:g} s apart" if gap else "at once"
    text = f"{load.name}: p95 of {_SMALL} small requests {how}, beside a huge one / alone"
    return LoadResult(
        figures=(Figure(text=text, value=ratio, limit=3),),
        details={"alone": quantiles(alone), "beside": quantiles(beside)},
    )


async def _small(load: ServerLoad, gap: float) -> list[float]:
    async def one(number: int) -> float:
        await asyncio.sleep(gap * number)
        answer = await load.image(number, num_inference_steps=_SMALL_STEPS)
        if answer.status != "200":
            raise RuntimeError(f"a small request was answered by {answer.status}")
        return answer.seconds

    return await asyncio.gather(*map(one, range(_SMALL)))


async def soak(load: ServerLoad, requests: int, clients: int) -> LoadResult:
    """Send a number of requests, and compare the memory of their first and last fifth.

    The first fifth itself is left out: prompts, results and allocators fill what they may keep.
    """
    each = max(clients, requests // _SAMPLES)
    memory, found = [], Outcomes()
    cpu, start = time.process_time(), time.perf_counter()
    for begin in range(0, requests, each):
        await _some(load, range(begin, begin + each), clients, found)
        memory.append(load.server.memory())
    found.elapsed, found.own_cpu = time.perf_counter() - start, time.process_time() - cpu
    found.in_time = len(found.times("200"))
    await asyncio.sleep(_SETTLE)
    fifth = len(memory) // 5
    before, after = (
        statistics.median(part) for part in (memory[fifth : 2 * fifth], memory[-fifth:])
    )
    failed = sum(len(times) for status, times in found.seconds.items() if status != "200")
    name = f"{load.name}: {requests} requests"
    growth = 100 * (after / before - 1)
    return LoadResult(
        figures=(
            Figure(text=f"{name}: failed", value=failed, limit=0),
            Figure(text=f"{name}: growth of memory", value=growth, unit=" %", limit=2),
            load.idle(),
        ),
        details={**found.summary(), "memory_bytes": memory},
    )


async def _some(load: ServerLoad, numbers: range, clients: int, found: Outcomes) -> None:
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            found.add(await load.image(number))

    await asyncio.gather(*(client() for _ in range(clients)))
