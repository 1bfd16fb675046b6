"""TensorRT, and TensorRT for RTX: engines for NVIDIA GPUs.

The two libraries have one API under two names. ``tensorrt`` times kernels on the GPU that is here
and makes an engine for that one; ``tensorrt_rtx`` needs no GPU to build, and compiles kernels for
the one it finds when it loads. Networks are strongly typed: precision is what the graph says.

Options of compile:

* workspace: megabytes of scratch memory that a layer may take; as much as there is by default.
* level: from 0, fastest to build, to 5, fastest to run; the library's own choice by default.
* sparse: use the zeros of weights that are two in four.
* weight_streaming: keep part of the weights in the host's memory where the GPU's is too small.
* strip: leave the weights out of the engine, and fill them in at load from the graph beside it.
* refit: let weights be replaced by others; without it, ``strip`` takes the same ones alone.
* capabilities (tensorrt-rtx): the GPUs to build for by compute capability, such as ``8.6,8.9``;
  by default the one that is here, or else 8.6, 8.9 and 12.0.
* hardware_compatible (tensorrt): ``same`` for all GPUs of this compute capability, or ``ampere+``.
* version_compatible (tensorrt): run on later versions too. Such an engine holds code that runs on
  the host: it is only loaded with ``host_code``.

Options of load: graphs (False launches every kernel by itself, and not all as a CUDA graph),
kernels (tensorrt-rtx: ``lazy`` compiles kernels for a new size while others serve, ``eager`` before
it runs, ``none`` never), host_code (let a version-compatible engine run its code on the host, if
you trust whoever built it), profile (record what each layer takes). threads changes nothing.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/ and
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/.
"""

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from latentforge.runtime.backends import (
    BACKENDS,
    CACHE,
    Options,
    Report,
    check_options,
    cuda,
    differences,
)
from latentforge.runtime.backends.trt.builder import PARTS, Build, known_capabilities
from latentforge.runtime.backends.trt.library import CHOICES, RTX, Log
from latentforge.runtime.backends.trt.session import TensorrtSession
from latentforge.runtime.errors import BackendError, DeviceError, ForeignEngineError, SettingsError
from latentforge.runtime.manifest import Component

__all__ = ["OPTIONS", "SUFFIX", "compile", "load"]

OPTIONS: dict[str, type] = {
    "threads": int,
    "profile": bool,
    "workspace": int,
    "level": int,
    "sparse": bool,
    "weight_streaming": bool,
    "strip": bool,
    "refit": bool,
    "capabilities": str,
    "hardware_compatible": str,
    "version_compatible": bool,
    "host_code": bool,
    "graphs": bool,
    "kernels": str,
}
SUFFIX = ".engine"
_USUAL = "8.6,8.9,12.0"  # RTX 30, 40 and 50
_REFUSED = {
    RTX: {
        "hardware_compatible": "its engines run on all GPUs named in capabilities: give those",
        "version_compatible": "it has no runtime of older versions: build again after an upgrade",
    },
    "tensorrt": {
        "capabilities": "it builds on the GPU that is here: give hardware_compatible, or build "
        "for tensorrt-rtx",
        "kernels": "its kernels are compiled by the build: leave it out",
    },
}


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Build an engine; with ``strip``, the graph and its weights go beside it.

    Returns:
        The library and the compute capabilities, and of an engine built on a GPU that and its
        driver.

    Raises:
        BackendError: the library refuses the graph, it is not as the component says, or memory
            runs out.
        DeviceError: the build needs a GPU, or the one that is here is not served.
        SettingsError: an option that cannot be, or a free dimension without a range.
    """
    _check(options)
    library = import_module(BACKENDS[component.backend].library)
    gpu = _gpu_for(component.backend, options)
    capabilities = _capabilities(library, component.backend, options, gpu)
    report("reading the graph", 0, PARTS)
    build = Build(library, onnx, component, options)
    if component.backend == RTX:
        build.aim_at(capabilities)
    plan = build.run(target.parent / f"timing{CACHE}", report)
    try:
        target.write_bytes(plan)  # from the library's memory, without a copy
        if options.get("strip"):
            _keep_weights(onnx, target, component)
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


def _check(options: Options) -> None:
    check_options(options, OPTIONS)
    for name, choices in CHOICES.items():
        if name in options and options[name] not in choices:
            raise SettingsError(f"{name} is {' or '.join(choices)}, not {options[name]!r}")
    if options.get("level", 0) > 5:
        raise SettingsError(f"level is from 0 to 5, not {options['level']}")
    if options.get("workspace") == 0:
        raise SettingsError("workspace is in megabytes, from 1 up: leave it out for no limit")


def _gpu_for(backend: str, options: Options) -> cuda.Gpu | None:
    """The GPU to build on, once it is clear that these options can be built there."""
    for name, reason in _REFUSED[backend].items():
        if options.get(name):
            raise SettingsError(f"{backend} does not take {name}: {reason}")
    gpu = cuda.gpu()
    for name in ("strip", "refit"):
        if gpu is None and options.get(name):
            raise SettingsError(
                f"{name} needs a GPU to build with, and none is here: build on a machine that has "
                f"one, or leave {name} out"
            )
    return gpu


def _capabilities(
    library: Any, backend: str, options: Options, gpu: cuda.Gpu | None
) -> tuple[str, ...]:
    """The compute capabilities to build for."""
    if backend != RTX:
        return ((gpu or _found()).capability,)
    asked = options.get("capabilities") or (gpu.capability if gpu else _USUAL)
    wanted = tuple(dict.fromkeys(part.strip() for part in asked.split(",")))
    known = known_capabilities(library)
    if missing := [each for each in wanted if each not in known]:
        error = SettingsError if options.get("capabilities") else DeviceError
        raise error(
            f"{backend} does not serve GPUs of compute capability {missing[0]!r}, only "
            f"{', '.join(known)}: build for those, or build data center GPUs such as Hopper, 9.0, "
            "with the backend tensorrt"
        )
    return wanted


def _found() -> cuda.Gpu:
    try:
        return cuda.found()
    except DeviceError as error:
        raise DeviceError(f"{error}; tensorrt-rtx builds without one") from error


def _keep_weights(onnx: Path, target: Path, component: Component) -> None:
    shutil.copyfile(onnx, target.with_suffix(".onnx"))
    for entry in component.data:
        name = Path(entry.file).name
        shutil.copyfile(onnx.parent / name, target.parent / name)


def load(path: Path, component: Component, options: Options) -> "TensorrtSession":
    """Load an engine on the GPU, and run it once at the usual size of each of its shapes.

    Raises:
        BackendError: the file is no engine, or not the one that the component describes.
        DeviceError: there is no GPU.
        ForeignEngineError: it was built for another, or by another version.
        SettingsError: there is no such option.
    """
    _check(options)
    library = import_module(BACKENDS[component.backend].library)
    _check_file(library, path)
    if "library" not in component.device:
        raise BackendError(
            f"{path}: the manifest does not say what it was built for: compile it again"
        )
    if options.get("version_compatible") and not options.get("host_code"):
        raise BackendError(
            f"{path} is version-compatible, and so holds code that runs on the host: load it with "
            "host_code=True if you trust whoever built it"
        )
    gpu = cuda.found()
    here = {
        "library": _version(library),
        "compute capability": gpu.capability,
        "gpu": gpu.name,
        "driver": gpu.driver,
    }
    if found := mismatch(component.backend, component.device, here, options):
        raise ForeignEngineError(f"{component.file} was built for {found}")
    return TensorrtSession(library, path, component, options)


def _check_file(library: Any, path: Path) -> None:
    """Refuse what the library can tell from its first bytes, and without a GPU, to be no engine."""
    log = Log(library)
    asked = hasattr(library.Runtime, "get_engine_validity")  # which tensorrt 10 lacks
    runtime = library.Runtime(log.sink) if asked else None
    try:
        with path.open("rb") as file:
            start = file.read(runtime.engine_header_size if runtime else 1)
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}") from error
    found = int(runtime.get_engine_validity(start)[1]) if runtime else 0
    if not start or found & int(library.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise BackendError(
            f"{path} is no engine of {library.__name__}: it was damaged or replaced; compile again"
        )


def mismatch(
    backend: str, built: Mapping[str, str], here: Mapping[str, str], options: Options
) -> str:
    """What differs between the device that an engine was built for and the one here, in words.

    Empty where the engine runs here. The driver is named beside what keeps it from running, and
    does not keep it by itself.
    """
    allowed = {"driver"}
    capability = here["compute capability"]
    compatible = options.get("hardware_compatible")
    if options.get("version_compatible"):
        allowed.add("library")
    if backend == RTX or compatible:
        allowed.add("gpu")
    several = capability in built.get("compute capability", "").split(", ")
    if several or (compatible == "ampere+" and int(capability.split(".")[0]) >= 8):
        allowed.add("compute capability")
    if not differences({k: v for k, v in built.items() if k not in allowed}, here):
        return ""
    allowed.discard("driver")
    return differences({k: v for k, v in built.items() if k not in allowed}, here)
