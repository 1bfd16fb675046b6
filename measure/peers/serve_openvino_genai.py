"""OpenVINO GenAI: ``python serve_openvino_genai.py JOB``.

It has no converter; it loads what optimum-intel exports.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino_model import convert, model_bytes, properties
from serving import LoadedModel, PeerJob, Stages, serve, versions

__all__ = ["link"]

_SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
)


def load(job: PeerJob, directory: Path) -> LoadedModel:
    """Load its pipeline, compiled for the request's size."""
    import openvino_genai as genai

    settings = job.settings
    _check(job)
    with tempfile.TemporaryDirectory() as view:
        link(directory, Path(view), job.scheduler)
        pipe = genai.Text2ImagePipeline(view)
        # Static sizes, as its documentation recommends.
        size = (settings["height"], settings["width"], settings["guidance_scale"])
        pipe.reshape(settings["images_per_prompt"], *size)
        pipe.compile("CPU", **properties(job.threads))
    return LoadedModel(
        generate=lambda stages: _generate(pipe, job, stages),
        versions=versions("openvino-genai", "openvino", "openvino-tokenizers"),
        precision="fp32",
        bytes=model_bytes(directory),
    )


def _check(job: PeerJob) -> None:
    """Refuse settings that the pipeline would silently ignore."""
    name = job.scheduler["name"]
    if name not in _SCHEDULERS or job.scheduler.get("options", {}).get("use_karras_sigmas"):
        raise ValueError(
            f"OpenVINO GenAI does not support {name}: use sampler ddim, euler, lcm or pndm"
        )
    if job.settings["guidance_rescale"]:
        raise ValueError("OpenVINO GenAI does not support guidance rescale: use --rescale 0")


def link(directory: Path, view: Path, scheduler: Mapping[str, Any]) -> None:
    """Link a model's directory, with the job's scheduler in place of the checkpoint's."""
    for entry in directory.iterdir():
        if entry.name != "scheduler":
            (view / entry.name).symlink_to(entry.resolve())
    config = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
    if config.get("beta_schedule") == "squaredcos_cap_v2":  # supported as explicit betas only
        config["trained_betas"] = _cosine_betas(config["num_train_timesteps"])
        config["beta_schedule"] = "linear"
    config |= {**scheduler.get("options", {}), "_class_name": scheduler["name"]}
    (view / "scheduler").mkdir()
    (view / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def _cosine_betas(count: int) -> list[float]:
    """Return the cosine schedule of Nichol & Dhariwal (2021), equation 17, capped at 0.999."""
    alphas = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return [min(1 - after / before, 0.999) for before, after in pairwise(alphas)]


def _generate(pipe: Any, job: PeerJob, stages: Stages) -> NDArray[np.float32]:
    """Generate the images prompt by prompt: its pipeline accepts one at a time."""
    settings = job.settings
    count = settings["images_per_prompt"]
    noise = np.load(job.noise)
    images: list[NDArray[np.float32]] = []
    for index, prompt in enumerate(settings["prompts"]):
        negative = list(settings["negative_prompts"])[index : index + 1]
        tensor = pipe.generate(
            prompt,
            **({"negative_prompt": negative[0]} if negative else {}),
            num_images_per_prompt=count,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            height=settings["height"],
            width=settings["width"],
            generator=_generator(noise[index * count : (index + 1) * count], settings["seed"]),
        )
        images.append(tensor.data.astype(np.float32))
        _add_times(pipe.get_performance_metrics(), stages)
    pixels: NDArray[np.float32] = np.concatenate(images) / np.float32(127.5) - np.float32(1)
    return pixels.transpose(0, 3, 1, 2)


def _add_times(metrics: Any, stages: Stages) -> None:
    """Add its own measurements: milliseconds, or microseconds in raw_metrics."""
    texts: Sequence[float] = metrics.get_text_encoder_infer_duration().values()
    stages.setdefault("text_encoder", []).extend(value / 1e3 for value in texts)
    steps = metrics.raw_metrics.unet_inference_durations
    stages.setdefault("denoiser", []).extend(value / 1e6 for value in steps)
    stages.setdefault("vae_decoder", []).append(metrics.get_vae_decoder_infer_duration() / 1e3)


def _generator(noise: NDArray[np.float32], seed: int) -> Any:
    """Return a generator that yields ``noise`` first.

    The noise that ancestral samplers add later differs from torch's.
    """
    import openvino
    import openvino_genai as genai

    class InitialNoise(genai.Generator):
        def __init__(self) -> None:
            super().__init__()
            self._random = np.random.default_rng(seed)
            self._initial: NDArray[np.float32] | None = noise

        def next(self) -> float:
            return float(self._random.standard_normal())

        def randn_tensor(self, shape: Any) -> Any:
            values, self._initial = self._initial, None
            if values is None:
                values = self._random.standard_normal(tuple(shape), np.float32)
            return openvino.Tensor(np.ascontiguousarray(values.reshape(tuple(shape))))

    return InitialNoise()


if __name__ == "__main__":
    serve(load, convert)
