"""Tiny checkpoints of every family with random weights, exported in seconds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from checkpoints import Architecture

from latentforge.export.models.flexible_structure import BlockStructure, FlexibleStructure

__all__ = ["DEPTH", "EDITING", "INPAINTING", "TINY", "UPSCALING", "WIDTH"]

WIDTH = 32  # of the text encoders
TOKENS = 24

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_PNDM = ("PNDMScheduler", {**_BETAS, "steps_offset": 1, "skip_prk_steps": True})
_V = {**_BETAS, "steps_offset": 1, "clip_sample": False, "prediction_type": "v_prediction"}
_TRAILING = {**_BETAS, "timestep_spacing": "trailing"}
_COSINE = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
}

_TEXT = {
    "vocab_size": 1076,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 48,
}
_VAE = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
_UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
_UNET_XL = {
    **_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 6 * 8,
}

_FLAT = {  # one level, for checkpoints whose other levels are covered elsewhere
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}

SD = Architecture(
    pipeline="StableDiffusionPipeline",
    unet=_UNET,
    vae=_VAE,
    texts={"text_encoder": _TEXT},
    scheduler=_PNDM,
    max_length=TOKENS,
)
SD_2 = replace(
    SD,
    unet={**_UNET, "attention_head_dim": (2, 4), "use_linear_projection": True},
    texts={"text_encoder": {**_TEXT, "num_hidden_layers": 2, "hidden_act": "gelu"}},
    scheduler=("DDIMScheduler", _V),
)
SDXL = replace(
    SD,
    pipeline="StableDiffusionXLPipeline",
    unet=_UNET_XL,
    vae={**_VAE, "scaling_factor": 0.13025, "force_upcast": True},
    texts={
        "text_encoder": {**_TEXT, "num_hidden_layers": 2},
        "text_encoder_2": {**_TEXT, "num_hidden_layers": 2, "hidden_act": "gelu"},
    },
    scheduler=("EulerDiscreteScheduler", {**_BETAS, "steps_offset": 1}),
    index={"force_zeros_for_empty_prompt": True},
)
REFINER = replace(
    SDXL,
    pipeline="StableDiffusionXLImg2ImgPipeline",
    unet={
        **_UNET_XL,
        **_FLAT,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "projection_class_embeddings_input_dim": 48 + 5 * 8,
    },
    texts={"text_encoder_2": SDXL.texts["text_encoder_2"]},
    index={
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
)
SSD_1B = replace(
    SDXL,
    unet={
        **_UNET_XL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, (2,)),
        "reverse_transformer_layers_per_block": ((1, 2), 1),
    },
)


def _with_channels(
    architecture: Architecture, pipeline: str, channels: int, *, depth: int = 1
) -> Architecture:
    assert isinstance(architecture.unet, Mapping)
    flat = {**_FLAT, "attention_head_dim": 4, "transformer_layers_per_block": depth}
    unet = {**architecture.unet, **flat, "in_channels": channels}
    return replace(architecture, pipeline=pipeline, unet=unet)


def _down(in_channels: int, layers: str, *, resample: bool) -> BlockStructure:
    return BlockStructure(
        in_channels=in_channels, out_channels=32, layers=layers, resample=resample
    )


def _up(layers: str, *, resample: bool) -> BlockStructure:
    return BlockStructure(
        in_channels=32, out_channels=32, prev_channels=32, layers=layers, resample=resample
    )


def _flexible(**changes: Any) -> FlexibleStructure:
    """Return the published structure, as narrow as group norms of 32 groups allow."""
    blocks: dict[str, Any] = {
        "down": (_down(32, "RA", resample=True), _down(32, "RAA", resample=True)),
        "mid": BlockStructure(in_channels=32, out_channels=32, layers="RAR", resample=True),
        "up": (_up("RARAA", resample=True), _up("RR", resample=False)),
    }
    small = {"cross_attention_dim": WIDTH, "time_width": 64, "sample_size": 16}
    return FlexibleStructure(**{**blocks, **small, **changes})


DECI_1 = replace(
    SD,
    pipeline="DeciDiffusionPipeline",
    unet=_flexible(),
    scheduler=("DDIMScheduler", {**_COSINE, "set_alpha_to_one": False}),
)
DECI_2 = replace(
    DECI_1,
    unet=_flexible(
        down=(_down(32, "RA", resample=True), _down(32, "RAA", resample=False)), mid=None
    ),
    scheduler=("DDIMScheduler", {**_COSINE, "set_alpha_to_one": True}),
)

UPSCALER = replace(
    SD_2,
    pipeline="StableDiffusionUpscalePipeline",
    vae={**_VAE, "scaling_factor": 0.08333},
    unet={
        **_UNET,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": (True, False),
        "attention_head_dim": 4,
        "use_linear_projection": True,
    },
    low_res_scheduler={
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
    },
    index={"max_noise_level": 350, "low_res_scheduler": ["diffusers", "DDPMScheduler"]},
)

TINY: Mapping[str, Architecture] = {
    "sd": SD,
    "sd-2": SD_2,
    "sd-turbo": replace(SD_2, scheduler=("EulerDiscreteScheduler", _TRAILING)),
    "bk-sdm": replace(SD, unet={**_UNET, **_FLAT, "mid_block_type": None}),
    "lcm": replace(
        SD,
        pipeline="LatentConsistencyModelPipeline",
        unet={**_UNET, **_FLAT, "time_cond_proj_dim": 16},
        scheduler=("LCMScheduler", _BETAS),
    ),
    "sd-inpainting": _with_channels(SD, "StableDiffusionInpaintPipeline", 9),
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "sdxl-turbo": replace(SDXL, scheduler=("EulerAncestralDiscreteScheduler", _TRAILING)),
    "ssd-1b": SSD_1B,
    "sdxl-inpainting": _with_channels(SDXL, "StableDiffusionXLInpaintPipeline", 9, depth=2),
    "pix2pix": _with_channels(SD, "StableDiffusionInstructPix2PixPipeline", 8),
    "sdxl-pix2pix": _with_channels(SDXL, "StableDiffusionXLInstructPix2PixPipeline", 8),
    "sd-depth": _with_channels(SD_2, "StableDiffusionDepth2ImgPipeline", 5),
    "upscaler": UPSCALER,
    "decidiffusion-1": DECI_1,
    "decidiffusion-2": DECI_2,
}

INPAINTING = ("sd-inpainting", "sdxl-inpainting")
EDITING = ("pix2pix", "sdxl-pix2pix")
DEPTH = ("sd-depth",)
UPSCALING = ("upscaler",)
