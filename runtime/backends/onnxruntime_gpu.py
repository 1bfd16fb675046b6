"""ONNX Runtime on NVIDIA GPUs, by its providers for CUDA, TensorRT, and TensorRT for RTX.

The engine is the ONNX file. TensorRT builds what it runs when a session is loaded, and keeps that
in a folder beside the engine, ENGINE.cache, which may be deleted at any time; where it cannot be
written, each load builds anew. Of several ranges of sizes, TensorRT for RTX builds for each, and
TensorRT for one that holds them all.

Nothing runs on the CPU but arithmetic on shapes: a graph with other operators that a provider
lacks is refused.

Options of all three:

* gpu: the GPU's number (0).
* graphs: False launches each kernel by itself instead of replaying a recording of them. One is made
  for each size, of which the last few are kept.
* threads, profile: as on the CPU. While layers are timed there are no graphs.

Each provider takes its own of these and overlooks the others:

* CUDA: nhwc (channels last), search (of convolutions: EXHAUSTIVE, HEURISTIC or DEFAULT),
  most_workspace (False lets them use 32 MB alone), tf32, memory (MB of weights and activations),
  tight (memory grows by what is asked for instead of doubling).
* TensorRT: level (of the builder's optimization, 0 to 5), workspace (MB), sparse,
  hardware_compatible (with GPUs from Ampere on).
* TensorRT for RTX: workspace (MB), weight_streaming (what weights may take of the GPU's memory,
  such as 512M or 50%).

Sources: the provider options of ONNX Runtime's documentation, and tensorrt_rtx_provider_options.h
of the package onnxruntime-ep-nv-tensorrt-rtx.
"""

import contextlib
import ctypes
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime as ort

from latentforge.runtime.backends import (
    BACKENDS,
    CACHE,
    Options,
    Report,
    check_options,
)
from latentforge.runtime.backends.ort.library import (
    LOG_NOTHING,
    TURN,
    DeviceSession,
    LayerRecording,
    Place,
    copy_graph,
    error_message,
    fixed_sizes,
    new_settings,
    open_session,
)
from latentforge.runtime.errors import BackendError, DeviceError, SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Shapes, bounding_range

__all__ = [
    "OPTIONS",
    "SUFFIX",
    "compile",
    "left_over",
    "load",
    "provider_options",
]

OPTIONS: dict[str, type] = {
    "threads": int,
    "profile": bool,
    "gpu": int,
    "graphs": bool,
    "nhwc": bool,
    "search": str,
    "most_workspace": bool,
    "tf32": bool,
    "memory": int,
    "tight": bool,
    "level": int,
    "workspace": int,
    "sparse": bool,
    "hardware_compatible": bool,
    "weight_streaming": str,
}
SUFFIX = ".onnx"

_log = logging.getLogger(__name__)

_SEARCHES = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
_MOST_LEVEL = 5
_MEGABYTES = ("memory", "workspace")
_SHAPE_OPERATORS = frozenset(
    """
    Add And Cast Ceil Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater
    Identity Less Max Min Mod Mul Not Or Range ReduceProd Reshape Shape Size Slice Squeeze Sub
    Unsqueeze Where
    """.split()
)
"""What ONNX Runtime leaves on the CPU of its own accord: CUDA has all of these for real tensors."""

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True, kw_only=True)
class _Provider:
    """One of the three.

    Attributes:
        name: that ONNX Runtime knows it by.
        options: its names for ours.
        cache: its options for the folder, and those that are set where there is one.
        profiles: the beginning of its options for ranges of sizes; nothing for one that takes any.
        several: whether it builds for each of several ranges by itself.
    """

    name: str
    options: Mapping[str, str]
    cache: tuple[str, ...] = ()
    cache_switches: tuple[str, ...] = ()
    profiles: str = ""
    several: bool = False


_PROVIDERS: Mapping[str, _Provider] = {
    "onnxruntime-cuda": _Provider(
        name="CUDAExecutionProvider",
        options={
            "gpu": "device_id",
            "graphs": "enable_cuda_graph",
            "nhwc": "prefer_nhwc",
            "search": "cudnn_conv_algo_search",
            "most_workspace": "cudnn_conv_use_max_workspace",
            "tf32": "use_tf32",
            "memory": "gpu_mem_limit",
        },
    ),
    "onnxruntime-tensorrt": _Provider(
        name="TensorrtExecutionProvider",
        options={
            "gpu": "device_id",
            "graphs": "trt_cuda_graph_enable",
            "level": "trt_builder_optimization_level",
            "workspace": "trt_max_workspace_size",
            "sparse": "trt_sparsity_enable",
            "hardware_compatible": "trt_engine_hw_compatible",
        },
        cache=("trt_engine_cache_path", "trt_timing_cache_path"),
        cache_switches=("trt_engine_cache_enable", "trt_timing_cache_enable"),
        profiles="trt_profile",
    ),
    "onnxruntime-tensorrt-rtx": _Provider(
        name="NvTensorRTRTXExecutionProvider",
        options={
            "graphs": "enable_cuda_graph",
            "workspace": "nv_max_workspace_size",
            "weight_streaming": "nv_weight_streaming_budget",
        },
        cache=("nv_runtime_cache_path",),
        profiles="nv_profile",
        several=True,
    ),
}


def provider_options(component: Component, options: Options, folder: Path | None) -> dict[str, str]:
    """What a provider is told, in its own words.

    Args:
        component: its backend says which provider.
        options: ours.
        folder: for what it builds; None where it cannot keep anything.

    Raises:
        SettingsError: a provider that has to know of ranges is not told of one.
    """
    provider = _PROVIDERS[component.backend]
    told = {
        name: _text(ours, options[ours])
        for ours, name in provider.options.items()
        if ours in options
    }
    if component.backend == "onnxruntime-cuda" and options.get("tight"):
        told["arena_extend_strategy"] = "kSameAsRequested"
    if component.backend == "onnxruntime-tensorrt":
        told |= _precisions(component.precision)
    if folder is not None:
        told |= dict.fromkeys(provider.cache, str(folder))
        told |= dict.fromkeys(provider.cache_switches, "1")
    return told | (_profiles(component, provider) if provider.profiles else {})


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(value << 20 if name in _MEGABYTES else value)


def _precisions(precision: str) -> dict[str, str]:
    """Permission to compute as a graph says: without it, this provider computes in float32."""
    return {f"trt_{kind}_enable": "1" for kind in ("fp16", "int8") if kind in precision}


def _profiles(component: Component, provider: _Provider) -> dict[str, str]:
    """The least, usual and most sizes of the inputs that have any freedom left."""
    known = {name for shapes in component.shapes for name in shapes}
    if missing := [name for name in component.free_dimensions if name not in known]:
        raise SettingsError(
            f"{component.file}: nothing says how large its {missing[0]} is, which "
            f"{component.backend} has to know: compile it for sizes"
        )
    if not component.free_dimensions:
        return {}
    every = component.shapes if provider.several else (bounding_range(component.shapes),)
    kinds = {"min": "min", "opt": "opt", "max": "max"}
    told = {
        f"{provider.profiles}_{kind}_shapes": ",".join(_inputs_at(component, every, which))
        for kind, which in kinds.items()
    }
    return told | ({"nv_multi_profile_enable": "1"} if len(every) > 1 else {})


def _inputs_at(component: Component, every: Sequence[Shapes], which: str) -> list[str]:
    """Inputs as ``name:1x4x64x64``, for each of the ranges in turn."""
    free = {
        name: spec
        for name, spec in component.inputs.items()
        if any(isinstance(size, str) for size in spec.shape)
    }
    sizes = [{name: getattr(r, which) for name, r in shapes.items()} for shapes in every]
    return [
        f"{name}:{'x'.join(map(str, spec.resolve(each)))}"
        for each in sizes
        for name, spec in free.items()
    ]


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Copy the graph and its weights, and make the folder for what is built of them at load."""
    check_options(options, OPTIONS)
    _check_values(options)
    provider_options(component, options, None)
    copy_graph(onnx, target, component)
    _folder(target, component)
    return {}


def _check_values(options: Options) -> None:
    if (search := options.get("search", "DEFAULT")) not in _SEARCHES:
        raise SettingsError(f"backend option search is one of {', '.join(_SEARCHES)}, not {search}")
    if (level := options.get("level", 0)) > _MOST_LEVEL:
        raise SettingsError(f"backend option level is at most {_MOST_LEVEL}, not {level}")


def _folder(engine: Path, component: Component) -> Path | None:
    """The folder for what a provider builds of an engine, where it builds and that can be kept."""
    if not _PROVIDERS[component.backend].cache:
        return None
    folder = engine.with_name(engine.name + CACHE)
    try:
        folder.mkdir(exist_ok=True)
        (folder / ".written").touch()
        (folder / ".written").unlink()
    except OSError:
        return None
    return folder


def load(path: Path, component: Component, options: Options) -> DeviceSession:
    """Load an ONNX file on a GPU; TensorRT builds it, unless the folder beside it has it already.

    Raises:
        BackendError: the provider is not installed, or refuses the graph.
        DeviceError: there is no GPU that it can use.
        SettingsError: there is no such option, or no range for a free dimension.
    """
    check_options(options, OPTIONS)
    _check_values(options)
    graphs = options.get("graphs", True) and not options.get("profile")
    folder = _folder(path, component)
    told = provider_options(component, {**options, "graphs": graphs}, folder)
    _check_installed(component.backend)
    _check_gpu(component.backend, options.get("gpu", 0))
    _load_libraries(component.backend)
    with TURN:
        try:
            return _opened(path, component, options, told, graphs=graphs)
        except BackendError as error:
            if not graphs or "graph capture" not in str(error):
                raise
        _log.info("%s: no graphs can be recorded of it, so kernels are launched singly", path)
        off = provider_options(component, {**options, "graphs": False}, folder)
        return _opened(path, component, options, off, graphs=False)


def _opened(
    path: Path, component: Component, options: Options, told: Mapping[str, str], *, graphs: bool
) -> DeviceSession:
    settings = new_settings(options)
    for name, size in fixed_sizes(path, component).items():
        settings.add_free_dimension_override_by_name(name, size)
    place, providers = _provide(settings, component.backend, options.get("gpu", 0), told)
    record = LayerRecording(settings) if options.get("profile") else None
    try:
        session = open_session(path, settings, providers)
        _check_nodes(session, component)
    except BackendError as error:
        if record is not None:
            record.layers(None)
        if "disabled by the user" in str(error):
            raise BackendError(f"{_not_started(component)}; or {_left_over(component)}") from error
        raise
    return DeviceSession(session, component, place, graphs=graphs, record=record)


def _provide(
    settings: ort.SessionOptions, backend: str, index: int, told: Mapping[str, str]
) -> tuple[Place, list[Any]]:
    """Set a session up for a provider: where its tensors lie, and what to open it with."""
    if _PROVIDERS[backend].profiles:  # what TensorRT gets is to be as it is, and whole
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:  # shapes are computed on the CPU, so that cannot be switched off: see left_over
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if backend != "onnxruntime-tensorrt-rtx":
        return Place(index=index), [(_PROVIDERS[backend].name, dict(told))]
    device = _plugin_device(index)
    settings.add_provider_for_devices([device], dict(told))
    return Place(memory=device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)), []


def _check_nodes(session: ort.InferenceSession, component: Component) -> None:
    """Raise unless the provider started, and got all of the graph but arithmetic on shapes."""
    provider = _PROVIDERS[component.backend]
    if provider.name not in session.get_providers():
        raise DeviceError(_not_started(component))
    if not provider.profiles and (lacking := left_over(session, provider.name)):
        raise BackendError(_left_over(component, ", ".join(lacking)))


def left_over(session: ort.InferenceSession, provider: str) -> list[str]:
    """The operators that another provider got, but for those that compute shapes.

    The session has to record that: ``session.record_ep_graph_assignment_info``.
    """
    parts = session.get_provider_graph_assignment_info()
    nodes = [node for part in parts if part.ep_name != provider for node in part.get_nodes()]
    return sorted({node.op_type for node in nodes} - _SHAPE_OPERATORS)


def _not_started(component: Component) -> str:
    name = _PROVIDERS[component.backend].name
    return (
        f"onnxruntime could not start {name} for {component.file}: it needs the CUDA, cuDNN and "
        "TensorRT libraries that it was built for, on LD_LIBRARY_PATH"
    )


def _left_over(component: Component, what: str = "operators") -> str:
    target = component.backend.removeprefix("onnxruntime-")
    return (
        f"{component.file} has {what} that {component.backend} would leave to the CPU: optimize "
        f"the exported engines with --target {target}, and by another recipe if that was done"
    )


def _check_installed(backend: str) -> None:
    ort.set_default_logger_severity(LOG_NOTHING)  # which says on its own what is missing
    if backend == "onnxruntime-tensorrt-rtx":
        _plugin(backend)
    elif _PROVIDERS[backend].name not in ort.get_available_providers():
        raise BackendError(
            f"{backend}: this onnxruntime is for the CPU, and excludes the one for GPUs: "
            f"pip uninstall onnxruntime, then pip install 'latentforge[{BACKENDS[backend].extra}]'"
        )


def _check_gpu(backend: str, index: int) -> None:
    count = _count()
    if count <= index:
        there = f"there are {count}" if count else "there is none here"
        raise DeviceError(f"{backend} needs an NVIDIA GPU {index} with its driver, and {there}")


def _count() -> int:
    """How many GPUs the driver sees."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _load_libraries(backend: str) -> None:
    """Load CUDA, cuDNN and TensorRT where pip put them: the provider looks there only by luck."""
    if backend == "onnxruntime-tensorrt-rtx":
        return  # brings its own
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls(directory="")
    if backend == "onnxruntime-tensorrt":
        with contextlib.suppress(ImportError):
            import_module("tensorrt")


def _plugin(backend: str) -> Any:
    try:
        return import_module(_PLUGIN)
    except ImportError as error:
        hint = f"pip install 'latentforge[{BACKENDS[backend].extra}]'"
        raise BackendError(f"{backend} is not installed ({error}): {hint}") from error


@cache
def _registered() -> str:
    """Make ONNX Runtime know the plugin, once in a process; returns its provider's name."""
    plugin = _plugin("onnxruntime-tensorrt-rtx")
    name = str(plugin.get_ep_name())
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        raise DeviceError(f"onnxruntime refuses {_PLUGIN}: {error_message(error)}") from error
    return name


def _plugin_device(index: int) -> Any:
    name = _registered()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if index >= len(devices):
        raise DeviceError(
            f"TensorRT for RTX can use {len(devices)} of the GPUs here, and GPU {index} is "
            "asked for: it serves GeForce RTX 30 and later, and onnxruntime-tensorrt the others"
        )
    return devices[index]
