"""latentforge search: a student of a checkpoint, whose structure is the best within a limit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.train.search.request import StructureRequest
    from latentforge.train.search.search_record import SearchRecord

__all__ = ["add"]

_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = arguments.command(
        commands,
        "search",
        _search,
        "Search the UNet that is nearest to a checkpoint's within a latency on this machine",
        "Leaves out or halves parts of the UNet: those that change its predictions least for the "
        "time that they take, measured on the deployed engine. The student is a checkpoint in "
        "diffusers' layout with inherited weights, which export, optimize and build take; its "
        "search.html shows what was compared. Needs pip install 'latentforge[cpu,train]'.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a diffusers directory, a hub id such as org/model (or org/model@revision), or demo",
    )
    parser.add_argument("student", type=Path, metavar="STUDENT", help="the checkpoint to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing student of a search"
    )
    _add_goals(parser)
    _add_means(parser)
    _add_runs(parser)


def _add_goals(parser: Any) -> None:
    group = parser.add_argument_group("goal", arguments.wrapped("Give one of them."))
    group.add_argument("--speedup", type=float, metavar="X", help="of a denoising step, such as 2")
    group.add_argument(
        "--latency", type=float, metavar="MS", help="milliseconds of a denoising step, at most"
    )
    group.add_argument(
        "--parameters", metavar="N", help="of the UNet, at most: a number such as 400M"
    )
    group.add_argument(
        "--memory",
        metavar="BYTES",
        help="of the UNet's weights in the deployed engine, at most, such as 800M",
    )


def _add_means(parser: Any) -> None:
    parser.add_argument(
        "--target",
        default="cpu",
        choices=arguments.TARGETS,
        help="backend that will run the engines, on which latency is measured (default: cpu)",
    )
    parser.add_argument(
        "--recipe",
        default="fp32",
        metavar="NAME|FILE",
        help="recipe of the deployed engines, one without calibration (default: fp32)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the image at which all is measured (default: the model's own)",
    )
    parser.add_argument(
        "--budget",
        default="20m",
        metavar="TIME",
        help="time to keep to, such as 20m or 2h, or none: fewer states and structures are "
        "measured until it fits (default: 20m)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder that keeps engines, states, errors and latencies for further searches "
        "(default: a hidden one beside STUDENT, deleted at the end); a search that was "
        "interrupted goes on in it",
    )
    parser.add_argument(
        "--seed", dest="random_seed", type=int, default=0, metavar="N", help="of all random choices"
    )


def _add_runs(parser: Any) -> None:
    group = parser.add_argument_group(
        "runs", arguments.wrapped("Denoising runs on which student and checkpoint are compared.")
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="their prompts, one per line")
    arguments.add_denoising(group)


def _search(options: argparse.Namespace) -> None:
    output.quiet_libraries()
    request = _request(options)
    from latentforge.train.search.stage import search

    _print(search(options.checkpoint, options.student, request), options.student)


def _request(options: argparse.Namespace) -> StructureRequest:
    from latentforge.measure.prompts import read_prompts
    from latentforge.train.search.request import StructureRequest

    return StructureRequest(
        speedup=options.speedup,
        latency=None if options.latency is None else options.latency / 1e3,
        parameters=_count("parameters", options.parameters),
        memory=_count("memory", options.memory),
        target=options.target,
        recipe=options.recipe,
        prompts=tuple(read_prompts(options.prompts)) if options.prompts else (),
        settings=arguments.request_of(options),
        size=options.size,
        budget=arguments.parse_duration(options.budget),
        work=options.work,
        seed=options.random_seed,
        overwrite=options.overwrite,
        quiet=False,
    )


def _count(name: str, text: str | None) -> int | None:
    """Return a number such as ``400000000`` or ``400M``."""
    if text is None:
        return None
    factor = _SUFFIXES.get(text[-1:], 1.0)
    digits = text[:-1] if text[-1:] in _SUFFIXES else text
    if not (digits.isascii() and digits.replace(".", "", 1).isdigit()):
        raise SettingsError(f"--{name} takes a number such as 400M, not {text!r}")
    return int(float(digits[:20]) * factor)


def _print(record: SearchRecord, student: Path) -> None:
    from latentforge.measure import formatting

    chosen, teacher = record.chosen, record.points[0]
    print(record.words)
    print(
        f"\nparameters: {chosen.parameters / 1e6:.4g} M of {teacher.parameters / 1e6:.4g} M\n"
        f"step: {formatting.seconds(chosen.measured)} of {formatting.seconds(teacher.measured)}, "
        f"{formatting.speedup(chosen.speedup.value if chosen.speedup else None)} measured\n"
        f"error of the prediction, without training: {chosen.error:.3g}\n"
        f"page: {student / 'search.html'}\n\n"
        f"next: latentforge build {student} ENGINES --target {record.setting['target']}"
    )
