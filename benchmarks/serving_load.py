"""Measure latentforge's server: overhead, overload, fairness, and many requests.

    python benchmarks/serving_load.py --output DIR
    python benchmarks/serving_load.py --output DIR ENGINES --seconds 5 --requests 200  # rehearsal

It starts the server itself, with engines of known cost and with the demo's, on this machine's
loopback interface, and writes serving.json and the table serving.md, in nine minutes at most. Run
it where nothing else runs: it takes a little of the cores that the server has, says how much, and
stamps answers by the kernel's clock, so that its own delays do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_stages.client import Client
from serving_stages.figures import Figure, as_json, as_table
from serving_stages.load import (
    LoadResult,
    ServerLoad,
    fairness,
    overhead,
    overload,
    refusals,
    soak,
)
from serving_stages.server_process import latentforge_server
from serving_stages.synthetic import StepCost, synthetic_engines

from latentforge.demo_engines import cached_demo_engines
from latentforge.measure.hardware import describe_machine
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest

__all__ = ["main"]

COST = StepCost()
_STEPS = 10  # of engines of known cost
_GAPS = (0.0, 0.15)
_REFUSED_RATE, _REFUSED_SECONDS, _REFUSED_STEPS = 100.0, 20.0, 30
_FULL = StepCost(call=1_000_000)  # of engines that run one image while others are refused
_ALL = ("refusals", "overload-synthetic", "overhead", "fairness", "overload", "soak")


@dataclass(frozen=True)
class LoadRun:
    """One run of all measurements.

    Attributes:
        options: of the command.
        work: a temporary folder.
        figures: for the table.
        details: of each measurement, by name.
    """

    options: argparse.Namespace
    work: Path
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def all(self, engines: Path) -> None:
        """Make the measurements that are wanted."""
        if self._wants("refusals"):
            made = synthetic_engines(engines, self.work / "full", _FULL)
            with self._serving(made, "--queue-seconds", "1", "--measure-seconds", "0") as load:
                fields = {"num_inference_steps": _REFUSED_STEPS, "guidance_scale": 1.0}
                work = refusals(load.asking(**fields), _REFUSED_RATE, _REFUSED_SECONDS)
                self._measure("refusals", work)
        if self._wants("overload-synthetic"):
            made = synthetic_engines(engines, self.work, COST)
            with self._serving(made, *self._bounds) as load:
                fields = {"num_inference_steps": _STEPS, "guidance_scale": 1.0}
                self._measure("overload-synthetic", self._overloaded(load.asking(**fields)))
            self._compare_with_cost()
        if self._wants("overhead", "fairness"):
            with self._serving(engines) as load:
                self._measure("overhead", self._overhead(load, engines))
                for gap in _GAPS:
                    self._measure("fairness", fairness(load, self.options.rounds, gap), gap)
        if self._wants("overload", "soak"):
            with self._serving(engines, *self._bounds) as load:
                self._measure("overload", self._overloaded(load))
                self._measure("soak", self._soak(load))

    def _wants(self, *names: str) -> bool:
        return any(name in self.options.only for name in names)

    def _compare_with_cost(self) -> None:
        """Add the capacity that batches of the size that ran have by the cost of their steps."""
        rows = self.details["overload-synthetic"].get("rows_of_a_batch", 1)
        known = COST.images_per_second(_STEPS, round(rows))
        text = "synthetic: capacity by the cost of its steps"
        self.figures.append(Figure(text=text, value=known, unit=" images/s"))

    @property
    def _bounds(self) -> tuple[str, ...]:
        """Options of a server that is full, and forgets, after seconds: both take time."""
        return ("--queue-seconds", str(self.options.queue_seconds), "--keep", "5")

    @contextmanager
    def _serving(self, engines: Path, *options: str) -> Iterator[ServerLoad]:
        log = self.work / f"{engines.name}-{len(self.details)}.log"
        given = shlex.split(self.options.serve)
        with latentforge_server(engines, log, *options, *given) as server:
            client = Client.of(server.url)
            name = Manifest.read(engines).name
            fields = {"unaccelerated": True}  # and the model's defaults
            yield ServerLoad(server=server, client=client, fields=fields, name=name)
            client.close()

    def _measure(
        self, kind: str, work: Coroutine[Any, Any, LoadResult], gap: float | None = None
    ) -> None:
        """Make a measurement; one that fails leaves its reason, and the others are made."""
        name = kind if gap is None else f"{kind}-{gap:g}"
        if not self._wants(kind):
            work.close()
            return
        print(f"{name} …", end=" ", flush=True)
        start = time.perf_counter()
        try:
            measured = asyncio.run(work)
        except RuntimeError as error:
            measured = LoadResult(
                figures=(Figure(text=f"{name}: {error}", value=1, limit=0),),
                details={"failed": str(error)},
            )
        self.figures.extend(measured.figures)
        self.details[name] = measured.details
        print(f"{time.perf_counter() - start:.0f} s", flush=True)

    async def _overhead(self, requests: ServerLoad, engines: Path) -> LoadResult:
        with load(engines) as pipe:
            return await overhead(requests, pipe, self.options.pairs)

    def _overloaded(self, requests: ServerLoad) -> Coroutine[Any, Any, LoadResult]:
        options = self.options
        return overload(
            requests,
            calm=options.calm,
            seconds=options.seconds,
            times=options.times,
            clients=options.clients,
            queue=options.queue_seconds,
        )

    def _soak(self, requests: ServerLoad) -> Coroutine[Any, Any, LoadResult]:
        short = requests.asking(num_inference_steps=self.options.soak_steps)
        return soak(short, self.options.requests, self.options.clients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, and return 1 if a limit is not kept."""
    options = _parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    engines, start = options.engines or cached_demo_engines(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="latentforge-load-") as work:
        run = LoadRun(options, Path(work))
        run.all(engines)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "figures": as_json(run.figures),
        "measurements": run.details,
    }
    (options.output / "serving.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output / "serving.md").write_text(as_table(run.figures) + "\n")
    print(as_table(run.figures))
    return int(any(figure.is_kept is False for figure in run.figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="?", type=Path, help="default: the demo's, in the cache")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=_ALL, default=_ALL, help="measurements")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each overload")
    parser.add_argument("--times", type=float, default=10.0, help="its rate, in capacities")
    parser.add_argument(
        "--calm", type=float, default=15.0, help="seconds to find the capacity in, twice"
    )
    parser.add_argument(
        "--clients", type=int, default=16, help="in that time, twice a batch, and of many requests"
    )
    parser.add_argument("--queue-seconds", type=float, default=5.0, help="of the server")
    parser.add_argument(
        "--serve", default="", metavar="OPTIONS", help='of the server, such as "--replicas 2"'
    )
    parser.add_argument("--pairs", type=int, default=40, help="to find the overhead from")
    parser.add_argument("--rounds", type=int, default=3, help="of small requests beside a huge one")
    parser.add_argument("--requests", type=int, default=5000, help="one after another")
    parser.add_argument("--soak-steps", type=int, default=1, help="of each of these")
    return parser


if __name__ == "__main__":
    sys.exit(main())
