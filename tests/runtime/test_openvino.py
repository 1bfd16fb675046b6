"""OpenVINO's backend, beyond the contract of all backends."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tiers import further

from latentforge.measure.hardware import available_cores
from latentforge.runtime import backends
from latentforge.runtime.compile.plan import CompileRequest
from latentforge.runtime.compile.stage import compile_engines
from latentforge.runtime.errors import BackendError, DeviceError, SettingsError
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load as load_directory
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Range, Sizes
from latentforge.runtime.tensor import TensorSpec

ov = pytest.importorskip("openvino", exc_type=ImportError)
openvino = backends.get("openvino")

TESTS = [str(folder) for folder in Path(__file__).parents[:2]]

Build = Callable[..., tuple[Path, Component]]
Load = Callable[..., backends.Session]
Arrays = dict[str, NDArray[Any]]

INPUTS = {
    "image": TensorSpec("float32", ("batch", 4, "height", "width")),
    "tokens": TensorSpec("float32", ("batch", 7, 256)),
}
OUTPUTS = {
    "features": TensorSpec("float32", ("batch", 8, "height", "width")),
    "values": TensorSpec("float32", ("batch", 7, 256)),
}
WEIGHTS = {"matrix": (256, 256), "kernel": (8, 4, 3, 3)}
BYTES = 4 * sum(int(np.prod(shape)) for shape in WEIGHTS.values())

GRAPH = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, height, width] image, float[batch, 7, 256] tokens, {inputs})
  => (float[batch, 8, height, width] features, float[batch, 7, 256] values)
{{
  {weights}
  features = Conv <pads = [1, 1, 1, 1]> (image, kernel)
  values = MatMul(tokens, matrix)
}}"""
STORED = {
    "float": "matrix = Identity(matrix_w) kernel = Identity(kernel_w)",
    "half": "matrix = Cast <to = 1> (matrix_w) kernel = Cast <to = 1> (kernel_w)",
    "int8": """matrix = DequantizeLinear <axis = 1> (matrix_w, matrix_s)
    kernel = DequantizeLinear <axis = 0> (kernel_w, kernel_s)""",
}
"""Weights in the graph by precision, as optimize writes them."""


def constants(stored: str) -> Iterator[tuple[str, NDArray[Any]]]:
    rng = np.random.default_rng(1)
    for name, axis in (("matrix", 1), ("kernel", 0)):
        array = rng.standard_normal(WEIGHTS[name], dtype=np.float32) / 16
        if stored == "int8":
            others = tuple(i for i in range(array.ndim) if i != axis)
            scale = np.abs(array).max(axis=others, keepdims=True) / 127
            yield f"{name}_s", scale.ravel()
            yield f"{name}_w", np.round(array / scale).astype(np.int8)
        else:
            yield f"{name}_w", array.astype(np.float16 if stored == "half" else np.float32)


def write_graph(path: Path, stored: str) -> None:
    arrays = dict(constants(stored))
    inputs = ", ".join(
        f"{ir.tensor(a).dtype.name.lower()}[{', '.join(map(str, a.shape))}] {name}"
        for name, a in arrays.items()
    )
    model = ir.from_onnx_text(GRAPH.format(inputs=inputs, weights=STORED[stored]))
    for name, array in arrays.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    ir.save(model, path)


def component(*shapes: dict[str, Range], **changes: Any) -> Component:
    fields = {"inputs": INPUTS, "outputs": OUTPUTS, "precision": "fp32"} | changes
    whole = Component(file="m.xml", sha256="0" * 64, bytes=0, backend="openvino", **fields)
    return whole.specialize(shapes)


def feeds(batch: int = 1, height: int = 5, width: int = 6) -> Arrays:
    rng = np.random.default_rng(2)
    return {
        "image": rng.standard_normal((batch, 4, height, width), dtype=np.float32),
        "tokens": rng.standard_normal((batch, 7, 256), dtype=np.float32),
    }


def no_report(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that compiles the graph, and returns the engine and its component."""

    def built(*shapes: dict[str, Range], stored: str = "float", **options: Any) -> Any:
        write_graph(tmp_path / "m.onnx", stored)
        part = component(*shapes)
        path = tmp_path / part.file
        backends.get("openvino").compile(tmp_path / "m.onnx", path, part, options, no_report)
        return path, part

    return built


@pytest.fixture
def load() -> Iterator[Load]:
    sessions: list[backends.Session] = []

    def loaded(path: Path, part: Component, **options: Any) -> backends.Session:
        sessions.append(backends.get("openvino").load(path, part, options))
        return sessions[-1]

    yield loaded
    for session in sessions:
        session.close()


def reference(path: Path, given: Arrays) -> Arrays:
    """Run ONNX Runtime without its optimizations: one quantizes the inputs of int8 products."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), given), strict=True))


def worst(found: Arrays, wanted: Arrays) -> float:
    """Return the largest difference; values are of order 1."""
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in OUTPUTS)


ONE = Range.of(1)
SIZE = {"batch": Range.of(2), "height": Range.of(8), "width": Range.of(4)}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    "shapes",
    [(), (SIZE,), (SIZE | {"batch": Range(1, 1, 4)},), (SIZE, SIZE | {"batch": ONE})],
    ids=["free", "fixed", "range", "several"],
)
def test_agrees_with_onnx_runtime(
    build: Build, load: Load, tmp_path: Path, stored: str, shapes: tuple[dict[str, Range], ...]
) -> None:
    session = load(*build(*shapes, stored=stored))
    given = feeds(2, 8, 4)
    wanted = reference(tmp_path / "m.onnx", given)
    assert worst(session.run(given), wanted) < 1e-5


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("stored", "compress", "part"),
    [
        ("float", False, 1.0),
        ("half", False, 0.5),
        ("int8", False, 0.25),
        ("float", True, 0.5),
        ("int8", True, 0.25),
    ],
)
def test_weights_keep_their_precision(
    build: Build, stored: str, compress: bool, part: float, fixed: bool
) -> None:
    path, _ = build(*[SIZE] * fixed, stored=stored, compress=compress)
    size = path.with_suffix(".bin").stat().st_size
    assert size == pytest.approx(part * BYTES, rel=0.03)


def test_the_ir_has_the_sizes(build: Build) -> None:
    """OpenVINO on its own sees the sizes, too."""
    openvino = pytest.importorskip("openvino")
    ranges = SIZE | {"batch": Range(1, 2, 4)}
    for shapes, wanted in (
        ((), "[?,4,?,?]"),
        ((SIZE,), "[2,4,8,4]"),
        ((ranges,), "[1..4,4,8,4]"),
        ((SIZE, SIZE | {"batch": Range.of(6)}), "[2..6,4,8,4]"),
    ):
        path, _ = build(*shapes)
        shape = openvino.Core().read_model(path).input("image").partial_shape.to_string()
        assert shape.replace("1..,", "?,").replace("1..]", "?]") == wanted


def test_dynamic_quantization_is_off_by_default(build: Build, load: Load, tmp_path: Path) -> None:
    engine = build(stored="int8")
    given = feeds()
    wanted = reference(tmp_path / "m.onnx", given)
    assert worst(load(*engine).run(given), wanted) < 1e-5
    asked = worst(load(*engine, dynamic_quantization=True).run(given), wanted)
    assert asked < 0.1  # and no less than 1e-5 where the processor can do it


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"device": "GPU.7"},
            DeviceError,
            r"no device 'GPU\.7' here; available devices: AUTO, .*CPU",
        ),
        ({"device": "TPU"}, DeviceError, "no device 'TPU' here; available devices: AUTO, .*CPU"),
        ({"device": ""}, DeviceError, "no device '' here; available devices: AUTO, .*CPU"),
        ({"hint": "speed"}, SettingsError, "hint must be latency or throughput, not 'speed'"),
        ({"precision": "fp8"}, SettingsError, "precision must be f32 or f16 or bf16, not 'fp8'"),
        ({"cache": "yes"}, SettingsError, "cache must be of type bool"),
    ],
)
def test_refuses_options(
    build: Build, load: Load, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = build()
    with pytest.raises(error, match=message):
        load(*engine, **options)


@pytest.mark.parametrize("option", [{"hint": "speed"}, {"precision": "fp8"}, {"threads": 257}])
def test_compile_refuses_options(build: Build, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(option))):
        build(**option)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    "options",
    [{"device": "AUTO"}, {"device": "AUTO", "threads": 1}, {"precision": "bf16"}, {"threads": 256}],
)
def test_takes_options(build: Build, load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    given = feeds()
    found = load(*build(), **options).run(given)
    assert worst(found, reference(tmp_path / "m.onnx", given)) < 0.05  # in bf16, 8 bits


def test_a_precision_that_the_processor_lacks_is_named(
    build: Build, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    openvino._warn_of_precision.cache_clear()  # it says so once
    able = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    load(*build(), precision="bf16")
    said = "openvino computes in f32 here: this processor lacks bf16" in caplog.text
    assert said != able
    caplog.clear()
    load(*build())
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "threads"), [({}, 3), ({"threads": 1}, 2), ({"threads": 2}, 2)]
)
def test_threads_where_none_are_given(
    build: Build,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    threads: int,
) -> None:
    """One thread counts as two: with one, errors of shapes are passed over."""
    monkeypatch.setenv("LATENTFORGE_THREADS", "3")
    session = load(*build(), **options)
    (graph,) = session._engine  # type: ignore[attr-defined]
    # OpenVINO takes no more than there are
    expected = min(threads, available_cores())
    assert graph._compiled.get_property("INFERENCE_NUM_THREADS") == expected


def test_auto_gets_the_settings(build: Build, load: Load) -> None:
    engine = build()
    for options in ({}, {"precision": "bf16"}):
        cpu, auto = (load(*engine, device=device, **options) for device in ("CPU", "AUTO"))
        assert worst(auto.run(feeds()), cpu.run(feeds())) == 0


def test_unsupported_operators(tmp_path: Path) -> None:
    model = """<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
    m (float[batch, 4] x) => (float[batch, 4] y) { y = com.microsoft.NhwcConv(x, x) }"""
    ir.save(ir.from_onnx_text(model), tmp_path / "m.onnx")
    row = TensorSpec("float32", ("batch", 4))
    part = component(inputs={"x": row}, outputs={"y": row})
    message = (
        r"does not support the operators com\.microsoft\.NhwcConv: optimize .* --target openvino$"
    )
    with pytest.raises(BackendError, match=message) as caught:
        backends.get("openvino").compile(
            tmp_path / "m.onnx", tmp_path / "m.xml", part, {}, no_report
        )
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_files_that_are_not_graphs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"GIF89a" * 99, b"\xff" * 1000, b"<?xml version='1.0'?><net/>"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(BackendError, match=r"m\.onnx") as caught:
            backends.get("openvino").compile(
                tmp_path / "m.onnx", tmp_path / "m.xml", component(), {}, no_report
            )
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert capfd.readouterr() == ("", "")  # of the readers of other formats, some print


def test_a_full_disk(build: Build, tmp_path: Path) -> None:
    program = f"""if True:
        import resource, sys
        sys.path[:0] = {TESTS!r}
        from pathlib import Path
        from test_openvino import backends, component, no_report
        resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999))
        try:
            backends.get("openvino").compile(
                Path("m.onnx"), Path("new.xml"), component(), {{}}, no_report)
        except Exception as error:
            print(type(error).__name__, error)
        """
    build()
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    refusal = "BackendError openvino refuses m.onnx|TargetError cannot write new.xml: a file above"
    assert re.match(refusal, result.stdout), result
    assert not list(tmp_path.glob("new*"))


def test_out_of_memory(tmp_path: Path) -> None:
    program = f"""if True:
        import resource, sys
        sys.path[:0] = {TESTS!r}
        from pathlib import Path
        import numpy as np
        from test_openvino import *
        side = 2048
        row = TensorSpec("float32", ("batch", side))
        part = component(inputs={{"x": row}}, outputs={{"y": row}})
        model = ir.from_onnx_text('''<ir_version: 9, opset_import: ["" : 17]>
        m (float[batch, 2048] x, float[2048, 2048] w) => (float[batch, 2048] y)
        {{ y = MatMul(x, w) }}''')
        weights = model.graph.inputs.pop()
        weights.const_value = ir.tensor(np.ones((side, side), np.float32), name="w")
        model.graph.register_initializer(weights)
        ir.save(model, "m.onnx")
        backend = backends.get("openvino")
        backend.compile(Path("m.onnx"), Path("m.xml"), part, {{}}, no_report)
        backend.load(Path("m.xml"), part, {{}}).close()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**23,) * 2)
        try:
            backend.load(Path("m.xml"), part, {{}})
        except Exception as error:
            print(type(error).__name__, error)
        """
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert re.match(r"BackendError .*m\.xml: out of memory; .+", result.stdout), result


def damages(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    yield content[:-1]
    yield b""


def test_truncated_weights(build: Build, load: Load) -> None:
    path, part = build()
    weights = path.with_suffix(".bin")
    for damaged in damages(weights.read_bytes()):
        weights.write_bytes(damaged)
        with pytest.raises(BackendError, match=r"m\.xml: .*weights") as caught:
            load(path, part)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(BackendError, match=r"no file .*m\.bin"):
        load(path, part)


def test_an_engine_that_reads_beyond_its_weights(build: Build, load: Load) -> None:
    path, part = build()
    text = path.read_text()
    size = re.search(r'offset="\d+" size="(262144)"', text)
    assert size is not None
    for number in (2**31, 2**40, 2**63, 2**64 - 1, 2**64, -1):
        path.write_text(text[: size.start(1)] + str(number) + text[size.end(1) :])
        with pytest.raises(BackendError, match=r"m\.xml"):
            load(path, part)


def test_reads_no_other_file(build: Build, load: Load, tmp_path: Path) -> None:
    path, part = build()
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (path, path.with_suffix(".bin")):
        shutil.move(file, alone / file.name)
    session = load(alone / path.name, part)
    assert worst(session.run(feeds()), reference(tmp_path / "m.onnx", feeds())) < 1e-5
    assert sorted(file.name for file in alone.iterdir()) == ["m.bin", "m.xml"]


# The cache


def blobs(path: Path) -> list[Path]:
    return sorted(path.with_suffix(backends.CACHE).glob("*.blob"))


def from_cache(session: Any) -> list[bool]:
    """Return for each compiled graph whether OpenVINO loaded it from the cache."""
    return [g._compiled.get_property("LOADED_FROM_CACHE") for g in session._engine]


def test_the_cache_is_used(build: Build, load: Load, tmp_path: Path) -> None:
    path, part = build(SIZE, SIZE | {"batch": ONE}, stored="half")
    assert from_cache(load(path, part, cache=True)) == [False, False]
    before = {blob: blob.stat().st_mtime_ns for blob in blobs(path)}
    assert len(before) == 2
    assert sum(blob.stat().st_size for blob in before) < BYTES / 4  # it holds no weights
    again = load(path, part, cache=True)
    assert from_cache(again) == [True, True]
    assert {blob: blob.stat().st_mtime_ns for blob in blobs(path)} == before
    for batch in (1, 2):
        given = feeds(batch, 8, 4)
        assert worst(again.run(given), reference(tmp_path / "m.onnx", given)) < 1e-5


def test_settings_apply_with_a_cache(build: Build, load: Load) -> None:
    engine = build(SIZE, stored="int8")
    given = feeds(2, 8, 4)
    load(*engine, cache=True)
    for options in ({}, {"precision": "bf16"}, {"dynamic_quantization": True}, {"threads": 1}):
        cached, plain = (load(*engine, cache=cache, **options) for cache in (True, False))
        assert worst(cached.run(given), plain.run(given)) == 0


def test_the_cache_distinguishes_weights(
    build: Build, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(*build(SIZE), cache=True)
    other = [(name, -array) for name, array in constants("float")]
    monkeypatch.setattr(sys.modules[__name__], "constants", lambda stored: other)
    session = load(*build(SIZE), cache=True)
    given = feeds(2, 8, 4)
    assert worst(session.run(given), reference(tmp_path / "m.onnx", given)) < 1e-5


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "swap"])
def test_a_damaged_cache_is_rebuilt(build: Build, load: Load, tmp_path: Path, damage: str) -> None:
    path, part = build()
    load(path, part, cache=True).close()
    (blob,) = blobs(path)
    content = blob.read_bytes()
    blob.chmod(0o600)
    third = len(content) // 3
    blob.write_bytes(
        {
            "cut": content[:-third],
            "flip": content[:third] + bytes(b ^ 4 for b in content[third:]),
            "empty": b"",
            "swap": content[third:] + content[:third],
        }[damage]
    )
    session = load(path, part, cache=True)
    assert from_cache(session) == [False]
    assert worst(session.run(feeds()), reference(tmp_path / "m.onnx", feeds())) < 1e-5
    assert from_cache(load(path, part, cache=True)) == [True]


def test_a_cache_that_cannot_be_written(build: Build, load: Load, tmp_path: Path) -> None:
    path, part = build()
    path.with_suffix(backends.CACHE).write_text("in the way")
    session = load(path, part, cache=True)
    assert worst(session.run(feeds()), reference(tmp_path / "m.onnx", feeds())) < 1e-5


def test_no_cache_by_default(build: Build, load: Load, tmp_path: Path) -> None:
    load(*build()).run(feeds())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.onnx", "m.xml"]


# Threads


@pytest.mark.parametrize("hint", ["latency", "throughput"])
@pytest.mark.parametrize("fixed", [False, True])
def test_threads_get_their_own_results(
    build: Build, load: Load, tmp_path: Path, hint: str, fixed: bool
) -> None:
    shapes = [SIZE, SIZE | {"batch": ONE}] if fixed else []
    session = load(*build(*shapes), hint=hint)
    cases = [(1 + i % 2, 8, 4) if fixed else (1 + i % 3, 4 + i % 5, 6) for i in range(15)]
    given = [{name: i * array for name, array in feeds(*c).items()} for i, c in enumerate(cases)]
    wanted = [reference(tmp_path / "m.onnx", case) for case in given]

    def one(index: int) -> float:
        return worst(session.run(given[index % 15]), wanted[index % 15])

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(one, range(300))) < 2e-4  # of values 15 times as large


def test_layer_times_are_summed_over_runs(build: Build, load: Load) -> None:
    session = load(*build(SIZE), profile=True)
    given = feeds(2, 8, 4)
    start = time.perf_counter()
    for _ in range(300):
        session.run(given)
    wall = time.perf_counter() - start
    layers = {layer.name: layer for layer in session.layers()}
    assert layers["values"].operator in {"FullyConnected", "MatMul"}
    assert sum(layer.seconds for layer in layers.values()) < wall
    assert all(layer.seconds > 299e-6 for layer in layers.values())  # a microsecond each, or more


FIXED = Sizes(height=(Range.of(64),), width=(Range.of(64),), batch=(Range.of(2),))


@pytest.mark.parametrize("sizes", [Sizes(), *further(FIXED)], ids=["dynamic", "static"])
def test_the_demo_gives_the_image_of_onnxruntime(
    demo_engines: Path, tmp_path: Path, sizes: Sizes
) -> None:
    target = tmp_path / "openvino"
    compile_engines(demo_engines, target, CompileRequest(backend="openvino", sizes=sizes))
    with load_directory(target) as ours, load_directory(demo_engines) as theirs:
        results = [pipe("owl on a pink background", steps=2, seed=1) for pipe in (theirs, ours)]
    assert psnr(results[0].latents, results[1].latents) >= 40
    pixels = [to_array(result.images) for result in results]
    assert psnr(*pixels, peak=2.0) >= 40
