"""Sessions: loaded engines, and the one check of what goes into them and what comes out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds, TensorSpec

__all__ = ["CheckedSession", "LayerTime", "Outputs", "Session", "Signature", "check_signature"]

_MAX_CACHED_SIZES = 64

Outputs = dict[str, NDArray[np.generic]]
"""Output arrays by name."""

Signature = Mapping[str, tuple[str, tuple[int, ...] | None]]
"""Dtype and shape of a graph's tensors by name; -1 is a free size, None an unknown rank."""

_Expected = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


class LayerTime(NamedTuple):
    """Seconds that one layer took, summed over all runs of a session."""

    name: str
    operator: str
    seconds: float


class Session(Protocol):
    """One loaded engine. Safe to run from several threads at once."""

    def run(self, feeds: Feeds) -> Outputs:
        """Run the engine once.

        Args:
            feeds: every input of the component, of the dtypes and shapes of its specs.

        Returns:
            Every output by name, of the dtypes and shapes of its specs. The caller owns the arrays
            and may modify them.

        Raises:
            ShapeError: the feeds do not fit the component's inputs.
            BackendError: the session is closed, the engine failed, or its outputs do not fit the
                component's specs.
        """
        ...

    def layers(self) -> list[LayerTime]:
        """Return the time of each layer since the load; empty unless loaded with profile=True.

        Ends the recording: a second call returns nothing.
        """
        ...

    def close(self) -> None:
        """Free the engine. Running it afterwards raises BackendError."""
        ...


class CheckedSession(ABC):
    """Base of the backends' sessions: checks inputs and outputs against the component's specs.

    A backend implements _run(), and extends close() and layers() where it holds resources or can
    time layers. The check of the outputs costs about a microsecond: expected shapes are kept for
    the sizes that ran.

    Attributes:
        component: description of the engine, with the specs of its inputs and outputs.
    """

    def __init__(self, component: Component) -> None:
        self.component = component
        self._engine: Any = None  # the library's object while the session is open
        self._expected: dict[tuple[int, ...], _Expected] = {}

    def run(self, feeds: Feeds) -> Outputs:
        """Run the engine once: see Session.run()."""
        engine = self._engine  # another thread may close the session meanwhile
        if engine is None:
            raise self._closed()
        sizes, index = self.component.fit(feeds)
        try:
            outputs = self._run(engine, feeds, sizes, index)
        except BackendError:
            raise
        except Exception as error:  # libraries' errors share no base class
            raise self._failed(error) from error
        self._check_outputs(outputs, sizes)
        return outputs

    def layers(self) -> list[LayerTime]:
        """Return the time of each layer: see Session.layers()."""
        return []

    def close(self) -> None:
        """Free the engine: see Session.close()."""
        self._engine = None

    @abstractmethod
    def _run(
        self, engine: Any, feeds: Feeds, sizes: Mapping[str, int], index: int | None
    ) -> Outputs:
        """Run the library once.

        Args:
            engine: ``self._engine`` as it was when the run began.
            feeds: inputs that fit the component's specs.
            sizes: size of each free dimension in the feeds.
            index: of the component's shapes, the one that the feeds fit; None if it has none.

        Returns:
            Arrays that the library will not write to again.

        Raises:
            BackendError: the message names the file; it reaches the caller as it is. Any other
                Exception becomes a BackendError with what _reason() says of it.
        """

    @abstractmethod
    def _reason(self, error: BaseException) -> str:
        """Return the message of a library's error, on one line."""

    def _closed(self) -> BackendError:
        return BackendError(f"{self.component.file} is closed")

    def _failed(self, error: BaseException) -> BackendError:
        return BackendError(f"{self.component.file} failed: {self._reason(error)}")

    def _check_outputs(self, outputs: Outputs, sizes: Mapping[str, int]) -> None:
        key = tuple(sizes.values())  # in the order of the inputs' specs, which never changes
        expected = self._expected.get(key)
        if expected is None:
            expected = self._remember(key, sizes)
        if outputs.keys() != expected.keys():
            raise self._wrong_names(outputs)
        for name, (dtype, shape) in expected.items():
            array = outputs[name]
            is_array = isinstance(array, np.ndarray)  # and not a sequence or map of tensors
            if not is_array or array.dtype != dtype or array.shape != shape:
                raise self._wrong_output(name, array, shape)

    def _remember(self, key: tuple[int, ...], sizes: Mapping[str, int]) -> _Expected:
        signature = {}
        for name, spec in self.component.outputs.items():
            try:
                signature[name] = np.dtype(spec.dtype), spec.resolve(sizes)
            except ShapeError as error:
                raise BackendError(f"{self.component.file}: output {name}: {error}") from error
        if len(self._expected) >= _MAX_CACHED_SIZES:
            self._expected.clear()
        self._expected[key] = signature
        return signature

    def _wrong_names(self, outputs: Outputs) -> BackendError:
        specs = self.component.outputs
        names = sorted(specs.keys() ^ outputs.keys())
        return BackendError(
            f"{self.component.file}: expected outputs {', '.join(specs)}, and the engine returned "
            f"{', '.join(outputs) or 'none'} ({', '.join(names)} differs): compile it again"
        )

    def _wrong_output(self, name: str, value: object, shape: tuple[int, ...]) -> BackendError:
        spec = self.component.outputs[name]
        return BackendError(
            f"{self.component.file}: output {name}: expected {spec.dtype}{list(shape)} (manifest: "
            f"{spec}), and the engine returned {_described(value)}: it is not the engine that its "
            "manifest describes; export or compile it again"
        )


def _described(value: object) -> str:
    """Return dtype and shape of an output, or its Python type if it is not a tensor."""
    if not isinstance(value, np.ndarray):
        return f"no tensor but {type(value).__name__}"
    dtype = value.dtype if value.dtype.kind in "biufc" else "text"
    return f"{dtype}{list(value.shape)}"


def check_signature(
    kind: str, specs: Mapping[str, TensorSpec], tensors: Signature, *, exact: bool = True
) -> None:
    """Refuse a graph whose tensors do not fit the manifest's specs.

    Args:
        kind: ``input`` or ``output``, with the place in front of it if there is one.
        specs: expected tensors by name.
        tensors: those of the graph.
        exact: refuse further tensors, too.

    Raises:
        BackendError: names, dtypes, ranks or sizes differ.
    """
    if specs.keys() - tensors.keys() or (exact and tensors.keys() - specs.keys()):
        raise BackendError(
            f"{kind}s: expected {', '.join(specs)} (manifest), found "
            f"{', '.join(tensors) or 'none'}: export again"
        )
    for name, spec in specs.items():
        dtype, shape = tensors[name]
        if dtype != spec.dtype or not _may_fit(shape, spec.shape):
            found = dtype if shape is None else f"{dtype}{list(shape)}"
            raise BackendError(
                f"{kind} {name}: expected {spec} (manifest), found {found}: export again"
            )


def _may_fit(shape: tuple[int, ...] | None, expected: tuple[int | str, ...]) -> bool:
    """Return True if a graph's shape can be the expected one at some sizes."""
    if shape is None or len(shape) != len(expected):
        return shape is None
    pairs = zip(shape, expected, strict=True)
    return all(not isinstance(b, int) or a in (-1, b) for a, b in pairs)
