"""Conditioning inputs of the denoiser: text embeddings, sizes and the guidance scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.conditioning.embedding_cache import EmbeddingCache, Embeddings
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.engine import Engine
from latentforge.runtime.manifest import Conditioning, TextEncoding
from latentforge.runtime.settings import Settings
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ConditioningEncoder", "ConditioningInputs", "guidance_embedding"]

Array = NDArray[np.float32]
ConditioningInputs = dict[str, Array]
"""Conditioning inputs of the denoiser by name; one row per image, or more with guidance."""


@dataclass(frozen=True, kw_only=True)
class ConditioningEncoder:
    """Text encoders of a model, and the rules for its other conditioning.

    Attributes:
        conditioning: rules of the manifest.
        inputs: inputs of the whole denoiser.
        engines: hold the text encoders.
        tokenizers: tokenizers by name.
        cache: embeddings of earlier texts. With it each text is encoded alone, so that its
            embedding does not depend on the others of a request.
    """

    conditioning: Conditioning
    inputs: Mapping[str, TensorSpec]
    engines: Mapping[str, Engine]
    tokenizers: Mapping[str, Tokenizer]
    cache: EmbeddingCache | None = None

    def encode(self, settings: Settings) -> ConditioningInputs:
        """Return the denoiser's conditioning inputs for a request, by input name.

        With classifier-free guidance the rows of the negative prompts come first: two rows per
        image, or three with image guidance. Guidance is not classifier-free at scale 1 or below, or
        for a denoiser that takes the scale as an input (Meng et al. 2023, arXiv 2210.03142): then
        it is one row per image.
        """
        guidance = settings.uses_guidance and "timestep_cond" not in self.inputs
        zeros = self.conditioning.zero_negative and not settings.negative_prompts
        texts = list(settings.prompts)
        if guidance and not zeros:
            texts += settings.negative_prompts or [""] * len(texts)
        rows = self._encode_texts(texts, settings.images_per_prompt)
        positive = {name: array[: settings.count] for name, array in rows.items()}
        positive |= self._numbers(settings, settings.aesthetic_score)
        if not guidance:
            return positive
        negative = {
            name: np.zeros_like(array[: settings.count]) if zeros else array[settings.count :]
            for name, array in rows.items()
        }
        negative |= self._numbers(settings, settings.negative_aesthetic_score)
        negatives = settings.guidance_rows - 1
        return {
            name: np.concatenate([*[negative[name]] * negatives, positive[name]])
            for name in positive
        }

    def _encode_texts(self, texts: Sequence[str], repeats: int) -> ConditioningInputs:
        """Return contexts (rows, tokens, width) and pooled outputs (rows, width)."""
        contexts, pooled = [], None
        for encoder in self.conditioning.encoders:
            ids = self.tokenizers[encoder.tokenizer](texts)
            outputs = self._run_encoder(encoder, ids)
            contexts.append(outputs[encoder.context])
            pooled = outputs[encoder.pooled] if encoder.pooled else pooled
        encoded = {"encoder_hidden_states": np.concatenate(contexts, axis=-1)}
        if pooled is not None:
            encoded["text_embeds"] = pooled
        rows = {name: array.repeat(repeats, axis=0) for name, array in encoded.items()}
        return {name: array for name, array in rows.items() if name in self.inputs}

    def _run_encoder(self, encoder: TextEncoding, ids: NDArray[np.int64]) -> Embeddings:
        """Return the outputs that are used of an encoder, one row per row of ids."""
        run = self.engines[encoder.component].run
        if self.cache is None:
            return run({"input_ids": ids})
        names = [name for name in (encoder.context, encoder.pooled) if name is not None]

        def encode(row: NDArray[np.int64]) -> Embeddings:
            outputs = run({"input_ids": row})
            return {name: outputs[name] for name in names}

        rows = [
            self.cache.get(encoder.component, row, partial(encode, row))
            for row in np.split(ids, len(ids))
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in names}

    def _numbers(self, settings: Settings, aesthetic_score: float) -> ConditioningInputs:
        """Return the inputs that are the same for every image: sizes, scales and levels."""
        rows: ConditioningInputs = {}
        if "time_ids" in self.inputs:
            values = _time_ids(settings, aesthetic_score)
            rows["time_ids"] = np.array(
                [[values[name] for name in self.conditioning.time_ids]], np.float32
            )
        if "timestep_cond" in self.inputs:
            width = int(self.inputs["timestep_cond"].shape[1])
            rows["timestep_cond"] = guidance_embedding(settings.guidance_scale, width)
        if "noise_level" in self.inputs:
            rows["noise_level"] = np.array([[settings.noise_level]], np.float32)
        return {name: row.repeat(settings.count, axis=0) for name, row in rows.items()}


def guidance_embedding(scale: float, width: int) -> Array:
    """Return the sinusoidal embedding (1, width) of the guidance scale, for consistency models.

    Luo et al. (2023), arXiv 2310.04378, section 4.2, as diffusers computes it.
    """
    half = width // 2
    rate = np.log(np.float32(1e4)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -rate)
    angles = np.float32((scale - 1) * 1000) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return waves.astype(np.float32)[None]


def _time_ids(settings: Settings, aesthetic_score: float) -> Mapping[str, float]:
    """Return the micro-conditioning of Stable Diffusion XL: Podell et al. (2023), section 2.2."""
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
