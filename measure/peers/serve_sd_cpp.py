"""stable-diffusion.cpp, as a participant: ``python serve_sd_cpp.py JOB``.

It reads a checkpoint as it is, but for the names in transformers 5's text encoders. Its noise is
torch's and its levels are given, so the trajectory is the reference's; its tokenizer is CLIP's
own, whatever the checkpoint's says, and pictures come in 8 bits. Convolutions are in half
precision, which has no switch.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from older_layout import link as convert
from serving import Job, Loaded, Stages, serve, versions

_METHODS = {
    "DDIMScheduler": "euler",  # which it is, without noise added: Song et al. (2020), section 4.3
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
}
_FILES = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
_WIDTHS = [320, 640, 1280, 1280]
_TEXT, _LATENTS, _PIXELS = "get_learned_condition", "latent images", "decode_first_stage"
_BETAS = ("scaled_linear", 0.00085, 0.012, 1000)


def load(job: Job, directory: Path) -> Loaded:
    """Its context on a job's threads, with the job's noise levels."""
    import stable_diffusion_cpp

    config = _json(directory / "scheduler" / "scheduler_config.json")
    config = {**config, **job.scheduler.get("options", {})}
    _check(job, directory, config)
    log = _Log()
    callback = stable_diffusion_cpp.sd_log_callback(log.note)
    stable_diffusion_cpp.sd_set_log_callback(callback, None)
    model = stable_diffusion_cpp.StableDiffusion(
        model_path=str(directory),
        wtype="f32",
        n_threads=job.threads,
        rng_type="cpu",
        sampler_rng_type="cpu",
        prediction="v" if config.get("prediction_type") == "v_prediction" else "eps",
        vae_decode_only=True,
        verbose=False,
    )
    log.kept = callback
    return Loaded(
        paint=lambda stages: _paint(model, job, _sigmas(job, config), log, stages),
        versions=versions("stable-diffusion-cpp-python"),
        precision="fp32, convolutions fp16",
        bytes=sum((directory / name).stat().st_size for name in _FILES),
    )


@dataclass
class _Log:
    """When it said what, which tells where its time goes: its own figures are rounded."""

    times: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    kept: Any = None  # what C calls must not be collected

    def note(self, level: int, text: bytes, data: Any) -> None:
        """A line of its log."""
        for stage in (_TEXT, _LATENTS, _PIXELS):
            if f"{stage} completed".encode() in text:
                self.times[stage] = time.perf_counter()

    def step(self, step: int, steps: int, mean: float) -> None:
        """A step of its sampler, of which it calls a 0th one too."""
        if step > 0:
            self.steps.append(time.perf_counter())

    def stages(self, start: float) -> Stages:
        """Seconds by stage of what began at a time.

        A step is two calls of the UNet, one a prompt, where others make one call of both.
        """
        marks = [self.times[_TEXT], *self.steps]
        return {
            "text_encoder": [self.times[_TEXT] - start],
            "denoiser": [after - before for before, after in pairwise(marks)],
            "vae_decoder": [self.times[_PIXELS] - self.times[_LATENTS]],
        }


def _check(job: Job, directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse what it would abort on, or do otherwise."""
    name, wanted = job.scheduler["name"], job.settings
    unet = _json(directory / "unet" / "config.json")
    if unet.get("block_out_channels") != _WIDTHS:
        raise ValueError(
            "stable-diffusion.cpp has the UNets of Stable Diffusion 1 and 2, and this is another: "
            f"blocks of {unet.get('block_out_channels')} channels, not {_WIDTHS}"
        )
    if missing := [file for file in _FILES if not (directory / file).is_file()]:
        raise ValueError(f"stable-diffusion.cpp needs {missing[0]}, which the checkpoint lacks")
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    if tuple(config.get(key) for key in keys) != _BETAS or config.get("rescale_betas_zero_snr"):
        raise ValueError("stable-diffusion.cpp has Stable Diffusion's noise schedule alone")
    if name not in _METHODS or config.get("use_karras_sigmas"):
        raise ValueError(f"stable-diffusion.cpp has no {name}: choose ddim or euler")
    if wanted["guidance_rescale"]:
        raise ValueError("stable-diffusion.cpp has no guidance_rescale: measure without it")


def _sigmas(job: Job, config: Mapping[str, Any]) -> list[float]:
    """The noise levels that diffusers' scheduler would visit, as sigma / alpha, the last included.

    DDIM ends on the first training step unless set_alpha_to_one.
    """
    count, steps = _BETAS[3], job.settings["steps"]
    betas = np.linspace(_BETAS[1] ** 0.5, _BETAS[2] ** 0.5, count) ** 2
    alphas = np.cumprod(1 - betas)
    ratios = np.sqrt((1 - alphas) / alphas)
    ddim = job.scheduler["name"] == "DDIMScheduler"
    match config.get("timestep_spacing", "leading" if ddim else "linspace"):
        case "leading":
            times = np.arange(steps) * (count // steps) + config.get("steps_offset", 0)
        case "trailing":
            times = np.sort(np.round(np.arange(count, 0, -count / steps))) - 1
        case _:
            times = np.linspace(0, count - 1, steps)
    levels = np.interp(np.round(times) if ddim else times, np.arange(count), ratios)
    last = ratios[0] if ddim and not config.get("set_alpha_to_one", True) else 0.0
    return [float(level) for level in (*levels[::-1], last)]


def _paint(
    model: Any, job: Job, sigmas: list[float], log: _Log, stages: Stages
) -> NDArray[np.float32]:
    """One prompt after another, since it takes one at a time."""
    wanted = job.settings
    images = []
    for index, prompt in enumerate(wanted["prompts"]):
        negative = "".join(list(wanted["negative_prompts"])[index : index + 1])
        log.steps.clear()
        start = time.perf_counter()
        images += model.generate_image(
            prompt,
            negative_prompt=negative,
            width=wanted["width"],
            height=wanted["height"],
            cfg_scale=wanted["guidance_scale"],
            sample_method=_METHODS[job.scheduler["name"]],
            sample_steps=len(sigmas) - 1,
            sigmas=",".join(f"{sigma:.9g}" for sigma in sigmas),
            seed=wanted["seed"],
            batch_count=wanted["images_per_prompt"],
            progress_callback=log.step,
        )
        for stage, calls in log.stages(start).items():
            stages.setdefault(stage, []).extend(calls)
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return (pixels / np.float32(127.5) - np.float32(1)).transpose(0, 3, 1, 2)


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    assert isinstance(content, dict)
    return content


if __name__ == "__main__":
    serve(load, convert)
