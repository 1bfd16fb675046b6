"""latentforge's own operators: results, compilation, and messages if they are missing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import Handmade
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operators import attention, convolution, gelu, group_scale, product, rounded, silu

from latentforge.optimize.half.bfloat16 import pack_bf16
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.optimize.passes.native.conv import pack
from latentforge.optimize.stage.component import save_part
from latentforge.runtime.backends import get
from latentforge.runtime.errors import BackendError
from latentforge.runtime.kernels import DOMAIN, instruction_sets, library
from latentforge.runtime.kernels.compiler import (
    INSTRUCTION_SETS,
    LIBRARY,
    build,
    compilable_instructions,
    compiler,
)
from latentforge.runtime.manifest import Manifest

Array = np.ndarray[Any, Any]

TOLERANCE = 5e-5  # of the output's range
ROUNDED = 2e-3  # the same, where a last digit of an activation may round to the other bfloat16
TYPES = ("float32", "float16", "bfloat16")

built = pytest.mark.skipif(library() is None, reason="the library was not compiled here")


def some(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def ran(op_type: str, inputs: list[Array | None], outputs: int = 1, **attributes: Any) -> Any:
    """Run an operator of the library; weights and biases are constants, as in optimized graphs."""
    names = ["" if array is None else f"i{place}" for place, array in enumerate(inputs)]
    node = onnx.helper.make_node(
        op_type, names, [f"o{place}" for place in range(outputs)], domain=DOMAIN, **attributes
    )
    kind = onnx.helper.np_dtype_to_tensor_dtype
    fixed = {name: array for name, array in zip(names[1:3], inputs[1:3], strict=True) if name}
    feeds = {n: a for n, a in zip(names, inputs, strict=True) if n and n not in fixed}
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(n, kind(a.dtype), a.shape) for n, a in feeds.items()],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in node.output],
        [onnx.numpy_helper.from_array(array, name) for name, array in fixed.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library()))
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    values = ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    return values[0] if outputs == 1 else values


def in_type(packed: Array, name: str) -> Array:
    """Return packed weights in a type that the operators take, and in its layout."""
    return pack_bf16(packed) if name == "bfloat16" else packed.astype(name)


def close(got: Array, wanted: Array, tolerance: float = TOLERANCE) -> None:
    assert got.dtype == np.float32 and got.shape == wanted.shape
    error = np.abs(got - wanted).max()
    assert error <= tolerance * max(np.ptp(wanted), np.abs(wanted).max()), error


def check_conv(
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    upsample: int = 1,
    pads: tuple[int, int, int, int] | None = None,
    bias: bool = True,
    norm: bool = False,
    act: bool = False,
    row: int = 0,
    residual: bool = False,
    weights: str = "float32",
    grow: tuple[int, int] | None = None,
) -> None:
    """Compare Conv with its definition."""
    n, _, _, c = shape
    pads = (kernel // 2,) * 4 if pads is None else pads
    weight = pack(some(channels, c, kernel, kernel, seed=1) / (kernel * c**0.5))
    given = {"channels": channels, "pads": pads, "stride": stride, "upsample": upsample}
    inputs = [
        some(*shape),
        in_type(weight, weights),
        some(channels, seed=2) if bias else None,
        1 + some(n, c, seed=3) / 2 if norm else None,
        some(n, c, seed=4) if norm else None,
        some(row, channels, seed=5) if row else None,
    ]
    _, h, w, _ = shape
    size = None if grow is None else np.array([n, 2 * h - grow[0], 2 * w - grow[1], c])
    wanted = convolution(*inputs, None, size, act=act, **given)  # type: ignore[arg-type]
    added = some(*wanted.shape, seed=6) if residual else None
    got = ran("Conv", [*inputs, added, size], silu=int(act), **given)
    exact = weights != "bfloat16" or not norm
    wanted = wanted if added is None else wanted + added
    close(got, wanted, TOLERANCE if exact else ROUNDED)


FUSIONS: dict[str, dict[str, Any]] = {
    "nothing": {"bias": False},
    "bias": {},
    "norm": {"norm": True},
    "norm, silu": {"norm": True, "act": True},
    "row of each": {"row": 2},
    "row for all": {"row": 1},
    "residual": {"residual": True},
    "all": {"norm": True, "act": True, "row": 2, "residual": True},
    "all in half": {"norm": True, "act": True, "row": 1, "residual": True, "weights": "float16"},
    "in bf16": {"weights": "bfloat16"},
    "all in bf16": {"norm": True, "act": True, "row": 1, "residual": True, "weights": "bfloat16"},
    "enlarged in bf16": {"upsample": 2, "weights": "bfloat16"},
    "to a size in bf16": {"grow": (1, 0), "weights": "bfloat16"},
    "stride in bf16": {"stride": 2, "residual": True, "weights": "bfloat16"},
    "enlarged": {"upsample": 2},
    "enlarged, all": {"upsample": 2, "norm": True, "act": True, "row": 2, "residual": True},
    "to a size": {"grow": (1, 0)},
    "to a size, all": {"grow": (1, 1), "norm": True, "act": True, "row": 2, "residual": True},
    "doubled by size": {"grow": (0, 0), "residual": True},
    "stride": {"stride": 2},
    "stride, all": {"stride": 2, "norm": True, "act": True, "row": 2, "residual": True},
    "as the VAE's": {"stride": 2, "pads": (0, 0, 1, 1)},
    "no padding": {"pads": (0, 0, 0, 0)},
    "lopsided": {"pads": (1, 0, 0, 1), "norm": True, "act": True},
    "1x1": {"kernel": 1},
    "1x1, all": {"kernel": 1, "norm": True, "act": True, "row": 2, "residual": True},
    "1x1, stride": {"kernel": 1, "stride": 2},
    "1x1 in half": {"kernel": 1, "weights": "float16"},
    "1x1 in bf16": {"kernel": 1, "weights": "bfloat16"},
    "1x1 in bf16, stride": {"kernel": 1, "stride": 2, "weights": "bfloat16"},
}
SIZES = {
    "tiny": ((2, 3, 4, 3), 5),
    "odd": ((2, 13, 9, 20), 33),
    "of latents": ((2, 16, 24, 4), 48),
    "to latents": ((2, 15, 17, 48), 4),
    "wide": ((2, 8, 8, 160), 64),
    "tall": ((2, 37, 6, 32), 32),
    "large": ((2, 33, 40, 64), 96),
}


@built
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size", SIZES)
def test_convolves(size: str, fusion: str) -> None:
    shape, channels = SIZES[size]
    check_conv(shape, channels, **FUSIONS[fusion])


@built
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 20, 20, 40))),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    upsample=st.sampled_from([1, 2]),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    switches=st.fixed_dictionaries(
        {name: st.booleans() for name in ("bias", "norm", "act", "residual")}
    ),
    weights=st.sampled_from(TYPES),
    row=st.integers(0, 2),
)
def test_convolves_any_configuration(
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: int,
    stride: int,
    upsample: int,
    pads: tuple[int, int, int, int],
    switches: dict[str, bool],
    weights: str,
    row: int,
) -> None:
    n, height, width, c = shape
    top, left, bottom, right = pads
    given = {**switches, "act": switches["norm"] and switches["act"], "row": (0, 1, n)[row]}
    if kernel > min(upsample * height + top + bottom, upsample * width + left + right):
        return
    if kernel == 1:
        pads, upsample = (0, 0, 0, 0), 1
    upsample = upsample if stride == 1 else 1
    if kernel > min(upsample * height + top + bottom, upsample * width + left + right):
        return
    check_conv(
        (n, height, width, c),
        channels,
        kernel,
        stride=stride,
        upsample=upsample,
        pads=pads,
        weights=weights,
        **given,
    )


@built
@pytest.mark.parametrize("side", [2, 4, 8, 17])
@pytest.mark.parametrize("upsample", [1, 2])
def test_an_image_is_the_same_beside_others(side: int, upsample: int) -> None:
    """In its bytes: which way of convolution is the fastest changes with their number."""
    images, weight = some(9, side, side, 96), pack(some(160, 96, 3, 3, seed=1) / 30)
    given = {"channels": 160, "pads": (1, 1, 1, 1), "stride": 1, "upsample": upsample}
    rest: list[Array | None] = [weight, some(160, seed=2), None, None, None, None, None]
    together = ran("Conv", [images, *rest], silu=0, **given)
    for count in (1, 2, 4):
        part = ran("Conv", [images[:count], *rest], silu=0, **given)
        assert part.tobytes() == together[:count].tobytes()


@built
@pytest.mark.parametrize("shape", [(1, 5, 7, 32), (3, 16, 16, 48), (2, 33, 31, 64)])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_normalizes(shape: tuple[int, int, int, int], groups: int) -> None:
    x = 3 * some(*shape) + 20 * some(1, 1, 1, shape[3], seed=1)
    weights = [1 + some(shape[3], seed=2) / 2, some(shape[3], seed=3)]
    given = {"groups": groups, "epsilon": 1e-5}
    wanted = group_scale(x, *weights, **given)  # type: ignore[arg-type]
    scale, shift = ran("GroupScale", [x, *weights], 2, **given)
    close(scale, wanted[0])
    close(shift, wanted[1])
    normed = x * wanted[0][:, None, None] + wanted[1][:, None, None]
    close(ran("GroupNorm", [x, *weights], silu=0, **given), normed)
    close(ran("GroupNorm", [x, *weights], silu=1, **given), silu(normed))


@built
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("added", ["nothing", "bias", "residual", "both"])
@pytest.mark.parametrize(
    "shape, channels", [((1, 3), 5), ((2, 7, 20), 33), ((3, 77, 64), 48), ((2, 300, 96), 128)]
)
def test_multiplies(shape: tuple[int, ...], channels: int, added: str, weights: str) -> None:
    weight = pack(some(channels, shape[-1], 1, 1, seed=1) / shape[-1] ** 0.5)
    inputs = [
        some(*shape),
        in_type(weight, weights),
        some(channels, seed=2) if added in ("bias", "both") else None,
        some(*shape[:-1], channels, seed=3) if added in ("residual", "both") else None,
    ]
    wanted = product(*inputs, channels=channels)  # type: ignore[arg-type]
    close(ran("MatMul", inputs, channels=channels), wanted)


@built
def test_inputs_round_to_bfloat16() -> None:
    """To the nearest and to even, each by itself: the weights are the identity."""
    ties = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0xC2FF_7FFF], np.uint32)
    others = [np.inf, -np.inf, np.nan, 3.4e38, 65504.1, 1e-30, -0.0, 3.3e38]
    numbers = np.array([*ties.view(np.float32), *others, *some(20)], np.float32)
    weight = in_type(pack(np.eye(32, dtype=np.float32)[:, :, None, None]), "bfloat16")
    got = ran("MatMul", [np.diag(numbers), weight, None], channels=32)
    np.testing.assert_array_equal(np.diag(got), rounded(numbers))
    others = got[~np.eye(32, dtype=bool)].reshape(32, 31)
    finite = np.isfinite(rounded(numbers))
    assert np.isnan(others[~finite]).all() and not others[finite].any()  # zero times infinity


def check_gated(
    x: Array, half: int, scale: float = 1.0, *, bias: bool = True, weights: str = "float32"
) -> None:
    """Compare a gated MatMul with its definition."""
    weight = scale * some(2 * half, x.shape[-1], seed=1) / x.shape[-1] ** 0.5
    weight = weight.astype(weights).astype(np.float32)
    added = some(2 * half, seed=2) if bias else None
    multiplied = rounded(x) if weights == "bfloat16" else x.astype(np.float64)
    y = multiplied @ weight.T.astype(np.float64) + (0 if added is None else added)
    turns = np.arange(2 * half).reshape(2, -1, 16).swapaxes(0, 1).reshape(-1)
    packed = in_type(pack(weight[turns][:, :, None, None]), weights)
    inputs = [x, packed, None if added is None else added[turns]]
    got = ran("MatMul", inputs, channels=2 * half, gated=1)
    close(got, y[..., :half] * gelu(y[..., half:]))


@built
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [16, 48, 320])
@pytest.mark.parametrize("shape", [(1, 3), (7, 20), (1, 77, 64), (2, 300, 33)])
def test_multiplies_gated(shape: tuple[int, ...], half: int, bias: bool, weights: str) -> None:
    check_gated(some(*shape), half, bias=bias, weights=weights)


@built
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e4])
def test_multiplies_gated_far_from_one(scale: float) -> None:
    check_gated(some(40, 24), 48, scale)


@built
def test_multiplies_gated_by_extremes() -> None:
    gates = [-1e38, -1e10, -1e4, -100, -20, -10, -0.0, 1e-30, 10, 20, 100, 1e4, 1e10, 1e38]
    right = np.array([*gates, np.inf, np.nan], np.float32)
    bias = np.concatenate([np.ones(16, np.float32), right])  # which is all there is: x is zero
    x, weight = np.zeros((1, 8), np.float32), pack(some(32, 8, 1, 1))
    got = ran("MatMul", [x, weight, bias], channels=32, gated=1)
    np.testing.assert_allclose(got[0], np.maximum(right, 0), rtol=1e-6, atol=1e-6)


@built
@pytest.mark.parametrize("size", [6, 16, 40, 64, 80])
@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 77), (64, 64), (130, 300), (300, 5)])
def test_attends(queries: int, keys: int, size: int) -> None:
    heads, scale = 3, size**-0.5
    query = 3 * some(2, queries, heads * size)  # some scores far above the others
    key, value = (some(2, keys, heads * size, seed=seed) for seed in (1, 2))
    wanted = attention(query, key, value, heads=heads, scale=scale)
    # through the graph's inputs, as tokens come: ran() makes constants of the second and third
    close(ran("Attention", [query, key, value], heads=heads, scale=scale), wanted)


@built
def test_attention_with_large_scores() -> None:
    query, key = 100 * some(1, 20, 32), 100 * some(1, 200, 32, seed=1)
    value = some(1, 200, 32, seed=2)
    wanted = attention(query, key, value, heads=2, scale=1.0)
    close(ran("Attention", [query, key, value], heads=2, scale=1.0), wanted)


CONV: dict[str, Any] = {"channels": 16, "pads": (1,) * 4, "silu": 0, "stride": 1, "upsample": 1}


def refused(message: str, op_type: str, inputs: list[Array | None], **attributes: Any) -> None:
    with pytest.raises(Exception, match=re.escape(f"latentforge.{op_type}: {message}")):
        ran(op_type, inputs, **attributes)


@built
def test_convolution_refuses_what_it_cannot_compute() -> None:
    x, weight = some(1, 8, 8, 32), pack(some(16, 32, 3, 3))
    found = "input weight: expected float, float16 or bfloat16[1, 32, 3, 3, 16], found "
    refused(f"{found}float[1, 16, 3, 3, 16]", "Conv", [x, weight[:, :16], None], **CONV)
    refused(
        "input weight: expected float, float16 or bfloat16, found double",
        "Conv",
        [x, weight.astype(np.float64), None],
        **CONV,
    )
    nothing = [x[..., :0], weight[:, :0], None]
    refused("input x: expected float[any, 1 or more, 1 or more, 1 or", "Conv", nothing, **CONV)
    residual = [x, weight, None, None, None, None, some(1, 4, 4, 16)]
    refused("input residual: expected float[1, 8, 8, 16], found", "Conv", residual, **CONV)
    refused("input shift: expected scale and", "Conv", [x, weight, None, some(1, 32)], **CONV)
    refused("input bias: expected float[16], found float[0]", "Conv", [x, weight, some(0)], **CONV)
    tiny = "input x: expected padded sides of at least 3, found float[1, 2, 2, 32]"
    refused(tiny, "Conv", [x[:, :2, :2], weight, None], **{**CONV, "pads": (0,) * 4, "stride": 2})


@built
def test_convolution_refuses_attributes() -> None:
    x, weight = some(1, 8, 8, 32), pack(some(16, 32, 3, 3))
    single = [x, weight[:, :, :1, :1], None]
    refused("attribute pads: expected an integer from 0 to 0, found 1", "Conv", single, **CONV)
    for change, message in (
        ({"stride": 3}, "stride: expected an integer from 1 to 2, found 3"),
        ({"stride": "two"}, "stride: expected an integer, found something else"),
        ({"pads": (-1, 0, 0, 0)}, "pads: expected an integer from 0 to 2, found -1"),
        ({"pads": (0, 0, 48, 48)}, "pads: expected an integer from 0 to 2, found 48"),
        ({"pads": (1, 1)}, "pads: expected four integers, found something else"),
        ({"channels": 2**63 - 1}, "channels: expected an integer from 1 to 2147483647, found 92"),
        ({"dilations": (2, 2)}, "dilations: expected none, found one"),
        ({"auto_pad": "SAME_UPPER"}, "auto_pad: expected none, found one"),
    ):
        refused(f"attribute {message}", "Conv", [x, weight, None], **{**CONV, **change})
    without = {name: value for name, value in CONV.items() if name != "pads"}
    refused("attribute pads: expected four integers, found none", "Conv", [x, weight, None],
            **without)  # fmt: skip


@built
def test_convolution_refuses_sizes() -> None:
    x, weight = some(1, 8, 8, 32), pack(some(16, 32, 3, 3))
    huge = [1, 2**62, 2**62, 32]
    for sides in (
        *([2, 8, 8, 32], [1, 3, 8, 32], [1, 8, 129, 32], [1, 8, 8, 16], [1, -8, 8, 32], huge),
        [1, 8, 8],
    ):
        inputs = [x, weight, *[None] * 5, np.array(sides)]
        refused("input size: expected", "Conv", inputs, **CONV)
    inputs[-1] = np.array([1, 8, 8, 32])
    refused("input size: expected none, since", "Conv", inputs, **{**CONV, "upsample": 2})


@built
def test_other_operators_refuse_what_they_cannot_compute() -> None:
    tokens, packed = some(3, 32), pack(some(32, 32, 1, 1))
    refused("input residual: expected none, since the product is gated", "MatMul",
            [tokens, packed, None, some(3, 16)], channels=32, gated=1)  # fmt: skip
    refused("attribute channels: expected a multiple of 32", "MatMul",
            [tokens, packed[:1], None], channels=16, gated=1)  # fmt: skip
    refused("input x: expected 1 or more channels", "MatMul",
            [tokens[:, :0], packed[:, :0], None], channels=32)  # fmt: skip
    norm = [some(1, 8, 8, 32), some(32), some(32)]
    refused("input x: expected channels that 5 groups", "GroupNorm", norm, groups=5, epsilon=0.0,
            silu=0)  # fmt: skip
    for epsilon in (-1.0, float("nan"), float("inf")):
        refused(
            "attribute epsilon: expected a", "GroupNorm", norm, groups=4, epsilon=epsilon, silu=0
        )
    keys = [some(1, 4, 8), some(1, 4, 8), some(1, 5, 8)]
    refused("input value: expected float[1, 4, 8]", "Attention", keys, heads=2, scale=1.0)
    refused("attribute heads: expected an integer from 1", "Attention", keys, heads=0, scale=1.0)


@built
def test_empty_batches_are_legal() -> None:
    conv = ran("Conv", [some(0, 8, 8, 32), pack(some(16, 32, 3, 3)), None], **CONV)
    assert conv.shape == (0, 8, 8, 16)
    assert ran("MatMul", [some(2, 0, 32), pack(some(5, 32, 1, 1)), None], channels=5).size == 0
    norm = [some(0, 8, 8, 32), some(32), some(32)]
    scale, shift = ran("GroupScale", norm, 2, groups=4, epsilon=0.0)
    assert scale.shape == shift.shape == (0, 32)
    assert ran("GroupNorm", norm, groups=4, epsilon=0.0, silu=1).shape == (0, 8, 8, 32)
    attended = ran("Attention", [some(0, 4, 8)] * 3, heads=2, scale=1.0)
    assert attended.shape == (0, 4, 8)


@built
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512_bf16"])
def test_other_instruction_sets_agree(kernels: str) -> None:
    """Kernels of smaller instruction sets, those that this processor runs."""
    sets = instruction_sets()
    assert sets is not None
    if kernels not in sets.supported:
        pytest.skip(f"this processor does not run {kernels}")
    numbers = Path(__file__).parent / "test_kernels.py"
    run = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(numbers)]
    only = "test_convolves or test_multiplies or test_attends or test_normalizes"
    skipped = " and not whatever and not large"
    done = subprocess.run(
        [*run, "-k", f"({only}){skipped}"],
        capture_output=True,
        text=True,
        env={**os.environ, "LATENTFORGE_KERNELS": kernels},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-2000:]


@built
def test_an_unknown_instruction_set_is_refused(handmade: Handmade) -> None:
    directory, component = decoder(handmade)
    (directory / "engines.json").write_bytes(msgspec.json.encode(component))
    program = (
        "import sys, msgspec; from pathlib import Path\n"
        "from latentforge.runtime.backends import get\n"
        "from latentforge.runtime.manifest import Component\n"
        "folder = Path(sys.argv[1])\n"
        "made = msgspec.json.decode((folder / 'engines.json').read_bytes(), type=Component)\n"
        "get('onnxruntime').load(folder / made.file, made, {})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "LATENTFORGE_KERNELS": "avx9"},
    )
    *_, last = done.stderr.splitlines()
    assert last.startswith("latentforge.runtime.errors.BackendError: onnxruntime refuses ")
    assert "LATENTFORGE_KERNELS is 'avx9': unset it, or choose from" in last
    assert last.endswith("portable")


@built
def test_the_library_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = instruction_sets()
    assert sets is not None
    assert set(sets.supported) <= set(sets.compiled) <= {*INSTRUCTION_SETS, "portable"}
    assert sets.supported[-1] == sets.compiled[-1] == "portable" and sets.used in sets.supported
    monkeypatch.setattr("latentforge.runtime.kernels.LIBRARY", Path(np.__file__))
    with pytest.raises(BackendError, match="cannot be used: .*; run python -m latentforge.runtime"):
        instruction_sets()


@built
def test_rows_are_independent() -> None:
    x, weight = some(3, 12, 12, 32), pack(some(48, 32, 3, 3, seed=1))
    given = {"channels": 48, "pads": (1, 1, 1, 1), "silu": 0, "stride": 1, "upsample": 1}
    together = ran("Conv", [x, weight, None], **given)
    alone = [ran("Conv", [x[i : i + 1], weight, None], **given) for i in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


# -- in engines ------------------------------------------------------------------------------------

DECODER = """<ir_version: 9, opset_import: ["" : 20, "latentforge" : 1]>
m (float[batch, 4, latent_height, latent_width] latent_sample)
  => (float[batch, 3, height, width] sample)
<float[1, 4, 1, 1, 16] w = {WEIGHTS}, float[4] scales = {1, 1, 8, 8}>
{
  rows = Transpose<perm = [0, 2, 3, 1]>(latent_sample)
  y = latentforge.Conv<channels = 3, pads = [0, 0, 0, 0], silu = 0, stride = 1, upsample = 1>
      (rows, w)
  small = Transpose<perm = [0, 3, 1, 2]>(y)
  sample = Resize<mode = "nearest", nearest_mode = "floor",
      coordinate_transformation_mode = "asymmetric">(small, , scales)
}""".replace("WEIGHTS", ", ".join(["0.5"] * 64))


def decoder(handmade: Handmade) -> tuple[Path, Any]:
    directory = handmade(onnx={"vae_decoder": DECODER})
    component = Manifest.read(directory).components["vae_decoder"]
    return directory, msgspec.structs.replace(component, custom_ops=True)


@built
@pytest.mark.parametrize("optimized", [True, False])
def test_engines_run_and_compile(optimized: bool, handmade: Handmade, tmp_path: Path) -> None:
    directory, component = decoder(handmade)
    backend, feeds = get("onnxruntime"), {"latent_sample": some(2, 4, 3, 5)}
    wanted = backend.load(directory / component.file, component, {}).run(feeds)["sample"]
    assert wanted.shape == (2, 3, 24, 40)
    np.testing.assert_allclose(wanted[:, 0, ::8, ::8], feeds["latent_sample"].sum(1) / 2, atol=1e-6)
    target = tmp_path / "compiled.onnx"
    options = {"optimized": optimized}
    backend.compile(directory / component.file, target, component, options, lambda *_: None)
    got = backend.load(target, component, {}).run(feeds)["sample"]
    np.testing.assert_array_equal(got, wanted)


def test_the_manifest_records_custom_operators(handmade: Handmade, tmp_path: Path) -> None:
    directory, component = decoder(handmade)
    own = ir.load(directory / component.file)
    plain = ir.from_onnx_text("<ir_version: 9> m (float[n] x) => (float[n] y) { y = Neg(x) }")
    marks = [
        save_part(name, GraphPartition.whole(model, component), component, tmp_path).custom_ops
        for name, model in (("own", own), ("plain", plain))
    ]
    assert marks == [True, False]


def test_engines_are_refused_without_the_library(
    handmade: Handmade, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, component = decoder(handmade)
    monkeypatch.setattr("latentforge.runtime.kernels.LIBRARY", directory / "none.so")
    with pytest.raises(BackendError, match="vae_decoder.onnx needs .* install a C.. compiler"):
        get("onnxruntime").load(directory / component.file, component, {})


# -- the build -------------------------------------------------------------------------------------


def test_a_failed_compilation_keeps_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LIBRARY.stat().st_mtime_ns if LIBRARY.exists() else None
    monkeypatch.setenv("CXX", f"{sys.executable} -c raise(SystemExit(3))")
    assert build() == f"{sys.executable} failed with status 3"
    assert before == (LIBRARY.stat().st_mtime_ns if LIBRARY.exists() else None)
    assert not list(LIBRARY.parent.glob(".build-*"))


def test_a_compiler_that_lacks_instructions_leaves_them_out(tmp_path: Path) -> None:
    """A script in the place of the compiler, which refuses flags as an older one does."""
    command = tmp_path / "older"
    command.write_text('#!/bin/sh\ncase "$*" in *amx*|*bf16*) exit 1;; esac\nexec c++ "$@"\n')
    command.chmod(0o755)
    if not compilable_instructions(["c++"]):
        pytest.skip("no compiler, or another architecture")
    assert compilable_instructions([str(command)]).keys() == {"kernels_avx2", "kernels_avx512"}


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert compiler() is None
    run = [sys.executable, "-m", "latentforge.runtime.kernels"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "latentforge: no C++ compiler is installed\n")


def test_a_wheel_without_sources_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("latentforge.runtime.kernels.compiler.FOLDER", tmp_path)
    monkeypatch.setenv("CXX", "c++")
    assert "pip install --no-binary latentforge" in str(build(tmp_path / LIBRARY.name))
    assert not list(tmp_path.iterdir())
