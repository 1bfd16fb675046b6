"""ONNX Runtime's providers for CUDA, TensorRT and TensorRT for RTX, on a GPU.

Written without a GPU at hand, and never run yet: what fails here first may be the test.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.backends import onnxruntime_gpu
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Range
from latentforge.runtime.tensor import TensorSpec

onnx = pytest.importorskip("onnx")

Load = Callable[..., backends.Session]

IMAGE = TensorSpec("float32", ("batch", 8, "side", "side"))
CONTEXT = TensorSpec("float32", ("batch", 8, 1, 1))
OUT = TensorSpec("float32", ("batch", 16, "side", "side"))
WEIGHTS = np.random.default_rng(0).standard_normal((16, 8, 1, 1)).astype(np.float32)
SHAPES = (
    {"batch": Range(1, 2, 2), "side": Range.of(16)},
    {"batch": Range(1, 1, 4), "side": Range(32, 32, 64)},
)
NAMES = [name for name in backends.BACKENDS if name.startswith("onnxruntime-")]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, gpu: str) -> str:
    """Yield each installed provider that has a GPU."""
    try:
        onnxruntime_gpu._check_installed(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    return str(request.param)


def component(backend: str, **changes: Any) -> Component:
    fields: dict[str, Any] = {
        "file": "m.onnx",
        "sha256": "0" * 64,
        "bytes": 0,
        "backend": backend,
        "precision": "fp32",
        "inputs": {"x": IMAGE, "c": CONTEXT},
        "outputs": {"y": OUT},
        "shapes": SHAPES,
    }
    return Component(**{**fields, **changes})


def no_report(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


def save(path: Path, operator: str = "Conv") -> None:
    """Write the graph operator(x + c, weights) with free sizes."""

    def conditioned(name: str, spec: TensorSpec) -> Any:
        return onnx.helper.make_tensor_value_info(name, 1, list(spec.shape))

    nodes = [
        onnx.helper.make_node("Add", ["x", "c"], ["s"]),
        onnx.helper.make_node(operator, ["s", "w"], ["y"]),
    ]
    tensor = onnx.numpy_helper.from_array(WEIGHTS, "w")
    inputs, outputs = [conditioned("x", IMAGE), conditioned("c", CONTEXT)], [conditioned("y", OUT)]
    graph = onnx.helper.make_graph(nodes, "m", inputs, outputs, [tensor])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)


@pytest.fixture
def load(name: str, tmp_path: Path) -> Iterator[Load]:
    """Return a function that compiles and loads the graph."""
    sessions: list[backends.Session] = []

    def loaded(part: Component | None = None, **options: Any) -> backends.Session:
        part = part or component(name)
        save(tmp_path / "source.onnx")
        target = tmp_path / part.file
        onnxruntime_gpu.compile(tmp_path / "source.onnx", target, part, options, no_report)
        options = {"tf32": False, **options}
        sessions.append(onnxruntime_gpu.load(target, part, options))
        return sessions[-1]

    yield loaded
    for session in sessions:
        session.close()


def feeds(batch: int = 2, side: int = 16, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 8, side, side)).astype(np.float32)
    return {"x": x, "c": rng.standard_normal((batch, 8, 1, 1)).astype(np.float32)}


def expected(given: dict[str, NDArray[Any]]) -> NDArray[Any]:
    return np.einsum("oi,bihw->bohw", WEIGHTS[:, :, 0, 0], given["x"] + given["c"])


def check(session: backends.Session, given: dict[str, NDArray[Any]]) -> None:
    # TensorRT computes float32 in TF32, of ten bits
    np.testing.assert_allclose(session.run(given)["y"], expected(given), rtol=0, atol=2e-2)


@pytest.mark.parametrize("graphs", [True, False])
def test_agrees_with_numpy(load: Load, graphs: bool) -> None:
    session = load(graphs=graphs)
    for seed in range(6):  # the first runs record, the others replay
        check(session, feeds(seed=seed))


def test_sizes_may_change_with_every_run(load: Load) -> None:
    session = load()
    for seed, (batch, side) in enumerate(
        ((2, 16), (1, 32), (2, 16), (4, 64), (1, 16), (1, 32)) * 3
    ):
        check(session, feeds(batch, side, seed))
    with pytest.raises(ShapeError, match="were not built for batch 1, side 24"):
        session.run(feeds(1, 24))


def test_one_size(name: str, load: Load) -> None:
    shapes = ({"batch": Range.of(2), "side": Range.of(16)},)
    session = load(component(name, shapes=()).specialize(shapes))
    for seed in range(4):
        check(session, feeds(seed=seed))


def test_the_caller_owns_outputs(load: Load) -> None:
    session = load()
    given = feeds()
    first = session.run(given)["y"]
    first[...] = 9
    session.run(feeds(seed=1))
    assert (first == 9).all()
    check(session, given)


def test_a_read_only_array_stays_on_the_gpu(load: Load) -> None:
    session = load()
    given = feeds()
    base = given["c"].copy()
    given["c"] = base.view()
    given["c"].setflags(write=False)
    wanted = expected(given)
    session.run(given)
    base[...] = 100  # what nobody may do shows that nothing was uploaded again
    for _ in range(4):
        np.testing.assert_allclose(session.run(given)["y"], wanted, rtol=0, atol=2e-2)
    check(session, given | {"c": base})


def test_threads_get_their_own_results(load: Load) -> None:
    session = load()

    def one(seed: int) -> None:
        check(session, feeds(1 + seed % 2, (16, 32)[seed % 2], seed))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(40)))


def test_two_sessions_in_parallel(load: Load) -> None:
    first, second = load(), load()

    def one(seed: int) -> None:
        check((first, second)[seed % 2], feeds(seed=seed))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(40)))


def test_the_built_engine_is_cached(name: str, load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "m.onnx.cache"
    session = load()
    check(session, feeds())
    session.close()
    if name == "onnxruntime-cuda":
        assert not folder.exists()
        return
    built = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert built
    again = onnxruntime_gpu.load(tmp_path / "m.onnx", component(name), {})
    check(again, feeds(seed=1))
    again.close()
    engines = [path for path in built if path.suffix == ".engine"]  # timings may be added to
    assert all(path.stat().st_mtime_ns == built[path] for path in engines)


def test_a_cache_that_is_damaged_or_cannot_be_written(
    name: str, load: Load, tmp_path: Path
) -> None:
    load().close()
    folder = tmp_path / "m.onnx.cache"
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file():
            path.unlink()
    if folder.is_dir():
        folder.rmdir()
    folder.write_bytes(b"a file in the way")
    session = onnxruntime_gpu.load(tmp_path / "m.onnx", component(name), {})
    check(session, feeds())
    session.close()


def test_layers(load: Load) -> None:
    session = load(profile=True)
    for seed in range(3):
        check(session, feeds(seed=seed))
    layers = session.layers()
    assert layers and all(layer.seconds >= 0 and layer.name for layer in layers)
    assert session.layers() == []
    check(session, feeds())


def test_closed(load: Load) -> None:
    session = load()
    session.run(feeds())
    session.close()
    session.close()
    with pytest.raises(BackendError, match=r"m\.onnx is closed"):
        session.run(feeds())


def test_operators_that_a_provider_lacks(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """8-bit convolutions exist on the CPU only."""
    spec = {"x": TensorSpec("uint8", (1, 8, 16, 16))}
    node = onnx.helper.make_node("ConvInteger", ["x", "w"], ["y"])
    weights = onnx.numpy_helper.from_array(np.ones((16, 8, 1, 1), np.uint8), "w")
    x = onnx.helper.make_tensor_value_info("x", 2, [1, 8, 16, 16])
    y = onnx.helper.make_tensor_value_info("y", 6, [1, 16, 16, 16])
    graph = onnx.helper.make_graph([node], "m", [x], [y], [weights])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    outputs = {"y": TensorSpec("int32", (1, 16, 16, 16))}
    part = component(name, inputs=spec, outputs=outputs, shapes=())
    with pytest.raises(BackendError, match="--target") as caught:
        onnxruntime_gpu.load(tmp_path / "m.onnx", part, {})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
