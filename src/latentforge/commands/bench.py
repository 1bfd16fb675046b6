"""latentforge bench: engines timed beside others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import BackendError, SettingsError

__all__ = ["add"]


_ADVICE = "python benchmarks/peers.py env makes environments for those that need their own"


def add(commands: Any) -> None:
    from latentforge.measure.peers import PEERS

    parser = arguments.command(
        commands,
        "bench",
        _bench,
        "Time engines, and others on the same checkpoint beside them",
        "Each participant has its own process and the same threads, and they take turns, so that "
        "a drifting machine hits all alike. Ratios are medians over neighbouring runs, and "
        "pictures are compared too. A peer that fails, or isn't installed, becomes a row.",
    )
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINES")
    _add_peer_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="default: a photo of a cat")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    arguments.add_request(parser)
    _add_measuring_arguments(parser)
    arguments.add_result_files(parser)
    arguments.add_table(
        parser, "peers", {name: peer.summary for name, peer in PEERS.items()}, _ADVICE
    )


def _add_peer_arguments(parser: Any) -> None:
    parser.add_argument(
        "--against",
        type=arguments.names,
        default=(),
        metavar="PEER,...",
        help="those below; the first one is the reference of all ratios",
    )
    parser.add_argument(
        "--checkpoint", metavar="CHECKPOINT", help="for the peers (default: the engines' own)"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=FILE",
        help="the interpreter of a peer that lives in another environment; may be repeated",
    )
    parser.add_argument(
        "--peer-files",
        type=Path,
        metavar="DIR",
        help="keep there what peers make of the checkpoint, for next time (default: nowhere)",
    )


def _add_measuring_arguments(parser: Any) -> None:
    group = parser.add_argument_group("what is measured")
    arguments.add_unaccelerated(group)
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="counted runs of each (default: 5)"
    )
    group.add_argument(
        "--batches", type=_numbers, default=(), metavar="N,...", help="curves over images at once"
    )
    group.add_argument(
        "--sizes", type=_numbers, default=(), metavar="PIXELS,...", help="curves over square sizes"
    )
    group.add_argument(
        "--layers", action="store_true", help="tell what each layer of the engines takes"
    )
    group.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="start a participant anew for each turn; done unasked where not all fit in memory",
    )
    arguments.add_threads(group)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in arguments.names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers, such as 1,2,4, not {text!r}") from None


def _bench(options: argparse.Namespace) -> None:
    from latentforge.benchmark import PROMPT, benchmark
    from latentforge.measure.bench.summary import summary

    output.check_result_files(options)
    results = benchmark(
        options.engines,
        against=options.against,
        checkpoint=options.checkpoint,
        pythons=_pairs("--python", options.python),
        prompt=options.prompt or PROMPT,
        request=arguments.request_of(options),
        batches=options.batches,
        sizes=options.sizes,
        layers=options.layers,
        plain=bool(options.unaccelerated),
        repeats=options.repeats,
        threads=options.threads,
        alone=options.one_at_a_time,
        folder=options.peer_files,
        command=output.called(),
        quiet=False,
    )
    output.emit_results(results, options, summary(results))
    for entry in results.entries:
        if entry.status != "ok" and entry.role != "peer":
            raise BackendError(f"{entry.name} did not run: {entry.message}")


def _pairs(name: str, given: Sequence[str]) -> dict[str, str]:
    if wrong := [text for text in given if not all(text.partition("="))]:
        raise SettingsError(f"{name} is NAME=VALUE, not {wrong[0]!r}")
    return dict(text.split("=", 1) for text in given)
