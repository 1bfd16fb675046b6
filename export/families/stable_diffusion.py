"""Stable Diffusion 1.x and 2.x and models distilled from them.

One CLIP text encoder, a UNet and a KL autoencoder: Rombach et al. (2022), arXiv 2112.10752. Smaller
distilled models (BK-SDM, Kim et al. 2023), latent consistency models and inpainting models, whose
UNet has nine input channels, differ in their configuration only.
"""

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
        config = checkpoint.config("unet")
        parts.check_unet(checkpoint, config, {})
        latent = parts.latent_space(checkpoint, 2 ** (len(config["block_out_channels"]) - 1))
        if images is None:
            images = parts.inpainting(config["in_channels"], latent)
        text = parts.text_encoder(checkpoint, CLIPTextModel, ("last_hidden_state",))
        parts.check_context(checkpoint, [text], config["cross_attention_dim"])
        unet = parts.unet(config, latent, tokens=parts.tokens(text), images=images)
        return ExportPlan(
            components=(text, unet, *parts.vae(latent)),
            conditioning=Conditioning(
                encoders=(TextEncoding(component="text_encoder", tokenizer="tokenizer"),),
                channels=images,
            ),
            latent=latent,
            sample_size=int(config["sample_size"]) * latent.downscale,
            defaults=parts.defaults(checkpoint, family),
        )


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
