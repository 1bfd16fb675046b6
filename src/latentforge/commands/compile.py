"""latentforge compile: native engines of exported or optimized graphs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.runtime.compile.plan import CompileRequest

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from latentforge.runtime.backends import BACKENDS

    parser = arguments.command(
        commands,
        "compile",
        _compile,
        "Compile graphs to native engines, and compare an image of both",
        "Reads an engine directory that export or optimize wrote, and writes another one. Each "
        "graph is compiled in a process of its own, so that a build that runs out of memory fails "
        "alone. Then one denoising step by the new engines is compared with the source's; if the "
        "images differ, the engines are kept as ENGINES.rejected. tensorrt-rtx and the "
        "onnxruntime backends for GPUs build without a GPU; the comparison is then skipped.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="engine directory to read, written by export or optimize",
    )
    arguments.add_target(parser)
    parser.add_argument(
        "--backend",
        action="append",
        required=True,
        metavar="[COMPONENT=]NAME",
        help="backend of all components, or of one of them, such as vae_decoder=onnxruntime; the "
        "latter may be repeated",
    )
    arguments.add_option(parser)
    arguments.add_sizes(parser)
    arguments.add_dry_run(parser)
    rows = {name: _describe(spec.extra, gpu=spec.gpu) for name, spec in BACKENDS.items()}
    arguments.add_table(parser, "backends", rows, _EXAMPLES)


_EXAMPLES = """\
examples:
  latentforge compile onnx ov --backend openvino
  latentforge compile onnx trt --backend tensorrt-rtx --height 512,768 --width 512,768
  latentforge compile onnx mixed --backend onnxruntime --backend denoiser=openvino

A wrong --option is refused with the list of those that the backend has."""


def _describe(extra: str, *, gpu: bool) -> str:
    place = "NVIDIA GPU" if gpu else "CPU"
    return f"{place:<12}pip install 'latentforge[{extra}]'"


def _compile(options: argparse.Namespace) -> None:
    from latentforge.runtime.compile.plan import plan_compilation
    from latentforge.runtime.compile.stage import compile_engines

    request = _request(options)
    if options.dry_run:
        print(plan_compilation(options.source, request))
        return
    manifest = compile_engines(options.source, options.engines, request)
    output.print_changes(manifest)
    output.print_next_step(options.engines)


def _request(options: argparse.Namespace) -> CompileRequest:
    from latentforge.runtime.compile.plan import CompileRequest

    default = [text for text in options.backend if "=" not in text]
    if len(default) != 1:
        raise SettingsError(
            "give one --backend NAME for all components, and --backend COMPONENT=NAME for others"
        )
    return CompileRequest(
        backend=default[0],
        component_backends=dict(text.split("=", 1) for text in options.backend if "=" in text),
        options=tuple(options.option),
        sizes=arguments.sizes_of(options),
        overwrite=options.overwrite,
        quiet=False,
    )
