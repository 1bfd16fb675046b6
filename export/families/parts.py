"""Component plans that several families share, made from a checkpoint's configurations.

Inputs and outputs have the names of optimum's ONNX exports.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.types import ComponentPlan, FamilyDefaults
from latentforge.export.modules import load_module
from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.manifest import ImageChannels, Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "check_context",
    "check_unet",
    "defaults",
    "inpainting",
    "latent_space",
    "reading",
    "text_encoder",
    "tokens",
    "unet",
    "vae",
]


_NO_CONDITIONING = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
}


class TextEncoder(nn.Module):
    """Text encoder: token ids (batch, tokens) to hidden states and pooled outputs.

    Hidden states are (batch, tokens, width): ``hidden_states.K`` is the input of layer K,
    ``last_hidden_state`` the output of the final norm. Pooled outputs are (batch, width).
    """

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        values = self.model(input_ids=input_ids, output_hidden_states=True)
        return tuple(self._value(values, name) for name in self.outputs)

    @staticmethod
    def _value(values: Any, name: str) -> Tensor:
        key, _, index = name.partition(".")
        return values[key][int(index)] if index else values[key]


class UNet(nn.Module):
    """UNet: noisy latents (batch, channels, h, w), timestep (1,) and conditioning to prediction.

    A noise level (batch, 1) is a class label.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=None if noise_level is None else noise_level[:, 0].to(torch.int64),
            timestep_cond=timestep_cond,
            added_cond_kwargs=None if text_embeds is None else added,
            return_dict=False,
        )
        return output[0]


class VaeDecoder(nn.Module):
    """VAE decoder: latents (batch, channels, h, w), unscaled, to pixels in -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.encoder = model.quant_conv = None  # half of the weights, and unused here
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """VAE encoder: pixels in -1..1 to mean and log variance of the latents, joined by channel."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.decoder = model.post_quant_conv = None
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.model.encoder(sample)
        return moments if self.model.quant_conv is None else self.model.quant_conv(moments)


def text_encoder(
    checkpoint: Checkpoint, kind: type[Any], outputs: tuple[str, ...], name: str = "text_encoder"
) -> ComponentPlan:
    """Return the plan of a CLIP or OpenCLIP text encoder.

    Args:
        checkpoint: the checkpoint.
        kind: model class of transformers.
        outputs: outputs of the graph: last_hidden_state, hidden_states.K, pooler_output,
            text_embeds.
        name: of the component and of its folder.
    """
    config = checkpoint.config(name)
    tokens, width = config["max_position_embeddings"], config["hidden_size"]
    hidden = TensorSpec("float32", ("batch", tokens, width))
    pooled = {
        "text_embeds": TensorSpec("float32", ("batch", config.get("projection_dim", 512))),
        "pooler_output": TensorSpec("float32", ("batch", width)),
    }
    return ComponentPlan(
        name=name,
        folder=name,
        part=name,
        module=partial(load_module, folder=name, kind=kind),
        wrap=partial(TextEncoder, outputs=outputs),
        inputs={"input_ids": TensorSpec("int64", ("batch", tokens))},
        outputs={output: pooled.get(output, hidden) for output in outputs},
    )


def tokens(text: ComponentPlan) -> int:
    """Return the number of tokens that a text encoder takes."""
    return int(text.inputs["input_ids"].shape[1])


def unet(
    config: Mapping[str, Any],
    latent: Latent,
    *,
    tokens: int,
    images: Sequence[ImageChannels] = (),
    folder: str = "unet",
    module: Callable[[Checkpoint], nn.Module] | None = None,
    added: Mapping[str, int] | None = None,
) -> ComponentPlan:
    """Return the plan of a UNet, as the component ``denoiser``.

    Args:
        config: with in_channels, cross_attention_dim and, optionally, time_cond_proj_dim.
        latent: the latent space.
        tokens: number of tokens of a prompt.
        images: channels of images that it takes after those of the latents.
        folder: folder of its weights.
        module: loads the module, if it is not diffusers' UNet2DConditionModel.
        added: widths of additional inputs (batch, width), by name.

    Raises:
        CheckpointError: the input channels do not match the latents.
    """
    if images and config.get("time_cond_proj_dim") and images != ("mask", "masked_image"):
        raise CheckpointError(
            "the UNet takes an image and embedded guidance (time_cond_proj_dim), a combination "
            "that no diffusers pipeline supports"
        )
    channels = latent.sample_channels(images)
    if config["in_channels"] != channels:
        raise CheckpointError(
            f"the UNet takes {reprlib.repr(config['in_channels'])} channels, but "
            f"{' + '.join(('latents', *images))} have {channels}"
        )
    widths = dict(added or {})
    if config.get("time_cond_proj_dim"):
        widths["timestep_cond"] = config["time_cond_proj_dim"]
    size = ("latent_height", "latent_width")
    context = ("batch", tokens, config["cross_attention_dim"])
    return ComponentPlan(
        name="denoiser",
        folder=folder,
        part="unet",
        module=module or partial(load_module, folder=folder, kind=UNet2DConditionModel),
        wrap=UNet,
        inputs={
            "sample": TensorSpec("float32", ("batch", channels, *size)),
            "timestep": TensorSpec("float32", (1,)),
            "encoder_hidden_states": TensorSpec("float32", context),
            **{name: TensorSpec("float32", ("batch", width)) for name, width in widths.items()},
        },
        outputs={"out_sample": TensorSpec("float32", ("batch", latent.channels, *size))},
        multiples=dict.fromkeys(size, latent.multiple),
    )


def vae(latent: Latent, *, overflows_fp16: bool = False) -> tuple[ComponentPlan, ComponentPlan]:
    """Return the plans of the autoencoder's decoder and encoder, in this order.

    Args:
        latent: the latent space.
        overflows_fp16: its values exceed the range of half precision.
    """
    scale = latent.downscale
    shape = ("batch", latent.channels, "latent_height", "latent_width")
    pixels = ("batch", 3, f"latent_height*{scale}", f"latent_width*{scale}")
    moments = ("batch", 2 * latent.channels, f"height//{scale}", f"width//{scale}")
    shared: Mapping[str, Any] = {
        "folder": "vae",
        "part": "vae",
        "module": partial(load_module, folder="vae", kind=AutoencoderKL),
        "overflows_fp16": overflows_fp16,
    }
    decoder = ComponentPlan(
        name="vae_decoder",
        wrap=VaeDecoder,
        inputs={"latent_sample": TensorSpec("float32", shape)},
        outputs={"sample": TensorSpec("float32", pixels)},
        **shared,
    )
    encoder = ComponentPlan(
        name="vae_encoder",
        wrap=VaeEncoder,
        inputs={"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
        outputs={"latent_parameters": TensorSpec("float32", moments)},
        multiples={"height": scale, "width": scale},
        **shared,
    )
    return decoder, encoder


def latent_space(checkpoint: Checkpoint, multiple: int) -> Latent:
    """Return the latent space of the checkpoint's VAE.

    Args:
        checkpoint: the checkpoint.
        multiple: divisor of the latents' height and width, by the denoiser's downsampling.

    Raises:
        CheckpointError: the VAE normalizes latents in a way that the runtime does not support.
    """
    config = checkpoint.config("vae")
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(key) is not None:
            raise CheckpointError(f"{checkpoint.name}: vae has a {key}, which is not supported")
    return Latent(
        channels=config["latent_channels"],
        scaling_factor=config.get("scaling_factor", 0.18215),
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        multiple=multiple,
    )


def inpainting(channels: object, latent: Latent) -> tuple[ImageChannels, ...]:
    """Return the channels of images that a UNet with this number of channels takes.

    Raises:
        CheckpointError: it is neither a model for text to image nor one for inpainting.
    """
    kinds: tuple[tuple[ImageChannels, ...], ...] = ((), ("mask", "masked_image"))
    sizes = [latent.sample_channels(kind) for kind in kinds]
    if channels not in sizes:
        raise CheckpointError(
            f"the UNet takes {reprlib.repr(channels)} channels, but with {latent.channels} latent "
            f"channels it must take {sizes[0]} (text to image) or {sizes[1]} (inpainting)"
        )
    return kinds[sizes.index(channels)]


def defaults(checkpoint: Checkpoint, family: FamilyDefaults) -> FamilyDefaults:
    """Return the family's defaults, or those of a model that was distilled to few steps.

    Latent consistency models have an LCMScheduler and, mostly, a guidance input (Luo et al. 2023).
    Models from adversarial distillation (Sauer et al. 2023, arXiv 2311.17042) predict epsilon and
    have an Euler scheduler with trailing timesteps, a combination that no other model has.
    """
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    kind = scheduler.get("_class_name")
    if checkpoint.config("unet").get("time_cond_proj_dim"):
        return FamilyDefaults(sampler="lcm", steps=4, guidance_scale=8.5)
    if kind == "LCMScheduler":
        return FamilyDefaults(steps=4, guidance_scale=1.0)
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    last = scheduler.get("timestep_spacing") == "trailing"
    if euler and noise and last and not scheduler.get("rescale_betas_zero_snr"):
        return FamilyDefaults(steps=1, guidance_scale=0.0)
    return family


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors from reading a malformed configuration into one-line CheckpointErrors."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.name}: a config.json has no key {error}") from error
    except (TypeError, ValueError, ManifestError) as error:
        raise CheckpointError(f"{checkpoint.name}: a config.json is invalid: {error}") from error


def check_unet(
    checkpoint: Checkpoint, config: Mapping[str, Any], expected: Mapping[str, object]
) -> None:
    """Refuse a UNet with other conditioning inputs than its pipeline has.

    Args:
        checkpoint: the checkpoint, named in the error.
        config: configuration of the UNet.
        expected: keys of the conditioning inputs that the pipeline has; all others are None.

    Raises:
        CheckpointError: the configuration has another kind of added conditioning.
    """
    for key, value in {**_NO_CONDITIONING, **expected}.items():
        if config.get(key) != value:
            raise CheckpointError(
                f"{checkpoint.name}: {key} of the unet of a {checkpoint.pipeline_class} must be "
                f"{value}, not {reprlib.repr(config.get(key))}"
            )


def check_context(checkpoint: Checkpoint, texts: Sequence[ComponentPlan], width: object) -> None:
    """Refuse text encoders whose joined hidden states do not have the UNet's context width.

    Args:
        checkpoint: the checkpoint, named in the error.
        texts: plans of the text encoders.
        width: cross_attention_dim of the UNet.

    Raises:
        CheckpointError: the widths differ.
    """
    total = sum(
        int(next(s for s in t.outputs.values() if len(s.shape) == 3).shape[2]) for t in texts
    )
    if total != width:
        names = " and ".join(text.name for text in texts)
        raise CheckpointError(
            f"{checkpoint.name}: the UNet's cross_attention_dim is {reprlib.repr(width)}, but "
            f"the hidden states of {names} are {total} wide"
        )
