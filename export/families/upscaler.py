"""Stable Diffusion x4 upscaler: enlarges an image as a prompt says.

The UNet takes the pixels of the image as further channels, with noise on them, and the amount of
that noise as a class: https://huggingface.co/stabilityai/stable-diffusion-x4-upscaler. Its latents
have the size of the image, and the VAE only decodes them.
"""

import reprlib
from dataclasses import replace
from typing import Any

import msgspec
from transformers import CLIPTextModel

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import parts
from latentforge.export.families.types import ExportPlan, Family, FamilyDefaults, Reference
from latentforge.export.schedulers import schedule_of
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.manifest import (
    Conditioning,
    ImageChannels,
    NoiseAugmentation,
    TextEncoding,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["UPSCALER"]

_CHANNELS: tuple[ImageChannels, ...] = ("low_resolution",)
_DEFAULTS = FamilyDefaults(steps=75, guidance_scale=9.0)
_NOISE_LEVEL = 20

# As diffusers' pipeline sets them, whatever the checkpoint says.
_SCALING_FACTOR = 0.08333
_MAX_NOISE_LEVEL = 350


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    with parts.reading(checkpoint):
        config = parts.unet_config(checkpoint)
        augmentation = _noise_augmentation(checkpoint, config)
        parts.check_unet(checkpoint, config, {"num_class_embeds": config["num_class_embeds"]})
        latent = parts.latent_space(checkpoint, parts.unet_multiple(config))
        latent = msgspec.structs.replace(latent, scaling_factor=_SCALING_FACTOR)
        text = parts.text_encoder(checkpoint, CLIPTextModel, ("last_hidden_state",))
        parts.check_context(checkpoint, [text], config["cross_attention_dim"])
        unet = parts.unet(
            config,
            latent,
            tokens=parts.tokens(text),
            images=_CHANNELS,
            added={"noise_level": 1},
        )
        upcast = parts.overflows_fp16(checkpoint)
        decoder, _ = parts.vae(checkpoint, latent, overflows_fp16=upcast)
        return ExportPlan(
            components=(text, unet, decoder),
            conditioning=Conditioning(
                encoders=(TextEncoding(component="text_encoder", tokenizer="tokenizer"),),
                channels=_CHANNELS,
                noise_augmentation=augmentation,
            ),
            latent=latent,
            sample_size=parts.sample_size(checkpoint, config, latent),
            defaults=_defaults(checkpoint, augmentation),
        )


def _defaults(checkpoint: Checkpoint, augmentation: NoiseAugmentation) -> FamilyDefaults:
    level = min(_NOISE_LEVEL, augmentation.max_level)
    return replace(parts.defaults(checkpoint, _DEFAULTS), noise_level=level)


def _noise_augmentation(checkpoint: Checkpoint, config: dict[str, Any]) -> NoiseAugmentation:
    """Return the noise that the UNet's classes stand for.

    Raises:
        CheckpointError: the UNet has no class for the largest level, or the schedule none.
    """
    schedule = schedule_of(checkpoint.config("low_res_scheduler", "scheduler_config.json"))
    if not isinstance(schedule, Schedule):
        raise CheckpointError(f"{checkpoint.name}: low_res_scheduler has no betas")
    level = checkpoint.index.get("max_noise_level", _MAX_NOISE_LEVEL)
    if type(level) is not int or level < 0:
        raise CheckpointError(
            f"{checkpoint.name}: max_noise_level must be an integer of at least 0, not "
            f"{reprlib.repr(level)}"
        )
    classes = config.get("num_class_embeds")
    counts = (classes, schedule.train_steps)
    if not all(type(count) is int and count > level for count in counts):
        raise CheckpointError(
            f"{checkpoint.name}: noise levels go up to {reprlib.repr(level)}, but the UNet has "
            f"{reprlib.repr(classes)} classes and low_res_scheduler {schedule.train_steps} steps"
        )
    return NoiseAugmentation(schedule=schedule, max_level=level)


UPSCALER = Family(
    name="upscaler",
    pipelines=("StableDiffusionUpscalePipeline",),
    plan=_plan,
    reference=Reference(image="StableDiffusionUpscalePipeline"),
)
