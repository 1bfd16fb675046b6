"""Overload a running server, and measure what it does for those it accepts.

    latentforge serve demo-engines --port 8000
    python benchmarks/serving_load.py http://127.0.0.1:8000 --seconds 60 --times 10

First it finds the capacity, with as many clients as wait for each other; then requests arrive at
random times (Poisson), as often as asked for, whether earlier ones were answered or not: clients
who wait for answers would hide the queue (coordinated omission). Each asks for one image of its own
seed. It prints one JSON object. Run it where the server has its cores for itself, or read the
ratios alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["main"]

_SAMPLE = re.compile(r"^latentforge_(running|waiting|permits)\{[^}]*\} (\S+)$", re.MULTILINE)
_MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Load:
    """Requests to one server.

    Attributes:
        client: of the server.
        fields: of each request.
    """

    client: httpx.AsyncClient
    fields: dict[str, Any]

    async def request(self, seed: int, found: Outcomes) -> float:
        """Ask for an image, note the answer, and return the seconds until the next may be sent."""
        start = time.perf_counter()
        body = {**self.fields, "seed": seed}
        pause = 0.0
        try:
            answer = await self.client.post("/v1/images/generations", json=body)
            status = str(answer.status_code)
            pause = float(answer.headers.get("retry-after", 0))
        except httpx.HTTPError as error:
            status = type(error).__name__
        found.add(status, time.perf_counter() - start)
        return pause

    async def closed(self, clients: int, seconds: float) -> Outcomes:
        """Let clients ask again as soon as they are answered."""
        found, end = Outcomes(), time.perf_counter() + seconds

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                await asyncio.sleep(await self.request(random.randrange(1 << 31), found))

        start = time.perf_counter()
        await asyncio.gather(*map(client, range(clients)))
        found.elapsed = time.perf_counter() - start
        return found

    async def open(self, rate: float, seconds: float) -> Outcomes:
        """Send requests at random times, at a rate per second, and wait for all answers."""
        found, tasks, start = Outcomes(), [], time.perf_counter()
        due = random.expovariate(rate)
        while due < seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.request(random.randrange(1 << 31), found)))
            due += random.expovariate(rate)
        found.elapsed = time.perf_counter() - start
        found.in_time = len(found.seconds.get("200", ()))
        await asyncio.gather(*tasks)
        return found

    async def state(self) -> dict[str, float]:
        """Return the gauges of the server, and its memory in MB."""
        text = (await self.client.get("/metrics")).text
        gauges: dict[str, float] = {}
        for name, value in _SAMPLE.findall(text):
            gauges[name] = gauges.get(name, 0.0) + float(value)
        memory = _MEMORY.search(text)
        return {**gauges, "memory_mb": float(memory[1]) / 1e6 if memory else 0.0}


@dataclass
class Outcomes:
    """Seconds of answers by status; those that came in time, and the time of the load."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0
    in_time: int = 0

    def add(self, status: str, seconds: float) -> None:
        """Add an answer."""
        self.seconds.setdefault(status, []).append(seconds)

    def summary(self) -> dict[str, Any]:
        """Return counts and percentiles by status."""
        return {
            status: {
                "count": len(times),
                "p50": round(_percentile(times, 50), 4),
                "p99": round(_percentile(times, 99), 4),
            }
            for status, times in sorted(self.seconds.items())
        }


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the capacity, the overload and the state after it."""
    fields = {"prompt": options.prompt, "n": 1, "output_format": "jpeg"}
    if options.steps:
        fields["num_inference_steps"] = options.steps
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(options.seconds * 10 + 60)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
        load = Load(client, fields)
        alone = await load.closed(1, options.calm / 2)
        calm = await load.closed(options.clients, options.calm)
        before = await load.state()
        capacity = len(calm.seconds.get("200", ())) / calm.elapsed
        over = await load.open(options.times * capacity, options.seconds)
        await asyncio.sleep(1)
        return {
            "alone": alone.summary(),
            "capacity_images_per_second": round(capacity, 3),
            "calm": calm.summary(),
            "overload": over.summary(),
            "goodput": round(over.in_time / over.elapsed / capacity, 3),
            "before": before,
            "after": await load.state(),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a server and print the result."""
    parser = argparse.ArgumentParser(description="Overload a server and measure it.")
    parser.add_argument("url", help="address of the server")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    parser.add_argument("--times", type=float, default=10.0, help="load, in capacities")
    parser.add_argument("--calm", type=float, default=10.0, help="seconds to find the capacity")
    parser.add_argument("--clients", type=int, default=8, help="clients in that time")
    parser.add_argument("--steps", type=int, help="of each image")
    parser.add_argument("--prompt", default="a red apple on a plate")
    options = parser.parse_args(arguments)
    print(json.dumps(asyncio.run(measure(options.url, options)), indent=2))


if __name__ == "__main__":
    main()
