"""Stable Diffusion XL, its refiner and models distilled from it.

Podell et al. (2023), arXiv 2307.01952. The UNet is conditioned on the input of the last layer of
two text encoders, on the pooled output of the second, and on image sizes as numbers. The refiner
has the second encoder only, and an aesthetic score in place of the target size. SSD-1B and Vega
have fewer blocks.
"""

import reprlib
from typing import Any

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.configs import read_config, select_class
from latentforge.export.families import parts
from latentforge.export.families.types import (
    ComponentPlan,
    ExportPlan,
    Family,
    FamilyDefaults,
    Reference,
)
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.manifest import Conditioning, ImageChannels, TextEncoding, TimeId

__all__ = ["STABLE_DIFFUSION_XL", "plan"]

_DEFAULTS = FamilyDefaults(guidance_scale=5.0)
_SCORE = "requires_aesthetics_score"
_CROP: tuple[TimeId, ...] = ("original_height", "original_width", "crop_top", "crop_left")
_BASE: tuple[TimeId, ...] = (*_CROP, "target_height", "target_width")
_REFINER: tuple[TimeId, ...] = (*_CROP, "aesthetic_score")


def plan(
    checkpoint: Checkpoint,
    *,
    images: tuple[ImageChannels, ...] | None = None,
    family: FamilyDefaults = _DEFAULTS,
) -> ExportPlan:
    """Return the plan: two text encoders, a pooled prompt and sizes condition the UNet.

    Args:
        checkpoint: the checkpoint.
        images: channels of images that the UNet takes; None: none, or those for inpainting.
        family: defaults of a model that was not distilled.

    Raises:
        CheckpointError: the configurations are malformed, or of a kind that is not supported.
    """
    with parts.reading(checkpoint):
        config = parts.unet_config(checkpoint)
        parts.check_unet(checkpoint, config, {"addition_embed_type": "text_time"})
        multiple = parts.unet_multiple(config)
        # An image in further channels is not normalized by diffusers.
        latent = parts.latent_space(checkpoint, multiple, normalized=images is None)
        if images is None:
            images = parts.inpainting(config["in_channels"], latent)
        texts = _text_encoders(checkpoint)
        parts.check_context(checkpoint, texts, config["cross_attention_dim"])
        time_ids = _REFINER if parts.flag(checkpoint, _SCORE, False) else _BASE
        unet = parts.unet(
            config,
            latent,
            tokens=parts.tokens(texts[-1]),
            images=images,
            added={
                "text_embeds": _pooled(checkpoint, config, texts[-1], time_ids),
                "time_ids": len(time_ids),
            },
        )
        upcast = parts.overflows_fp16(checkpoint)
        return ExportPlan(
            components=(*texts, unet, *parts.vae(checkpoint, latent, overflows_fp16=upcast)),
            conditioning=Conditioning(
                encoders=tuple(_encoder(text) for text in texts),
                zero_negative=parts.flag(checkpoint, "force_zeros_for_empty_prompt", True),
                time_ids=time_ids,
                channels=images,
            ),
            latent=latent,
            sample_size=parts.sample_size(checkpoint, config, latent),
            defaults=parts.defaults(checkpoint, family),
        )


def _text_encoders(checkpoint: Checkpoint) -> tuple[ComponentPlan, ...]:
    """Return plans of the text encoders that the checkpoint has; the refiner lacks the first.

    The context is the input of the last layer.
    """
    kinds: dict[str, tuple[type[Any], tuple[str, ...]]] = {
        "text_encoder": (CLIPTextModel, ()),
        "text_encoder_2": (CLIPTextModelWithProjection, ("text_embeds",)),
    }
    plans = []
    for name, (kind, pooled) in kinds.items():
        if name == "text_encoder_2" or checkpoint.index.get(name, [None])[0] is not None:
            config = read_config(checkpoint, name, select_class(checkpoint, name, [kind]))
            layers = config["num_hidden_layers"]
            outputs = (f"hidden_states.{layers - 1}", *pooled)
            plans.append(parts.text_encoder(checkpoint, kind, outputs, name))
    return tuple(plans)


def _encoder(text: ComponentPlan) -> TextEncoding:
    context, *pooled = text.outputs
    return TextEncoding(
        component=text.name,
        tokenizer=text.name.replace("text_encoder", "tokenizer"),
        context=context,
        pooled=pooled[0] if pooled else None,
    )


def _pooled(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    text: ComponentPlan,
    time_ids: tuple[TimeId, ...],
) -> int:
    """Return the width of the pooled prompt.

    The UNet's added embedding holds the pooled prompt and one embedding per time id.
    """
    total = config["projection_class_embeddings_input_dim"]
    width = int(total - len(time_ids) * config["addition_time_embed_dim"])
    projected = text.outputs["text_embeds"].shape[1]
    if width != projected:
        raise CheckpointError(
            f"{checkpoint.name}: the pooled output of text_encoder_2 is {reprlib.repr(projected)} "
            f"wide, but beside {len(time_ids)} time ids the UNet's added embedding holds {width}"
        )
    return width


STABLE_DIFFUSION_XL = Family(
    name="stable_diffusion_xl",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    plan=plan,
    reference=Reference(
        text="StableDiffusionXLPipeline",
        image="StableDiffusionXLImg2ImgPipeline",
        inpaint="StableDiffusionXLInpaintPipeline",
    ),
)
