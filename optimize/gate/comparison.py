"""Comparison of optimized engines with their source: component outputs, latents and images.

The source's runs come recorded (optimize/recording.py); gate.py checks the figures measured here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality.metrics import Perceptual, compare_images, is_constant
from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.recording import Call, CallRecording, RecordedImage
from latentforge.runtime.backends import Report
from latentforge.runtime.denoising.step_engines import StepEngines
from latentforge.runtime.errors import GateError
from latentforge.runtime.image import psnr, relative_error
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.timings import Stopwatch

__all__ = ["component_errors", "image_errors"]

Outputs = Mapping[str, NDArray[Any]]


def component_errors(
    pipeline: Pipeline, recording: CallRecording, report: Report = lambda *_: None
) -> dict[str, dict[str, float]]:
    """Run each component on inputs recorded from the source, and compare the outputs.

    Args:
        pipeline: of the optimized engines.
        recording: of the source.
        report: called with the name of a component, before it runs, and the number of those done
            and of all.

    Returns:
        By component, ``max_relative_error`` (the largest difference as a fraction of the largest
        output) and ``psnr`` in dB.

    Raises:
        BackendError: an output holds NaN or infinity.
    """
    errors = {}
    for done, (name, calls) in enumerate(recording.calls.items()):
        report(name, done, len(recording.calls))
        errors[name] = _errors([(call.outputs, _run(pipeline, name, call)) for call in calls])
    return errors


def _run(pipeline: Pipeline, name: str, call: Call) -> Outputs:
    """Return a component's outputs for a recorded call; the denoiser may be in several parts."""
    if name != "denoiser":
        return pipeline.load_engine(name).run(call.feeds)
    rows = {key: a for key, a in call.feeds.items() if key not in ("sample", "timestep")}
    timestep = float(np.ravel(call.feeds["timestep"])[0])
    denoiser = StepEngines.of(pipeline.engines).condition(rows, [timestep], Stopwatch())
    return {"out_sample": denoiser.predict(np.asarray(call.feeds["sample"], np.float32), timestep)}


def _errors(pairs: Sequence[tuple[Outputs, Outputs]]) -> dict[str, float]:
    arrays = [(expected[key], actual[key]) for expected, actual in pairs for key in expected]
    return {
        "max_relative_error": max(relative_error(a, b) for a, b in arrays),
        "psnr": min(psnr(a, b) for a, b in arrays),
    }


def image_errors(
    pipeline: Pipeline, references: Sequence[RecordedImage], gate: Gate, progress: Progress
) -> dict[str, float]:
    """Generate the recorded images again at equal seeds, and compare them.

    Returns:
        The figures of measure/quality/metrics.py, ``latents_psnr`` in dB, and the number of
        ``images``.

    Raises:
        GateError: an image has a single colour while its reference has not, or NaN occurred.
    """
    results = []
    for reference in references:
        with progress.part(f"gate: {reference.settings.prompts[0][:32]}"):
            results.append(pipeline.run(reference.settings, report=progress.step))
    candidate = [image for result in results for image in result.images]
    reference_images = [image for result in references for image in result.images]
    if is_constant(candidate) and not is_constant(reference_images):
        raise GateError("the optimized engines generate an image of a single colour")
    latents = [
        np.concatenate([reference.latents for reference in references]),
        np.concatenate([result.latents for result in results]),
    ]
    network = Perceptual(Path(gate.network)) if gate.network else None
    return {
        **compare_images(reference_images, candidate, network),
        "latents_psnr": psnr(*latents),
        "images": float(len(candidate)),
    }
