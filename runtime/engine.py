"""Engines: loaded components that take any number of rows and reject NaN."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.backends.session import ResidentSession
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import ANY, Range
from latentforge.runtime.tensor import DeviceArray, Feeds, Tensor, Tensors, on_host

__all__ = ["Engine", "Engines", "LoadEngine"]

LoadEngine = Callable[[str, backends.Options], "Engine"]
"""Loads a component by name, with backend options."""

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_T = TypeVar("_T", bound=Tensor)


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
        outputs, _ = self.run_resident(rows, shared, max_rows=max_rows)
        return outputs

    def run_resident(
        self,
        rows: Tensors,
        shared: Feeds = _EMPTY,
        *,
        keep: Collection[str] = (),
        max_rows: int | None = None,
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Tensor]]:
        """Run as run() does, and return outputs that other runs take as inputs apart.

        Args:
            rows, shared, max_rows: as of run(); rows may be on a device.
            keep: names of outputs; those that the engine does not have are ignored.

        Returns:
            The other outputs as run() returns them, and the outputs to keep in the engine's
            dtypes: on the device if the session can keep them there and served all rows at once.
            Only those on the host are searched for NaN; what is computed from the others is.
        """
        outputs = self._outputs(rows, shared, max_rows, keep)
        kept = {key: outputs.pop(key) for key in tuple(outputs) if key in keep}
        return self._in_float32(outputs, self._count(rows)), self._checked(kept)

    def run_unconverted(self, rows: Feeds, shared: Feeds = _EMPTY) -> dict[str, NDArray[Any]]:
        """Run as run() does, but return outputs in the engine's dtypes, as inputs of others."""
        outputs = self._checked(self._outputs(rows, shared, None))
        return {key: on_host(value) for key, value in outputs.items()}

    def prepared(self, rows: Tensors) -> dict[str, Tensor]:
        """Return inputs for many runs: constant, in the engine's dtypes.

        A backend may keep constant arrays on its device.
        """
        return {name: _constant(self._cast(name, tensor)) for name, tensor in rows.items()}

    def _outputs(
        self, rows: Tensors, shared: Feeds, max_rows: int | None, keep: Collection[str] = ()
    ) -> dict[str, Tensor]:
        count = self._count(rows)
        inputs = {name: self._cast(name, tensor) for name, tensor in rows.items()}
        supported = self._supported_rows(inputs)
        parts, start = [], 0
        while start < count:
            size = _next_size(count - start, supported, max_rows or self.max_rows)
            micro_batch = {key: _slice(tensor, start, size) for key, tensor in inputs.items()}
            kept = keep if size == count else ()  # rows of several runs are joined on the host
            parts.append(self._run_session({**micro_batch, **shared}, kept))
            start += size
        if len(parts) > 1:
            joined = {key: [on_host(part[key]) for part in parts] for key in parts[0]}
            parts = [{key: np.concatenate(arrays) for key, arrays in joined.items()}]
        return {key: _first(value, count) for key, value in parts[0].items()}

    def _run_session(self, feeds: Tensors, keep: Collection[str]) -> Tensors:
        if isinstance(self.session, ResidentSession):
            return self.session.run_resident(feeds, keep)
        return self.session.run({name: on_host(tensor) for name, tensor in feeds.items()})

    def _in_float32(self, outputs: Tensors, count: int) -> dict[str, NDArray[np.float32]]:
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are rejected
            arrays = {
                key: on_host(value).astype(np.float32, copy=False) for key, value in outputs.items()
            }
        for key, value in arrays.items():
            if value.shape[:1] != (count,):
                raise BackendError(
                    f"{self.name}: output {key} has the shape {list(value.shape)} for {count} rows "
                    "of inputs: the graph is not the one that was exported; export it again"
                )
        return self._checked(arrays)

    def _count(self, rows: Tensors) -> int:
        counts = {name: len(array) for name, array in rows.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            got = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ShapeError(
                f"{self.name}: inputs must have the same number of rows; got {got or 0}"
            )
        return next(iter(counts.values()))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        spec = self.component.inputs.get(name)
        if spec is None or tensor.dtype == spec.dtype:
            return tensor
        if not np.can_cast(tensor.dtype, spec.dtype, "same_kind"):
            return tensor  # rejected by the session
        return on_host(tensor).astype(spec.dtype)

    def _supported_rows(self, inputs: Tensors) -> list[Range]:
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

    def _checked(self, outputs: dict[str, _T]) -> dict[str, _T]:
        for key, value in outputs.items():
            if isinstance(value, np.ndarray) and not np.isfinite(value).all():
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


def _constant(tensor: Tensor) -> Tensor:
    """Return a read-only view of an array; what is on a device is constant as it is."""
    if isinstance(tensor, DeviceArray):
        return tensor
    view = tensor.view()
    view.setflags(write=False)
    return view


def _first(tensor: Tensor, count: int) -> Tensor:
    return tensor if isinstance(tensor, DeviceArray) else tensor[:count]


def _slice(tensor: Tensor, start: int, size: int) -> Tensor:
    """Return `size` rows of an array, padded by repeating the last row.

    All of an array is the same object, because backends may cache it.
    """
    if size == len(tensor):
        return tensor
    rows = on_host(tensor)[start : start + size]
    missing = size - len(rows)
    return np.concatenate([rows, rows[-1:].repeat(missing, axis=0)]) if missing else rows
