"""All stages: devices, tests, pictures, full-size benchmarks, vendors, recipes."""

import json
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu_stages import operators
from gpu_stages.context import ROOT, StageRecord

__all__ = ["STAGES"]

SAMPLERS = "ddim euler euler_ancestral heun dpmpp_2m dpmpp_2m_karras unipc pndm".split()
SAME_IMAGE = 30.0  # dB, in half precision
VENDORS = ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


def devices(stage: StageRecord) -> None:
    """GPU, driver, libraries and providers, and a MatMul on each in both precisions."""
    import onnxruntime

    from latentforge.measure.hardware import describe_machine

    stage.record("machine", describe_machine())
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    except OSError as error:
        smi = str(error)
    stage.record("nvidia-smi", smi)
    stage.record("onnxruntime", onnxruntime.__version__)
    for provider in onnxruntime.get_available_providers():
        for dtype in (np.float32, np.float16):
            stage.record(f"MatMul {provider} {np.dtype(dtype)}", _matmul(provider, dtype))


def _matmul(provider: str, dtype: Any) -> str:
    """Return the largest error of a product to numpy's, or why there is none."""
    import onnxruntime
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    a, b, y = (helper.make_tensor_value_info(name, kind, [64, 64]) for name in "aby")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "m", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = {n: np.random.default_rng(i).normal(size=(64, 64)) for i, n in enumerate("ab")}
    feeds = {name: value.astype(dtype) for name, value in given.items()}
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
        if session.get_providers()[0] != provider:
            return f"fell back to {session.get_providers()[0]}"
        made = session.run(None, feeds)[0].astype(np.float64)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    exact = feeds["a"].astype(np.float64) @ feeds["b"].astype(np.float64)
    return f"largest error {np.abs(made - exact).max():.2g}"


def tests(stage: StageRecord) -> None:
    """tests/gpu by pytest; without a GPU they are skipped."""
    options = ["-q", "--no-header", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    plain = ["-o", "addopts=--import-mode=importlib"]
    stage.command("pytest", sys.executable, "-m", "pytest", *options, *plain, "tests/gpu")


def demo(stage: StageRecord) -> None:
    """The embedded checkpoint from export to pictures, beside diffusers on the CPU."""
    for recipe in ("fp32", "fp16"):
        if engines := stage.engines("demo", "demo", recipe):
            _pictures(stage, engines, recipe)
    for key, error in operators.errors(stage.provider):
        failed = not stage.dry and not error.startswith("largest error")
        stage.record(key, {"code": 1, "error": error} if failed else error)


def _pictures(stage: StageRecord, engines: Path, recipe: str) -> None:
    import latentforge
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.demo import CHECKPOINT
    from latentforge.export.reference.eager import EagerPipeline

    eager = EagerPipeline(open_checkpoint(str(CHECKPOINT)))
    with latentforge.load(engines) as pipe:
        for sampler in SAMPLERS[: 2 if stage.dry else None]:
            for batch in (1, 4):
                key = f"psnr {recipe} {sampler} batch {batch}"
                stage.record(key, _attempt(lambda s=sampler, b=batch: _psnr(pipe, eager, s, b)))
        picture = pipe("a red apple", steps=2, seed=1).images[0]
        image: dict[str, Any] = {"image": picture, "strength": 0.6}
        key = f"psnr {recipe} image to image"
        stage.record(key, _attempt(lambda: _psnr(pipe, eager, "ddim", 1, **image)))
        stage.record(f"two threads {recipe}", _attempt(lambda: _threads(pipe)))
    if not stage.dry:
        plain = engines.with_name(f"{engines.name}-plain")
        made = engines.with_name(engines.name.removesuffix("-engines"))
        how = ["--backend", stage.backend, "--option", "graphs=false", "--overwrite"]
        if stage.forge(f"compile {recipe} without CUDA graphs", "compile", made, plain, *how):
            with latentforge.load(plain) as pipe:
                key = f"psnr {recipe} without CUDA graphs"
                stage.record(key, _attempt(lambda: _psnr(pipe, eager, "ddim", 1)))


def _psnr(pipe: Any, eager: Any, sampler: str, batch: int, **images: Any) -> float:
    given = {"steps": 4, "seed": 3, "sampler": sampler, "images_per_prompt": batch}
    strength = {k: v for k, v in images.items() if k == "strength"}
    ours = pipe("a red apple", **given, **images)
    theirs = eager(ours.settings, image=images.get("image")) if strength else eager(ours.settings)
    a, b = (np.stack([np.asarray(i, float) for i in r.images]) for r in (ours, theirs))
    value = round(float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9))), 1)
    if not value >= SAME_IMAGE:
        raise ValueError(f"another image: {value} dB to diffusers, expected {SAME_IMAGE:g}")
    return value


def _threads(pipe: Any) -> str:
    """Draw two images at once, and each alone; they have to be the same."""
    alone = [np.asarray(pipe("an owl", steps=2, seed=seed).images[0]) for seed in (1, 2)]
    made: dict[int, Any] = {}

    def draw(seed: int) -> None:
        made[seed] = np.asarray(pipe("an owl", steps=2, seed=seed).images[0])

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = all(np.array_equal(made.get(seed), alone[seed - 1]) for seed in (1, 2))
    if not same:
        raise ValueError("images drawn at once differ from those drawn alone")
    return "same images"


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception:
        return {"code": 1, "error": traceback.format_exc()}


def sd15(stage: StageRecord) -> None:
    """Stable Diffusion 1.5 at full size with random weights, beside eager and compiled."""
    _full_size(stage, "sd15", steps=50)


def deci(stage: StageRecord) -> None:
    """DeciDiffusion 1.0 with 30 steps, and its time relative to Stable Diffusion 1.5 eager."""
    _full_size(stage, "deci1", steps=30)
    seeds = stage.output / "sd15-bench.json"
    ours = stage.output / "deci1-bench.json"
    if seeds.exists() and ours.exists() and not stage.dry:
        base = json.loads(seeds.read_text())["entries"][0]["median"].get("total")
        mine = json.loads(ours.read_text())["entries"][-1]["median"].get("total")
        stage.record("times as fast as sd15 eager", base / mine if base and mine else None)


def _full_size(stage: StageRecord, name: str, *, steps: int) -> None:
    checkpoint: object = "demo"
    if not stage.dry:
        checkpoint = stage.work / name
        script = ROOT / "benchmarks" / "checkpoints.py"
        write = [sys.executable, script, name, checkpoint, "--half"]
        if not checkpoint.exists() and not stage.command(f"{name} checkpoint", *write):
            return
    engines = stage.engines("demo" if stage.dry else name, checkpoint, "fp16")
    if engines is None:
        return
    where = "cpu:fp32" if stage.dry else "cuda:fp16"
    against = [f"eager@{where}", *([] if stage.dry else [f"compile@{where}"])]
    size = [] if stage.dry else ["--height", 512, "--width", 512]
    how = ["--steps", 2 if stage.dry else steps, "--repeats", 1 if stage.dry else 6]
    files = ["--json", stage.output / f"{name}-bench.json"]
    bench = ["bench", engines, "--against", ",".join(against), "--sampler", "ddim", *size, *how]
    stage.forge(f"{name} bench", *bench, "--layers", "--batches", "4", *files)


def vendors(stage: StageRecord) -> None:
    """TensorRT, TensorRT-RTX and ONNX Runtime's providers for them, where they are installed."""
    from latentforge.runtime import backends
    from latentforge.runtime.errors import LatentforgeError

    made = stage.work / "demo-exported"
    if not made.exists() and not stage.forge("demo export", "export", "demo", made):
        return
    for backend in VENDORS:
        try:
            backends.get(backend)
        except LatentforgeError as error:
            stage.record(backend, str(error))
            continue
        to = ["--backend", backend, "--overwrite"]
        engines = stage.work / f"demo-{backend}"
        if stage.forge(f"{backend} compile", "compile", made, engines, *to):
            stage.forge(f"{backend} verify", "verify", engines)


def recipes(stage: StageRecord) -> None:
    """int8 and a search of an acceleration plan, on the embedded checkpoint."""
    stage.engines("demo", "demo", "int8")
    if not stage.dry:
        how = ["--target", stage.target, "--fast", "--effort", "4", "--overwrite"]
        stage.forge("build --fast", "build", "demo", stage.work / "demo-fast", *how)


STAGES: Mapping[str, Callable[[StageRecord], None]] = {
    step.__name__: step for step in (devices, tests, demo, sd15, deci, vendors, recipes)
}
"""All stages in order of worth."""
