"""TensorRT and TensorRT for RTX on a GPU.

These were written where there was no GPU, and have not been run: the first run on one may find
them wrong as well as the code.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from test_tensorrt import LIBRARIES, RTX, Watch, component, node, specs, write

from latentforge.runtime import backends
from latentforge.runtime.backends import cuda
from latentforge.runtime.backends.trt import engine_builder, trt_session
from latentforge.runtime.errors import BackendError, DeviceError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Range, Shapes

Load = Callable[..., trt_session.TensorrtSession]

SHAPES: tuple[Shapes, ...] = (
    {"batch": Range(1, 2, 4), "n": Range(1, 3, 8)},
    {"batch": Range(8, 8, 8), "n": Range(1, 1, 4)},
)
INPUTS = specs(x="float32 batch 4", w="float32 batch n", s="float32")
OUTPUTS = specs(y="float32 batch 6", z="float32 batch n*2")
WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
NODES = [
    node("Mul", "x s", "a"),
    node("MatMul", "a weight", "y"),
    node("Concat", "w w", "z", axis=1),
]
TOLERANCE = 2e-2  # TF32 is allowed to products


@pytest.fixture(params=LIBRARIES)
def name(request: pytest.FixtureRequest, gpu: cuda.Gpu) -> str:
    """Yield each of the two libraries that is installed and supports this GPU."""
    library = pytest.importorskip(backends.BACKENDS[request.param].library, exc_type=ImportError)
    if request.param == RTX and gpu.capability not in engine_builder.supported_capabilities(
        library
    ):
        pytest.skip(f"{RTX} does not support {gpu.name}, of compute capability {gpu.capability}")
    return str(request.param)


def built(
    folder: Path, name: str, shapes: tuple[Shapes, ...] = SHAPES, **options: Any
) -> Component:
    """Write the graph, build it, and describe the engine."""
    graph = OUTPUTS | specs(z="float32 batch m")
    (folder / "graph").mkdir(exist_ok=True)
    onnx = write(folder / "graph" / "m.onnx", NODES, INPUTS, graph, {"weight": WEIGHT})
    part = component(name, INPUTS, OUTPUTS, shapes)
    device = backends.get(name).compile(onnx, folder / "m.engine", part, options, Watch())
    return msgspec.structs.replace(part, file="m.engine", device=device, options=options)


@pytest.fixture
def load(name: str, tmp_path: Path) -> Iterator[Load]:
    """Return a function that builds with some options and loads with others."""
    sessions: list[Any] = []

    def loaded(build: dict[str, Any] | None = None, **options: Any) -> Any:
        part = built(tmp_path, name, **(build or {}))
        both = {**part.options, **options}
        sessions.append(backends.get(name).load(tmp_path / "m.engine", part, both))
        return sessions[-1]

    yield loaded
    for session in sessions:
        session.close()


def feeds(batch: int = 2, n: int = 3, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, 4)).astype(np.float32),
        "w": rng.standard_normal((batch, n)).astype(np.float32),
        "s": np.array(0.5 + seed, np.float32),
    }


def check(outputs: dict[str, NDArray[Any]], given: dict[str, NDArray[Any]]) -> None:
    wanted = (given["x"] * given["s"]) @ WEIGHT
    np.testing.assert_allclose(outputs["y"], wanted, atol=TOLERANCE * (1 + abs(wanted).max()))
    np.testing.assert_array_equal(outputs["z"], np.concatenate([given["w"]] * 2, axis=1))


@pytest.mark.parametrize("graphs", [True, False])
def test_any_size_of_any_profile(
    load: Load, capfd: pytest.CaptureFixture[str], graphs: bool
) -> None:
    session = load(graphs=graphs)
    for round_ in range(3):  # plain, captured and replayed
        for batch, n in ((2, 3), (1, 1), (4, 8), (8, 1), (8, 4), (3, 2), (4, 1), (1, 7), (2, 2)):
            given = feeds(batch, n, seed=round_)
            check(session.run(given), given)
    for batch, n in ((5, 1), (8, 5), (1, 9)):
        with pytest.raises(ShapeError, match="not built for"):
            session.run(feeds(batch, n))
    assert capfd.readouterr() == ("", "")


def test_contexts_of_other_sizes_are_limited(load: Load) -> None:
    session = load()
    most = len(SHAPES) + trt_session._EXTRA_CONTEXTS
    for n in (*range(1, 9), 1):
        given = feeds(2, n)
        check(session.run(given), given)
        assert len(session._contexts) <= most


def test_captures_a_cuda_graph(name: str, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    if name == RTX:
        pytest.skip("TensorRT for RTX captures by itself")
    caplog.set_level(logging.INFO)
    session = load()
    assert len(session._contexts) == len(SHAPES)
    assert all(ready.graph is not None for ready in session._contexts.values())
    assert "without a CUDA graph" not in caplog.text
    assert all(ready.graph is None for ready in load(graphs=False)._contexts.values())


def test_a_read_only_input_is_uploaded_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    upload = cuda.Buffer.upload

    def counted(self: cuda.Buffer, size: int, stream: cuda.Stream) -> None:
        sent.append(size)
        upload(self, size, stream)

    session = load()
    monkeypatch.setattr(cuda.Buffer, "upload", counted)
    given = feeds()
    given["x"].setflags(write=False)
    for _ in range(3):
        check(session.run(given), given)
    assert len(sent) == 3 + 2 * 2
    for other in (feeds(seed=1), given, feeds(8, 1)):
        check(session.run(other), other)
    twin = {**given, "x": given["x"].copy() + 1}
    twin["x"].setflags(write=False)
    check(session.run(twin), twin)


def test_a_writable_input_is_uploaded_again(load: Load) -> None:
    session, given = load(), feeds()
    check(session.run(given), given)
    given["x"] += 1
    check(session.run(given), given)


def test_arrays_of_any_layout(load: Load) -> None:
    session, given = load(), feeds()
    given["x"] = np.asfortranarray(given["x"])
    given["w"] = np.repeat(given["w"], 2, axis=1)[:, ::2]
    first = session.run(given)
    for value in first.values():
        value[...] = 9
    check(session.run(given), given)
    assert all((value == 9).all() for value in first.values())


def test_threads_get_their_own_results(load: Load) -> None:
    session = load()

    def one(seed: int) -> None:
        given = feeds(1 + seed % 4, 1 + seed % 3, seed)
        check(session.run(given), given)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))


def test_closing_while_others_run(load: Load) -> None:
    session = load()

    def many() -> str:
        while True:
            try:
                session.run(feeds())
            except BackendError as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(many) for _ in range(4)]
        session.close()
        assert {run.result() for run in runs} == {"m.engine is closed"}
    session.close()
    assert session.layers() == []


def test_closing_frees_the_memory(load: Load) -> None:
    load().close()  # what the library takes once and keeps
    before = cuda.free_memory()
    for _ in range(10):
        load().close()
    after = cuda.free_memory()
    assert before is not None and after is not None and before - after < 64 << 20


def test_layers(load: Load) -> None:
    assert load().layers() == []
    session = load(profile=True)
    for _ in range(3):
        check(session.run(given := feeds()), given)
    layers = session.layers()
    assert layers and all(layer.name and layer.seconds >= 0 for layer in layers)
    assert sum(layer.seconds for layer in layers) < 10
    assert session.layers() == []


@pytest.mark.parametrize(
    "options", [{"strip": True}, {"refit": True}, {"strip": True, "refit": True}]
)
def test_weights_beside_the_engine(load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    session = load(options)
    given = feeds()
    check(session.run(given), given)
    assert (tmp_path / "m.onnx").exists() == ("strip" in options)


@pytest.mark.parametrize("options", [{"weight_streaming": True}, {"sparse": True}, {"level": 0}])
def test_other_options(load: Load, options: dict[str, Any]) -> None:
    session, given = load(options), feeds()
    check(session.run(given), given)


@pytest.mark.parametrize(
    "options",
    [
        {"hardware_compatible": "same"},
        {"hardware_compatible": "ampere+"},
        {"version_compatible": True},
    ],
)
def test_compatible_engines(name: str, load: Load, options: dict[str, Any]) -> None:
    if name == RTX:
        pytest.skip("TensorRT for RTX has no such options")
    session, given = load(options, host_code=True), feeds()
    check(session.run(given), given)


@pytest.mark.parametrize("kernels", ["lazy", "eager", "none"])
def test_kernels_of_rtx(name: str, load: Load, kernels: str) -> None:
    if name != RTX:
        pytest.skip("only TensorRT for RTX compiles kernels when it runs")
    session = load(kernels=kernels)
    for n in (1, 2, 3, 1):
        given = feeds(2, n)
        check(session.run(given), given)


@pytest.mark.parametrize("damage", [None, b"", b"GIF89a" * 99])
def test_the_cache_of_rtx(name: str, tmp_path: Path, damage: bytes | None) -> None:
    if name != RTX:
        pytest.skip("only TensorRT for RTX has a cache of kernels")
    part = built(tmp_path, name)
    cache = tmp_path / "m.engine.cache"
    backends.get(name).load(tmp_path / "m.engine", part, {}).close()
    assert cache.stat().st_size > 0
    if damage is not None:
        cache.write_bytes(damage)
    session = backends.get(name).load(tmp_path / "m.engine", part, {})
    given = feeds()
    check(session.run(given), given)
    session.close()
    assert cache.stat().st_size > len(damage or b"")
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "m.engine", "m.engine.cache"}


def test_the_timing_cache_of_tensorrt(name: str, tmp_path: Path) -> None:
    if name == RTX:
        pytest.skip("TensorRT for RTX times nothing when it builds")
    cache = tmp_path / "timing.cache"
    for damage in (None, b"", b"GIF89a" * 99):
        if damage is not None:
            cache.write_bytes(damage)
        built(tmp_path, name)
        assert cache.stat().st_size > len(damage or b"")


@pytest.mark.parametrize(
    ("key", "value"), [("library", "tensorrt 1.0"), ("compute capability", "1.0")]
)
def test_an_engine_for_another_device(name: str, tmp_path: Path, key: str, value: str) -> None:
    part = built(tmp_path, name)
    other = msgspec.structs.replace(part, device={**part.device, key: value})
    with pytest.raises(DeviceError, match=rf"m\.engine was built for {key} {value} \(here "):
        backends.get(name).load(tmp_path / "m.engine", other, {})


def test_a_truncated_engine(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    part = built(tmp_path, name)
    path = tmp_path / "m.engine"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BackendError, match=r"m\.engine") as caught:
        backends.get(name).load(path, part, {})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_engine_that_is_not_as_described(name: str, tmp_path: Path) -> None:
    part = built(tmp_path, name)
    for changes in (
        {"inputs": {**INPUTS, "x": specs(x="float16 batch 4")["x"]}},
        {"outputs": {**OUTPUTS, "y": specs(y="float32 batch 7")["y"]}},
        {"outputs": specs(other="float32 batch 6")},
        {"shapes": SHAPES[:1]},
    ):
        wrong = msgspec.structs.replace(part, **changes)
        with pytest.raises(BackendError, match=r"m\.engine does not load: "):
            backends.get(name).load(tmp_path / "m.engine", wrong, {})


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float16", "float32"])
def test_every_type(name: str, tmp_path: Path, dtype: str) -> None:
    x, y = specs(x=f"{dtype} batch 4"), specs(y=f"{dtype} batch 8")
    write(tmp_path / "m.onnx", [node("Concat", "x x", "y", axis=1)], x, y)
    part = component(name, x, y, ({"batch": Range(1, 2, 4)},))
    device = backends.get(name).compile(
        tmp_path / "m.onnx", tmp_path / "m.engine", part, {}, Watch()
    )
    part = msgspec.structs.replace(part, file="m.engine", device=device)
    session = backends.get(name).load(tmp_path / "m.engine", part, {})
    given = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    np.testing.assert_array_equal(session.run({"x": given})["y"], np.hstack([given, given]))
    session.close()
