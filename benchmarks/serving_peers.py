"""Compare latentforge's server with plain servers around other software, under the same load.

    python benchmarks/serving_peers.py --output DIR
    python benchmarks/serving_peers.py --output DIR sd15-engines --checkpoint sd15 \\
        --steps 2 --size 256 --rounds 2 --one-at-a-time

Clients each send a request when their last is answered, first to one server for some seconds, then
to the next, in rounds, on this machine's loopback interface; nothing else should run. Each server
has the same steps, size, guidance and sampler, and its own defaults otherwise. Peers are installed
in environments of their own, as for ``bench``, and the model is converted by their own exporters.
It writes serving_peers.json and the table serving_peers.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
from serving_stages.client import Answer, Client, Outcomes, closed_load, percentile
from serving_stages.peer_servers import OURS, SERVERS, ImageOrder, PeerFolders, ServerKind, prepared
from serving_stages.server_process import ServerProcess, free_port, running

from latentforge.demo_engines import cached_demo_engines
from latentforge.export.checkpoint import open_checkpoint
from latentforge.measure.conclusion import interval_text
from latentforge.measure.hardware import describe_machine
from latentforge.measure.results import ConfidenceInterval
from latentforge.measure.statistics import median_interval
from latentforge.runtime.manifest import Manifest

__all__ = ["main"]

Command = Callable[[int], Sequence[str]]
"""Function that returns the command of a server for its port."""


@dataclass(kw_only=True)
class Contender:
    """Server that takes part.

    Attributes:
        name: for the results.
        kind: of server.
        command: for a port.
        rounds: what its clients found, round by round.
        memory: most bytes that its processes held after a round.
        cpu: seconds of processor time of its processes, in the rounds.
        failed: why it does not take part any more; empty if it does.
    """

    name: str
    kind: ServerKind
    command: Command
    rounds: list[Outcomes] = field(default_factory=list)
    memory: int = 0
    cpu: float = 0.0
    failed: str = ""

    @contextmanager
    def serving(self, order: ImageOrder, folder: Path) -> Iterator[ServerProcess]:
        """Run its server, once it has made an image of the right size."""
        port = free_port()
        log = folder / f"{self.name}.log"
        with running(self.command(port), port, log, ready=self.kind.ready) as server:
            asyncio.run(self._warm(server, order))
            yield server

    async def _warm(self, server: ServerProcess, order: ImageOrder) -> None:
        client = Client.of(server.url)
        for number in range(2):
            answer = await self._send(client, order, number)
            if answer.status != "200":
                raise RuntimeError(f"answered {answer.status}: {answer.body[:200]!r}")
            order.check(self.kind.picture(answer))
        client.close()

    async def _send(self, client: Client, order: ImageOrder, number: int) -> Answer:
        return await client.post(self.kind.path, self.kind.fields(order, number))

    async def load(
        self, server: ServerProcess, order: ImageOrder, clients: int, seconds: float
    ) -> Outcomes:
        """Let clients ask for images for some seconds."""
        client = Client.of(server.url)
        try:
            return await closed_load(
                lambda number: self._send(client, order, number), clients, seconds
            )
        finally:
            client.close()

    def ratios(self, ours: Contender) -> ConfidenceInterval:
        """Return the images per second of ours over its own, from rounds that are neighbours."""
        pairs = zip(ours.rounds, self.rounds, strict=True)
        return median_interval([a.rate / b.rate for a, b in pairs])

    @property
    def times(self) -> list[float]:
        """Seconds of all answers with an image."""
        return [seconds for found in self.rounds for seconds in found.times("200")]


@dataclass(frozen=True, kw_only=True)
class Match:
    """Rounds of all contenders.

    Attributes:
        order: image that is asked for.
        options: of the command.
        folder: for logs.
    """

    order: ImageOrder
    options: argparse.Namespace
    folder: Path

    def play(self, contenders: Sequence[Contender]) -> None:
        """Run the rounds; a contender that fails leaves its reason and takes no further part."""
        with ExitStack() as stack:
            servers = {} if self.options.one_at_a_time else self._started(contenders, stack)
            for number in range(self.options.rounds):
                for contender in contenders:
                    if not contender.failed:
                        print(f"round {number + 1}: {contender.name}", flush=True)
                        self._round(contender, servers.get(contender.name))

    def _started(
        self, contenders: Sequence[Contender], stack: ExitStack
    ) -> dict[str, ServerProcess]:
        servers = {}
        for contender in contenders:
            try:
                server = contender.serving(self.order, self.folder)
                servers[contender.name] = stack.enter_context(server)
            except (RuntimeError, OSError) as error:
                contender.failed = str(error)
        return servers

    def _round(self, contender: Contender, server: ServerProcess | None) -> None:
        try:
            if server is not None:
                self._load(contender, server)
                return
            with contender.serving(self.order, self.folder) as alone:
                self._load(contender, alone)
        except (RuntimeError, OSError) as error:
            contender.failed = str(error)

    def _load(self, contender: Contender, server: ServerProcess) -> None:
        options, cpu = self.options, server.cpu()
        seconds = options.seconds / options.rounds
        found = asyncio.run(contender.load(server, self.order, options.clients, seconds))
        failed = {status: len(times) for status, times in found.seconds.items() if status != "200"}
        if failed:
            raise RuntimeError(f"requests failed: {failed}")
        contender.rounds.append(found)
        contender.cpu += server.cpu() - cpu
        contender.memory = max(contender.memory, server.memory())


def table(contenders: Sequence[Contender]) -> str:
    """Return the results as Markdown; ratios above 1 are in favour of the first."""
    ours = contenders[0]
    lines = [
        "| server | images/s | p50, s | p95, s | first / it (interval) | memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for contender in contenders:
        if contender.failed:
            continue
        rate = statistics.median(found.rate for found in contender.rounds)
        ratio = contender.ratios(ours)
        interval = f" ({text})" if (text := interval_text(ratio)) else ""
        shown = "" if contender is ours else f"{ratio.value:.2f}×{interval}"
        middle, late = (percentile(contender.times, point) for point in (50, 95))
        lines.append(
            f"| {contender.kind.text} (`{contender.name}`) | {rate:.3g} | {middle:.3g} | "
            f"{late:.3g} | {shown} | {contender.memory / 1e9:.2f} GB |"
        )
    absent = [f"{c.name}: {c.failed}" for c in contenders if c.failed]
    return "\n".join([*lines, *(line for text in absent for line in ("", text))])


def _result(contender: Contender, ours: Contender) -> dict[str, Any]:
    """Return a contender's results as JSON has them."""
    if contender.failed:
        return {"server": contender.kind.text, "failed": contender.failed}
    ratio = contender.ratios(ours)
    return {
        "server": contender.kind.text,
        "command": list(contender.command(0)),
        "rounds": [found.summary() for found in contender.rounds],
        "p50": percentile(contender.times, 50),
        "p95": percentile(contender.times, 95),
        "ratio": {"low": ratio.low, "median": ratio.value, "high": ratio.high},
        "level": ratio.level,
        "memory_bytes": contender.memory,
        "cpu_seconds": round(contender.cpu, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the servers and write the results; return 1 if ours failed."""
    options = _parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    engines = options.engines or [cached_demo_engines()]
    order = _order(Manifest.read(engines[0]), options)
    with tempfile.TemporaryDirectory(prefix="latentforge-peers-") as work:
        contenders = [*map(_ours, engines), *_theirs(options, engines[0], Path(work))]
        Match(order=order, options=options, folder=options.output).play(contenders)
    if contenders[0].failed:
        print(f"{contenders[0].name}: {contenders[0].failed}")
        return 1
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine(),
        "order": order.plain(0),
        "clients": options.clients,
        "servers": {entry.name: _result(entry, contenders[0]) for entry in contenders},
    }
    (options.output / "serving_peers.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output / "serving_peers.md").write_text(table(contenders) + "\n")
    print(table(contenders))
    return 0


def _ours(engines: Path) -> Contender:
    """Return latentforge's server of an engine directory."""
    serve = (sys.executable, "-m", "latentforge", "serve", str(engines), "--port")
    name = f"latentforge-{engines.absolute().name}"
    return Contender(name=name, kind=OURS, command=lambda port: (*serve, str(port)))


def _theirs(options: argparse.Namespace, engines: Path, work: Path) -> list[Contender]:
    """Return the peers that were asked for, installed and with the model converted."""
    source = options.checkpoint or Manifest.read(engines).source.checkpoint
    place = PeerFolders(
        environments=options.environments,
        models=options.models or work,
        checkpoint=open_checkpoint(source).path,
    )
    return [_peer(name, place) for name in options.peers.split(",")]


def _peer(name: str, place: PeerFolders) -> Contender:
    try:
        kind, command = prepared(name, place)
    except RuntimeError as error:
        return Contender(name=name, kind=SERVERS[name], command=lambda _: (), failed=str(error))
    return Contender(name=name, kind=kind, command=command)


def _order(manifest: Manifest, options: argparse.Namespace) -> ImageOrder:
    """Return the image to ask for: the model's default where nothing else is wanted."""
    defaults, size = manifest.defaults, options.size
    return ImageOrder(
        steps=options.steps or defaults.steps,
        guidance=defaults.guidance_scale if options.guidance is None else options.guidance,
        width=size or defaults.width,
        height=size or defaults.height,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "engines", nargs="*", type=Path, help="ours; the first is compared (default: the demo's)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of results and logs")
    parser.add_argument("--peers", default=",".join(SERVERS), help="names, with commas")
    parser.add_argument("--checkpoint", help="of the peers, if the engines do not name it")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each server, in all")
    parser.add_argument("--rounds", type=int, default=6, help="to divide them into")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="of both sides, in pixels")
    parser.add_argument("--guidance", type=float)
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="start each server anew in each round"
    )
    parser.add_argument("--environments", type=Path, default=peers.FOLDER, metavar="DIR")
    parser.add_argument("--models", type=Path, help="keep converted models here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
