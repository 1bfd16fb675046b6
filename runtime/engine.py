"""Engines: loaded components that take any number of rows and reject NaN."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import ANY, Range
from latentforge.runtime.tensor import Feeds

__all__ = ["Engine", "Engines", "LoadEngine"]

LoadEngine = Callable[[str, backends.Options], "Engine"]
"""Loads a component by name, with backend options."""

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Engine:
    """Component with its loaded session.

    An engine that supports only some numbers of rows serves every request: a larger one in several
    runs (micro-batches), a smaller one padded by repeating its last row. If it supports more,
    ``max_rows`` limits the rows of one run, which saves memory.

    Attributes:
        name: of the component.
        component: its manifest entry.
        session: the loaded session.
        max_rows: largest micro-batch of one session run; None if there is no limit.
    """

    name: str
    component: Component
    session: backends.Session
    max_rows: int | None = None

    @classmethod
    def load(
        cls,
        name: str,
        component: Component,
        directory: Path,
        options: backends.Options,
        *,
        max_rows: int | None = None,
        low_memory: bool = False,
        spin: bool = True,
        wrap: Callable[[str, backends.Session], backends.Session] | None = None,
    ) -> "Engine":
        """Load a component of an engine directory on its backend.

        Args:
            name, component, max_rows: see Engine.
            directory: the engine directory.
            options: backend options; the backend takes those it supports.
            low_memory: do not repack the weights, if the backend can do without.
            spin: keep the threads spinning between runs. An engine that runs rarely should not,
                because the others need the cores.
            wrap: replaces the loaded session.

        Raises:
            BackendError: the backend is not installed, or rejects the engine.
            DeviceError: the engine needs a device that this machine does not have.
            ForeignEngineError: the engine was built for another device or version.
        """
        backend = backends.get(component.backend)
        spinning = {} if spin else {"spin": False}
        packing = {"prepack": False} if low_memory else {}
        requested = {**spinning, **packing, **options}
        supported = {key: value for key, value in requested.items() if key in backend.OPTIONS}
        stored = {k: v for k, v in component.options.items() if k not in backends.ONLY_AT_LOAD}
        session = backend.load(directory / component.file, component, {**stored, **supported})
        if wrap is not None:
            session = wrap(name, session)
        return cls(name, component, session, max_rows)

    def run(
        self, rows: Feeds, shared: Feeds = _EMPTY, *, max_rows: int | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Run on all rows and return every output with as many rows, in float32.

        Args:
            rows: inputs with one row per sample, all of the same length. They are converted to
                float16 or int32 if the engine takes that.
            shared: inputs that apply to every row, such as the timestep.
            max_rows: largest micro-batch of this call; None: the engine's own limit.

        Raises:
            ShapeError: the inputs do not fit the engine.
            BackendError: the engine failed, or an output holds NaN or infinity.
        """
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are rejected
            outputs = {
                key: value.astype(np.float32, copy=False)
                for key, value in self._outputs(rows, shared, max_rows).items()
            }
        for key, value in outputs.items():
            if value.shape[:1] != (count := self._count(rows),):
                raise BackendError(
                    f"{self.name}: output {key} has the shape {list(value.shape)} for {count} rows "
                    "of inputs: the graph is not the one that was exported; export it again"
                )
        return self._checked(outputs)

    def run_unconverted(self, rows: Feeds, shared: Feeds = _EMPTY) -> dict[str, NDArray[Any]]:
        """Run as run() does, but return outputs in the engine's dtypes, as inputs of others."""
        return self._checked(self._outputs(rows, shared, None))

    def prepared(self, rows: Feeds) -> dict[str, NDArray[Any]]:
        """Return inputs for many runs: read-only, in the engine's dtypes.

        A backend may keep read-only arrays on its device.
        """
        arrays = {name: self._cast(name, array).view() for name, array in rows.items()}
        for array in arrays.values():
            array.setflags(write=False)
        return arrays

    def _outputs(self, rows: Feeds, shared: Feeds, max_rows: int | None) -> dict[str, NDArray[Any]]:
        count = self._count(rows)
        inputs = {name: self._cast(name, array) for name, array in rows.items()}
        supported = self._supported_rows(inputs)
        parts, start = [], 0
        while start < count:
            size = _next_size(count - start, supported, max_rows or self.max_rows)
            micro_batch = {key: _slice(array, start, size) for key, array in inputs.items()}
            parts.append(self.session.run({**micro_batch, **shared}))
            start += size
        if len(parts) > 1:
            parts = [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]}]
        return {key: value[:count] for key, value in parts[0].items()}

    def _count(self, rows: Feeds) -> int:
        counts = {name: len(array) for name, array in rows.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            got = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ShapeError(
                f"{self.name}: inputs must have the same number of rows; got {got or 0}"
            )
        return next(iter(counts.values()))

    def _cast(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        spec = self.component.inputs.get(name)
        if spec is None or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            return array  # rejected by the session
        return array.astype(spec.dtype, copy=False)

    def _supported_rows(self, inputs: Feeds) -> list[Range]:
        """Return the numbers of rows that the engine supports at the size of these inputs."""
        name = next(iter(inputs))
        spec = self.component.inputs.get(name)
        if spec is None or not spec.shape:
            raise ShapeError(f"{self.name}: engine has no input {name!r} with rows")
        rows = spec.shape[0]
        if isinstance(rows, int):
            return [Range.of(rows)]
        sizes = self.component.sizes(inputs)
        return [
            shapes[rows]
            for shapes in self.component.shapes
            if rows in shapes
            and all(sizes.get(key, 0) in r for key, r in shapes.items() if key != rows)
        ] or [ANY]

    def _checked(self, outputs: dict[str, NDArray[_T]]) -> dict[str, NDArray[_T]]:
        for key, value in outputs.items():
            if not np.isfinite(value).all():
                raise BackendError(
                    f"{self.name}: output {key} holds NaN or infinity: its precision does not "
                    "suit this model, or the weights are damaged; build again with --precision fp32"
                )
        return outputs


class Engines(Mapping[str, Engine]):
    """Loaded engines by component name. Threads may share it.

    Components that few requests need are loaded by the first request that does.
    """

    def __init__(
        self, load: LoadEngine, names: Iterable[str], options: backends.Options = _EMPTY
    ) -> None:
        self._load = load
        self._options = dict(options)
        self._lock = Lock()
        self._closed = False
        self._names = tuple(names)
        self._loaded = {name: load(name, options) for name in self._names}

    def __getitem__(self, name: str) -> Engine:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded))

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, name: str) -> Engine:
        """Return an engine, after loading it if no request has needed it before.

        Raises:
            BackendError: the engines are closed, or this one cannot be loaded.
        """
        with self._lock:
            self._require_open()
            if name not in self._loaded:
                self._loaded[name] = self._load(name, self._options)
            return self._loaded[name]

    def reload(self, **options: Any) -> "Engines":
        """Load a second copy of the engines, with further backend options.

        Raises:
            BackendError: the engines are closed.
        """
        self._require_open()
        return Engines(self._load, self._names, {**self._options, **options})

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the pipeline is closed: load its directory again")

    def close(self) -> None:
        """Free all engines. Running one afterwards raises BackendError."""
        with self._lock:
            self._closed = True
            for engine in self.values():
                engine.session.close()


def _next_size(left: int, supported: Sequence[Range], max_rows: int | None) -> int:
    """Return the rows of the next run: as many as possible, or else the smallest supported."""
    limit = min(left, max_rows or left)
    fitting = [min(limit, rows.max) for rows in supported if rows.min <= limit]
    return max(fitting, default=min(rows.min for rows in supported))


def _slice(array: NDArray[np.generic], start: int, size: int) -> NDArray[np.generic]:
    """Return `size` rows of an array, padded by repeating the last row.

    All of an array is the same object, because backends may cache it.
    """
    rows = array if size == len(array) else array[start : start + size]
    missing = size - len(rows)
    return np.concatenate([rows, rows[-1:].repeat(missing, axis=0)]) if missing else rows
