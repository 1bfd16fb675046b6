"""One component, loaded: a session that takes any batch, and refuses to pass NaN on."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime import backends
from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds

__all__ = ["Engine"]

_NOTHING: Feeds = MappingProxyType({})
_T = TypeVar("_T", bound=np.generic)


class Engine:
    """A component and its session.

    An engine of a fixed batch serves every request: a larger one in several runs, a smaller
    one padded by repeating its last row. Where the batch is free, ``at_once`` limits the rows
    of one run, which saves memory.
    """

    def __init__(
        self,
        name: str,
        component: Component,
        session: backends.Session,
        *,
        at_once: int | None = None,
    ) -> None:
        self.name = name
        self.component = component
        self.session = session
        self.at_once = at_once

    @classmethod
    def load(
        cls,
        name: str,
        component: Component,
        directory: Path,
        options: backends.Options,
        *,
        at_once: int | None = None,
        low_memory: bool = False,
        rare: bool = False,
    ) -> "Engine":
        """Load a component of an engine directory on its backend.

        With low_memory, weights stay as they lie in the file where the backend can do that. One
        that runs rarely leaves the cores to the others as soon as it is done.
        """
        backend = backends.get(component.backend)
        if rare and "spin" in backend.OPTIONS:
            options = {"spin": False, **options}
        if low_memory and "prepack" in backend.OPTIONS:
            options = {"prepack": False, **options}
        session = backend.load(directory / component.file, component, options)
        return cls(name, component, session, at_once=at_once)

    def run(self, rows: Feeds, shared: Feeds = _NOTHING) -> dict[str, NDArray[np.float32]]:
        """Run on all rows and return every output with as many rows, in float32.

        Args:
            rows: inputs with one row a sample, all of the same length; they become float16 or
                int32 where the engine takes that.
            shared: inputs that hold for every row, such as the timestep.

        Raises:
            ShapeError: the feeds do not fit the engine.
            BackendError: the engine failed, or an output holds NaN or infinity.
        """
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            outputs = {
                key: value.astype(np.float32, copy=False)
                for key, value in self._outputs(rows, shared).items()
            }
        return self._checked(outputs)

    def run_as_it_is(self, rows: Feeds, shared: Feeds = _NOTHING) -> dict[str, NDArray[Any]]:
        """The same, with every output in the dtype that the engine gives it: for other engines."""
        return self._checked(self._outputs(rows, shared))

    def _outputs(self, rows: Feeds, shared: Feeds) -> dict[str, NDArray[Any]]:
        batch = self._count(rows)
        given = {name: self._cast(name, array) for name, array in rows.items()}
        fixed = self._fixed(next(iter(rows)))
        size = fixed or self.at_once or batch
        parts = [
            self.session.run({**_part(given, start, size, pad=fixed is not None), **shared})
            for start in range(0, batch, size)
        ]
        return {key: _joined([part[key] for part in parts])[:batch] for key in parts[0]}

    def _count(self, rows: Feeds) -> int:
        counts = {name: len(array) for name, array in rows.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            got = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ShapeError(f"{self.name}: inputs need the same number of rows; got {got or 0}")
        return next(iter(counts.values()))

    def _cast(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        spec = self.component.inputs.get(name)
        if spec is None or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            return array  # for the session to refuse
        return array.astype(spec.dtype, copy=False)

    def _fixed(self, name: str) -> int | None:
        """The number of rows that the engine is fixed to, or None."""
        spec = self.component.inputs.get(name)
        if spec is None or not spec.shape:
            raise ShapeError(f"{self.name}: engine has no input {name!r} with rows")
        return spec.shape[0] if isinstance(spec.shape[0], int) else None

    def _checked(self, outputs: dict[str, NDArray[_T]]) -> dict[str, NDArray[_T]]:
        for key, value in outputs.items():
            if not np.isfinite(value).all():
                raise BackendError(
                    f"{self.name}: output {key} holds NaN or infinity: its precision does not suit "
                    "this model, or the weights are damaged; build again with --precision fp32"
                )
        return outputs


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _part(rows: Feeds, start: int, size: int, *, pad: bool) -> dict[str, NDArray[np.generic]]:
    """Rows start to start + size of every input; with pad, the last one fills up what lacks."""
    parts = {key: array[start : start + size] for key, array in rows.items()}
    return {key: _padded(array, size) for key, array in parts.items()} if pad else parts


def _padded(array: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    missing = size - len(array)
    return np.concatenate([array, array[-1:].repeat(missing, axis=0)]) if missing else array
