"""An engine takes any number of rows, even of a fixed graph, and rejects NaN."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.backends import LayerTime
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds, TensorSpec, bind

Array = NDArray[np.generic]


class Doubling:
    """Session that computes 2 x + t, and records the rows of each run."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self.seen: list[int] = []

    def run(self, feeds: Feeds) -> dict[str, Array]:
        bind(self.component.inputs, feeds)
        self.seen.append(len(feeds["x"]))
        dtype = self.component.outputs["y"].dtype
        x, t = (feeds[key].astype(np.float64) for key in ("x", "t"))
        with np.errstate(over="ignore"):
            return {"y": (2 * x + t).astype(dtype)}

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        pass


def component(batch: int | str, output: str = "float32", backend: str = "null") -> Component:
    row = (batch, 2)
    return Component(
        sha256="0" * 64,
        bytes=0,
        inputs={"x": TensorSpec("float32", row), "t": TensorSpec("float32", (1,))},
        outputs={"y": TensorSpec(output, row)},
        file="m.onnx",
        backend=backend,
        precision="fp32",
    )


def engine(
    batch: int | str, output: str = "float32", max_rows: int | None = None
) -> tuple[Engine, Doubling]:
    part = component(batch, output)
    session = Doubling(part)
    return Engine("denoiser", part, session, max_rows=max_rows), session


def rows(count: int) -> NDArray[np.float32]:
    return np.arange(2 * count, dtype=np.float32).reshape(count, 2)


T = {"t": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("batch", "count", "max_rows", "seen"),
    [
        ("batch", 1, None, [1]),
        ("batch", 5, None, [5]),
        ("batch", 5, 2, [2, 2, 1]),
        ("batch", 2, 7, [2]),
        (1, 3, None, [1, 1, 1]),
        (2, 1, None, [2]),
        (2, 3, None, [2, 2]),
        (2, 4, None, [2, 2]),
        (4, 1, 1, [4]),
    ],
)
def test_any_number_of_rows(
    batch: int | str, count: int, max_rows: int | None, seen: list[int]
) -> None:
    loaded, session = engine(batch, max_rows=max_rows)
    output = loaded.run({"x": rows(count)}, T)["y"]
    np.testing.assert_array_equal(output, 2 * rows(count) + 1)
    assert session.seen == seen


def test_a_call_can_have_its_own_limit() -> None:
    loaded, session = engine("batch", max_rows=4)
    output = loaded.run({"x": rows(5)}, T, max_rows=2)["y"]
    np.testing.assert_array_equal(output, 2 * rows(5) + 1)
    assert session.seen == [2, 2, 1] and loaded.max_rows == 4
    loaded.run({"x": rows(5)}, T)
    assert session.seen[3:] == [4, 1]


def test_engines_load_on_demand_and_once() -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, options: Any) -> Engine:
        calls.append((name, dict(options)))
        return engine("batch")[0]

    loaded = Engines(load, ["denoiser"], {"threads": 1})
    assert list(loaded) == ["denoiser"] and "vae_encoder" not in loaded
    assert loaded.load("vae_encoder") is loaded.load("vae_encoder") is loaded["vae_encoder"]
    assert calls == [("denoiser", {"threads": 1}), ("vae_encoder", {"threads": 1})]
    copy = loaded.reload(profile=True)
    assert calls[2:] == [("denoiser", {"threads": 1, "profile": True})]
    assert copy["denoiser"] is not loaded["denoiser"]


def test_gives_float32_whatever_the_engine_gives() -> None:
    loaded, _ = engine("batch", "float16")
    output = loaded.run({"x": rows(2)}, T)["y"]
    assert output.dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_passes_no_nan_on(dtype: str, bad: float) -> None:
    loaded, _ = engine("batch", dtype)
    x = rows(3)
    x[2, 1] = bad
    with pytest.raises(BackendError, match="denoiser: output y holds NaN"):
        loaded.run({"x": x}, T)


def test_passes_nothing_on_that_is_too_large_for_float32() -> None:
    part = component("batch", "float64")

    class Huge(Doubling):
        def run(self, feeds: Feeds) -> dict[str, Array]:
            return {"y": np.full((1, 2), 1e300)}

    with pytest.raises(BackendError, match="infinity"):
        Engine("denoiser", part, Huge(part)).run({"x": rows(1)}, T)


def test_nan_in_the_padding_does_not_matter_for_what_is_kept() -> None:
    loaded, _ = engine(2)
    x = rows(2)
    assert loaded.run({"x": x[:1]}, T)["y"].shape == (1, 2)


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_refuses_inputs_of_different_lengths(batch: int | str) -> None:
    spec = TensorSpec("float32", (batch, 2))
    part = Component(
        file="m",
        sha256="0" * 64,
        bytes=0,
        backend="null",
        precision="fp32",
        inputs={"x": spec, "z": spec},
        outputs={"y": spec},
    )
    loaded = Engine("denoiser", part, backends.get("null").load(Path("m"), part, {}))
    assert loaded.run({"x": rows(3), "z": rows(3)})["y"].shape == (3, 2)
    for x, z in ((3, 2), (2, 3), (0, 1)):
        with pytest.raises(ShapeError, match=f"denoiser: .*x {x}, z {z}"):
            loaded.run({"x": rows(x), "z": rows(z)})


def test_refuses_no_rows() -> None:
    loaded, _ = engine("batch")
    for nothing in ({}, {"x": rows(0)}):
        with pytest.raises(ShapeError, match="denoiser"):
            loaded.run(nothing, T)


def test_refuses_an_input_that_is_not_there() -> None:
    loaded, _ = engine("batch")
    with pytest.raises(ShapeError, match="'sample'"):
        loaded.run({"sample": rows(1)}, T)
    with pytest.raises(ShapeError, match="engine takes x, t; got x"):
        loaded.run({"x": rows(1)})


def test_loads_on_the_components_backend(tmp_path: Path) -> None:
    loaded = Engine.load("denoiser", component("batch"), tmp_path, {})
    assert not loaded.run({"x": rows(3)}, T)["y"].any()
    with pytest.raises(BackendError, match="no backend 'os'; there are null, onnxruntime"):
        Engine.load("denoiser", component("batch", backend="os"), tmp_path, {})


@pytest.mark.parametrize("batch", ["b", 2])
def test_splits_and_pads_for_onnxruntime(tmp_path: Path, batch: int | str) -> None:
    pytest.importorskip("onnxruntime")
    ir = pytest.importorskip("onnx_ir")
    text = f"""<ir_version: 9, opset_import: ["" : 17]>
    m (float[{batch}, 2] x, float[1] t) => (float[{batch}, 2] y)
    {{ z = Add(x, x)  y = Add(z, t) }}"""
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    loaded = Engine.load("denoiser", component(batch, backend="onnxruntime"), tmp_path, {})
    for count in (1, 2, 3, 5):
        output = loaded.run({"x": rows(count)}, T)["y"]
        np.testing.assert_array_equal(output, 2 * rows(count) + 1)
    with pytest.raises(BackendError, match="NaN"):
        loaded.run({"x": rows(3) * np.float32(np.nan)}, T)
