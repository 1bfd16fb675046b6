"""The base of all sessions: what it checks, and what its errors say."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from latentforge.runtime.backends.session import CheckedSession, Outputs, Run
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import TensorSpec

COMPONENT = Component(
    file="m.engine",
    sha256="0" * 64,
    bytes=0,
    backend="null",
    precision="fp32",
    inputs={"x": TensorSpec("float32", ("batch", "n"))},
    outputs={"y": TensorSpec("float16", ("batch", "n*2")), "z": TensorSpec("int64", (1,))},
)
RIGHT = {"y": np.zeros((2, 6), np.float16), "z": np.zeros(1, np.int64)}
FEEDS = {"x": np.zeros((2, 3), np.float32)}


class Fixed(CheckedSession):
    """Session that returns what it was made with, or raises it."""

    def __init__(self, outcome: Any, component: Component = COMPONENT) -> None:
        super().__init__(component)
        self._engine = outcome
        self.sizes: list[tuple[Mapping[str, int], int | None]] = []

    def _run(self, run: Run) -> Outputs:
        self.sizes.append((run.sizes, run.shape_index))
        if isinstance(run.engine, BaseException):
            raise run.engine
        return dict(run.engine)

    def _reason(self, error: BaseException) -> str:
        return f"reason of {error}"


def test_outputs_that_fit_are_returned() -> None:
    session = Fixed(RIGHT)
    for _ in range(3):
        assert session.run(FEEDS).keys() == RIGHT.keys()
    assert session.sizes == [({"batch": 2, "n": 3}, None)] * 3
    assert session.layers() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y": np.zeros((2, 6, 1), np.float16)},
            r"output y: expected float16\[2, 6\] \(manifest: float16\[batch, n\*2\]\), and the "
            r"engine returned float16\[2, 6, 1\]",
        ),
        ({"y": np.zeros((2, 6), np.float32)}, r"output y: .* returned float32\[2, 6\]"),
        ({"y": np.zeros((2, 5), np.float16)}, r"output y: .* returned float16\[2, 5\]"),
        ({"y": np.zeros((1, 6), np.float16)}, r"output y: .* returned float16\[1, 6\]"),
        ({"z": np.zeros((), np.int64)}, r"output z: expected int64\[1\] .* returned int64\[\]"),
        (
            {"y": [np.zeros(6, np.float16)] * 2},
            r"output y: expected float16\[2, 6\] .* returned no tensor but list: ",
        ),
        ({"y": np.full((2, 6), "a", object)}, r"output y: .* returned text\[2, 6\]"),
        ({"y": np.full((2, 6), "a")}, r"output y: .* returned text\[2, 6\]"),
        ({"y": None}, r"expected outputs y, z, and the engine returned z \(y differs\)"),
        ({"w": np.zeros(1)}, r".* returned y, z, w \(w differs\): compile it again"),
        ({"y": None, "z": None}, r".* returned none \(y, z differs\)"),
    ],
)
def test_outputs_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    outputs = {k: v for k, v in {**RIGHT, **changes}.items() if v is not None}
    with pytest.raises(BackendError, match=rf"^m\.engine: {message}"):
        Fixed(outputs).run(FEEDS)


def test_every_size_has_its_own_expectation() -> None:
    session = Fixed(RIGHT)
    session.run(FEEDS)
    for rows in range(3, 200):
        with pytest.raises(BackendError, match=rf"expected float16\[{rows}, 6\]"):
            session.run({"x": np.zeros((rows, 3), np.float32)})
    session.run(FEEDS)


def test_a_size_that_no_input_determines() -> None:
    outputs = {"y": TensorSpec("float32", ("tokens",))}
    component = Component(
        file="m.engine",
        sha256="0" * 64,
        bytes=0,
        backend="null",
        precision="fp32",
        inputs=COMPONENT.inputs,
        outputs=outputs,
    )
    with pytest.raises(BackendError, match=r"m\.engine: output y: dimension 'tokens'"):
        Fixed({"y": np.zeros(3, np.float32)}, component).run(FEEDS)


def test_feeds_are_checked_before_the_library_sees_them() -> None:
    session = Fixed(RIGHT)
    with pytest.raises(ShapeError, match="x: engine takes float32"):
        session.run({"x": np.zeros((2, 3))})
    assert session.sizes == []


def test_errors_name_the_file() -> None:
    with pytest.raises(BackendError, match=r"^m\.engine failed: reason of bad$"):
        Fixed(ValueError("bad")).run(FEEDS)
    with pytest.raises(BackendError, match="^complete$"):
        Fixed(BackendError("complete")).run(FEEDS)
    with pytest.raises(KeyboardInterrupt):
        Fixed(KeyboardInterrupt()).run(FEEDS)


def test_a_closed_session() -> None:
    session = Fixed(RIGHT)
    session.close()
    session.close()
    with pytest.raises(BackendError, match=r"^m\.engine is closed$"):
        session.run(FEEDS)
    assert session.sizes == []
