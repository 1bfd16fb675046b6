"""Tensor specs of an engine, and feeds that differ from them, refused by name."""

from typing import Any

import msgspec
import numpy as np
import pytest

from latentforge.runtime.errors import ManifestError, ShapeError
from latentforge.runtime.tensor import DTYPES, TensorSpec, bind

SPECS = {
    "image": TensorSpec("float32", ("batch", 3, "height", "width")),
    "ids": TensorSpec("int64", ("batch", 8)),
    "step": TensorSpec("float32", (1,)),
}


def feeds(**changes: Any) -> dict[str, Any]:
    arrays = {
        "image": np.zeros((2, 3, 16, 24), np.float32),
        "ids": np.zeros((2, 8), np.int64),
        "step": np.zeros(1, np.float32),
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def test_bind_returns_the_free_dimensions() -> None:
    sizes = bind(SPECS, feeds())
    assert sizes == {"batch": 2, "height": 16, "width": 24}
    scaled = TensorSpec("float32", ("batch", 1, "height*8", "width//2"))
    assert scaled.resolve(sizes) == (2, 1, 128, 12)
    assert str(scaled) == "float32[batch, 1, height*8, width//2]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "engine takes image, ids, step; got image, step"),
        ({"mask": np.zeros(1)}, "engine takes image, ids, step; got image, ids, step, mask"),
        ({"ids": np.zeros((2, 8), np.int32)}, r"ids: engine takes int64\[batch, 8\].*got int32"),
        ({"ids": np.zeros((2, 8), ">i8")}, r"ids: engine takes int64\[batch, 8\].*got >i8"),
        ({"ids": np.zeros((2, 9), np.int64)}, r"ids: .*batch=2.*got int64\[2, 9\]"),
        ({"ids": np.zeros((3, 8), np.int64)}, r"ids: .*batch=2.*got int64\[3, 8\]"),
        ({"ids": np.zeros(8, np.int64)}, r"ids: .*got int64\[8\]"),
        ({"step": np.float32(0)}, r"step: engine takes float32\[1\].*got float32\[\]"),
        ({"step": np.zeros(2, np.float32)}, "step: engine takes"),
    ],
)
def test_bind_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        bind(SPECS, feeds(**changes))


def test_bind_refuses_empty_feeds() -> None:
    with pytest.raises(ShapeError, match="got nothing"):
        bind(SPECS, {})


def test_a_scaled_input_must_fit() -> None:
    specs = {
        "small": TensorSpec("float32", ("h",)),
        "large": TensorSpec("float32", ("h*8", "h//2")),
    }
    small = np.zeros(4, np.float32)
    assert bind(specs, {"small": small, "large": np.zeros((32, 2), np.float32)}) == {"h": 4}
    with pytest.raises(ShapeError, match="large"):
        bind(specs, {"small": small, "large": np.zeros((31, 2), np.float32)})


def test_a_dimension_that_no_input_determines() -> None:
    with pytest.raises(ShapeError, match="'h' is not determined"):
        TensorSpec("float32", ("h",)).resolve({"w": 1})
    with pytest.raises(ShapeError, match=r"'h\*2' is not determined"):
        bind({"x": TensorSpec("float32", ("h*2",))}, {"x": np.zeros(4, np.float32)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_one_of_numpy(dtype: str) -> None:
    assert np.dtype(TensorSpec(dtype, ()).dtype).name == dtype


@pytest.mark.parametrize("dtype", ["", "f4", "object", "O", "float32,float32", "datetime64", "V8"])
def test_refuses_a_dtype(dtype: str) -> None:
    with pytest.raises(ManifestError, match="choose from bool, int8"):
        TensorSpec(dtype, (1,))


@pytest.mark.parametrize("size", [0, -1, True, 1.0, None, "", "A", "1", "h*", "h*0", "h/2", "h\n"])
def test_refuses_a_size(size: Any) -> None:
    with pytest.raises(ManifestError, match="neither a size from 1 to"):
        TensorSpec("float32", (size,))


def test_decoding_is_strict() -> None:
    text = b'{"dtype": "float32", "shape": ["batch", 4]}'
    assert msgspec.json.decode(text, type=TensorSpec) == TensorSpec("float32", ("batch", 4))
    with pytest.raises(msgspec.ValidationError, match="layout"):
        msgspec.json.decode(text[:-1] + b', "layout": "nchw"}', type=TensorSpec)
