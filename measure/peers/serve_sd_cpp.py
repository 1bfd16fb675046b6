"""stable-diffusion.cpp: ``python serve_sd_cpp.py JOB``.

It reads a checkpoint directly, except for the tensor names in transformers 5's text encoders. It
draws torch's noise and gets the noise levels from here, so the trajectory is the reference's. Its
tokenizer is always CLIP's own, whatever the checkpoint contains, and images have 8 bits. Its
convolutions are in half precision, which cannot be changed.
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
from serving import LoadedModel, PeerJob, Stages, serve, versions

_METHODS = {
    "DDIMScheduler": "euler",  # equivalent at eta = 0: Song et al. (2020), section 4.3
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


def load(job: PeerJob, directory: Path) -> LoadedModel:
    """Create its context with the job's number of threads."""
    import stable_diffusion_cpp

    config = _json(directory / "scheduler" / "scheduler_config.json")
    config = {**config, **job.scheduler.get("options", {})}
    _check(job, directory, config)
    log = _StageLog()
    callback = stable_diffusion_cpp.sd_log_callback(log.on_line)
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
    log.callback = callback
    return LoadedModel(
        generate=lambda stages: _generate(model, job, _sigmas(job, config), log, stages),
        versions=versions("stable-diffusion-cpp-python"),
        precision="fp32, convolutions fp16",
        bytes=sum((directory / name).stat().st_size for name in _FILES),
    )


@dataclass
class _StageLog:
    """Times of log lines and steps, from which stage times follow: those it prints are rounded."""

    times: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    callback: Any = None  # keeps the C callback from being garbage collected

    def on_line(self, level: int, text: bytes, data: Any) -> None:
        """Record the time of a log line that ends a stage."""
        for stage in (_TEXT, _LATENTS, _PIXELS):
            if f"{stage} completed".encode() in text:
                self.times[stage] = time.perf_counter()

    def on_step(self, step: int, steps: int, mean: float) -> None:
        """Record the time of a sampler step; it reports a step 0 before the first."""
        if step > 0:
            self.steps.append(time.perf_counter())

    def stages(self, start: float) -> Stages:
        """Return seconds by stage of a generation that began at ``start``.

        With guidance, a step is two calls of the UNet with one row each, not one call with two.
        """
        marks = [self.times[_TEXT], *self.steps]
        return {
            "text_encoder": [self.times[_TEXT] - start],
            "denoiser": [after - before for before, after in pairwise(marks)],
            "vae_decoder": [self.times[_PIXELS] - self.times[_LATENTS]],
        }


def _check(job: PeerJob, directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse models that it aborts on, and settings that it would silently ignore."""
    name, settings = job.scheduler["name"], job.settings
    unet = _json(directory / "unet" / "config.json")
    if unet.get("block_out_channels") != _WIDTHS:
        raise ValueError(
            "stable-diffusion.cpp supports only UNets of Stable Diffusion 1 and 2: this one has "
            f"blocks of {unet.get('block_out_channels')} channels, not {_WIDTHS}"
        )
    if missing := [file for file in _FILES if not (directory / file).is_file()]:
        raise ValueError(f"stable-diffusion.cpp needs {missing[0]}, which this checkpoint lacks")
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    if tuple(config.get(key) for key in keys) != _BETAS or config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "stable-diffusion.cpp supports the noise schedule of Stable Diffusion only"
        )
    if name not in _METHODS or config.get("use_karras_sigmas"):
        raise ValueError(f"stable-diffusion.cpp does not support {name}: use sampler ddim or euler")
    if settings["guidance_rescale"]:
        raise ValueError("stable-diffusion.cpp does not support guidance rescale: use --rescale 0")


def _sigmas(job: PeerJob, config: Mapping[str, Any]) -> list[float]:
    """Return the noise levels of diffusers' scheduler as sigma / alpha, the final one included.

    DDIM ends at the first training timestep unless set_alpha_to_one.
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


def _generate(
    model: Any, job: PeerJob, sigmas: list[float], log: _StageLog, stages: Stages
) -> NDArray[np.float32]:
    """Generate the images prompt by prompt: it accepts one at a time."""
    settings = job.settings
    images = []
    for index, prompt in enumerate(settings["prompts"]):
        negative = "".join(list(settings["negative_prompts"])[index : index + 1])
        log.steps.clear()
        start = time.perf_counter()
        images += model.generate_image(
            prompt,
            negative_prompt=negative,
            width=settings["width"],
            height=settings["height"],
            cfg_scale=settings["guidance_scale"],
            sample_method=_METHODS[job.scheduler["name"]],
            sample_steps=len(sigmas) - 1,
            sigmas=",".join(f"{sigma:.9g}" for sigma in sigmas),
            seed=settings["seed"],
            batch_count=settings["images_per_prompt"],
            progress_callback=log.on_step,
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
