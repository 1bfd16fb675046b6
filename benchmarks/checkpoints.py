"""Write full-size checkpoints with random weights, for benchmarks without access to a hub.

    python benchmarks/checkpoints.py sd15 sd15

The architectures equal the published ones in every dimension, so that times, memory and file sizes
are realistic; the images are noise. The tokenizer is the demo checkpoint's.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentforge.export.demo import CHECKPOINT as DEMO
from latentforge.export.models.flexible_structure import (
    DECIDIFFUSION_1,
    DECIDIFFUSION_2,
    FlexibleStructure,
)
from latentforge.export.models.flexible_unet import FlexibleUNet2DConditionModel

__all__ = ["ARCHITECTURES", "Architecture", "main", "write"]

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of a checkpoint.

    Attributes:
        pipeline: the pipeline class of its model_index.json.
        unet: configuration of the UNet, or the structure of a flexible one.
        vae: configuration of the autoencoder.
        texts: configurations of the text encoders by folder; text_encoder_2 has a projection.
        scheduler: class and configuration.
        low_res_scheduler: options of the DDPM scheduler of an upscaler.
        index: further entries of model_index.json.
        max_length: maximum number of tokens of a prompt.
    """

    pipeline: str
    unet: Config | FlexibleStructure
    vae: Config
    texts: Mapping[str, Config]
    scheduler: tuple[str, Config]
    low_res_scheduler: Config | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 77


def write(
    architecture: Architecture, target: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint in diffusers' layout with random weights."""
    with _default_dtype(dtype):
        torch.manual_seed(
            seed
        )  # before each part, so that equal parts have equal weights in all checkpoints
        diffusers.AutoencoderKL(**architecture.vae).save_pretrained(target / "vae")
        torch.manual_seed(seed)
        _write_unet(architecture.unet, target)
        for folder, config in architecture.texts.items():
            torch.manual_seed(seed)
            _write_text(config, target, folder, architecture.max_length)
    kind, options = architecture.scheduler
    getattr(diffusers, kind)(**options).save_pretrained(target / "scheduler")
    if architecture.low_res_scheduler is not None:
        noise = diffusers.DDPMScheduler(**architecture.low_res_scheduler)
        noise.save_pretrained(target / "low_res_scheduler")
    index = {"_class_name": architecture.pipeline, **_classes(architecture), **architecture.index}
    (target / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_unet(unet: Config | FlexibleStructure, target: Path) -> None:
    """Write a UNet; a flexible one gets its own folder, and ``unet`` an empty configuration."""
    if not isinstance(unet, FlexibleStructure):
        diffusers.UNet2DConditionModel(**unet).save_pretrained(target / "unet")
        return
    FlexibleUNet2DConditionModel(unet).save_pretrained(target / "flexible_unet")
    (target / "unet").mkdir()
    (target / "unet" / "config.json").write_text("{}")


def _write_text(config: Config, target: Path, folder: str, max_length: int) -> None:
    """Write a text encoder with its tokenizer, both with the demo tokenizer's special tokens."""
    demo = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    special = {key: demo[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind = CLIPTextModelWithProjection if folder == "text_encoder_2" else CLIPTextModel
    text = CLIPTextConfig(**{**config, **special, "max_position_embeddings": max_length})
    kind(text).save_pretrained(target / folder)
    tokenizer = target / folder.replace("text_encoder", "tokenizer")
    shutil.copytree(DEMO / "tokenizer", tokenizer)
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": max_length}))


def _classes(architecture: Architecture) -> dict[str, list[str]]:
    texts = {
        folder: [
            "transformers",
            "CLIPTextModelWithProjection" if folder == "text_encoder_2" else "CLIPTextModel",
        ]
        for folder in architecture.texts
    }
    tokenizers = {
        folder.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]
        for folder in architecture.texts
    }
    return {
        "scheduler": ["diffusers", architecture.scheduler[0]],
        **texts,
        **tokenizers,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_VAE_XL = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPENCLIP_H = {  # without its last layer, as in Stable Diffusion 2
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
_OPENCLIP_G = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
_UNET_2 = {
    **_UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_UNET_XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_PNDM = ("PNDMScheduler", {**_BETAS, "skip_prk_steps": True, "steps_offset": 1})
_DDIM_V = {**_BETAS, "steps_offset": 1, "clip_sample": False, "prediction_type": "v_prediction"}
_DECI = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
_DECI_2 = {**_DECI, "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": True}

ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(
        pipeline="StableDiffusionPipeline",
        unet=_UNET,
        vae=_VAE,
        texts={"text_encoder": _CLIP_L},
        scheduler=_PNDM,
    ),
    "sd21": Architecture(
        pipeline="StableDiffusionPipeline",
        unet=_UNET_2,
        vae={**_VAE, "sample_size": 768},
        texts={"text_encoder": _OPENCLIP_H},
        scheduler=("DDIMScheduler", _DDIM_V),
    ),
    "sdxl": Architecture(
        pipeline="StableDiffusionXLPipeline",
        unet=_UNET_XL,
        vae=_VAE_XL,
        texts={"text_encoder": _CLIP_L, "text_encoder_2": _OPENCLIP_G},
        scheduler=("EulerDiscreteScheduler", {**_BETAS, "steps_offset": 1}),
        index={"force_zeros_for_empty_prompt": True},
    ),
    "deci1": Architecture(
        pipeline="DeciDiffusionPipeline",
        unet=DECIDIFFUSION_1,
        vae=_VAE,
        texts={"text_encoder": _CLIP_L},
        scheduler=("DDIMScheduler", _DECI),
    ),
    "deci2": Architecture(
        pipeline="DeciDiffusionPipeline",
        unet=DECIDIFFUSION_2,
        vae=_VAE,
        texts={"text_encoder": _CLIP_L},
        scheduler=("DDIMScheduler", _DECI_2),
    ),
}


def main() -> None:
    """Write one checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true", help="write float16 weights")
    options = parser.parse_args()
    dtype = torch.float16 if options.half else torch.float32
    write(ARCHITECTURES[options.architecture], options.target, seed=options.seed, dtype=dtype)


if __name__ == "__main__":
    main()
