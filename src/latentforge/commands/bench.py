"""latentforge bench: time engines against other software."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import BackendError, SettingsError

__all__ = ["add"]


_ADVICE = "python benchmarks/peers.py env creates the environments of peers that need their own"


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    from latentforge.measure.peers import PEERS

    parser = arguments.command(
        commands,
        "bench",
        _bench,
        "Time engines, and compare them with other software on the same checkpoint",
        "Each participant has its own process and the same number of threads. Runs are "
        "interleaved, so that drift of the machine's speed affects all alike. Speedups are medians "
        "over pairs of neighbouring runs with a confidence interval, and images are compared with "
        "the reference's. A peer that fails or is not installed is listed with the reason.",
    )
    parser.add_argument(
        "engines", nargs="+", type=Path, metavar="ENGINES", help="engine directories of one model"
    )
    _add_peer_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="default: a photo of a cat")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    arguments.add_request(parser)
    _add_measurement_arguments(parser)
    arguments.add_result_files(parser)
    arguments.add_table(
        parser, "peers", {name: peer.summary for name, peer in PEERS.items()}, _ADVICE
    )


def _add_peer_arguments(parser: Any) -> None:
    parser.add_argument(
        "--against",
        type=arguments.names,
        default=(),
        metavar="PEER[@DEVICE:PRECISION],...",
        help="peers of the list below; the first one is the reference of all speedups. eager and "
        "compile take a device and a precision, as in eager@cuda:fp16 (default: those of the "
        "first engines)",
    )
    parser.add_argument(
        "--checkpoint", metavar="CHECKPOINT", help="of the peers (default: the engines' own)"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=FILE",
        help="Python interpreter of a peer with its own environment; may be repeated",
    )
    parser.add_argument(
        "--peer-files",
        type=Path,
        metavar="DIR",
        help="keep the checkpoints that peers convert, for further runs (default: not kept)",
    )


def _add_measurement_arguments(parser: Any) -> None:
    from latentforge.measure.bench import REPEATS

    group = parser.add_argument_group("measurement")
    arguments.add_unaccelerated(group)
    group.add_argument(
        "--repeats",
        type=int,
        default=REPEATS,
        metavar="N",
        help=f"timed runs per participant; fewer than {REPEATS} support no conclusion, 6 give "
        f"intervals of 95 %% or more (default: {REPEATS})",
    )
    group.add_argument(
        "--batches",
        type=_numbers,
        default=(),
        metavar="N,...",
        help="also measure these numbers of images per prompt, as curves",
    )
    group.add_argument(
        "--sizes",
        type=_numbers,
        default=(),
        metavar="PIXELS,...",
        help="also measure square images of these sizes, as curves",
    )
    group.add_argument("--layers", action="store_true", help="profile each layer of the engines")
    group.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="load one participant at a time and restart it for each run; the default if they do "
        "not fit into memory together",
    )
    arguments.add_threads(group)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in arguments.names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers such as 1,2,4, not {text!r}"
        ) from None


def _bench(options: argparse.Namespace) -> None:
    from latentforge.benchmark import BenchRequest, benchmark
    from latentforge.measure.bench.summary import summary

    output.check_result_files(options)
    request = BenchRequest(
        engines=options.engines,
        against=options.against,
        checkpoint=options.checkpoint,
        pythons=_pairs("--python", options.python),
        **({"prompt": options.prompt} if options.prompt else {}),
        settings=arguments.request_of(options),
        batches=options.batches,
        sizes=options.sizes,
        layers=options.layers,
        unaccelerated=bool(options.unaccelerated),
        repeats=options.repeats,
        threads=options.threads,
        one_at_a_time=options.one_at_a_time,
        folder=options.peer_files,
        command=output.command_line(),
    )
    results = benchmark(request, quiet=False)
    output.emit_results(results, options, summary(results))
    for entry in results.entries:
        if entry.status != "ok" and entry.role != "peer":
            raise BackendError(f"{entry.name} did not run: {entry.message}")


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    if wrong := [text for text in texts if not all(text.partition("="))]:
        raise SettingsError(f"{option} expects NAME=VALUE, not {wrong[0]!r}")
    return dict(text.split("=", 1) for text in texts)
