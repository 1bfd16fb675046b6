"""TensorRT and TensorRT for RTX without a GPU: RTX engines are built, but not run.

Where the same code serves both libraries, it runs for each that can build here.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentforge.runtime import backends
from latentforge.runtime.backends import cuda, tensorrt
from latentforge.runtime.backends.trt import engine_builder, trt_common, trt_session
from latentforge.runtime.errors import BackendError, DeviceError, SettingsError
from latentforge.runtime.manifest import Component, FileEntry
from latentforge.runtime.shapes import Range, Shapes
from latentforge.runtime.tensor import TensorSpec

LIBRARIES = [name for name, entry in backends.BACKENDS.items() if entry.module == "tensorrt"]
RTX = "tensorrt-rtx"

onnx = pytest.importorskip("onnx")

no_gpu = pytest.mark.skipif(cuda.find_gpu() is not None, reason="is about machines without a GPU")

ROW = TensorSpec("float32", ("batch", 4))
SHAPES: tuple[Shapes, ...] = (
    {"batch": Range(1, 2, 4), "n": Range(1, 3, 8)},
    {"batch": Range(8, 8, 8), "n": Range(1, 1, 1)},
)
TYPES = {"float32": 1, "float16": 10, "int64": 7, "int32": 6, "bool": 9, "float64": 11, "int8": 3}

Specs = Mapping[str, TensorSpec]


def specs(**given: str) -> dict[str, TensorSpec]:
    """Return specs of text such as ``x="float32 batch 4"``."""
    made = {}
    for name, text in given.items():
        dtype, *shape = text.split()
        made[name] = TensorSpec(dtype, tuple(int(s) if s.isdigit() else s for s in shape))
    return made


def component(
    backend: str, inputs: Specs, outputs: Specs, shapes: tuple[Shapes, ...] = (), **changes: Any
) -> Component:
    """Return the component of m.engine, which is built from m.onnx."""
    fields = {"file": "m.onnx", "sha256": "0" * 64, "bytes": 0, "precision": "fp32", **changes}
    return Component(backend=backend, inputs=inputs, outputs=outputs, shapes=shapes, **fields)


def write(
    path: Path,
    nodes: list[Any],
    inputs: Specs,
    outputs: Specs,
    weights: Mapping[str, Any] = {},  # noqa: B006 (read only)
    domains: tuple[str, ...] = ("",),
) -> Path:
    """Write a graph with these nodes; weights are arrays, or TensorProtos."""
    helper = onnx.helper
    made = [
        value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    infos = [
        [helper.make_tensor_value_info(n, TYPES[s.dtype], s.shape) for n, s in each.items()]
        for each in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "m", *infos, made)
    opsets = [helper.make_opsetid(domain, 17 if not domain else 1) for domain in domains]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def node(operator: str, takes: str, gives: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, takes.split(), gives.split(), **attributes)


DOUBLED = [node("Add", "x x", "y")]
X = specs(x="float32 batch 4")
Y = specs(y="float32 batch 4")
ROWS: tuple[Shapes, ...] = ({"batch": Range(1, 2, 4)},)
PRODUCT = [node("MatMul", "w x", "y")]


@pytest.fixture(params=LIBRARIES)
def name(request: pytest.FixtureRequest) -> str:
    """Yield each of the two libraries that is installed and can build on this machine."""
    pytest.importorskip(backends.BACKENDS[request.param].library, exc_type=ImportError)
    if request.param != RTX and cuda.find_gpu() is None:
        pytest.skip(f"{request.param} builds on the GPU that it is to run on, and there is none")
    return str(request.param)


class Watch:
    """Recorder of a build's progress, with an optional action at each report."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.act = act

    def __call__(self, what: str, done: int, total: int) -> None:
        self.reports.append((what, done, total))
        self.act()


def build(
    path: Path, part: Component, watch: Watch | None = None, **options: Any
) -> Mapping[str, str]:
    """Compile m.onnx of a folder to m.engine there."""
    backend = backends.get(part.backend)
    return backend.compile(path / "m.onnx", path / "m.engine", part, options, watch or Watch())


def doubled(path: Path, name: str = RTX, **changes: Any) -> Component:
    """Write a graph of one node, and return the component to build of it."""
    write(path / "m.onnx", DOUBLED, X, Y)
    return component(name, X, Y, **{"shapes": ROWS, **changes})


def test_builds_for_several_shapes(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = specs(x="float32 batch 4", w="float32 batch n", t="float32 1", s="float32")
    outputs = specs(y="float32 batch 4", z="float32 batch n*2")
    nodes = [
        node("Sub", "x x", "d"),
        node("Mul", "d t", "e"),
        node("Mul", "e s", "y"),
        node("Concat", "w w", "z", axis=1),
    ]
    graph_outputs = outputs | specs(z="float32 batch m")
    write(tmp_path / "m.onnx", nodes, inputs, graph_outputs)
    sizes = []
    for shapes in (SHAPES[:1], SHAPES):
        device = build(tmp_path, component(name, inputs, outputs).specialize(shapes))
        sizes.append((tmp_path / "m.engine").stat().st_size)
    library = backends.BACKENDS[name].library
    assert device["library"].startswith(f"{library} ")
    assert device["compute capability"]
    assert sizes[1] > 1.2 * sizes[0]  # kernels of a second profile
    left = {path.name for path in tmp_path.iterdir()} - {"timing.cache"}
    assert left == {"m.onnx", "m.engine"}
    assert capfd.readouterr() == ("", "")


def half(*shape: int) -> Any:
    return (np.arange(np.prod(shape)) % 7 - 3).reshape(shape).astype(np.float16)


QUANTIZED = [
    node("QuantizeLinear", "x xs zero", "q"),
    node("DequantizeLinear", "q xs zero", "d"),
    node("DequantizeLinear", "w ws zeros", "v", axis=0),
    node("Conv", "d v", "y", pads=[1, 1, 1, 1]),
]
IMAGE = specs(x="float32 batch 4 side side")


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs", "weights", "shapes"),
    [
        (
            [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "y")],
            specs(x="float16 batch 4 side side"),
            specs(y="float16 batch 8 side side"),
            {"w": half(8, 4, 3, 3)},
            ({"batch": Range(1, 1, 2), "side": Range(8, 16, 32)},),
        ),
        (
            [node("MatMul", "x w", "y")],
            specs(x="float16 batch 4"),
            specs(y="float16 batch 8"),
            {"w": half(4, 8)},
            ROWS,
        ),
        (
            QUANTIZED,
            IMAGE,
            specs(y="float32 batch 8 side side"),
            {
                "xs": np.float32(0.1),
                "zero": np.int8(0),
                "ws": np.full(8, 0.5, np.float32),
                "zeros": np.zeros(8, np.int8),
                "w": half(8, 4, 3, 3).astype(np.int8),
            },
            ({"batch": Range(1, 1, 2), "side": Range(8, 16, 32)},),
        ),
        (
            [node("Gather", "w x", "y")],
            specs(x="int64 2"),
            specs(y="float16 2 3"),
            {"w": half(5, 3)},
            (),
        ),
    ],
    ids=["convolution", "product", "quantized", "static"],
)
def test_builds_graphs_of_every_precision(
    name: str,
    tmp_path: Path,
    nodes: list[Any],
    inputs: Specs,
    outputs: Specs,
    weights: Mapping[str, Any],
    shapes: tuple[Shapes, ...],
) -> None:
    write(tmp_path / "m.onnx", nodes, inputs, outputs, weights)
    build(tmp_path, component(name, inputs, outputs, shapes))
    assert (tmp_path / "m.engine").stat().st_size > 10_000


def test_options_that_build(name: str, tmp_path: Path) -> None:
    part = doubled(tmp_path, name)
    build(tmp_path, part, level=1, workspace=512, sparse=True, weight_streaming=True)
    assert (tmp_path / "m.engine").exists()


def test_progress_never_falls_and_ends_full(name: str, tmp_path: Path) -> None:
    watch = Watch()
    build(tmp_path, doubled(tmp_path, name), watch)
    done = [now for _, now, _ in watch.reports]
    assert len(set(done)) > 20 and done == sorted(done)
    assert watch.reports[0] == ("reading the graph", 0, 1000)
    assert watch.reports[-1] == ("built", 1000, 1000)
    assert max(done[:-1]) < 1000 and {total for _, _, total in watch.reports} == {1000}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_report_that_raises_ends_the_build(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    part = doubled(tmp_path, name)
    whole = Watch()
    build(tmp_path, part, whole)
    (tmp_path / "m.engine").unlink()

    def act() -> None:
        if len(watch.reports) == 5:
            raise error

    watch = Watch(act)
    with pytest.raises(error):
        build(tmp_path, part, watch)
    assert len(watch.reports) < len(whole.reports) / 2
    assert not (tmp_path / "m.engine").exists()
    assert capfd.readouterr() == ("", "")


def test_interrupting_ends_the_build(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C arrives while the main thread waits for the library, within a phase."""
    part = doubled(tmp_path, name)
    whole = Watch()
    build(tmp_path, part, whole)
    (tmp_path / "m.engine").unlink()

    def handle(*arguments: Any) -> None:
        handled.set()
        signal.default_int_handler(*arguments)

    def act() -> None:
        if len(watch.reports) == 5:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert handled.wait(60)
            time.sleep(0.5)  # until the main thread, which is awake, has left its wait

    handled = threading.Event()
    watch = Watch(act)
    before = signal.signal(signal.SIGINT, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, part, watch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "m.engine").exists()
    assert len(watch.reports) < len(whole.reports) / 2
    assert capfd.readouterr() == ("", "")


# What is refused before or instead of building


@no_gpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware_compatible": "same"}, "does not take hardware_compatible: .* capabilities"),
        ({"version_compatible": True}, "does not take version_compatible: .* build again"),
        ({"strip": True}, "strip needs a GPU to build with, .* or leave strip out"),
        ({"refit": True}, "refit needs a GPU to build with"),
        (
            {"hardware_compatible": "all"},
            r"hardware_compatible must be same or ampere\+, not 'all'",
        ),
        ({"kernels": "soon"}, "kernels must be lazy or eager or none, not 'soon'"),
        ({"level": 6}, "level must be at most 5, not 6"),
        ({"workspace": 0}, "workspace must be at least 1 megabyte"),
        ({"graphs": 1}, "graphs must be of type bool"),
        ({"turbo": True}, "no backend option 'turbo'; there are threads, workspace"),
        ({"capabilities": "9.0"}, "'9.0', only 7.5, 8.0, .* Hopper, 9.0, with .* tensorrt"),
        ({"capabilities": "8.6,nine"}, "compute capability 'nine'"),
        ({"capabilities": "8.6,"}, "compute capability ''"),
    ],
)
def test_refuses_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    part = doubled(tmp_path)
    watch = Watch()
    with pytest.raises(SettingsError, match=message) as caught:
        build(tmp_path, part, watch, **options)
    assert "\n" not in str(caught.value)
    assert watch.reports == [] and not (tmp_path / "m.engine").exists()


def test_builds_for_the_requested_capabilities(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    device = build(tmp_path, doubled(tmp_path), capabilities="8.6, 7.5,8.6")
    assert device["compute capability"] == "8.6, 7.5"


@no_gpu
def test_tensorrt_needs_a_gpu_to_build() -> None:
    with pytest.raises(
        SettingsError, match="tensorrt does not take capabilities: it builds for the GPU"
    ):
        tensorrt._build_gpu("tensorrt", {"capabilities": "8.6"})
    with pytest.raises(DeviceError, match="CUDA finds none here: .*; tensorrt-rtx builds without"):
        tensorrt._capabilities(None, "tensorrt", {}, None)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((), "dimension batch has no range, and .* needs one"),
        (({"n": Range(1, 1, 1)},), "dimension batch has no range"),
    ],
)
def test_a_free_dimension_without_a_range(
    name: str, tmp_path: Path, shapes: tuple[Shapes, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build(tmp_path, doubled(tmp_path, name, shapes=shapes))


def test_sizes_that_contradict_the_graph(name: str, tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", DOUBLED, X, Y)
    free = specs(x="float32 batch n"), specs(y="float32 batch n")
    shapes = ({"batch": Range(1, 2, 4), "n": Range(2, 4, 8)},)
    with pytest.raises(SettingsError, match=r"m\.onnx: x: sizes 2 to 8 .* fixed to 4: export"):
        build(tmp_path, component(name, *free, shapes))


def test_sizes_that_the_library_cannot_reconcile(name: str, tmp_path: Path) -> None:
    square = specs(x="float32 batch n"), specs(y="float32 batch n")
    write(tmp_path / "m.onnx", [node("MatMul", "x x", "y")], *square)
    shapes = ({"batch": Range.of(2), "n": Range.of(4)},)
    with pytest.raises(BackendError, match=r"refuses .*m\.onnx: .*mismatching dim") as caught:
        build(tmp_path, component(name, *square, shapes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (specs(other="float32 batch 4"), Y, "inputs: expected other .*, found x: "),
        (X, specs(y="float32 batch 4", z="float32 1"), "outputs: expected y, z .*, found y: "),
        (
            specs(x="float16 batch 4"),
            Y,
            r"x: expected float16\[batch, 4\] .*, found float32\[-1, 4\]",
        ),
        (
            specs(x="float32 batch 5"),
            Y,
            r"x: expected float32\[batch, 5\] .*, found float32\[-1, 4\]",
        ),
        (specs(x="float32 batch"), Y, r"x: expected float32\[batch\] .*, found float32\[-1, 4\]"),
        (X, specs(y="int64 batch 4"), r"y: expected int64\[batch, 4\] .*, found float32\[-1, 4\]"),
    ],
)
def test_a_graph_that_is_not_as_described(
    name: str, tmp_path: Path, inputs: Specs, outputs: Specs, message: str
) -> None:
    write(tmp_path / "m.onnx", DOUBLED, X, Y)
    with pytest.raises(BackendError, match=message):
        build(tmp_path, component(name, inputs, outputs, ROWS))


def test_double_precision_is_not_silently_single(name: str, tmp_path: Path) -> None:
    x, y = specs(x="float64 batch 4"), specs(y="float64 batch 4")
    write(tmp_path / "m.onnx", DOUBLED, x, y)
    with pytest.raises(BackendError, match=r"x: expected float64.*, found float32\[-1, 4\]"):
        build(tmp_path, component(name, x, y, ROWS))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: bytes(byte ^ 0xFF for byte in content),
        lambda _: b"",
        lambda _: b"no graph at all, but a text\n" * 9,
        None,
    ],
    ids=["cut", "flipped", "empty", "text", "missing"],
)
def test_a_broken_graph(
    name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes] | None,
) -> None:
    part = doubled(tmp_path, name)
    path = tmp_path / "m.onnx"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(BackendError, match=r"m\.onnx") as caught:
        build(tmp_path, part)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (tmp_path / "m.engine").exists()
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_the_library_lacks(name: str, tmp_path: Path) -> None:
    strange = onnx.helper.make_node("Fold", ["x"], ["y"], name="/up/Fold", domain="com.acme")
    write(tmp_path / "m.onnx", [strange], X, Y, domains=("", "com.acme"))
    with pytest.raises(BackendError, match=r"refuses .*m\.onnx: Fold /up/Fold: ") as caught:
        build(tmp_path, component(name, X, Y, ROWS))
    assert "\n" not in str(caught.value)


def outside(place: str, **fields: str) -> Any:
    """Return a weight with external data."""
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4, 4], data_location=1)
    weight.external_data.add(key="location", value=place)
    for key, value in fields.items():
        weight.external_data.add(key=key, value=value)
    return weight


SQUARE = specs(x="float32 4 n"), specs(y="float32 4 n")
WIDE: tuple[Shapes, ...] = ({"n": Range(1, 2, 4)},)


def test_weights_beside_the_graph(name: str, tmp_path: Path) -> None:
    """They are copied into the engine, and are most of it."""
    width = 512
    weights = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    (tmp_path / "m.onnx.data").write_bytes(weights.tobytes())
    weight = outside("m.onnx.data")
    weight.dims[:] = [width, width]
    wide = specs(x=f"float32 {width} n"), specs(y=f"float32 {width} n")
    write(tmp_path / "m.onnx", PRODUCT, *wide, {"w": weight})
    data = (FileEntry(file="m.onnx.data", sha256="0" * 64, bytes=weights.nbytes),)
    build(tmp_path, component(name, *wide, WIDE, data=data))
    assert weights.tobytes()[:4096] in (tmp_path / "m.engine").read_bytes()


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("../secret.bin", {}),
        ("{outside}/secret.bin", {}),
        ("link.bin", {}),
        ("folder/secret.bin", {}),
        ("nowhere.bin", {}),
        ("short.bin", {}),
        ("whole.bin", {"offset": "64", "length": "64"}),
    ],
)
def test_weights_that_are_not_beside_the_graph(
    name: str, tmp_path: Path, place: str, fields: dict[str, str]
) -> None:
    inside, other = tmp_path / "engines", tmp_path / "other"
    inside.mkdir()
    other.mkdir()
    for path in (tmp_path / "secret.bin", other / "secret.bin", inside / "whole.bin"):
        path.write_bytes(bytes(64))
    (inside / "short.bin").write_bytes(bytes(32))
    if place == "link.bin":
        (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    if place.startswith("folder"):
        (inside / "folder").symlink_to(other)
    weight = outside(place.format(outside=tmp_path), **fields)
    write(inside / "m.onnx", PRODUCT, *SQUARE, {"w": weight})
    with pytest.raises(BackendError, match=r"m\.onnx|is a link") as caught:
        build(inside, component(name, *SQUARE, WIDE))
    assert "\n" not in str(caught.value)
    assert not (inside / "m.engine").exists()


def test_a_link_within_the_directory_is_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(bytes(64))
    (tmp_path / "link.bin").symlink_to(tmp_path / "real.bin")
    write(tmp_path / "m.onnx", PRODUCT, *SQUARE, {"w": outside("link.bin")})
    build(tmp_path, component(name, *SQUARE, WIDE))
    assert (tmp_path / "m.engine").exists()


@pytest.mark.parametrize(
    "reason",
    [
        "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 9)",
        "cudaMalloc: out of memory",
        "std::bad_alloc",
        "Failed to map file to memory: m.onnx.data",
    ],
)
def test_messages_that_mean_out_of_memory(reason: str) -> None:
    assert engine_builder._MEMORY.search(reason)
    assert not engine_builder._MEMORY.search("requires workspace memory greater than 0")


# Loading, as far as it goes without a GPU


@pytest.fixture
def engine(tmp_path: Path) -> Component:
    """Build m.engine, and return its component."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    part = doubled(tmp_path)
    return msgspec.structs.replace(part, file="m.engine", device=build(tmp_path, part))


def load(path: Path, part: Component, **options: Any) -> backends.Session:
    return backends.get(part.backend).load(path / "m.engine", part, options)


@no_gpu
def test_loading_without_a_gpu(
    engine: Component, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match="needs an NVIDIA GPU, and CUDA finds none here: ") as it:
        load(tmp_path, engine)
    assert "\n" not in str(it.value)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.engine"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:63],
        lambda content: bytes(byte ^ 0xFF for byte in content),
        lambda _: b"",
        lambda _: b"GIF89a" * 99,
    ],
    ids=["cut", "flipped", "empty", "foreign"],
)
def test_a_damaged_engine(
    engine: Component,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackendError, match=r"m\.engine is not an engine of tensorrt_rtx") as caught:
        load(tmp_path, engine)
    assert not isinstance(caught.value, DeviceError)
    assert capfd.readouterr() == ("", "")


def test_a_missing_engine(engine: Component, tmp_path: Path) -> None:
    (tmp_path / "m.engine").unlink()
    with pytest.raises(BackendError, match=r"cannot read .*m\.engine: No such file"):
        load(tmp_path, engine)


def test_host_code_needs_permission(engine: Component, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match="contains code that runs on the host: load it with host_"
    ):
        load(tmp_path, engine, version_compatible=True)
    assert "host_code" in backends.ONLY_AT_LOAD  # no manifest can set it


def test_an_engine_without_a_device_record(engine: Component, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"m\.engine: the manifest does not record .* compile it"
    ):
        load(tmp_path, msgspec.structs.replace(engine, device={}))


def test_load_refuses_options_too(engine: Component, tmp_path: Path) -> None:
    for options in ({"turbo": 1}, {"kernels": "soon"}, {"graphs": "yes"}):
        with pytest.raises(SettingsError):
            load(tmp_path, engine, **options)


HERE = {
    "library": "tensorrt 10.9.0",
    "compute capability": "8.9",
    "gpu": "NVIDIA RTX 4090",
    "driver": "13.0",
}


@pytest.mark.parametrize(
    ("backend", "built", "options", "message"),
    [
        ("tensorrt", {}, {}, ""),
        ("tensorrt", {"driver": "12.4"}, {}, ""),
        ("tensorrt", {"library": "tensorrt 10.8.0"}, {}, "library tensorrt 10.8.0 (here tensorrt"),
        ("tensorrt", {"library": "tensorrt 10.8.0"}, {"version_compatible": True}, ""),
        ("tensorrt", {"gpu": "NVIDIA L40"}, {}, "gpu NVIDIA L40 (here NVIDIA RTX 4090)"),
        ("tensorrt", {"gpu": "NVIDIA L40"}, {"hardware_compatible": "same"}, ""),
        (
            "tensorrt",
            {"compute capability": "8.6", "gpu": "NVIDIA A10"},
            {"hardware_compatible": "same"},
            "compute capability 8.6 (here 8.9)",
        ),
        (
            "tensorrt",
            {"compute capability": "8.6", "gpu": "NVIDIA A10"},
            {"hardware_compatible": "ampere+"},
            "",
        ),
        (
            "tensorrt",
            {"gpu": "NVIDIA L40", "driver": "12.4"},
            {},
            "gpu NVIDIA L40 (here NVIDIA RTX 4090), driver 12.4 (here 13.0)",
        ),
        (RTX, {"compute capability": "8.6, 8.9", "gpu": "NVIDIA A10"}, {}, ""),
        (RTX, {"compute capability": "8.6, 12.0"}, {}, "compute capability 8.6, 12.0 (here 8.9)"),
        (RTX, {"compute capability": "18.9"}, {}, "compute capability 18.9 (here 8.9)"),
    ],
)
def test_differences_that_prevent_loading(
    backend: str, built: dict[str, str], options: dict[str, Any], message: str
) -> None:
    found = tensorrt.mismatch(backend, {**HERE, **built}, HERE, options)
    assert found.startswith(message) and bool(found) == bool(message)


def test_older_architectures_are_not_ampere() -> None:
    old = {**HERE, "compute capability": "7.5", "gpu": "NVIDIA T4"}
    found = tensorrt.mismatch("tensorrt", HERE, old, {"hardware_compatible": "ampere+"})
    assert found == "compute capability 8.9 (here 7.5)"


def test_a_library_that_is_not_installed() -> None:
    for name in LIBRARIES:
        entry = backends.BACKENDS[name]
        try:
            __import__(entry.library)
        except ImportError:
            with pytest.raises(BackendError, match=rf"pip install 'latentforge\[{entry.extra}\]'"):
                backends.get(name)


@no_gpu
def test_no_gpu() -> None:
    assert cuda.find_gpu() is None and cuda.free_memory() is None


def test_cuda_bindings_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DeviceError, match=r"without cuda-bindings \(.*\): pip install"):
        cuda.require_gpu()
    assert cuda.find_gpu() is None and cuda.free_memory() is None


# The session's reckoning


def test_progress_of_nested_phases() -> None:
    phases = engine_builder.Phases()
    phases.start("build", None, 2)
    phases.start("optimize", "build", 4)
    assert phases.reached == 0
    phases.step("optimize", 1)
    assert phases.reached == pytest.approx(0.5 * 0.5 * 0.5)  # half of half of the first step
    phases.finish("optimize")
    phases.start("time", "build", 1)
    assert phases.reached == pytest.approx(0.5 * 0.5)
    phases.step("time", 0)
    assert phases.reached == pytest.approx(0.5 * 0.75)
    phases.finish("time")
    phases.step("build", 0)
    assert phases.reached == 0.5
    phases.step("never begun", 7)
    phases.start("optimize", "build", 4)
    assert phases.reached == 0.5
    phases.step("build", 1)
    phases.finish("build")
    phases.start("build again", None, 2)
    phases.step("build again", 0)
    assert phases.reached == 1


def test_profiles_and_buffers_follow_the_shapes() -> None:
    inputs = specs(x="float16 batch 4 h", t="int64 1", s="float32")
    outputs = specs(y="float32 batch 2 h*8", z="bool batch h//2")
    shapes: tuple[Shapes, ...] = (
        {"batch": Range(1, 2, 4), "h": Range(8, 16, 16)},
        {"batch": Range.of(1), "h": Range.of(32)},
    )
    part = component(RTX, inputs, outputs, shapes)
    assert trt_common.profiles(part) == (
        {"x": ((1, 4, 8), (2, 4, 16), (4, 4, 16)), "t": ((1,),) * 3, "s": ((),) * 3},
        {"x": ((1, 4, 32),) * 3, "t": ((1,),) * 3, "s": ((),) * 3},
    )
    assert trt_common.buffer_sizes(part) == {
        "x": 2 * 4 * 4 * 16,
        "t": 8,
        "s": 4,
        "y": 4 * 4 * 2 * 128,
        "z": 32,
    }


def test_inputs_that_are_uploaded_already() -> None:
    array = np.ones(3, np.float32)
    kept = array.view()
    kept.setflags(write=False)
    twin = array.view()
    twin.setflags(write=False)
    assert trt_session.is_uploaded({"x": kept}, "x", kept)
    assert not trt_session.is_uploaded({"x": kept}, "x", twin)
    assert not trt_session.is_uploaded({"x": array}, "x", array)  # it may have changed meanwhile
    assert not trt_session.is_uploaded({"x": None}, "x", kept)
    assert not trt_session.is_uploaded({"y": kept}, "x", kept)
