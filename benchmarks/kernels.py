"""Compare our operators with ONNX Runtime's in interleaved runs, at Stable Diffusion 1.5's sizes.

    python benchmarks/kernels.py [--repeats N] [--kernels avx2]

prints how close the matrix product comes to the peak of the registers, and for each operator the
paired ratio of durations, with its range. ``--kernels`` restricts ours to fewer instructions;
ONNX Runtime has no such setting, and uses all that the processor has.
"""

import argparse
import ctypes
import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from latentforge.optimize.passes.native.conv import pack
from latentforge.runtime.kernels import DOMAIN, required_library
from latentforge.runtime.kernels.compiler import INSTRUCTION_SETS

Array = np.ndarray[Any, Any]

CONVOLUTIONS = [  # batch, side, input and output channels
    *((2, 64, 320, 320), (2, 64, 640, 320), (2, 32, 640, 640), (2, 32, 1280, 640)),
    *((2, 16, 1280, 1280), (2, 8, 1280, 1280)),
    *((1, 64, 512, 512), (1, 128, 512, 512), (1, 256, 256, 256), (1, 512, 128, 128)),
]
PRODUCTS = [(8192, 320, 320), (8192, 320, 2560), (8192, 1280, 320), (2048, 640, 5120)]
ATTENTIONS = [(4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (256, 256, 160)]
HEADS = 8


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def session(operator: str, domain: str, inputs: dict[str, Array], fixed: dict[str, Array],
            attributes: dict[str, Any]) -> ort.InferenceSession:  # fmt: skip
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(operator, [*inputs, *fixed], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        operator,
        [helper.make_tensor_value_info(name, kind, a.shape) for name, a in inputs.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in fixed.items()],
    )
    opsets = [helper.make_opsetid(name, number) for name, number in
              (("", 20), (DOMAIN, 1), ("com.microsoft", 1))]  # fmt: skip
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(required_library("this")))
    return ort.InferenceSession(model.SerializeToString(), options)


def cases() -> Iterator[tuple[str, float, list[tuple[ort.InferenceSession, dict[str, Array]]]]]:
    """Yield a name, the work in GMAC, and the sessions of both operators with their inputs."""
    for n, side, c, k in CONVOLUTIONS:
        x, w = noise(n, side, side, c), noise(k, c, 3, 3) / np.float32(3 * c**0.5)
        attributes = {"channels": k, "pads": [1] * 4, "silu": 0, "stride": 1, "upsample": 1}
        channels_first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        yield (
            f"Conv {n}x{side}x{side}, {c} to {k}",
            n * side**2 * c * k * 9e-9,
            [
                (session("Conv", DOMAIN, {"x": x}, {"w": pack(w)}, attributes), {"x": x}),
                (
                    session("Conv", "", {"x": channels_first}, {"w": w}, {"pads": [1] * 4}),
                    {"x": channels_first},
                ),
            ],
        )
    for rows, c, k in PRODUCTS:
        x, w = noise(2, rows // 2, c), noise(k, c, 1, 1) / np.float32(c**0.5)
        plain = np.ascontiguousarray(w[:, :, 0, 0].T)
        yield (
            f"MatMul {rows} rows, {c} to {k}",
            rows * c * k * 1e-9,
            [
                (session("MatMul", DOMAIN, {"x": x}, {"w": pack(w)}, {"channels": k}), {"x": x}),
                (session("MatMul", "", {"x": x}, {"w": plain}, {}), {"x": x}),
            ],
        )
    for queries, keys, size in ATTENTIONS:
        feeds = {
            n: noise(2, t, HEADS * size) for n, t in (("q", queries), ("k", keys), ("v", keys))
        }
        scale = size**-0.5
        native, ort_attributes = ({n: HEADS, "scale": scale} for n in ("heads", "num_heads"))
        work = 4e-9 * queries * keys * HEADS * size
        yield f"Attention {queries} x {keys}, {HEADS} x {size}", work, [
            (session("Attention", DOMAIN, feeds, {}, native), feeds),
            (session("MultiHeadAttention", "com.microsoft", feeds, {}, ort_attributes), feeds),
        ]  # fmt: skip


def compare(pair: list[tuple[ort.InferenceSession, dict[str, Array]]], repeats: int) -> Array:
    """Return the seconds of interleaved runs after one warm-up run: (repeats, 2)."""
    seconds = []
    for _ in range(repeats + 1):
        row = []
        for session, feeds in pair:
            start = time.perf_counter()
            session.run(None, feeds)
            row.append(time.perf_counter() - start)
        seconds.append(row)
    return np.array(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernels", choices=["portable", *INSTRUCTION_SETS])
    options = parser.parse_args()
    if options.kernels:
        os.environ["LATENTFORGE_KERNELS"] = options.kernels
    library = ctypes.CDLL(str(required_library("this benchmark")))
    library.latentforge_kernels.restype = ctypes.c_char_p
    figures = [getattr(library, f"latentforge_{name}") for name in ("peak", "product")]
    for figure in figures:
        figure.restype = ctypes.c_double
    peak, product = (figure() for figure in figures)
    print(f"{library.latentforge_kernels().decode()}: the matrix product in Conv does "
          f"{product / 1e9:.1f} GMAC/s per thread, {product / peak:.0%} of the registers' peak of "
          f"{peak / 1e9:.1f}")  # fmt: skip
    print(
        "| operator | ours, GMAC/s | ONNX Runtime's, GMAC/s | ratio (range) |\n|---|---:|---:|---:|"
    )
    for name, work, pair in cases():
        seconds = compare(pair, options.repeats)
        native, reference = (work / median(column) for column in seconds.T)
        ratio = seconds[:, 1] / seconds[:, 0]
        interval = f"{ratio.min():.2f} to {ratio.max():.2f}"
        print(
            f"| {name} | {native:.0f} | {reference:.0f} | {median(ratio):.2f} ({interval}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
