"""Contract of all backends, on one small engine."""

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.errors import BackendError, SettingsError, ShapeError
from latentforge.runtime.manifest import Component, FileEntry
from latentforge.runtime.shapes import Range
from latentforge.runtime.tensor import TensorSpec

Load = Callable[..., backends.Session]

ROW = TensorSpec("float32", ("batch", 4))
INPUTS = {"x": ROW, "w": TensorSpec("float32", ("batch", "n")), "t": TensorSpec("float32", (1,))}
OUTPUTS = {"y": ROW, "z": TensorSpec("float32", ("batch", "n*2")), "c": TensorSpec("float32", (2,))}
MODEL = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4] x, float[batch, n] w, float[1] t)
  => (float[batch, 4] y, float[batch, m] z, float[2] c)
<float[2] constant = {0, 0}>
{
  d = Sub(x, x)
  y = Mul(d, t)
  e = Sub(w, w)
  z = Concat<axis = 1>(e, e)
  c = Identity(constant)
}"""


def component(backend: str = "", **changes: Any) -> Component:
    file = f"m{backends.get(backend).SUFFIX}" if backend else "m.engine"
    fields = {"file": file, "inputs": INPUTS, "outputs": OUTPUTS} | changes
    return Component(sha256="0" * 64, bytes=0, backend=backend, precision="fp32", **fields)


def feeds(batch: int = 1, n: int = 3) -> dict[str, Any]:
    return {
        "x": np.ones((batch, 4), np.float32),
        "w": np.ones((batch, n), np.float32),
        "t": np.ones(1, np.float32),
    }


HERE = [name for name, entry in backends.BACKENDS.items() if not entry.gpu]


@pytest.fixture(params=HERE)
def name(request: pytest.FixtureRequest) -> str:
    """Each backend that needs no GPU in turn, where it is installed."""
    pytest.importorskip(backends.BACKENDS[request.param].library, exc_type=ImportError)
    return str(request.param)


def no_report(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


@pytest.fixture
def load(name: str, tmp_path: Path) -> Iterator[Load]:
    """A function that compiles and loads a graph, the one above if none is named."""
    sessions = []

    def loaded(model: str = MODEL, part: Component | None = None, **options: Any) -> Any:
        part = part or component(name)
        graph = tmp_path / "graph" / "m.onnx"
        graph.parent.mkdir(exist_ok=True)
        ir.save(ir.from_onnx_text(model), graph)
        backend = backends.get(name)
        backend.compile(graph, tmp_path / part.file, part, {}, no_report)
        sessions.append(backend.load(tmp_path / part.file, part, options))
        return sessions[-1]

    yield loaded
    for session in sessions:
        session.close()


def test_runs_any_size(load: Load) -> None:
    session = load()
    for batch, n in ((1, 1), (3, 5), (2, 2)):
        output = session.run(feeds(batch, n))
        assert {key: value.shape for key, value in output.items()} == {
            "y": (batch, 4),
            "z": (batch, 2 * n),
            "c": (2,),
        }
        assert all(value.dtype == np.float32 and not value.any() for value in output.values())


def test_the_caller_owns_outputs(load: Load) -> None:
    session = load()
    inputs = feeds()
    first = session.run(inputs)
    for value in first.values():
        value[...] = 9
    second = session.run(inputs)
    assert not any(value.any() for value in second.values())
    assert all((value == 9).all() for value in first.values())
    assert all((value == 1).all() for value in inputs.values())


def test_takes_arrays_that_are_not_contiguous(load: Load) -> None:
    session = load()
    inputs = feeds(2) | {"x": np.ones((4, 2), np.float32).T}
    assert session.run(inputs)["y"].shape == (2, 4)


def test_takes_read_only_arrays(load: Load) -> None:
    session = load()
    inputs = feeds(2)
    for value in inputs.values():
        value.setflags(write=False)
    assert not session.run(inputs)["y"].any()


def test_selects_one_of_its_shapes(name: str, load: Load) -> None:
    part = component(name).specialize(({"batch": Range.of(1)}, {"batch": Range.of(4)}))
    session = load(MODEL, part)
    for batch, n in ((1, 2), (4, 3), (1, 5)):
        output = session.run(feeds(batch, n))
        assert output["y"].shape == (batch, 4) and output["z"].shape == (batch, 2 * n)
    for batch in (2, 5):
        with pytest.raises(ShapeError, match=f"for batch {batch}; they take batch 1 or batch 4"):
            session.run(feeds(batch))
    assert not session.run(feeds(4))["y"].any()


def test_refuses_sizes_outside_its_range(name: str, load: Load) -> None:
    session = load(MODEL, component(name).specialize(({"batch": Range(2, 2, 3)},)))
    for batch in (2, 3):
        assert session.run(feeds(batch))["y"].shape == (batch, 4)
    for batch in (1, 4):
        with pytest.raises(ShapeError, match=f"for batch {batch}; they take batch 2:2:3"):
            session.run(feeds(batch))


def test_refuses_other_sizes_than_its_fixed_one(name: str, load: Load) -> None:
    session = load(MODEL, component(name).specialize(({"batch": Range.of(2)},)))
    assert session.run(feeds(2, 5))["z"].shape == (2, 10)
    with pytest.raises(ShapeError, match=r"x: engine takes float32\[2, 4\]"):
        session.run(feeds(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.ones((1, 5), np.float32)}, r"x: engine takes float32\[batch, 4\]; got|x: .*"),
        ({"x": np.ones((1, 4), np.float64)}, "x: engine takes float32.*got float64"),
        ({"x": np.ones((1, 4), ">f4")}, "x: engine takes float32.*got >f4"),
        ({"x": np.ones(4, np.float32)}, r"x: engine takes float32.*got float32\[4\]"),
        ({"x": np.ones((2, 4), np.float32)}, "w: engine takes .*batch=2"),
        ({"t": np.ones(2, np.float32)}, "t: engine takes"),
        ({"x": None}, "engine takes x, w, t; got w, t"),
        ({"mask": np.ones(1, np.float32)}, "got x, w, t, mask"),
    ],
)
def test_refuses_wrong_feeds(
    load: Load, changes: dict[str, NDArray[np.generic] | None], message: str
) -> None:
    session = load()
    given = {key: value for key, value in {**feeds(), **changes}.items() if value is not None}
    with pytest.raises(ShapeError, match=message):
        session.run(given)
    assert not session.run(feeds())["y"].any()


def test_a_closed_session(load: Load) -> None:
    session = load()
    session.close()
    session.close()
    with pytest.raises(BackendError, match=r"^m\.\w+ is closed$"):
        session.run(feeds())
    assert session.layers() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turbo": True}, "no backend option 'turbo'; there are"),
        ({"threads": "2"}, "threads must be of type int"),
        ({"threads": 2.0}, "threads must be of type int"),
        ({"threads": True}, "threads must be of type int"),
        ({"threads": -1}, "threads must not be negative, got -1"),
        ({"profile": 1}, "profile must be of type bool"),
    ],
)
def test_refuses_options(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(**options)


def test_calls_of_the_null_backend_take_a_second_at_most(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="call_us must be at most 1000000, not 1000001"):
        backends.get("null").load(tmp_path, component("null"), {"call_us": 1_000_001})


def test_compile_refuses_options_too(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no backend option 'turbo'"):
        backends.get(name).compile(
            tmp_path / "m.onnx", tmp_path / "m.engine", component(name), {"turbo": True}, no_report
        )
    assert list(tmp_path.iterdir()) == []


def test_threads_share_a_session(load: Load) -> None:
    session = load(threads=1)

    def one(index: int) -> bool:
        output = session.run(feeds(1 + index % 4, 1 + index % 3))
        shapes = output["y"].shape[0], output["z"].shape[1]
        return shapes == (1 + index % 4, 2 * (1 + index % 3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))


def test_closing_while_others_run(name: str, load: Load) -> None:
    session = load(threads=1)
    begun = threading.Event()

    def many() -> str:
        for _ in range(100_000):
            try:
                session.run(feeds())
            except BackendError as error:
                return str(error)
            begun.set()
        return "never closed"

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(many) for _ in range(4)]
        begun.wait(30)
        session.close()
        assert {run.result() for run in runs} == {f"{component(name).file} is closed"}


def test_layers(name: str, load: Load) -> None:
    assert load().layers() == []
    session = load(profile=True)
    for _ in range(2):
        session.run(feeds(500, 500))  # some libraries leave out what takes no microsecond
    layers = session.layers()
    assert session.layers() == []
    assert not session.run(feeds())["y"].any()
    if name == "null":
        assert layers == []
        return
    wanted = {"Add", "Concat"} if name == "openvino" else {"Mul", "Concat"}  # in its own words
    assert {layer.operator for layer in layers} >= wanted
    assert all(layer.seconds >= 0 and layer.name for layer in layers)


@pytest.mark.parametrize("asked", [False, True])
def test_profiling_leaves_no_file(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    session = load(profile=True)
    session.run(feeds())
    if asked:
        session.layers()
    session.close()
    assert list(scratch.iterdir()) == []


def test_an_unknown_backend() -> None:
    for bad in ("cuda", "", "null.os", "../null", "__init__"):
        with pytest.raises(BackendError, match="there are null, onnxruntime"):
            backends.get(bad)


# What only real engines can do


real = pytest.mark.parametrize("name", [n for n in HERE if n != "null"], indirect=True)


@real
def test_threads_get_their_own_results(name: str, load: Load) -> None:
    spec = {"x": ROW}
    part = component(name, inputs=spec, outputs={"y": ROW})
    model = """<ir_version: 9, opset_import: ["" : 17]>
    m (float[batch, 4] x) => (float[batch, 4] y) { y = Add(x, x) }"""
    session = load(model, part)

    def one(value: int) -> bool:
        x = np.full((3, 4), value, np.float32)
        return bool((session.run({"x": x})["y"] == 2 * value).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(300)))


@real
def test_the_caller_owns_constant_outputs(name: str, load: Load) -> None:
    model = """<ir_version: 9, opset_import: ["" : 17]>
    m (float[batch, 4] x) => (float[2] c) <float[2] c = {1, 2}> { }"""
    part = component(name, inputs={"x": ROW}, outputs={"c": TensorSpec("float32", (2,))})
    session = load(model, part)
    session.run({"x": feeds()["x"]})["c"][:] = 9
    assert session.run({"x": feeds()["x"]})["c"].tolist() == [1, 2]


def break_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in content)


@real
@pytest.mark.parametrize("damage", [break_off, flip, lambda _: b"", lambda _: b"GIF89a" * 99])
@pytest.mark.parametrize("profile", [False, True])
def test_a_corrupt_engine_file(
    name: str,
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    profile: bool,
) -> None:
    load()
    folder = tmp_path / "temporary"  # where no other process leaves anything
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = tmp_path / component(name).file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackendError, match=re.escape(path.name)) as caught:
        backends.get(name).load(path, component(name), {"profile": profile})
    assert "\n" not in str(caught.value)
    assert os.listdir(folder) == []


@real
def test_a_missing_engine_file(name: str, load: Load, tmp_path: Path) -> None:
    path = (tmp_path / "nowhere").with_suffix(backends.get(name).SUFFIX)
    with pytest.raises(BackendError, match=re.escape(path.name)):
        backends.get(name).load(path, component(name), {})


@real
def test_an_engine_that_is_not_as_described(name: str, load: Load) -> None:
    spec = TensorSpec("float32", ("batch", 5))
    wrong = [
        component(name, inputs=INPUTS | {"x": spec}),
        component(name, outputs={"missing": ROW}),
        component(name, inputs={"other": ROW}),
    ]
    for part in wrong:  # which shows when it is compiled, or else when it runs
        shapes = {key: spec.resolve({"batch": 1, "n": 1}) for key, spec in part.inputs.items()}
        with pytest.raises(BackendError, match=r"m\.\w+( failed|: )") as caught:
            session = load(MODEL, part)
            session.run({key: np.ones(shape, np.float32) for key, shape in shapes.items()})
        assert "\n" not in str(caught.value)


@real
@pytest.mark.parametrize(
    ("outputs", "key", "found"),
    [
        ({"y": TensorSpec("float32", ("batch", 4, 1))}, "y", "rank"),
        ({"y": TensorSpec("float16", ("batch", 4))}, "y", "dtype"),
        ({"y": TensorSpec("float32", ("batch", 5))}, "y", "size"),
        ({"z": TensorSpec("float32", ("batch", "n*3"))}, "z", "size that only a run shows"),
        ({"y": TensorSpec("float32", ("n", 4))}, "y", "rows"),
        ({"missing": ROW}, "missing", "name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outputs_that_differ_from_the_manifest(
    name: str, load: Load, outputs: dict[str, TensorSpec], key: str, found: str
) -> None:
    """Found when the engine is compiled, or loaded, or at the latest when it runs."""
    part = component(name, outputs=OUTPUTS | outputs)
    with pytest.raises(BackendError, match=rf"m\.\w+.*\b{key}\b") as caught:
        load(MODEL, part).run(feeds(2, 3))
    message = str(caught.value)
    assert "\n" not in message
    if found != "name":
        spec = outputs[key]
        shape = list(spec.resolve({"batch": 2, "n": 3}))
        assert f"output {key}: expected {spec.dtype}{shape}" in message or str(spec) in message
        assert "float32[2, " in message or re.search(r"found float32(\[-1, 4\])?:", message)


LATENT = TensorSpec("float32", ("batch", 4, "latent_height", "latent_width"))
PIXELS = TensorSpec("float32", ("batch", 3, "latent_height*8", "latent_width*8"))
DECODER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, latent_height, latent_width] latent_sample) => (TYPE)
<int64[1] a = {0}, int64[1] b = {CHANNELS}, int64[1] axis = {1}, float[4] scales = {1, 1, 8, 8}>
{
  part = Slice(latent_sample, a, b, axis)
  q = Resize<mode="nearest">(part, , scales)
  LAST
}"""


@real
@pytest.mark.parametrize(
    ("channels", "kind", "last", "found"),
    [
        (1, "float[b, c, h, w] sample", "sample = Identity(q)", "1, "),
        (2, "float[b, c, h, w] sample", "sample = Identity(q)", "2, "),
        (4, "float[b, c, h, w] sample", "sample = Identity(q)", "4, "),
        (3, "float[b, c, h, w] sample", "sample = AveragePool<kernel_shape=[2, 2]>(q)", "3, 15"),
        (3, "float[b, c, h, w] sample", "sample = Concat<axis=0>(q, q, q)", r"\[3, 3"),
        (3, "float[b, c, h] sample", "sample = ReduceMean<axes=[3], keepdims=0>(q)", "3, "),
        (3, "string[b, c, h, w] sample", "sample = Cast<to=8>(q)", "string"),
        (3, "int64[b, c, h, w] sample", "sample = Cast<to=7>(q)", "int64"),
        (3, "bfloat16[b, c, h, w] sample", "sample = Cast<to=16>(q)", "bf16|bfloat16"),
        (3, "seq(float[b, c, h, w]) sample", "sample = SequenceConstruct(q)", "seq|Sequence"),
        (3, "optional(float[b, c, h, w]) sample", "sample = Optional(q)", "[oO]ptional"),
        (3, "float[b, c, h, w] image", "image = Identity(q)", "image"),
    ],
)
def test_a_decoder_of_other_outputs(
    name: str, load: Load, channels: int, kind: str, last: str, found: str
) -> None:
    """No picture is made of an output that is not as the manifest says."""
    part = component(name, inputs={"latent_sample": LATENT}, outputs={"sample": PIXELS})
    model = DECODER.replace("TYPE", kind).replace("CHANNELS", str(channels)).replace("LAST", last)
    with pytest.raises(BackendError, match=rf"m\.\w+: .*({found})") as caught:
        load(model, part).run({"latent_sample": np.ones((1, 4, 2, 2), np.float32)})
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "sample: expected float32[" in message
        or "expected sample" in message
        or (
            "does not support the operators" in message  # OpenVINO has none of such types
        )
    )


@real
def test_further_outputs_are_left_out(name: str, load: Load) -> None:
    part = component(name, outputs={"z": OUTPUTS["z"]})
    assert load(MODEL, part).run(feeds(2)).keys() == {"z"}


@real
def test_an_engine_that_fails(name: str, load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    model = """<ir_version: 9, opset_import: ["" : 17]>
    m (float[batch, 4] x) => (float[batch, 4] y)
    { t = Transpose(x) p = MatMul(t, t) y = Identity(p) }"""
    session = load(model, component(name, inputs={"x": ROW}, outputs={"y": ROW}))
    with pytest.raises(BackendError, match=r"^m\.\w+ failed: ") as caught:
        session.run({"x": np.ones((3, 4), np.float32)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library says nothing on its own


@real
def test_too_many_threads(load: Load) -> None:
    with pytest.raises(SettingsError, match="threads must be at most 256, not 1000000"):
        load(threads=1_000_000)


@real
@pytest.mark.parametrize("place", ["../secret.bin", "{outside}/secret.bin", "link.bin"])
def test_external_weights_outside_the_directory(
    name: str, load: Load, tmp_path: Path, place: str
) -> None:
    onnx = pytest.importorskip("onnx")
    inside = tmp_path / "engines"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    weight.external_data.add(key="location", value=place.format(outside=tmp_path))
    info = [onnx.helper.make_tensor_value_info(key, 1, ["batch", 4]) for key in "xy"]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "m", info[:1], info[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    (inside / "m.onnx").write_bytes(model.SerializeToString())
    part = component(name, inputs={"x": ROW}, outputs={"y": ROW})
    with pytest.raises(BackendError, match=r"m\.onnx"):  # when it is compiled, or else loaded
        backends.get(name).compile(inside / "m.onnx", inside / part.file, part, {}, no_report)
        backends.get(name).load(inside / part.file, part, {})


@real
def test_compile_includes_external_weights(name: str, tmp_path: Path) -> None:
    graphs, engines = tmp_path / "graphs", tmp_path / "engines"
    graphs.mkdir()
    engines.mkdir()
    weights = np.arange(4096, dtype=np.float32)
    model = ir.from_onnx_text("""<ir_version: 9, opset_import: ["" : 17]>
    m (float[batch, 4096] x, float[4096] w) => (float[batch, 4096] y) { y = Add(x, w) }""")
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(weights, name="w")
    model.graph.register_initializer(value)
    ir.save(model, graphs / "m.onnx", external_data="m.onnx.data")
    row = TensorSpec("float32", ("batch", 4096))
    data = (FileEntry.of(graphs / "m.onnx.data", graphs),)
    part = component(name, inputs={"x": row}, outputs={"y": row}, data=data)
    backends.get(name).compile(graphs / "m.onnx", engines / part.file, part, {}, no_report)
    shutil.rmtree(graphs)
    session = backends.get(name).load(engines / part.file, part, {})
    output = session.run({"x": np.ones((2, 4096), np.float32)})["y"]
    np.testing.assert_array_equal(output, [weights + 1] * 2)
    session.close()
