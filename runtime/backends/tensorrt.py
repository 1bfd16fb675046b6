"""TensorRT, and TensorRT for RTX: engines for NVIDIA GPUs.

The two libraries have one API under two names. ``tensorrt`` times kernels on the GPU of this
machine and builds an engine for that GPU; ``tensorrt_rtx`` builds without a GPU, and compiles
kernels for the GPU that it finds at load. Networks are strongly typed: tensors have the precision
of the graph.

Options of compile:

* workspace: maximum scratch memory of a layer, in megabytes; no limit by default.
* level: of the builder's optimization, from 0, fastest to build, to 5, fastest to run; the
  library's default if not given.
* sparse: use 2:4 structured sparsity of weights.
* weight_streaming: keep part of the weights in host memory if GPU memory is too small.
* strip: build the engine without weights, and load them from the graph beside it.
* refit: allow weights to be replaced; without it, ``strip`` accepts the original weights only.
* capabilities (tensorrt-rtx): compute capabilities to build for, such as ``8.6,8.9``; by default
  that of this machine's GPU, or else 8.6, 8.9 and 12.0.
* hardware_compatible (tensorrt): ``same`` for all GPUs of this compute capability, or ``ampere+``.
* version_compatible (tensorrt): run on later versions of the library too. Such an engine contains
  code that runs on the host, and is loaded with ``host_code`` only.

Options of load:

* graphs: False launches each kernel separately instead of replaying one CUDA graph.
* kernels (tensorrt-rtx): for a new size, ``lazy`` compiles specialized kernels in the background,
  ``eager`` before its first run, ``none`` never.
* host_code: allow a version-compatible engine to run its host code, if you trust its author.
* profile: record the time of each layer.
* threads: accepted, without effect.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/ and
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from latentforge.runtime import backends
from latentforge.runtime.backends import BACKENDS, CACHE, Options, Report, cuda, differences
from latentforge.runtime.backends.trt import engine_builder
from latentforge.runtime.backends.trt.engine_builder import PARTS, EngineBuilder
from latentforge.runtime.backends.trt.trt_common import CHOICES, RTX, Log
from latentforge.runtime.backends.trt.trt_session import TensorrtSession
from latentforge.runtime.errors import BackendError, DeviceError, ForeignEngineError, SettingsError
from latentforge.runtime.manifest import Component

__all__ = ["OPTIONS", "SUFFIX", "compile", "load", "mismatch"]

OPTIONS: dict[str, type] = {
    **dict.fromkeys(("threads", "workspace", "level"), int),
    **dict.fromkeys(("profile", "sparse", "weight_streaming", "strip", "refit"), bool),
    **dict.fromkeys(("version_compatible", "host_code", "graphs"), bool),
    **dict.fromkeys(("capabilities", "hardware_compatible", "kernels"), str),
}
SUFFIX = ".engine"
_DEFAULT_CAPABILITIES = "8.6,8.9,12.0"  # RTX 30, 40 and 50
_REFUSED = {
    RTX: {
        "hardware_compatible": "its engines run on all GPUs that capabilities lists: use that",
        "version_compatible": "it has no runtime of older versions: build again after an upgrade",
    },
    "tensorrt": {
        "capabilities": "it builds for the GPU of this machine: use hardware_compatible, or build "
        "for tensorrt-rtx",
        "kernels": "its kernels are compiled during the build: leave it out",
    },
}


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Build an engine; with ``strip``, copy the graph and its weights beside it.

    Returns:
        The library and the compute capabilities; if built on a GPU, its name and driver too.

    Raises:
        DeviceError: the build needs a GPU, or this machine's is not supported.
        SettingsError: an option is invalid, or a free dimension has no range.
    """
    _check_options(options)
    library = import_module(BACKENDS[component.backend].library)
    gpu = _build_gpu(component.backend, options)
    capabilities = _capabilities(library, component.backend, options, gpu)
    report("reading the graph", 0, PARTS)
    builder = EngineBuilder(library, onnx, component, options)
    if component.backend == RTX:
        builder.set_capabilities(capabilities)
    plan = builder.run(target.parent / f"timing{CACHE}", report)
    try:
        target.write_bytes(plan)  # from the library's memory, without a copy
        if options.get("strip"):
            backends.copy_graph(onnx, target.with_suffix(".onnx"), component)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return {
        "library": _version(library),
        "compute capability": ", ".join(capabilities),
        **({"gpu": gpu.name, "driver": gpu.driver} if gpu else {}),
    }


def _version(library: Any) -> str:
    return f"{library.__name__} {library.__version__}"


def _check_options(options: Options) -> None:
    backends.check_options(options, OPTIONS, {**CHOICES, "level": range(6)})
    if options.get("workspace") == 0:
        raise SettingsError("workspace must be at least 1 megabyte: leave it out for no limit")


def _build_gpu(backend: str, options: Options) -> cuda.Gpu | None:
    """Return the GPU to build on, after checking that it can build with these options."""
    for name, reason in _REFUSED[backend].items():
        if options.get(name):
            raise SettingsError(f"{backend} does not take {name}: {reason}")
    gpu = cuda.find_gpu()
    needing = [name for name in ("strip", "refit") if options.get(name)]
    if gpu is None and needing:
        raise SettingsError(
            f"{needing[0]} needs a GPU to build with, and this machine has none: build on one that "
            f"does, or leave {needing[0]} out"
        )
    return gpu


def _capabilities(
    library: Any, backend: str, options: Options, gpu: cuda.Gpu | None
) -> tuple[str, ...]:
    """Return the compute capabilities to build for."""
    if backend != RTX:
        return ((gpu or _require_gpu()).capability,)
    default = gpu.capability if gpu else _DEFAULT_CAPABILITIES
    requested = (options.get("capabilities") or default).split(",")
    capabilities = tuple(dict.fromkeys(part.strip() for part in requested))
    supported = engine_builder.supported_capabilities(library)
    if missing := [capability for capability in capabilities if capability not in supported]:
        error = SettingsError if options.get("capabilities") else DeviceError
        raise error(
            f"{backend} does not support GPUs of compute capability {missing[0]!r}, only "
            f"{', '.join(supported)}: build for those, or build for data center GPUs such as "
            "Hopper, 9.0, with the backend tensorrt"
        )
    return capabilities


def _require_gpu() -> cuda.Gpu:
    try:
        return cuda.require_gpu()
    except DeviceError as error:
        raise DeviceError(f"{error}; tensorrt-rtx builds without one") from error


def load(path: Path, component: Component, options: Options) -> TensorrtSession:
    """Load an engine on the GPU, and run it once at the optimal size of each of its shapes.

    Raises:
        BackendError: the file is not an engine, or not the one that the component describes.
        DeviceError: there is no GPU.
        ForeignEngineError: it was built for another GPU, or by another version.
        SettingsError: an option is invalid.
    """
    _check_options(options)
    library = import_module(BACKENDS[component.backend].library)
    _check_file(library, path)
    if "library" not in component.device:
        raise BackendError(
            f"{path}: the manifest does not record what it was built for: compile it again"
        )
    if options.get("version_compatible") and not options.get("host_code"):
        raise BackendError(
            f"{path} is version-compatible, so it contains code that runs on the host: load it "
            "with host_code=True if you trust its author"
        )
    gpu = cuda.require_gpu()
    here = {
        "library": _version(library),
        "compute capability": gpu.capability,
        "gpu": gpu.name,
        "driver": gpu.driver,
    }
    if difference := mismatch(component.backend, component.device, here, options):
        raise ForeignEngineError(f"{component.file} was built for {difference}")
    return TensorrtSession(library, path, component, options)


def _check_file(library: Any, path: Path) -> None:
    """Refuse a file whose header is not an engine's, which the library can tell without a GPU."""
    log = Log(library)
    has_check = hasattr(library.Runtime, "get_engine_validity")  # tensorrt 10 has not
    runtime = library.Runtime(log.sink) if has_check else None
    try:
        with path.open("rb") as file:
            header = file.read(runtime.engine_header_size if runtime else 1)
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}") from error
    flaws = int(runtime.get_engine_validity(header)[1]) if runtime else 0
    if not header or flaws & int(library.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise BackendError(
            f"{path} is not an engine of {library.__name__}: it was damaged or replaced; compile "
            "again"
        )


def mismatch(
    backend: str, built: Mapping[str, str], here: Mapping[str, str], options: Options
) -> str:
    """Return the differences that keep an engine from running on this machine, in words.

    Args:
        backend: tensorrt or tensorrt-rtx.
        built: library, compute capability, gpu and driver that the engine was built for.
        here: the same of this machine.
        options: that the engine was built with.

    Returns:
        An empty string if the engine runs here. Another driver is mentioned beside other
        differences; alone it does not count.
    """
    allowed = {"driver"}
    capability = here["compute capability"]
    compatible = options.get("hardware_compatible")
    if options.get("version_compatible"):
        allowed.add("library")
    if backend == RTX or compatible:
        allowed.add("gpu")
    included = capability in built.get("compute capability", "").split(", ")
    if included or (compatible == "ampere+" and int(capability.split(".")[0]) >= 8):
        allowed.add("compute capability")
    if not differences({k: v for k, v in built.items() if k not in allowed}, here):
        return ""
    allowed.discard("driver")
    return differences({k: v for k, v in built.items() if k not in allowed}, here)
