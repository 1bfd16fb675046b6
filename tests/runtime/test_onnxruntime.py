"""ONNX Runtime: optimized graphs, the ONNX header, and the GPU providers without a GPU."""

import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.backends import onnxruntime as cpu
from latentforge.runtime.backends import onnxruntime_gpu
from latentforge.runtime.backends.onnxruntime_gpu import provider_options, unsupported_operators
from latentforge.runtime.backends.ort import device_session, ort_session
from latentforge.runtime.backends.ort.device_memory import OrtArray, Place
from latentforge.runtime.backends.ort.device_session import DeviceSession
from latentforge.runtime.backends.ort.onnx_header import input_dimensions
from latentforge.runtime.backends.ort.ort_session import LayerRecording, fixed_sizes
from latentforge.runtime.errors import (
    BackendError,
    DeviceError,
    ForeignEngineError,
    SettingsError,
    ShapeError,
)
from latentforge.runtime.manifest import Component, FileEntry
from latentforge.runtime.shapes import Range
from latentforge.runtime.tensor import TensorSpec, on_host

onnx = pytest.importorskip("onnx")

WIDTH = 64
IMAGE = TensorSpec("float32", ("batch", 8, "height", "width"))
OUT = TensorSpec("float32", ("batch", 16, "height", "width"))
GPUS = [name for name in backends.BACKENDS if name.startswith("onnxruntime-")]


def component(**changes: Any) -> Component:
    fields: dict[str, Any] = {
        "file": "m.engine",
        "sha256": "0" * 64,
        "bytes": 0,
        "backend": "onnxruntime",
        "precision": "fp32",
        "inputs": {"x": IMAGE},
        "outputs": {"y": OUT},
    }
    return Component(**{**fields, **changes})


def no_report(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


def save(path: Path, nodes: list[Any], weights: dict[str, NDArray[Any]], part: Component) -> None:
    """Write a graph with the signature of a component."""

    def conditioned(specs: Any) -> list[Any]:
        kinds = {"float32": 1, "int64": 7, "float16": 10, "bool": 9, "int8": 3}
        return [
            onnx.helper.make_tensor_value_info(name, kinds[spec.dtype], list(spec.shape))
            for name, spec in specs.items()
        ]

    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(
        nodes, "m", conditioned(part.inputs), conditioned(part.outputs), tensors
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Write a convolution and a product, whose weights ONNX Runtime prepacks."""
    node = onnx.helper.make_node
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 8, 3, 3)).astype(np.float32),
        "p": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "shape": np.array([0, 16, -1, WIDTH], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        node("Relu", ["c"], ["r"], name="relu"),
        node("Shape", ["r"], ["s"], name="sizes"),
        node("Reshape", ["r", "shape"], ["f"], name="rows"),
        node("MatMul", ["f", "p"], ["m"], name="product"),
        node("Reshape", ["m", "s"], ["y"], name="back"),
    ]
    save(tmp_path / "m.onnx", nodes, weights, component())
    return tmp_path / "m.onnx"


def image(batch: int = 2, height: int = 8, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, 8, height, width)).astype(np.float32)


def compiled(graph: Path, part: Component, **options: Any) -> tuple[Path, Component]:
    """Compile into a separate folder, and return the engine and its component."""
    target = graph.parent / "engines" / part.file
    target.parent.mkdir(exist_ok=True)
    device = cpu.compile(graph, target, part, options, no_report)
    changed = {field: getattr(part, field) for field in part.__struct_fields__}
    return target, Component(**{**changed, "device": device, "options": options})


def reference(graph: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    result = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(result[0])


# As the library optimizes it


def test_an_optimized_engine_gives_the_same_numbers(
    graph: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, part = compiled(graph, component())
    session = cpu.load(path, part, part.options)
    for size in ((1, 8, 16), (3, 16, 8)):
        x = image(*size)
        assert (session.run({"x": x})["y"] == reference(graph, x)).all()
    assert capfd.readouterr() == ("", "")
    assert sorted(file.name for file in path.parent.iterdir()) == ["m.engine", "m.engine.data"]
    assert part.device["library"] == f"onnxruntime {ort.__version__}"


def test_prepacked_weights_are_stored_by_default(graph: Path) -> None:
    path, _ = compiled(graph, component())
    both = path.with_name("m.engine.data").stat().st_size
    path, part = compiled(graph, component(), prepack=False)
    one = path.with_name("m.engine.data").stat().st_size
    assert both > one + 4 * WIDTH * WIDTH * 0.9
    y = cpu.load(path, part, part.options).run({"x": image()})["y"]
    np.testing.assert_allclose(y, reference(graph, image()), rtol=1e-4, atol=1e-4)


def test_a_graph_is_copied_on_request(graph: Path) -> None:
    path, part = compiled(graph, component(), optimized=False)
    assert path.read_bytes() == graph.read_bytes()
    assert part.device == {}


def test_external_weights_are_copied(graph: Path) -> None:
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="m.bin", size_threshold=1024)
    entry = FileEntry.of(graph.with_name("m.bin"), graph.parent)
    expected = reference(graph, image())
    for options in ({"optimized": False}, {}):
        path, part = compiled(graph, component(data=(entry,)), **options)
        assert (path.parent / "m.bin").exists() or part.device
        assert (cpu.load(path, part, {}).run({"x": image()})["y"] == expected).all()
        for file in path.parent.iterdir():
            file.unlink()


def test_fixed_sizes_are_set_in_the_graph(graph: Path) -> None:
    fixed = component().specialize(({"batch": Range.of(2), "height": Range.of(8)},))
    assert fixed_sizes(graph, fixed) == {"batch": 2, "height": 8}
    path, part = compiled(graph, fixed)
    opened = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert opened.get_inputs()[0].shape == [2, 8, 8, "width"]
    assert "sizes" in {node.name for node in onnx.load(graph).graph.node}
    y = cpu.load(path, part, {}).run({"x": image()})["y"]
    np.testing.assert_allclose(y, reference(graph, image()), rtol=1e-4, atol=1e-4)


def test_sizes_outside_the_ranges_are_refused(graph: Path) -> None:
    shapes = tuple({"height": Range.of(side), "width": Range.of(side)} for side in (16, 32))
    path, part = compiled(graph, component().specialize(shapes))
    session = cpu.load(path, part, {})
    for side in (16, 32):
        assert session.run({"x": image(1, side, side)})["y"].shape == (1, 16, side, side)
    with pytest.raises(ShapeError, match="were not built for height 64"):
        session.run({"x": image(1, 64, 64)})


def test_progress_ends(graph: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = lambda what, done, total: told.append((done, total))  # noqa: E731
    cpu.compile(graph, tmp_path / "m.engine", component(), {}, report)
    assert told == [(0, 1), (1, 1)]


@pytest.mark.parametrize("name", ["library", "cpu"])
def test_an_engine_of_another_machine_is_refused(graph: Path, name: str) -> None:
    path, part = compiled(graph, component())
    device = {**part.device, name: "another"}
    fields = {field: getattr(part, field) for field in part.__struct_fields__}
    elsewhere = Component(**{**fields, "device": device})
    with pytest.raises(
        ForeignEngineError, match=rf"m\.engine was optimized for {name} another"
    ) as caught:
        cpu.load(path, elsewhere, {})
    assert part.device[name] in str(caught.value)


def test_the_processor_is_recorded() -> None:
    words = cpu._host_device()["cpu"].split()
    flags = Path("/proc/cpuinfo").read_text().split() if os.path.exists("/proc/cpuinfo") else []
    assert words[0] in ("x86_64", "aarch64", "arm64")
    assert ("avx2" in words) == ("avx2" in flags)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "folder"])
def test_damaged_weights_of_an_optimized_engine(graph: Path, damage: str) -> None:
    path, part = compiled(graph, component())
    data = path.with_name("m.engine.data")
    content = data.read_bytes()
    data.unlink()
    if damage == "folder":
        data.mkdir()
    elif damage != "gone":
        data.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(BackendError, match=r"m\.engine") as caught:
        cpu.load(path, part, {})
    assert "\n" not in str(caught.value)


def test_compile_refuses_files_that_are_not_graphs(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"onnxruntime refuses .*m\.onnx") as caught:
        cpu.compile(tmp_path / "m.onnx", tmp_path / "m.engine", component(), {}, no_report)
    assert "\n" not in str(caught.value)


LOADED = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import msgspec
    from latentforge.runtime.backends import onnxruntime
    from latentforge.runtime.manifest import Component

    def own():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    part = msgspec.json.decode(sys.stdin.buffer.read(), type=Component)
    before = own()
    sessions = [onnxruntime.load(Path(sys.argv[1]), part, {}) for _ in range(2)]
    maps = Path("/proc/self/maps").read_text()
    print(json.dumps([(own() - before) * 1024, sys.argv[1] + ".data" in maps]))
    """
)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="/proc is Linux's")
def test_sessions_share_the_weights_of_an_optimized_engine(tmp_path: Path) -> None:
    import msgspec

    size = 2048
    weights = {"p": np.ones((size, size), np.float32)}
    spec = {"x": TensorSpec("float32", ("rows", size))}
    part = component(inputs=spec, outputs={"y": spec["x"]})
    node = onnx.helper.make_node("MatMul", ["x", "p"], ["y"])
    save(tmp_path / "m.onnx", [node], weights, part)

    def taken(**options: Any) -> tuple[int, bool]:
        path, made = compiled(tmp_path / "m.onnx", part, **options)
        command = [sys.executable, "-c", LOADED, str(path)]
        given = msgspec.json.encode(made)
        done = subprocess.run(command, input=given, capture_output=True, check=True)
        memory, mapped = msgspec.json.decode(done.stdout)
        return memory, mapped

    bytes_of_weights = 4 * size * size
    memory, mapped = taken(optimized=False)
    assert memory > 1.5 * bytes_of_weights and not mapped  # each has its own
    memory, mapped = taken()
    assert memory < 0.3 * bytes_of_weights and mapped


@pytest.mark.parametrize(
    ("variable", "options", "threads"),
    [
        (None, {}, 0),  # ONNX Runtime's own: every core
        ("", {}, 0),
        ("3", {}, 3),
        ("256", {"threads": 0}, 256),
        ("3", {"threads": 2}, 2),
    ],
)
def test_threads_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, options: dict[str, Any], threads: int
) -> None:
    monkeypatch.delenv("LATENTFORGE_THREADS")
    if variable is not None:
        monkeypatch.setenv("LATENTFORGE_THREADS", variable)
    assert ort_session.new_settings(options).intra_op_num_threads == threads


@pytest.mark.parametrize("variable", ["0", "-1", "257", "1.5", " 2", "two", "all", "²", "1_0"])
def test_other_threads_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("LATENTFORGE_THREADS", variable)
    with pytest.raises(SettingsError, match=f"LATENTFORGE_THREADS is {variable!r}: unset it, or"):
        ort_session.new_settings({})


ROWS = 3072  # scores of 38 MB
TOKENS = TensorSpec("float32", ("rows", 8))


def attention(folder: Path, **options: Any) -> cpu.OnnxRuntimeSession:
    """Return a session that computes scores of rows x rows, and frees all that it computes."""
    part = component(inputs={"x": TOKENS}, outputs={"y": TOKENS})
    node = onnx.helper.make_node
    nodes = [node("Relu", ["x"], ["r"]), node("Transpose", ["r"], ["t"])]
    nodes += [node("MatMul", ["r", "t"], ["s0"])]
    nodes += [node("Mul", [f"s{i}", "s0"], [f"s{i + 1}"]) for i in range(4)]
    if not (folder / "a.onnx").exists():
        save(folder / "a.onnx", [*nodes, node("MatMul", ["s4", "r"], ["y"])], {}, part)
    return cpu.load(folder / "a.onnx", part, {"threads": 1, **options})


def private_memory() -> int:
    """Return the bytes of memory of this process that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc is Linux's")


@needs_proc
def test_what_only_the_first_run_of_a_size_takes_is_freed(tmp_path: Path) -> None:
    session, x = attention(tmp_path), np.ones((ROWS, 8), np.float32)
    scores, before = 4 * ROWS**2, private_memory()
    first = session.run({"x": x})["y"]
    after_first = private_memory() - before
    session.run({"x": x})
    session.run({"x": x})
    kept = private_memory() - before
    assert session.run({"x": x})["y"].tobytes() == first.tobytes()
    session.close()
    assert after_first < 0.5 * scores
    assert 2.5 * scores < kept < 4 * scores  # the block that is planned


@needs_proc
def test_outputs_do_not_keep_the_memory_of_a_session(tmp_path: Path) -> None:
    session, x = attention(tmp_path), np.ones((ROWS, 8), np.float32)
    scores, before = 4 * ROWS**2, private_memory()
    outputs = [session.run({"x": x})["y"] for _ in range(3)]
    session.close()
    assert private_memory() - before < 0.5 * scores
    assert all(output.base is None and output.flags.writeable for output in outputs)
    assert len({output.tobytes() for output in outputs}) == 1


@needs_proc
def test_sessions_that_run_in_turn_share_their_memory(tmp_path: Path) -> None:
    sessions, x = [attention(tmp_path) for _ in range(3)], np.ones((ROWS, 8), np.float32)
    scores, before = 4 * ROWS**2, private_memory()
    for session in sessions * 3:
        session.run({"x": x})
    kept = private_memory() - before
    for session in sessions:
        session.close()
    assert kept < 4 * scores
    assert private_memory() - before < 0.5 * scores


def test_a_session_without_arena_keeps_its_own_memory(tmp_path: Path) -> None:
    session = attention(tmp_path, arena=False)
    x = np.ones((8, 8), np.float32)
    assert session.run({"x": x})["y"].shape == session.run({"x": x})["y"].shape == (8, 8)
    session.close()


def test_sessions_of_several_threads_share_an_arena(tmp_path: Path) -> None:
    """One thread closes sessions, which frees the arena, while others run theirs."""
    expected = attention(tmp_path).run({"x": np.ones((64, 8), np.float32)})["y"]

    def use(index: int) -> bool:
        session, rows = attention(tmp_path), 64 + index % 5
        outputs = [session.run({"x": np.ones((rows, 8), np.float32)})["y"] for _ in range(5)]
        session.close()
        return all(output.shape == (rows, 8) for output in outputs) and (
            rows != 64 or all(np.array_equal(output, expected) for output in outputs)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(40)))


def test_options_reach_the_library(graph: Path) -> None:
    settings = cpu._load_settings(component(), {"arena": False, "prepack": False, "spin": False})
    assert settings.enable_cpu_mem_arena is False
    assert settings.get_session_config_entry("session.disable_prepacking") == "1"
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    settings = cpu._load_settings(component(), {"yield_cores": True})
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"


def test_an_optimized_engine_keeps_its_prepacking() -> None:
    bound = component(device={"library": "this"})
    settings = cpu._load_settings(bound, {"prepack": False})
    with pytest.raises(RuntimeError):
        settings.get_session_config_entry("session.disable_prepacking")
    assert settings.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    unpacked = component(device={"library": "this"}, options={"prepack": False})
    settings = cpu._load_settings(unpacked, {})
    assert settings.get_session_config_entry("session.disable_prepacking") == "1"


def test_fixed_sizes_of_a_damaged_graph(graph: Path) -> None:
    fixed = component().specialize(({"batch": Range.of(2)},))
    content = graph.read_bytes()
    path = graph.with_name("damaged.onnx")
    for cut in range(0, len(content), 997):
        path.write_bytes(content[:cut])
        assert fixed_sizes(path, fixed) in ({}, {"batch": 2})
    for damaged in (b"GIF89a" * 99, bytes(byte ^ 0xFF for byte in content), b"\xff" * 64):
        path.write_bytes(damaged)
        assert fixed_sizes(path, fixed) == {}
    assert fixed_sizes(path.with_name("nowhere"), fixed) == {}


def header(path: Path, content: bytes) -> list[tuple[str, list[str]]]:
    path.write_bytes(content)
    return input_dimensions(path)


NAMES = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
DIMENSIONS = st.lists(st.one_of(NAMES, st.integers(1, 2**40), st.none()), max_size=6)


@given(inputs=st.dictionaries(NAMES, DIMENSIONS, max_size=5), weights=st.binary(max_size=300))
def test_the_header_of_a_graph(
    inputs: dict[str, list[str | int | None]], weights: bytes, tmp_path_factory: Any
) -> None:
    """The header agrees with the onnx package for any names, sizes and weights."""
    infos = [onnx.helper.make_tensor_value_info(name, 1, dims) for name, dims in inputs.items()]
    weight = onnx.TensorProto(name="w", data_type=2, dims=[len(weights)], raw_data=weights)
    graph = onnx.helper.make_graph([], "m", infos, [], [weight])
    content = onnx.helper.make_model(graph).SerializeToString()
    expected = [
        (name, [size if isinstance(size, str) else "" for size in dims])
        for name, dims in inputs.items()
    ]
    assert header(tmp_path_factory.getbasetemp() / "header.onnx", content) == expected


@given(data=st.data())
def test_the_header_of_a_damaged_graph(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Inserted, replaced or missing bytes give some names or none, but no error."""
    info = onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])
    graph = onnx.helper.make_graph([], "m", [info], [])
    content = onnx.helper.make_model(graph).SerializeToString()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    damaged = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    for name, dimensions in header(tmp_path_factory.getbasetemp() / "header.onnx", damaged):
        assert isinstance(name, str) and all(isinstance(size, str) for size in dimensions)


@given(content=st.binary(max_size=2000))
def test_the_header_of_any_bytes(tmp_path_factory: Any, content: bytes) -> None:
    header(tmp_path_factory.getbasetemp() / "header.onnx", content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80" * 1000,  # a number that never ends
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a graph of 2^63 bytes
        b"\x3a\x05\x5a",  # a graph that ends after the file
        b"\x3b",  # a group, which ONNX has not
    ],
)
def test_files_without_a_header(tmp_path: Path, content: bytes) -> None:
    assert header(tmp_path / "m.onnx", content) == []
    assert input_dimensions(tmp_path) == []  # a directory


# The session of the GPU providers, on the CPU


Make = Callable[..., DeviceSession]
PAIR = TensorSpec("float32", ("rows", 3))
ADDED = {"x": PAIR, "t": TensorSpec("float32", ()), "n": TensorSpec("int64", (1,))}


def adding(**changes: Any) -> Component:
    """Return the component of y = x + t and m = n + n, with inputs of each rank."""
    outputs = {"y": PAIR, "m": TensorSpec("int64", (1,))}
    return component(**{"inputs": ADDED, "outputs": outputs, "backend": GPUS[0], **changes})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    sessions: list[DeviceSession] = []

    def made(part: Component | None = None, *, graphs: bool = True, profile: bool = False) -> Any:
        node = onnx.helper.make_node
        nodes = [node("Add", ["x", "t"], ["y"]), node("Add", ["n", "n"], ["m"])]
        save(tmp_path / "m.onnx", nodes, {}, adding())
        settings = ort_session.new_settings({})
        record = LayerRecording(settings) if profile else None
        session = ort_session.open_session(tmp_path / "m.onnx", settings, ["CPUExecutionProvider"])
        opened = DeviceSession(
            session, part or adding(), Place(kind="cpu"), graphs=graphs, record=record
        )
        sessions.append(opened)
        return opened

    yield made
    for session in sessions:
        session.close()


def added(rows: int = 2, value: float = 1, t: float = 2) -> dict[str, Any]:
    return {
        "x": np.full((rows, 3), value, np.float32),
        "t": np.array(t, np.float32),
        "n": np.array([rows]),
    }


def test_a_device_session_takes_any_size(make: Make) -> None:
    session = make()
    for rows in (1, 3, 2, 1, *range(1, 30)):  # more than it keeps memory for
        outputs = session.run(added(rows, value=rows))
        assert outputs["y"].shape == (rows, 3) and (outputs["y"] == rows + 2).all()
        assert outputs["m"].tolist() == [2 * rows]
    assert len(session._buffers) == device_session._MAX_KEPT_SIZES


def test_the_caller_owns_outputs_of_a_device_session(make: Make) -> None:
    session = make()
    first = session.run(added(value=1))
    first["y"][...] = 9
    second = session.run(added(value=5))
    assert (first["y"] == 9).all() and (second["y"] == 7).all()
    third = session.run(added(value=6))
    assert (second["y"] == 7).all() and (third["y"] == 8).all()


def test_addresses_never_change(make: Make) -> None:
    session = make()
    session.run(added())
    (buffers,) = session._buffers.values()
    before = {name: value.data_ptr() for name, value in buffers.inputs.items()}
    session.run(added(rows=5))
    session.run(added(value=3))
    assert buffers in session._buffers.values()
    assert {name: value.data_ptr() for name, value in buffers.inputs.items()} == before


def test_a_read_only_array_is_uploaded_once(make: Make) -> None:
    session = make()
    base = np.ones((2, 3), np.float32)
    kept = base.view()
    kept.setflags(write=False)
    session.run(added() | {"x": kept})
    base[...] = 5  # what nobody may do shows that nothing was uploaded again
    assert (session.run(added() | {"x": kept})["y"] == 3).all()
    assert (session.run(added(t=4) | {"x": kept})["y"] == 5).all()
    session.run(added(rows=4))
    assert (session.run(added() | {"x": kept})["y"] == 3).all()
    other = base.view()
    other.setflags(write=False)
    assert (session.run(added() | {"x": other})["y"] == 7).all()
    assert (session.run(added(value=8))["y"] == 10).all()
    assert (session.run(added() | {"x": other})["y"] == 7).all()


def test_a_writable_array_is_uploaded_every_time(make: Make) -> None:
    session = make()
    feeds = added()
    session.run(feeds)
    feeds["x"][...] = 5
    assert (session.run(feeds)["y"] == 7).all()
    feeds["x"].setflags(write=False)
    assert (session.run(feeds)["y"] == 7).all()
    feeds["x"].setflags(write=True)
    feeds["x"][...] = 6
    assert (session.run(feeds)["y"] == 8).all()


def test_an_output_stays_on_the_device_and_is_an_input_there(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is copied when it is kept and when it comes in, never through the host."""
    downloads = watched(monkeypatch, OrtArray, "_download")
    copies = watched(monkeypatch, Place, "_copy")
    first, second = make(), make()
    kept = first.run_resident(added(value=1), ["y"])
    assert isinstance(kept["y"], OrtArray) and kept["m"].tolist() == [4]
    assert (kept["y"].dtype, kept["y"].shape, len(kept["y"])) == (np.float32, (2, 3), 2)
    for t in (2, 4):
        outputs = second.run_resident(added(t=t) | {"x": kept["y"]})
        assert (outputs["y"] == 3 + t).all()
    first.run(added(value=8))  # writes to the same addresses
    assert (second.run_resident(added() | {"x": kept["y"]})["y"] == 5).all()
    assert len(copies) == 2 and not downloads
    first.close()
    assert (kept["y"].host == 3).all() and kept["y"].host is kept["y"].host and len(downloads) == 1
    with pytest.raises(ValueError, match="read-only"):
        kept["y"].host[0] = 1


def test_an_array_of_another_device_goes_through_the_host(make: Make) -> None:
    session = make()
    kept = session.run_resident(added(), ["y"])["y"]
    assert isinstance(kept, OrtArray)
    far = OrtArray(Place(kind="cpu", index=1), kept.value, "float32", kept.shape)
    assert not session._holds(far)
    assert (session.run_resident(added() | {"x": far})["y"] == 5).all()
    assert (session.run_resident(added() | {"x": on_host(far)})["y"] == 5).all()


def test_arrays_on_the_device_are_checked_like_others(make: Make) -> None:
    session = make()
    kept = session.run_resident(added(rows=3), ["y", "m"])
    with pytest.raises(ShapeError, match=r"x: engine takes float32.*got int64\[1\]"):
        session.run_resident(added() | {"x": kept["m"]})
    with pytest.raises(ShapeError, match="t: engine takes"):
        session.run_resident(added() | {"t": kept["y"]})
    assert (session.run_resident(added(rows=3) | {"x": kept["y"]})["y"] == 5).all()
    session.close()
    with pytest.raises(BackendError, match=r"m\.engine is closed"):
        session.run_resident(added(), ["y"])


def test_threads_keep_their_own_outputs(make: Make) -> None:
    session = make()

    def one(value: int) -> bool:
        kept = session.run_resident(added(1 + value % 3, value), ["y"])["y"]
        again = session.run_resident(added(1 + value % 3) | {"x": kept})["y"]
        return bool((on_host(again) == value + 4).all() and (on_host(kept) == value + 2).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))


def watched(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    """Return a list that fills with the object of each call of a method."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def called(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, called)
    return calls


def test_arrays_that_are_not_contiguous(make: Make) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[1:]
    assert (make().run(added(3) | {"x": x})["y"] == x + 2).all()


def test_a_device_session_works_after_wrong_feeds(make: Make) -> None:
    session = make()
    with pytest.raises(ShapeError, match="x: engine takes"):
        session.run(added() | {"x": np.ones((2, 4), np.float32)})
    assert (session.run(added())["y"] == 3).all()


def test_a_device_session_that_fails(make: Make) -> None:
    wrong = adding(outputs={"y": TensorSpec("float32", ("rows", 7))})
    with pytest.raises(BackendError, match=r"m\.engine failed: ") as caught:
        make(wrong).run(added())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("y", TensorSpec("float32", (1, 3))),
        ("y", TensorSpec("float32", ("rows", 4))),
        ("y", TensorSpec("float16", ("rows", 3))),
        ("m", TensorSpec("int64", (2,))),
        ("m", TensorSpec("int64", (1, 1))),
        ("other", PAIR),
    ],
)
def test_a_device_session_with_other_outputs(make: Make, key: str, spec: TensorSpec) -> None:
    outputs = {**adding().outputs, key: spec}
    with pytest.raises(BackendError, match=rf"^m\.\w+.*{key}"):
        make(adding(outputs=outputs)).run(added())


def test_threads_get_their_own_results_of_a_device_session(make: Make) -> None:
    session = make()

    def one(value: int) -> bool:
        return bool((session.run(added(1 + value % 4, value))["y"] == value + 2).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(300)))


def test_closing_a_device_session_while_others_run(make: Make) -> None:
    session = make()
    begun = threading.Event()

    def many() -> str:
        for _ in range(100_000):
            try:
                session.run(added())
            except BackendError as error:
                return str(error)
            begun.set()
        return "never closed"

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(many) for _ in range(4)]
        begun.wait(30)
        session.close()
        session.close()
        assert {run.result() for run in runs} == {"m.engine is closed"}
    assert session.layers() == []
    assert not any(thread.name.startswith("latentforge-gpu") for thread in threading.enumerate())


@pytest.mark.parametrize("asked", [False, True])
def test_layers_of_a_device_session(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    session = make(profile=True, graphs=False)
    for _ in range(2):
        session.run(added())
    if asked:
        layers = session.layers()
        assert [layer.operator for layer in layers] == ["Add", "Add"]
        assert session.layers() == []
        assert (session.run(added())["y"] == 3).all()
    session.close()
    assert list(scratch.iterdir()) == []


def test_each_size_has_its_own_cuda_graph() -> None:
    settings = device_session._run_settings(3, 1)
    assert settings.get_run_config_entry("gpu_graph_id") == "3"
    assert settings.get_run_config_entry("cuda_graph_annotation_id") == "3"
    assert settings.get_run_config_entry("nv_profile_index") == "1"
    with pytest.raises(RuntimeError):
        device_session._run_settings(None, None).get_run_config_entry("gpu_graph_id")


def test_cuda_graphs_are_not_mixed_up(make: Make) -> None:
    session = make()
    for rows in range(1, 12):
        session.run(added(rows))
    session.run(added(1))
    numbers = [buffers.graph for buffers in session._buffers.values()]
    assert numbers == [5, 6, 7, 8, 9, 10, 11, 12]


# What the providers are told


BATCHED = {
    "x": TensorSpec("float16", ("batch", 4, "side", "side")),
    "p": TensorSpec("float16", ("batch", 77, 8)),
    "t": TensorSpec("float32", (1,)),
}
TWO = (
    {"batch": Range(1, 2, 2), "side": Range.of(64)},
    {"batch": Range(1, 2, 4), "side": Range(32, 32, 96)},
)


def batched(backend: str, **changes: Any) -> Component:
    fields = {"inputs": BATCHED, "outputs": {"y": BATCHED["x"]}, "shapes": TWO}
    return component(**{**fields, "backend": backend, **changes})


def test_options_of_cuda() -> None:
    given = {"gpu": 1, "nhwc": True, "tf32": False, "memory": 2, "search": "HEURISTIC"}
    given |= {"tight": True, "graphs": True, "most_workspace": False, "workspace": 9, "level": 3}
    part = batched("onnxruntime-cuda", shapes=())
    assert provider_options(part, given, Path("unused")) == {
        "device_id": "1",
        "prefer_nhwc": "1",
        "use_tf32": "0",
        "gpu_mem_limit": "2097152",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
        "cudnn_conv_use_max_workspace": "0",
    }
    assert provider_options(part, {}, None) == {}


def test_options_of_tensorrt() -> None:
    part = batched("onnxruntime-tensorrt", precision="fp16")
    given = {"level": 5, "workspace": 1, "sparse": True, "graphs": False, "nhwc": True}
    assert provider_options(part, given, Path("some/folder.cache")) == {
        "trt_builder_optimization_level": "5",
        "trt_max_workspace_size": "1048576",
        "trt_sparsity_enable": "1",
        "trt_cuda_graph_enable": "0",
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_timing_cache_enable": "1",
        "trt_engine_cache_path": "some/folder.cache",
        "trt_timing_cache_path": "some/folder.cache",
        "trt_profile_min_shapes": "x:1x4x32x32,p:1x77x8",
        "trt_profile_opt_shapes": "x:2x4x64x64,p:2x77x8",
        "trt_profile_max_shapes": "x:4x4x96x96,p:4x77x8",
    }
    assert not any("cache" in name for name in provider_options(part, {}, None))


def test_options_of_tensorrt_for_rtx() -> None:
    part = batched("onnxruntime-tensorrt-rtx")
    given = {"weight_streaming": "50%", "graphs": True, "gpu": 1}
    assert provider_options(part, given, Path("folder.cache")) == {
        "nv_weight_streaming_budget": "50%",
        "enable_cuda_graph": "1",
        "nv_runtime_cache_path": "folder.cache",
        "nv_profile_min_shapes": "x:1x4x64x64,p:1x77x8,x:1x4x32x32,p:1x77x8",
        "nv_profile_opt_shapes": "x:2x4x64x64,p:2x77x8,x:2x4x32x32,p:2x77x8",
        "nv_profile_max_shapes": "x:2x4x64x64,p:2x77x8,x:4x4x96x96,p:4x77x8",
        "nv_multi_profile_enable": "1",
    }


@pytest.mark.parametrize("backend", GPUS[1:])
def test_a_range_for_every_free_dimension(backend: str) -> None:
    with pytest.raises(SettingsError, match=r"m\.engine: dimension side has no range"):
        provider_options(batched(backend, shapes=({"batch": Range(1, 2, 2)},)), {}, None)
    fixed = batched(backend, shapes=()).specialize(({"batch": Range.of(1), "side": Range.of(8)},))
    assert provider_options(fixed, {}, None) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "FASTEST"}, "search must be EXHAUSTIVE or HEURISTIC or DEFAULT, not 'FASTEST'"),
        ({"level": 6}, "level must be at most 5, not 6"),
        ({"graphs": 1}, "graphs must be of type bool"),
        ({"prepack": True}, "no backend option 'prepack'"),
    ],
)
@pytest.mark.parametrize("backend", GPUS)
def test_invalid_options(graph: Path, backend: str, options: dict[str, Any], message: str) -> None:
    target = graph.parent / "engines" / "m.onnx"
    for work in (
        lambda: onnxruntime_gpu.compile(graph, target, batched(backend), options, no_report),
        lambda: onnxruntime_gpu.load(graph, batched(backend), options),
    ):
        with pytest.raises(SettingsError, match=message):
            work()
    assert not target.exists()


@pytest.mark.parametrize("backend", GPUS)
def test_compile_for_gpus_copies_the_graph(graph: Path, backend: str) -> None:
    graph.with_name("m.bin").write_bytes(b"weights")
    entry = FileEntry.of(graph.with_name("m.bin"), graph.parent)
    target = graph.parent / "engines" / "denoiser.onnx"
    target.parent.mkdir()
    part = batched(backend, data=(entry,))
    assert onnxruntime_gpu.compile(graph, target, part, {}, no_report) == {}
    assert target.read_bytes() == graph.read_bytes()
    assert target.with_name("m.bin").read_bytes() == b"weights"
    assert target.with_name("denoiser.onnx.cache").is_dir() == (backend != "onnxruntime-cuda")


def test_a_read_only_cache_folder(tmp_path: Path) -> None:
    part = batched("onnxruntime-tensorrt")
    (tmp_path / "m.engine.cache").write_bytes(b"a file in the way")
    assert onnxruntime_gpu._cache_folder(tmp_path / "m.engine", part) is None
    assert onnxruntime_gpu._cache_folder(tmp_path / "nowhere" / "m.engine", part) is None


def opened(graph: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])


def test_operators_of_other_providers_are_named(graph: Path) -> None:
    assert unsupported_operators(opened(graph), "CPUExecutionProvider") == []
    assert unsupported_operators(opened(graph), "CUDAExecutionProvider") == [
        "Conv",
        "MatMul",
        "Relu",
    ]


def test_shape_arithmetic_may_run_on_the_cpu(tmp_path: Path) -> None:
    spec = {"x": TensorSpec("float32", ("a", "b"))}
    part = component(inputs=spec, outputs={"y": TensorSpec("int64", (2,))})
    save(tmp_path / "m.onnx", [onnx.helper.make_node("Shape", ["x"], ["y"])], {}, part)
    assert unsupported_operators(opened(tmp_path / "m.onnx"), "CUDAExecutionProvider") == []


def test_a_provider_that_did_not_start(graph: Path) -> None:
    with pytest.raises(DeviceError, match=r"could not start CUDAExecutionProvider for m\.engine"):
        onnxruntime_gpu._check_nodes(opened(graph), component(backend="onnxruntime-cuda"))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="onnxruntime-gpu is installed"
)
@pytest.mark.parametrize("backend", GPUS[:2])
def test_without_the_provider(graph: Path, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=r"pip uninstall onnxruntime, then pip install") as error:
        onnxruntime_gpu.load(graph, batched(backend), {})
    assert "'latentforge[cuda]'" in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_without_the_plugin(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, onnxruntime_gpu._PLUGIN, None)  # as if not installed
    with pytest.raises(BackendError, match=r"pip install 'latentforge\[cuda-rtx\]'"):
        onnxruntime_gpu.load(graph, batched("onnxruntime-tensorrt-rtx"), {})


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"graphs": True}),
        ({"graphs": False, "search": "DEFAULT"}, {"graphs": False, "search": "DEFAULT"}),
        ({"profile": True}, {"profile": True, "graphs": False, "search": "HEURISTIC"}),
        (
            {"profile": True, "graphs": True, "search": "EXHAUSTIVE"},
            {"profile": True, "graphs": False, "search": "EXHAUSTIVE"},
        ),
    ],
)
def test_a_recording_holds_neither_graphs_nor_a_search_that_nobody_asked_for(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert onnxruntime_gpu._completed(given) == expected


@pytest.mark.parametrize("before", [None, "0"])
def test_kernels_are_awaited_only_for_a_recording(
    graph: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """The variable is set when the driver starts, and as it was afterwards."""
    name = "CUDA_LAUNCH_BLOCKING"
    seen: list[str | None] = []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    monkeypatch.setattr(onnxruntime_gpu, "_check_installed", lambda _: None)
    monkeypatch.setattr(onnxruntime_gpu, "_gpu_count", lambda: seen.append(os.environ.get(name)))
    monkeypatch.setattr(onnxruntime_gpu, "_load_libraries", lambda _: pytest.fail("no GPU"))
    for profile in (True, False):
        with pytest.raises(TypeError):  # from the count, which is None
            onnxruntime_gpu.load(graph, batched(GPUS[0]), {"profile": profile})
    assert seen == ["1", before] and os.environ.get(name) == before


@pytest.mark.parametrize("backend", GPUS)
def test_a_gpu_that_does_not_exist(backend: str) -> None:
    with pytest.raises(DeviceError, match=f"{backend} needs an NVIDIA GPU 64 with its driver, and"):
        onnxruntime_gpu._check_gpu(backend, 64)
