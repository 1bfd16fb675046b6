"""All stages: devices, tests, pictures, full-size models, other engines and recipes, SDXL."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gpu_stages.context import REFUSED, StageRecord, load_cuda
from gpu_stages.full_size import BUILDS, build, compile_torch, full, xl
from gpu_stages.pictures import demo

__all__ = ["STAGES"]

VENDORS: Mapping[str, str] = {
    "onnxruntime-tensorrt": "tensorrt",
    "onnxruntime-tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
"""Package that each backend needs; ONNX Runtime lists its provider for TensorRT without it, too."""

_NO_TESTS = 5  # pytest's exit status if there are none


def devices(stage: StageRecord) -> None:
    """GPU, driver, libraries and providers, and a MatMul on each in both precisions."""
    import onnxruntime

    from latentforge.measure.hardware import describe_machine

    stage.record("machine", describe_machine())
    stage.record("libraries", _versions())
    stage.record("free disk", f"{shutil.disk_usage(stage.work).free / 2**30:.0f} GB")
    stage.attempt("nvidia-smi", lambda: _driver(stage))
    load_cuda()
    available = onnxruntime.get_available_providers()
    for provider in [stage.provider] if stage.dry else available:
        if provider == "TensorrtExecutionProvider" and find_spec("tensorrt") is None:
            stage.record(provider, "tensorrt is not installed")
            continue
        for dtype in (np.float32, np.float16):
            name = f"MatMul {provider} {np.dtype(dtype)}"
            stage.attempt(name, lambda n=name, p=provider, d=dtype: stage.record(n, _matmul(p, d)))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import onnxruntime
    import torch

    names = ("diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "msgspec", "numpy")
    found = {name: version(name) for name in names}
    cuda = f"{torch.version.cuda}, GPU: {torch.cuda.is_available()}"
    providers = ", ".join(onnxruntime.get_available_providers())
    return {
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__} (CUDA {cuda})",
        "onnxruntime": f"{onnxruntime.__version__} ({providers})",
        **found,
    }


def _driver(stage: StageRecord) -> None:
    if stage.dry:
        stage.record("nvidia-smi", "none in a rehearsal")
        return
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True)
    stage.record("nvidia-smi", done.stdout)


def _matmul(provider: str, dtype: Any) -> str:
    """Return the largest error of a product to numpy's.

    Raises:
        ValueError: the provider did not start, or computes something else.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    a, b, y = (helper.make_tensor_value_info(name, kind, [64, 64]) for name in "aby")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "m", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = {n: np.random.default_rng(i).normal(size=(64, 64)) for i, n in enumerate("ab")}
    feeds = {name: value.astype(dtype) for name, value in given.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:
        raise ValueError(f"fell back to {session.get_providers()[0]}")
    made = session.run(None, feeds)[0].astype(np.float64)
    error = np.abs(made - feeds["a"].astype(np.float64) @ feeds["b"].astype(np.float64)).max()
    if not error < (0.1 if provider != "CPUExecutionProvider" or kind != 1 else 1e-3):
        raise ValueError(f"largest error {error:.2g}")
    return f"largest error {error:.2g}"


def tests(stage: StageRecord) -> None:
    """tests/gpu by pytest, whose plugins may be missing; a failure if all of them are skipped.

    A test that hangs in a library is named, with its stack.
    """
    options = ["-v", "--no-header", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    settings = {"addopts": "--import-mode=importlib", "filterwarnings": "default"}
    settings |= {"timeout": "20", "timeout_method": "thread"}
    options += [f"--override-ini={name}={value}" for name, value in settings.items()]
    allowed = (0, _NO_TESTS) if stage.dry else (0,)
    name, words = "tests/gpu", [sys.executable, "-m", "pytest", *options, "tests/gpu"]
    if not stage.command(name, *words, codes=allowed) or stage.dry:
        return
    if " passed" not in str(stage.facts[name]).splitlines()[-1]:
        stage.fail(name, "none of the tests ran")


def others(stage: StageRecord) -> None:
    """TensorRT and the providers for it, int8, and the search of build --fast."""
    for backend in VENDORS:
        _vendor(stage, backend)
    engines = stage.engines("demo", "demo", "fp32" if stage.dry else "fp16")
    if engines:
        stage.attempt("build --fast", lambda: _search(stage, engines))
    _int8(stage)
    stage.record("fp8", "latentforge has no recipe for it")


def _search(stage: StageRecord, engines: Path) -> None:
    """Search for an acceleration plan as build --fast does, of few plans and images."""
    from latentforge.optimize.search.request import SearchRequest
    from latentforge.optimize.search.search import accelerate, summary_lines

    copied = stage.work / "demo-fast"
    shutil.copytree(engines, copied)
    request = SearchRequest(gate=("psnr=20", "images=4"), effort=1 if stage.dry else 4)
    stage.record("build --fast", "\n".join(summary_lines(accelerate(copied, request))))


def _int8(stage: StageRecord) -> None:
    """Make engines in int8, which CUDA's provider may refuse: it has not all of the operators."""
    made = stage.optimized("demo", "demo", "int8")
    if made is None:
        return
    forge = [sys.executable, "-m", "latentforge", "compile", made, stage.work / "demo-int8-engines"]
    codes = (0,) if stage.dry else (0, REFUSED)
    stage.command("demo: compile int8", *forge, "--backend", stage.backend, codes=codes)


def _vendor(stage: StageRecord, backend: str) -> None:
    """Compile for a backend and run it, if its library is installed."""
    if find_spec(VENDORS[backend]) is None:
        stage.record(backend, f"{VENDORS[backend]} is not installed")
        return
    made, engines = stage.exported("demo", "demo"), stage.work / f"demo-{backend}"
    if made is None:
        return
    forge = [sys.executable, "-m", "latentforge"]
    codes = (0, REFUSED) if stage.dry else (0,)  # the engines need a GPU
    how = ["--backend", backend, "--overwrite"]
    if stage.command(f"{backend}: compile", *forge, "compile", made, engines, *how, codes=codes):
        stage.command(f"{backend}: verify", *forge, "verify", engines, codes=codes)


STAGES: Mapping[str, Callable[[StageRecord], None]] = {
    **{step.__name__: step for step in (devices, tests, demo, full, others, xl)},
    **{f"build-{name}": build for name in BUILDS},
    "build-compile": compile_torch,
}
"""All stages in order of worth, and the builds for ``full``, which run beside those before it."""
