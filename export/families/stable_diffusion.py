"""Stable Diffusion 1.x and 2.x and models distilled from them.

One CLIP text encoder, a UNet and a KL autoencoder: Rombach et al. (2022), arXiv 2112.10752. Smaller
distilled models (BK-SDM, Kim et al. 2023), latent consistency models and inpainting models, whose
UNet has nine input channels, differ in their configuration only.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CLIPTextModel

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import parts
from latentforge.export.families.types import ExportPlan, Family, FamilyDefaults, Reference
from latentforge.export.schedulers import corrected
from latentforge.runtime.manifest import Conditioning, ImageChannels, TextEncoding

__all__ = ["STABLE_DIFFUSION", "plan"]

_DEFAULTS = FamilyDefaults()


def plan(
    checkpoint: Checkpoint,
    *,
    images: tuple[ImageChannels, ...] | None = None,
    family: FamilyDefaults = _DEFAULTS,
) -> ExportPlan:
    """Return the plan: the last hidden states of one text encoder condition the UNet.

    Args:
        checkpoint: the checkpoint.
        images: channels of images that the UNet takes; None: none, or those for inpainting.
        family: defaults of a model that was not distilled.

    Raises:
        CheckpointError: the configurations are malformed, or of a kind that is not supported.
    """
    with parts.reading(checkpoint):
        config = parts.unet_config(checkpoint)
        parts.check_unet(checkpoint, config, {})
        latent = parts.latent_space(checkpoint, parts.unet_multiple(config))
        if images is None:
            images = parts.inpainting(config["in_channels"], latent)
        text = parts.text_encoder(checkpoint, CLIPTextModel, ("last_hidden_state",))
        parts.check_context(checkpoint, [text], config["cross_attention_dim"])
        unet = parts.unet(config, latent, tokens=parts.tokens(text), images=images)
        return ExportPlan(
            components=(text, unet, *parts.vae(checkpoint, latent)),
            conditioning=Conditioning(
                encoders=(TextEncoding(component="text_encoder", tokenizer="tokenizer"),),
                channels=images,
            ),
            latent=latent,
            sample_size=parts.sample_size(checkpoint, _with_size(checkpoint, config), latent),
            defaults=parts.defaults(checkpoint, family),
        )


def _with_size(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the UNet's configuration with the sample_size that diffusers takes.

    Releases of diffusers before 0.9 wrote 32 for models of 64, and its pipelines correct that.
    """
    version = str(checkpoint.config("unet").get("_diffusers_version"))
    size = config["sample_size"]
    old = re.match(r"0\.[0-8](\.|$)", version) is not None and type(size) is int and size < 64
    return {**config, "sample_size": 64 if old else size}


STABLE_DIFFUSION = Family(
    name="stable_diffusion",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    plan=plan,
    reference=Reference(
        text="StableDiffusionPipeline",
        image="StableDiffusionImg2ImgPipeline",
        inpaint="StableDiffusionInpaintPipeline",
    ),
    scheduler=corrected,
)
