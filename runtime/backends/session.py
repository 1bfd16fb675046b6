"""Sessions: loaded engines, and the one check of what goes into them and what comes out.

Arrays of the host go in and come out: Session.run(). Sessions on a device with memory of its own
can leave an output there for the runs that take it as an input, theirs or another session's:
ResidentSession.run_resident(). The loop does so with what it only passes on (the outputs of
denoiser_prompt, the cached feature); what it computes with (the latents) goes through run().
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError, ShapeError
from latentforge.runtime.manifest import Component
from latentforge.runtime.memory_limit import limited_memory, run_memory
from latentforge.runtime.tensor import DeviceArray, Feeds, Tensor, Tensors

__all__ = ["CheckedSession", "LayerTime", "Outputs", "ResidentSession", "Run", "Session"]

Outputs = dict[str, NDArray[np.generic]]
"""Output arrays by name."""


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


class Run(NamedTuple):
    """One run of a session.

    Attributes:
        engine: the library's object, which is open.
        feeds: inputs that fit the component's specs. Arrays of the host, except in a
            ResidentSession: its own device's too.
        sizes: size of each free dimension in the feeds.
        shape_index: of the component's shapes, the one that the feeds fit; None if it has none.
        keep: outputs to leave on the device, of a ResidentSession only.
    """

    engine: Any
    feeds: Mapping[str, Any]
    sizes: Mapping[str, int]
    shape_index: int | None
    keep: Collection[str] = ()


class CheckedSession(ABC):
    """Base of the backends' sessions: checks inputs and outputs against the component's specs.

    A backend implements _run(), and extends close() and layers() where it holds resources or can
    time layers.

    Attributes:
        component: description of the engine, with the specs of its inputs and outputs.
    """

    def __init__(self, component: Component) -> None:
        self.component = component
        self._engine: Any = None  # the library's object while the session is open

    def run(self, feeds: Feeds) -> Outputs:
        """Run the engine once: see Session.run()."""
        return self._run_checked(feeds)

    def _run_checked(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        engine = self._engine  # another thread may close the session meanwhile
        if engine is None:
            raise self._closed()
        sizes, index = self.component.fit(feeds)
        try:
            outputs = self._run(Run(engine, feeds, sizes, index, keep))
        except BackendError:
            raise
        except Exception as error:  # libraries' errors share no base class
            raise self._failed(error) from error
        self._check_outputs(outputs, sizes)
        return dict(outputs)

    def layers(self) -> list[LayerTime]:
        """Return the time of each layer: see Session.layers()."""
        return []

    def close(self) -> None:
        """Free the engine: see Session.close()."""
        self._engine = None

    @abstractmethod
    def _run(self, run: Run) -> Mapping[str, Tensor]:
        """Run the library once, and return arrays that it will not write to again.

        Raises:
            BackendError: the message names the file; it reaches the caller as it is. Any other
                Exception becomes a BackendError with what _reason() says of it.
        """

    @abstractmethod
    def _reason(self, error: BaseException) -> str:
        """Return the message of a library's error, on one line."""

    def limited(self, run: Run) -> AbstractContextManager[None]:
        """Return a block in which a run on the CPU takes no more memory than its sizes need."""
        elements = sum(array.size for array in run.feeds.values())
        for spec in self.component.outputs.values():
            with suppress(ShapeError):  # reported after the run
                elements += prod(spec.resolve(run.sizes))
        return limited_memory(run_memory(elements))

    def _closed(self) -> BackendError:
        return BackendError(f"{self.component.file} is closed")

    def _failed(self, error: BaseException) -> BackendError:
        return BackendError(f"{self.component.file} failed: {self._reason(error)}")

    def _check_outputs(self, outputs: Tensors, sizes: Mapping[str, int]) -> None:
        file, specs = self.component.file, self.component.outputs
        if names := sorted(specs.keys() ^ outputs.keys()):
            raise BackendError(
                f"{file}: expected outputs {', '.join(specs)}, and the engine returned "
                f"{', '.join(outputs) or 'none'} ({', '.join(names)} differs): compile it again"
            )
        for name, spec in specs.items():
            try:
                shape = spec.resolve(sizes)
            except ShapeError as error:
                raise BackendError(f"{file}: output {name}: {error}") from error
            value = outputs[name]
            # and not a sequence or map of tensors
            is_array = isinstance(value, (np.ndarray, DeviceArray))
            if not is_array or value.dtype != np.dtype(spec.dtype) or value.shape != shape:
                raise BackendError(
                    f"{file}: output {name}: expected {spec.dtype}{list(shape)} (manifest: "
                    f"{spec}), and the engine returned {_described(value)}: it is not the engine "
                    "that its manifest describes; export or compile it again"
                )


class ResidentSession(CheckedSession):
    """Base of the sessions of devices with memory of their own, which outputs may stay in."""

    def run_resident(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Run the engine once, as run() does, and leave outputs on the device.

        Args:
            feeds: as of run(). A DeviceArray of this session's device is used where it is; that
                of another one goes through the host.
            keep: outputs to return as DeviceArray.

        Returns:
            Every output by name: those in keep on the device, the others on the host.

        Raises:
            ShapeError, BackendError: as run() does.
        """
        local = {name: self._local(tensor) for name, tensor in feeds.items()}
        return self._run_checked(local, keep)

    def _local(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DeviceArray) and not self._holds(tensor):
            return tensor.host
        return tensor

    @abstractmethod
    def _holds(self, array: DeviceArray) -> bool:
        """Return True if the array is on this session's device, and of a type that it can use."""


def _described(value: object) -> str:
    """Return dtype and shape of an output, or its Python type if it is not a tensor."""
    if not isinstance(value, (np.ndarray, DeviceArray)):
        return f"no tensor but {type(value).__name__}"
    dtype = value.dtype if value.dtype.kind in "biufc" else "text"
    return f"{dtype}{list(value.shape)}"
