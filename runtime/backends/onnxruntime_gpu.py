"""ONNX Runtime on NVIDIA GPUs: its providers for CUDA, TensorRT, and TensorRT for RTX.

The engine is the ONNX file. TensorRT builds its own engines when a session is loaded, and keeps
them in a folder beside the ONNX file, ENGINE.cache, which may be deleted at any time; if it cannot
be written, each load builds anew. With several ranges of sizes, TensorRT for RTX builds for each,
and TensorRT for one range that encloses them all.

Only shape arithmetic runs on the CPU: a graph with other operators that a provider lacks is
refused.

Options of all three:

* gpu: number of the GPU (0).
* graphs: False launches each kernel separately instead of replaying CUDA graphs. One graph is
  captured for each size; the last few are kept.
* threads, profile: as on the CPU. Profiling disables CUDA graphs, and the search of algorithms,
  which would count as a layer's time. Kernels are waited for one by one, unless the process has
  used the GPU before: the library's times are the host's.

Options of one provider, which the others ignore:

* CUDA: nhwc (channels last), search (of convolution algorithms: EXHAUSTIVE, HEURISTIC or DEFAULT),
  most_workspace (False limits their workspace to 32 MB), tf32, memory (limit in MB for weights and
  activations), tight (the arena grows by the requested size instead of doubling).
* TensorRT: level (builder optimization, 0 to 5), workspace (MB), sparse, hardware_compatible (with
  GPUs from Ampere on).
* TensorRT for RTX: workspace (MB), weight_streaming (budget of GPU memory for weights, such as
  512M or 50%).

Sources: the provider options in ONNX Runtime's documentation, and tensorrt_rtx_provider_options.h
of the package onnxruntime-ep-nv-tensorrt-rtx.
"""

import contextlib
import ctypes
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime as ort

from latentforge.runtime import backends
from latentforge.runtime.backends import BACKENDS, CACHE, Options, Report
from latentforge.runtime.backends.ort import ort_session
from latentforge.runtime.backends.ort.device_memory import GPU_LOCK, Place
from latentforge.runtime.backends.ort.device_session import DeviceSession
from latentforge.runtime.errors import BackendError, DeviceError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import bounding_range

__all__ = ["OPTIONS", "SUFFIX", "compile", "load", "provider_options", "unsupported_operators"]

OPTIONS: dict[str, type] = {
    **dict.fromkeys(("threads", "gpu", "memory", "level", "workspace"), int),
    **dict.fromkeys(("profile", "graphs", "nhwc", "most_workspace", "tf32", "tight"), bool),
    **dict.fromkeys(("sparse", "hardware_compatible"), bool),
    **dict.fromkeys(("search", "weight_streaming"), str),
}
SUFFIX = ".onnx"

_log = escaping_logger(__name__)

_ALLOWED = {"search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"), "level": range(6)}
_MEGABYTES = ("memory", "workspace")
_SHAPE_OPERATORS = frozenset(
    """
    Add And Cast Ceil Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater
    Identity Less Max Min Mod Mul Not Or Range ReduceProd Reshape Shape Size Slice Squeeze Sub
    Unsqueeze Where
    """.split()
)
"""Shape arithmetic, which ONNX Runtime leaves on the CPU; CUDA has it for real tensors."""

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True, kw_only=True)
class _Provider:
    """Execution provider of ONNX Runtime.

    Attributes:
        name: in ONNX Runtime.
        options: names of our options in the provider's options.
        cache: provider options that take the cache folder.
        cache_switches: provider options to turn on with a cache folder.
        profiles: prefix of the provider options for ranges of sizes; empty if it takes any size.
        multiple_profiles: True if it builds for each of several ranges.
    """

    name: str
    options: Mapping[str, str]
    cache: tuple[str, ...] = ()
    cache_switches: tuple[str, ...] = ()
    profiles: str = ""
    multiple_profiles: bool = False


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
        multiple_profiles=True,
    ),
}


def provider_options(component: Component, options: Options, folder: Path | None) -> dict[str, str]:
    """Translate our options into those of the component's provider.

    Args:
        component: its backend selects the provider, and its shapes are the provider's profiles.
        options: ours.
        folder: cache folder for the provider's own engines; None if there is none.
    """
    provider = _PROVIDERS[component.backend]
    translated = {
        name: _text(option, options[option])
        for option, name in provider.options.items()
        if option in options
    }
    if component.backend == "onnxruntime-cuda" and options.get("tight"):
        translated["arena_extend_strategy"] = "kSameAsRequested"
    if component.backend == "onnxruntime-tensorrt":
        # the provider allows float32 alone by default
        kinds = [kind for kind in ("fp16", "int8") if kind in component.precision]
        translated |= {f"trt_{kind}_enable": "1" for kind in kinds}
    if folder is not None:
        translated |= dict.fromkeys(provider.cache, str(folder))
        translated |= dict.fromkeys(provider.cache_switches, "1")
    return translated | (_profiles(component, provider) if provider.profiles else {})


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(value << 20 if name in _MEGABYTES else value)


def _profiles(component: Component, provider: _Provider) -> dict[str, str]:
    """Return the min, opt and max shapes of the inputs that have free dimensions."""
    backends.check_ranges(component)
    if not component.free_dimensions:
        return {}
    separate = provider.multiple_profiles
    profiles = component.shapes if separate else (bounding_range(component.shapes),)
    free = {n: s for n, s in component.inputs.items() if any(isinstance(d, str) for d in s.shape)}
    options = {"nv_multi_profile_enable": "1"} if len(profiles) > 1 else {}
    for bound in ("min", "opt", "max"):
        sizes = [{name: getattr(r, bound) for name, r in shapes.items()} for shapes in profiles]
        options[f"{provider.profiles}_{bound}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, spec.resolve(profile)))}"  # such as sample:1x4x64x64
            for profile in sizes
            for name, spec in free.items()
        )
    return options


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Copy the graph and its weights, and make the cache folder: see Backend.compile()."""
    backends.check_options(options, OPTIONS, _ALLOWED)
    provider_options(component, options, None)
    backends.copy_graph(onnx, target, component)
    _cache_folder(target, component)
    return {}


def _cache_folder(engine: Path, component: Component) -> Path | None:
    """Return the cache folder beside an engine; None if there is none or it is read-only."""
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
    """Load an ONNX file on a GPU; TensorRT builds its engine unless the cache folder has it.

    Raises:
        BackendError: the provider is not installed, or refuses the graph.
        DeviceError: there is no GPU that it can use.
        SettingsError: there is no such option, or no range for a free dimension.
    """
    backends.check_options(options, OPTIONS, _ALLOWED)
    options = _completed(options)
    _check_installed(component.backend)
    with GPU_LOCK, _awaited_kernels() if options.get("profile") else contextlib.nullcontext():
        _check_gpu(component.backend, options.get("gpu", 0))
        _load_libraries(component.backend)
        try:
            return _open(path, component, options)
        except BackendError as error:
            if not options["graphs"] or "graph capture" not in str(error):
                raise
        _log.info("%s: CUDA graphs cannot capture it, so kernels are launched one by one", path)
        return _open(path, component, {**options, "graphs": False})


def _completed(options: Options) -> Options:
    """Return options with the defaults that depend on others."""
    if not options.get("profile"):
        return {"graphs": True, **options}
    return {"search": "HEURISTIC", **options, "graphs": False}


@contextlib.contextmanager
def _awaited_kernels() -> Iterator[None]:
    """Context manager in which the driver, if it starts, lets each launch wait for its kernel."""
    name = "CUDA_LAUNCH_BLOCKING"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _open(path: Path, component: Component, options: Options) -> DeviceSession:
    provider = provider_options(component, options, _cache_folder(path, component))
    settings = ort_session.new_settings(options)
    ort_session.fix_sizes(settings, path, component)
    place, providers = _configure(settings, component.backend, options.get("gpu", 0), provider)
    record = ort_session.LayerRecording(settings) if options.get("profile") else None
    try:
        session = ort_session.open_session(path, settings, providers)
        ort_session.check_outputs(session, component, path)
        _check_nodes(session, component)
    except BackendError as error:
        if record is not None:
            record.layers(None)
        if "disabled by the user" not in str(error):
            raise
        raise BackendError(f"{_not_started(component)}; or {_unsupported(component)}") from error
    return DeviceSession(session, component, place, graphs=options["graphs"], record=record)


def _configure(
    settings: ort.SessionOptions, backend: str, index: int, provider: Mapping[str, str]
) -> tuple[Place, list[Any]]:
    """Configure settings for a provider; return the device of its tensors and the provider list."""
    if _PROVIDERS[backend].profiles:  # TensorRT must get the whole graph, unchanged
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:  # shapes are computed on the CPU, so the fallback stays on: see unsupported_operators()
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if backend != "onnxruntime-tensorrt-rtx":
        return Place(index=index), [(_PROVIDERS[backend].name, dict(provider))]
    device = _plugin_device(index)
    settings.add_provider_for_devices([device], dict(provider))
    return Place(memory=device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)), []


def _check_nodes(session: ort.InferenceSession, component: Component) -> None:
    """Raise unless the provider started and runs all of the graph except shape arithmetic."""
    provider = _PROVIDERS[component.backend]
    if provider.name not in session.get_providers():
        raise DeviceError(_not_started(component))
    if not provider.profiles and (operators := unsupported_operators(session, provider.name)):
        raise BackendError(_unsupported(component, ", ".join(operators)))


def unsupported_operators(session: ort.InferenceSession, provider: str) -> list[str]:
    """Return the operators that other providers run, except shape arithmetic.

    The session must record assignments: ``session.record_ep_graph_assignment_info``.
    """
    subgraphs = session.get_provider_graph_assignment_info()
    nodes = [node for part in subgraphs if part.ep_name != provider for node in part.get_nodes()]
    return sorted({node.op_type for node in nodes} - _SHAPE_OPERATORS)


def _not_started(component: Component) -> str:
    name = _PROVIDERS[component.backend].name
    return (
        f"onnxruntime could not start {name} for {component.file}: it needs the CUDA, cuDNN and "
        "TensorRT libraries that it was built for, on LD_LIBRARY_PATH"
    )


def _unsupported(component: Component, operators: str = "operators") -> str:
    target = component.backend.removeprefix("onnxruntime-")
    return (
        f"{component.file} has {operators} that {component.backend} would run on the CPU: optimize "
        f"the exported engines with --target {target}, or with another recipe if they are"
    )


def _check_installed(backend: str) -> None:
    ort.set_default_logger_severity(ort_session.LOG_NOTHING)  # it would print what is missing
    if backend == "onnxruntime-tensorrt-rtx":
        _plugin(backend)
    elif _PROVIDERS[backend].name not in ort.get_available_providers():
        raise BackendError(
            f"{backend}: this onnxruntime is for the CPU, and excludes the one for GPUs: "
            f"pip uninstall onnxruntime, then pip install 'latentforge[{BACKENDS[backend].extra}]'"
        )


def _check_gpu(backend: str, index: int) -> None:
    count = _gpu_count()
    if count <= index:
        available = f"there are {count}" if count else "there is none here"
        raise DeviceError(f"{backend} needs an NVIDIA GPU {index} with its driver, and {available}")


def _gpu_count() -> int:
    """Return the number of GPUs that the driver sees."""
    count = ctypes.c_int()
    with contextlib.suppress(OSError):  # there is no driver
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        return 0 if failed else count.value
    return 0


def _load_libraries(backend: str) -> None:
    """Load CUDA, cuDNN and TensorRT from pip's packages, where the provider does not search."""
    if backend == "onnxruntime-tensorrt-rtx":
        return  # the plugin brings its own
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which libraries it does not find
        ort.preload_dlls(directory="")
    if backend == "onnxruntime-tensorrt":
        with contextlib.suppress(ImportError):
            import_module("tensorrt")


def _plugin(backend: str) -> Any:
    try:
        return import_module(_PLUGIN)
    except ImportError as error:
        raise backends.not_installed(backend, error) from error


@cache
def _registered() -> str:
    """Register the plugin with ONNX Runtime, once per process, and return its provider's name."""
    plugin = _plugin("onnxruntime-tensorrt-rtx")
    name = str(plugin.get_ep_name())
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        raise DeviceError(
            f"onnxruntime refuses {_PLUGIN}: {ort_session.error_message(error)}"
        ) from error
    return name


def _plugin_device(index: int) -> Any:
    name = _registered()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if index >= len(devices):
        raise DeviceError(
            f"TensorRT for RTX can use {len(devices)} of the GPUs here, and GPU {index} was "
            "requested: it supports GeForce RTX 30 and later; use onnxruntime-tensorrt for others"
        )
    return devices[index]
