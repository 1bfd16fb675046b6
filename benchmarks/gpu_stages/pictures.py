"""Pictures of the embedded checkpoint by engines in every way of running them."""

import math
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu_stages import operators
from gpu_stages.context import REFUSED, StageRecord, load_cuda

__all__ = ["IDENTICAL", "demo", "image_psnr", "judge"]

SAMPLERS = "ddim euler euler_ancestral heun dpmpp_2m dpmpp_2m_karras unipc pndm".split()
SAME_IMAGE = 30.0  # dB, in half precision
IDENTICAL = 138.1  # dB of images without a difference, instead of infinity
_PSNR = "PSNR to diffusers on the CPU"


def image_psnr(ours: Any, theirs: Any) -> float:
    """Return the PSNR of two lists of images, in dB."""
    a, b = (np.stack([np.asarray(image, float) for image in images]) for images in (ours, theirs))
    error = float(((a - b) ** 2).mean())
    return round(10 * math.log10(255**2 / error), 1) if error else IDENTICAL


def judge(stage: StageRecord, name: str, subject: str, images: int, value: float) -> None:
    """Record the PSNR of images to diffusers' in dB; a failure if they are others."""
    stage.measure(name, subject, images, value, "dB")
    if not value >= SAME_IMAGE:
        stage.fail(f"{subject}, batch {images}", f"another image: {value} dB to diffusers")


def demo(stage: StageRecord) -> None:
    """The embedded checkpoint from export to pictures, beside diffusers on the CPU."""
    load_cuda()
    for name, compare in operators.comparisons(stage.provider):
        _operator(stage, name, compare)
    for recipe in ("fp32", "fp16"):
        if engines := stage.engines("demo", "demo", recipe):
            stage.attempt(f"{recipe}: pictures", lambda e=engines, r=recipe: _pictures(stage, e, r))
            stage.attempt(f"{recipe}: ways to run", lambda e=engines, r=recipe: _ways(stage, e, r))
    if stage.dry and (made := stage.optimized("demo", "demo", "fp16", target="cuda")):
        _compile_plain(stage, "for CUDA", made, "onnxruntime-cuda")


def _operator(stage: StageRecord, name: str, compare: Callable[[], str]) -> None:
    try:
        stage.record(name, compare())
    except Exception as error:
        if stage.dry and not isinstance(error, ValueError):  # most have no kernel on a CPU
            stage.record(name, f"{type(error).__name__}: {error}")
        else:
            stage.fail(name, traceback.format_exc())


def _pictures(stage: StageRecord, engines: Path, recipe: str) -> None:
    import latentforge

    eager = _eager()
    with latentforge.load(engines) as pipe:
        for sampler in SAMPLERS[: 2 if stage.dry else None]:
            for batch in (1, 4):
                _compare(stage, f"{recipe} {sampler}", pipe, eager, sampler, batch)
        picture = pipe("a red apple", steps=2, seed=1).images[0]
        given: Mapping[str, Any] = {"image": picture, "strength": 0.6}
        _compare(stage, f"{recipe} image to image", pipe, eager, "ddim", 1, given)
        stage.attempt(f"{recipe}: two threads", lambda: _two_threads(stage, pipe, recipe))


def _eager() -> Any:
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.demo import CHECKPOINT
    from latentforge.export.reference.eager import EagerPipeline

    return EagerPipeline(open_checkpoint(str(CHECKPOINT)))


def _compare(
    stage: StageRecord,
    subject: str,
    pipe: Any,
    eager: Any,
    sampler: str,
    batch: int,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Draw images with engines and with diffusers, and judge their PSNR."""

    def draw() -> None:
        settings = {"steps": 4, "seed": 3, "sampler": sampler, "images_per_prompt": batch}
        ours = pipe("a red apple", **settings, **(given or {}))
        image = {"image": given["image"]} if given else {}
        value = image_psnr(ours.images, eager(ours.settings, **image).images)
        judge(stage, _PSNR, subject, batch, value)

    stage.attempt(f"{subject}, batch {batch}", draw)


def _two_threads(stage: StageRecord, pipe: Any, recipe: str) -> None:
    """Draw two images at once, and each alone; they have to be the same."""
    alone = [_draw(pipe, seed) for seed in (1, 2)]
    made: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda s=seed: made.update({s: _draw(pipe, s)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(np.array_equal(made.get(seed), alone[seed - 1]) for seed in (1, 2)):
        raise ValueError("images drawn at once differ from those drawn alone")
    stage.record(f"{recipe}: two threads", "the images of one")


def _draw(pipe: Any, seed: int, steps: int = 2) -> Any:
    return np.asarray(pipe("an owl", steps=steps, seed=seed).images[0])


class Unbound:
    """Session that hands the library arrays of the host, as its users do without IO binding."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        names = list(self._session.component.outputs)
        return dict(zip(names, self._session._engine.run(names, dict(feeds)), strict=True))

    def layers(self) -> list[Any]:
        return []

    def close(self) -> None:
        self._session.close()


def _ways(stage: StageRecord, engines: Path, recipe: str) -> None:
    """Time one image with CUDA graphs, without, and without IO binding; they have to be equal."""
    import latentforge

    made = engines.with_name(engines.name.removesuffix("-engines"))
    if (plain := _compile_plain(stage, recipe, made, stage.backend)) is None:
        return
    ways: Mapping[str, Callable[[], Any]] = {
        "CUDA graphs": lambda: latentforge.load(engines),
        "no CUDA graphs": lambda: latentforge.load(plain),
        "no IO binding": lambda: latentforge.load(plain, wrap_session=lambda _, s: Unbound(s)),
    }
    images = []
    for way, load in ways.items():
        with load() as pipe:
            images.append(_draw(pipe, 1))
            stage.record(f"{recipe}: {way}", f"{_seconds(pipe) * 1e3:.1f} ms an image of 8 steps")
    for way, image in zip(ways, images, strict=True):
        if not (value := image_psnr([images[0]], [image])) >= SAME_IMAGE:
            stage.fail(f"{recipe}: {way}", f"another image: {value} dB to that with CUDA graphs")


def _compile_plain(stage: StageRecord, name: str, made: Path, backend: str) -> Path | None:
    """Compile engines without CUDA graphs; a rehearsal may lack the provider to compare them."""
    plain = made.with_name(f"{made.name}-plain")
    graphs = ["--option", "graphs=false"] if backend == "onnxruntime-cuda" else []
    forge = [sys.executable, "-m", "latentforge", "compile", made, plain, "--overwrite"]
    codes = (0, REFUSED) if backend != stage.backend else (0,)
    step = f"{name}: compile without CUDA graphs"
    done = stage.command(step, *forge, "--backend", backend, *graphs, codes=codes)
    return plain if done else None


def _seconds(pipe: Any) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _draw(pipe, 1, steps=8)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
