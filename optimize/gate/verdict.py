"""Run the optimized engines as the original ones were run, and measure how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality.metrics import Perceptual, compare_images, is_constant
from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.stage.recording import Call, CallRecording, spread
from latentforge.runtime.denoising.step_engines import StepEngines
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import psnr, relative_error
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.profiling import Stopwatch
from latentforge.runtime.progress import Progress

__all__ = ["component_errors", "image_errors"]

_CALLS = 4  # of each component, spread over its run

Outputs = Mapping[str, NDArray[Any]]


def component_errors(pipeline: Pipeline, recording: CallRecording) -> dict[str, dict[str, float]]:
    """Each component on what the original was given.

    Returns:
        By component ``max_relative_error``, the largest difference as a fraction of the largest
        output, and ``psnr`` in dB.

    Raises:
        BackendError: an output holds NaN or infinity.
    """
    errors = {}
    for name, calls in recording.calls.items():
        some = spread(calls, _CALLS)
        errors[name] = _errors([(call.outputs, _again(pipeline, name, call)) for call in some])
    return errors


def _again(pipeline: Pipeline, name: str, call: Call) -> Outputs:
    """What a component makes of a recorded call, be it whole or in parts."""
    if name != "denoiser":
        return pipeline.load_engine(name).run(call.feeds)
    rows = {key: a for key, a in call.feeds.items() if key not in ("sample", "timestep")}
    timestep = float(np.ravel(call.feeds["timestep"])[0])
    unet = StepEngines.of(pipeline.engines).conditioned(rows, [timestep], Stopwatch())
    return {"out_sample": unet.predict(np.asarray(call.feeds["sample"], np.float32), timestep)}


def _errors(pairs: Sequence[tuple[Outputs, Outputs]]) -> dict[str, float]:
    both = [(expected[key], got[key]) for expected, got in pairs for key in expected]
    return {
        "max_relative_error": max(relative_error(a, b) for a, b in both),
        "psnr": min(psnr(a, b) for a, b in both),
    }


def image_errors(
    pipeline: Pipeline, references: Sequence[Result], gate: Gate, progress: Progress
) -> dict[str, float]:
    """The same pictures again, at equal seeds: see metrics.py, and ``latents_psnr`` in dB.

    Raises:
        GateError: a picture is of a single colour where the original isn't, or NaN came out.
    """
    results = []
    for reference in references:
        with progress.part(f"gate: {reference.settings.prompts[0][:32]}"):
            results.append(pipeline.run(reference.settings))
    ours = [image for result in results for image in result.images]
    theirs = [image for result in references for image in result.images]
    if is_constant(ours) and not is_constant(theirs):
        raise GateError("the optimized engines make a picture of a single colour")
    latents = [np.concatenate([r.latents for r in some]) for some in (references, results)]
    network = Perceptual(Path(gate.network)) if gate.network else None
    return {
        **compare_images(theirs, ours, network),
        "latents_psnr": psnr(*latents),
        "images": float(len(ours)),
    }
