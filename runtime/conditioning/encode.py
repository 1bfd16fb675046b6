"""Prompts, and what else a request tells the UNet, as its inputs."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.engine import Engine
from latentforge.runtime.manifest import Conditioning
from latentforge.runtime.settings import Settings
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ConditioningInputs", "guidance_embedding", "encode_conditioning"]

Array = NDArray[np.float32]
ConditioningInputs = dict[str, Array]
"""Inputs of the UNet by name, with a row an image."""


def encode_conditioning(
    settings: Settings,
    conditioning: Conditioning,
    inputs: Mapping[str, TensorSpec],
    engines: Mapping[str, Engine],
    tokenizers: Mapping[str, Tokenizer],
) -> tuple[ConditioningInputs, ConditioningInputs | None]:
    """What a UNet of these inputs is told of the prompts, and of the negative ones if they count.

    A UNet that takes the guidance scale itself (Meng et al. 2023, arXiv 2210.03142) needs no
    negative prompts, and neither does one that runs at scale 1 or below.
    """
    embedded = "timestep_cond" in inputs
    guided = settings.guided and not embedded
    texts = list(settings.prompts)
    zeros = conditioning.zero_negative and not settings.negative_prompts
    if guided and not zeros:
        texts += settings.negative_prompts or [""] * len(texts)
    encoded = _encode(texts, settings, conditioning, engines, tokenizers)
    rows = {name: array for name, array in encoded.items() if name in inputs}
    positive = {name: array[: settings.count] for name, array in rows.items()}
    negative = {
        name: np.zeros_like(array[: settings.count]) if zeros else array[settings.count :]
        for name, array in rows.items()
    }
    positive |= _numbers(settings, conditioning, inputs, settings.aesthetic_score)
    negative |= _numbers(settings, conditioning, inputs, settings.negative_aesthetic_score)
    return positive, negative if guided else None


def guidance_embedding(scale: float, width: int) -> Array:
    """Sines and cosines of the guidance scale, (1, width), for latent consistency models.

    Luo et al. (2023), arXiv 2310.04378, section 4.2, as diffusers computes it.
    """
    half = width // 2
    rate = np.log(np.float32(1e4)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -rate)
    angles = np.float32((scale - 1) * 1000) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return waves.astype(np.float32)[None]


def _encode(
    texts: Sequence[str],
    settings: Settings,
    conditioning: Conditioning,
    engines: Mapping[str, Engine],
    tokenizers: Mapping[str, Tokenizer],
) -> ConditioningInputs:
    """Contexts (rows, tokens, width) and pooled outputs (rows, width), an image a row."""
    contexts, pooled = [], None
    for encoder in conditioning.encoders:
        ids = tokenizers[encoder.tokenizer](texts)
        outputs = engines[encoder.component].run({"input_ids": ids})
        contexts.append(outputs[encoder.context])
        pooled = outputs[encoder.pooled] if encoder.pooled else pooled
    told = {"encoder_hidden_states": np.concatenate(contexts, axis=-1)}
    if pooled is not None:
        told["text_embeds"] = pooled
    return {name: array.repeat(settings.images_per_prompt, axis=0) for name, array in told.items()}


def _numbers(
    settings: Settings,
    conditioning: Conditioning,
    inputs: Mapping[str, TensorSpec],
    aesthetic_score: float,
) -> ConditioningInputs:
    """Inputs that are the same for every image: sizes and the guidance scale."""
    told: ConditioningInputs = {}
    if "time_ids" in inputs:
        values = _sizes(settings, aesthetic_score)
        row = np.array([[values[name] for name in conditioning.time_ids]], np.float32)
        told["time_ids"] = row.repeat(settings.count, axis=0)
    if "timestep_cond" in inputs:
        width = int(inputs["timestep_cond"].shape[1])
        row = guidance_embedding(settings.guidance_scale, width)
        told["timestep_cond"] = row.repeat(settings.count, axis=0)
    return told


def _sizes(settings: Settings, aesthetic_score: float) -> Mapping[str, float]:
    """The numbers that Stable Diffusion XL is told: Podell et al. (2023), section 2.2."""
    image = settings.height, settings.width
    original, target = settings.original_size or image, settings.target_size or image
    return {
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": settings.crop[0],
        "crop_left": settings.crop[1],
        "target_height": target[0],
        "target_width": target[1],
        "aesthetic_score": aesthetic_score,
    }
