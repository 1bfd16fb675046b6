"""OpenVINO GenAI, as a participant: ``python serve_openvino_genai.py JOB``.

It converts nothing itself and takes what optimum-intel makes.
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
from serving import Job, Loaded, Stages, serve, versions

_SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
)


def load(job: Job, directory: Path) -> Loaded:
    """Its pipeline, compiled for the request's size."""
    import openvino_genai as genai

    wanted = job.settings
    _check(job)
    with tempfile.TemporaryDirectory() as view:
        _link(directory, Path(view), job.scheduler)
        pipe = genai.Text2ImagePipeline(view)
        # As its documentation advises where one size is made.
        size = (wanted["height"], wanted["width"], wanted["guidance_scale"])
        pipe.reshape(wanted["images_per_prompt"], *size)
        pipe.compile("CPU", **properties(job.threads))
    return Loaded(
        paint=lambda stages: _paint(pipe, job, stages),
        versions=versions("openvino-genai", "openvino", "openvino-tokenizers"),
        precision="fp32",
        bytes=model_bytes(directory),
    )


def _check(job: Job) -> None:
    """Refuse what it would quietly do otherwise."""
    name = job.scheduler["name"]
    if name not in _SCHEDULERS or job.scheduler.get("options", {}).get("use_karras_sigmas"):
        raise ValueError(f"OpenVINO GenAI has no {name}: choose ddim, euler, lcm or pndm")
    if job.settings["guidance_rescale"]:
        raise ValueError("OpenVINO GenAI has no guidance_rescale: measure without it")


def _link(directory: Path, view: Path, scheduler: Mapping[str, Any]) -> None:
    """The model's directory again, with the job's scheduler in place of the checkpoint's."""
    for entry in directory.iterdir():
        if entry.name != "scheduler":
            (view / entry.name).symlink_to(entry.resolve())
    config = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
    if config.get("beta_schedule") == "squaredcos_cap_v2":  # which it knows only as numbers
        config["trained_betas"] = _cosine_betas(config["num_train_timesteps"])
        config["beta_schedule"] = "linear"
    config |= {**scheduler.get("options", {}), "_class_name": scheduler["name"]}
    (view / "scheduler").mkdir()
    (view / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def _cosine_betas(count: int) -> list[float]:
    """Nichol & Dhariwal (2021), equation 17, with beta capped at 0.999."""
    kept = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return [min(1 - after / before, 0.999) for before, after in pairwise(kept)]


def _paint(pipe: Any, job: Job, stages: Stages) -> NDArray[np.float32]:
    """One prompt after another, since it takes one at a time."""
    wanted = job.settings
    count = wanted["images_per_prompt"]
    noise = np.load(job.noise)
    images: list[NDArray[np.float32]] = []
    for index, prompt in enumerate(wanted["prompts"]):
        negative = list(wanted["negative_prompts"])[index : index + 1]
        tensor = pipe.generate(
            prompt,
            **({"negative_prompt": negative[0]} if negative else {}),
            num_images_per_prompt=count,
            num_inference_steps=wanted["steps"],
            guidance_scale=wanted["guidance_scale"],
            height=wanted["height"],
            width=wanted["width"],
            generator=_generator(noise[index * count : (index + 1) * count], wanted["seed"]),
        )
        images.append(tensor.data.astype(np.float32))
        _note(pipe.get_performance_metrics(), stages)
    pixels: NDArray[np.float32] = np.concatenate(images) / np.float32(127.5) - np.float32(1)
    return pixels.transpose(0, 3, 1, 2)


def _note(metrics: Any, stages: Stages) -> None:
    """Its own figures, in milliseconds, and microseconds where they are raw."""
    texts: Sequence[float] = metrics.get_text_encoder_infer_duration().values()
    stages.setdefault("text_encoder", []).extend(value / 1e3 for value in texts)
    steps = metrics.raw_metrics.unet_inference_durations
    stages.setdefault("denoiser", []).extend(value / 1e6 for value in steps)
    stages.setdefault("vae_decoder", []).append(metrics.get_vae_decoder_infer_duration() / 1e3)


def _generator(noise: NDArray[np.float32], seed: int) -> Any:
    """A source of noise that starts with the given one; what ancestral samplers add is its own."""
    import openvino
    import openvino_genai as genai

    class Given(genai.Generator):
        def __init__(self) -> None:
            super().__init__()
            self._rest = np.random.default_rng(seed)
            self._noise: NDArray[np.float32] | None = noise

        def next(self) -> float:
            return float(self._rest.standard_normal())

        def randn_tensor(self, shape: Any) -> Any:
            given, self._noise = self._noise, None
            if given is None:
                given = self._rest.standard_normal(tuple(shape), np.float32)
            return openvino.Tensor(np.ascontiguousarray(given.reshape(tuple(shape))))

    return Given()


if __name__ == "__main__":
    serve(load, convert)
