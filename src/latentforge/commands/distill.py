"""latentforge distill: a student of a checkpoint, trained to draw like it again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.train.distill.records import DistillRecord
    from latentforge.train.distill.request import DistillRequest

__all__ = ["add"]

_PRECISIONS = ("fp32", "bf16", "fp16")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = arguments.command(
        commands,
        "distill",
        _distill,
        "Train a checkpoint's student to draw like the checkpoint again",
        "The student learns the checkpoint's own predictions and features in runs of given "
        "prompts, without pictures, or with pictures and captions. What is beside a removal is "
        "trained first, then all. With --to-steps it learns to draw in fewer steps. "
        "The same command goes on after an interrupt. Several devices and machines run it by "
        "accelerate launch -m latentforge distill. Needs pip install 'latentforge[cpu,train]'.",
    )
    parser.add_argument(
        "teacher",
        metavar="TEACHER",
        help="a diffusers directory, a hub id such as org/model (or org/model@revision), or demo",
    )
    parser.add_argument("student", metavar="STUDENT", help="its student, a checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT", help="the checkpoint to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing student of a training"
    )
    _add_length(parser)
    _add_states(parser)
    _add_pictures(parser)
    _add_steps(parser)
    _add_training(parser)
    _add_loss(parser)
    _add_memory(parser)
    _add_files(parser)


def _add_length(parser: Any) -> None:
    group = parser.add_argument_group("length", arguments.wrapped("Give one of them."))
    group.add_argument("--minutes", type=float, metavar="M", help="of training")
    group.add_argument("--updates", type=int, metavar="N", help="of the weights")


def _add_states(parser: Any) -> None:
    group = parser.add_argument_group("runs of the teacher")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts that the student is for, one per line (default: of demo its own); with "
        "--data those of the samples",
    )
    group.add_argument(
        "--runs",
        type=int,
        default=256,
        metavar="N",
        help="number of runs, each of a prompt and a seed (default: 256)",
    )
    arguments.add_denoising(group)
    group.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the images (default: the model's own)"
    )


def _add_pictures(parser: Any) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--data",
        metavar="PLACE",
        help="pictures to learn from instead of the teacher's runs: a folder, with captions in "
        ".txt files or metadata.jsonl, or WebDataset shards (a folder, {000..127}.tar, or a list)",
    )
    group.add_argument(
        "--license", metavar="TEXT", help="license of the pictures, for the student's record"
    )


def _add_steps(parser: Any) -> None:
    group = parser.add_argument_group("fewer steps")
    group.add_argument(
        "--to-steps",
        type=int,
        metavar="N",
        help="teach the student to draw in N steps, 4 to 8 as a rule, without guidance "
        "(consistency distillation); STUDENT can be TEACHER itself",
    )
    group.add_argument(
        "--fold-guidance",
        action="store_true",
        help="teach it to need no guidance, in as many steps as before",
    )
    group.add_argument(
        "--scales",
        default="",
        metavar="LOW,HIGH",
        help="guidance scales that it learns with --to-steps, and then takes in requests (default: "
        "that of the runs alone, for good)",
    )


def _add_training(parser: Any) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--rate", type=float, default=1e-4, metavar="X", help="peak learning rate (default: 1e-4)"
    )
    group.add_argument(
        "--warmup", type=int, default=20, metavar="N", help="updates over which it rises"
    )
    group.add_argument(
        "--cooldown",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of the training, at the end, over which it falls to zero (default: 0.3)",
    )
    group.add_argument(
        "--decay",
        type=float,
        default=0.999,
        metavar="X",
        help="of the average of the weights, which is written (default: 0.999)",
    )
    group.add_argument(
        "--first-phase",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="in which only what is beside a removal, norms and biases are trained (default: 0.3)",
    )
    group.add_argument(
        "--block-drop",
        type=float,
        default=0.0,
        metavar="P",
        help="probability with which a block is left out of an update, so that one student serves "
        "smaller budgets too (default: 0)",
    )
    group.add_argument(
        "--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient"
    )
    group.add_argument(
        "--seed", dest="random_seed", type=int, default=0, metavar="N", help="of all random choices"
    )


def _add_loss(parser: Any) -> None:
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--weights",
        default="",
        metavar="NAME=W,...",
        help="of the terms, beside the scale that makes their first values equal: prediction 1, "
        "features 0.5, attention 0.5, with pictures task 1 unless given; 0 leaves one out",
    )
    group.add_argument(
        "--min-snr",
        default="5",
        metavar="GAMMA",
        help="of the weighting of timesteps, or none (default: 5)",
    )
    group.add_argument(
        "--guided",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="of batches in which guided predictions are compared (default: 0.15)",
    )


def _add_memory(parser: Any) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--batch", type=int, default=16, metavar="ROWS", help="of a forward pass (default: 16)"
    )
    group.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="batches per update (default: 1)"
    )
    group.add_argument("--precision", default="fp32", choices=_PRECISIONS, help="of activations")
    group.add_argument(
        "--teacher-precision", default="fp32", choices=_PRECISIONS, help="of the teacher's weights"
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again for the gradient instead of keeping them",
    )
    group.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        metavar="N",
        help="train what is not beside a removal by additions of this rank (default: 0, whole)",
    )


def _add_files(parser: Any) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--log", type=Path, metavar="DIR", help="log for TensorBoard")
    group.add_argument(
        "--save-every",
        type=int,
        default=200,
        metavar="N",
        help="updates between two states to go on from (default: 200)",
    )
    group.add_argument(
        "--sample-every",
        type=int,
        default=0,
        metavar="N",
        help="updates between two sets of images in the log (default: 0, none)",
    )
    group.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder that keeps the teacher's runs, the training's state and its losses (default: "
        "a hidden one beside OUT, deleted at the end)",
    )


_FIELDS = (
    *("updates", "minutes", "runs", "size", "batch", "accumulation", "rate", "warmup"),
    *("cooldown", "clip", "precision", "teacher_precision", "checkpointing", "decay", "guided"),
    *("block_drop", "first_phase", "lora_rank", "save_every", "sample_every", "log", "work"),
    *("data", "license", "to_steps", "fold_guidance", "overwrite"),
)
"""Options with the name and type of a field of the request."""


def _distill(options: argparse.Namespace) -> None:
    output.quiet_libraries()
    request = _request(options)
    from latentforge.train.distill.stage import distill

    _print(distill(options.teacher, options.student, options.target, request), options.target)


def _request(options: argparse.Namespace) -> DistillRequest:
    from latentforge.measure.prompts import read_prompts
    from latentforge.train.distill.request import DistillRequest

    return DistillRequest(
        **{name: getattr(options, name) for name in _FIELDS},
        prompts=tuple(read_prompts(options.prompts)) if options.prompts else (),
        settings=arguments.request_of(options),
        weights=_weights(options.weights),
        min_snr=None if options.min_snr == "none" else _number("--min-snr", options.min_snr),
        scales=tuple(_number("--scales", part) for part in arguments.names(options.scales)),
        seed=options.random_seed,
        quiet=False,
    )


def _weights(text: str) -> Mapping[str, float]:
    pairs = [part.partition("=") for part in arguments.names(text)]
    return {name: _number(f"--weights {name}", value) for name, _, value in pairs}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{name} takes a number, not {text[:40]!r}") from None


def _print(record: DistillRecord, target: Path) -> None:
    for name in record.scales:
        if name in record.first:
            print(f"{name}: {record.first[name]:.4g} at first, {record.last[name]:.4g} at the end")
    skipped = f", {record.skipped} batches with NaN skipped" if record.skipped else ""
    print(f"{record.updates} updates in {record.seconds:.0f} s{skipped}\n")
    print(f"next: latentforge build {target} ENGINES")
