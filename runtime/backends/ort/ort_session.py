"""Sessions of ONNX Runtime: settings, opening, profiling, and what a copied graph needs."""

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnxruntime as ort

from latentforge.runtime.backends import NO_MEMORY, Options
from latentforge.runtime.backends.ort.onnx_header import input_dimensions
from latentforge.runtime.backends.session import LayerTime
from latentforge.runtime.backends.signature import check_signature
from latentforge.runtime.cleanups import temporary_folder
from latentforge.runtime.errors import BackendError
from latentforge.runtime.machine import default_threads
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import DTYPES
from latentforge.runtime.text import one_line

__all__ = [
    "LOG_NOTHING",
    "LayerRecording",
    "check_outputs",
    "error_message",
    "fix_sizes",
    "fixed_sizes",
    "new_settings",
    "open_session",
    "register_operators",
]

LOG_NOTHING = 4
"""Log severity above all errors: each error reaches us as an exception and is reported once."""

_NAMES = {"float32": "float", "float64": "double"}
_DTYPES = {f"tensor({_NAMES.get(dtype, dtype)})": dtype for dtype in DTYPES}
"""Numpy's names of the library's types; it has more, such as sequences and strings."""


class LayerRecording:
    """Time of each layer of a session, which the library writes to a temporary folder.

    Reading the recording deletes the folder: read it once, even if nobody needs it.
    """

    def __init__(self, settings: ort.SessionOptions) -> None:
        self._open: ExitStack | None = ExitStack()
        self._folder = self._open.enter_context(temporary_folder("latentforge-profile-"))
        settings.enable_profiling = True
        settings.profile_file_prefix = str(self._folder / "events")

    def layers(self, session: ort.InferenceSession | None) -> list[LayerTime]:
        """End the recording and return it; empty the second time, or without a session."""
        opened, self._open = self._open, None
        if opened is None:
            return []
        with opened:  # a full disk cuts the file off
            try:
                events = json.loads(Path(session.end_profiling()).read_bytes()) if session else []
                return _layer_times(events)
            except (OSError, ValueError) as error:
                raise BackendError(f"cannot read the profile of onnxruntime: {error}") from error


def _layer_times(events: list[dict[str, Any]]) -> list[LayerTime]:
    """Sum ONNX Runtime's kernel events, in microseconds, by node."""
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            seconds[name, event["args"]["op_name"]] += event["dur"] / 1e6
    return [LayerTime(name, operator, total) for (name, operator), total in seconds.items()]


def new_settings(options: Options) -> ort.SessionOptions:
    """Return settings of a session that prints nothing, with the threads of the options."""
    settings = ort.SessionOptions()
    settings.log_severity_level = LOG_NOTHING
    settings.intra_op_num_threads = options.get("threads", 0) or default_threads()
    return settings


def register_operators(settings: ort.SessionOptions, library: Path) -> None:
    """Give a session's settings the operators of a library; BackendError if that is refused."""
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:  # the library's errors share no base class
        raise BackendError(f"onnxruntime refuses {library}: {error_message(error)}") from error


def open_session(
    path: Path, settings: ort.SessionOptions, providers: Sequence[Any]
) -> ort.InferenceSession:
    """Load a graph on these providers and no others; BackendError if the library refuses it."""
    try:
        # with the fallback on, some errors are printed and others end in a session on the CPU
        return ort.InferenceSession(path, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's errors share no base class
        raise BackendError(f"onnxruntime refuses {path}: {error_message(error)}") from error


def check_outputs(session: ort.InferenceSession, component: Component, path: Path) -> None:
    """Raise BackendError if names or types of a graph's outputs are not those of the component.

    Their shapes in the file may be wrong, which the library tolerates: each run checks them.
    """
    types = {output.name: output.type for output in session.get_outputs()}
    found = {name: (_DTYPES.get(type_, type_), None) for name, type_ in types.items()}
    check_signature(f"{path}: output", component.outputs, found, further=True)


def error_message(error: BaseException) -> str:
    """Return the message of one of the library's errors on one line; NO_MEMORY if it is that."""
    text = one_line(error, limit=None)
    return NO_MEMORY if "bad_alloc" in text or "Failed to allocate memory" in text else text


def fix_sizes(settings: ort.SessionOptions, onnx: Path, component: Component) -> None:
    """Fix the free dimensions of a graph that have a fixed size in the component."""
    for name, size in fixed_sizes(onnx, component).items():
        settings.add_free_dimension_override_by_name(name, size)


def fixed_sizes(onnx: Path, component: Component) -> dict[str, int]:
    """Return the dimensions that are free in a graph but have a fixed size in the component."""
    sizes: dict[str, int] = {}
    for name, dimensions in input_dimensions(onnx):
        spec = component.inputs.get(name)
        if spec is None or len(spec.shape) != len(dimensions):
            continue  # compiling or running it is refused later, with a better message
        pairs = zip(dimensions, spec.shape, strict=True)
        sizes |= {free: size for free, size in pairs if free and isinstance(size, int)}
    return sizes
