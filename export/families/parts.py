"""The components that families share, each as a plan made from a checkpoint's configurations.

Inputs and outputs have the names that optimum's ONNX exports gave them.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.types import ComponentPlan, FamilyDefaults
from latentforge.export.modules import load_module
from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.manifest import Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "check_context",
    "check_unet",
    "defaults",
    "latent_space",
    "reading",
    "text_encoder",
    "tokens",
    "unet",
    "vae",
]


class TextEncoder(nn.Module):
    """Token ids (batch, tokens) to hidden states (batch, tokens, width) and pooled outputs.

    ``hidden_states.K`` is what enters layer K, ``last_hidden_state`` comes after the final norm.
    """

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, output_hidden_states=True)
        return tuple(self._value(found, name) for name in self.outputs)

    @staticmethod
    def _value(found: Any, name: str) -> Tensor:
        key, _, index = name.partition(".")
        return found[key][int(index)] if index else found[key]


class UNet(nn.Module):
    """Noisy latents (batch, channels, h, w), timestep (1,) and conditions to the prediction."""

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
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=None if text_embeds is None else added,
            return_dict=False,
        )
        return output[0]


class VaeDecoder(nn.Module):
    """Latents (batch, channels, h, w), divided by the scaling factor, to pixels in -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.encoder = model.quant_conv = None  # half of the weights, and no use here
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Pixels in -1..1 to the mean and log variance of their latents, stacked by channel."""

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
    """A CLIP or OpenCLIP text tower, loaded as ``kind``, and which of its outputs to give."""
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
    """How many tokens a text encoder takes."""
    return int(text.inputs["input_ids"].shape[1])


def unet(
    config: Mapping[str, Any],
    latent: Latent,
    *,
    tokens: int,
    folder: str = "unet",
    module: Callable[[Checkpoint], nn.Module] | None = None,
    added: Mapping[str, int] | None = None,
) -> ComponentPlan:
    """The denoiser.

    Args:
        config: in_channels, cross_attention_dim and, if there is one, time_cond_proj_dim.
        latent: the latent space.
        tokens: of a prompt.
        folder: of its weights.
        module: loads it, if it is no UNet of diffusers.
        added: widths of further inputs (batch, width), by name.

    Raises:
        CheckpointError: the UNet does not fit the latents.
    """
    channels = config["in_channels"]
    _check_channels(channels, latent)
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
    """The two halves of the autoencoder, decoder first.

    Args:
        latent: the latent space.
        overflows_fp16: whether its values leave the range of half precision.
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
    """The VAE's latents; sides are multiples of what the UNet needs to halve them."""
    config = checkpoint.config("vae")
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(key) is not None:
            raise CheckpointError(f"{checkpoint.name}: vae has a {key}, which we do not apply")
    return Latent(
        channels=config["latent_channels"],
        scaling_factor=config.get("scaling_factor", 0.18215),
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        multiple=multiple,
    )


def defaults(checkpoint: Checkpoint, usual: FamilyDefaults) -> FamilyDefaults:
    """What requests get: the usual, or what a student that was distilled to few steps needs.

    Latent consistency models have a LCMScheduler, and mostly a guidance input (Luo et al. 2023);
    adversarial students (Sauer et al. 2023, arXiv 2311.17042) predict noise and come with an Euler
    scheduler that starts at the last timestep, as nothing else does.
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
    return usual


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Say in one line what is wrong with a configuration that makes no plan."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.name}: a config.json has no key {error}") from error
    except (TypeError, ValueError, ManifestError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: a config.json makes no sense: {error}"
        ) from error


def check_unet(checkpoint: Checkpoint, config: Mapping[str, Any], *, text_time: bool) -> None:
    """Refuse a UNet that is told of things that its pipeline does not tell it.

    Args:
        checkpoint: for its name.
        config: of the UNet.
        text_time: whether it is told of pooled prompts and sizes.

    Raises:
        CheckpointError: it is.
    """
    wanted = {
        "addition_embed_type": "text_time" if text_time else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            raise CheckpointError(
                f"{checkpoint.name}: a {checkpoint.pipeline_class} has a unet with {key} {value}, "
                f"and this one's is {reprlib.repr(config.get(key))}"
            )


def check_context(checkpoint: Checkpoint, texts: Sequence[ComponentPlan], width: object) -> None:
    """Refuse text encoders whose states, side by side, are not as wide as the UNet takes them.

    Raises:
        CheckpointError: with both numbers.
    """
    given = sum(
        int(next(s for s in t.outputs.values() if len(s.shape) == 3).shape[2]) for t in texts
    )
    if given != width:
        names = " and ".join(text.name for text in texts)
        raise CheckpointError(
            f"{checkpoint.name}: the UNet's cross_attention_dim is {reprlib.repr(width)}, and "
            f"from {names} come {given}"
        )


def _check_channels(channels: object, latent: Latent) -> None:
    """A UNet takes latents alone, or with a mask and the latents of what that leaves."""
    sizes = latent.channels, 2 * latent.channels + 1
    if channels not in sizes:
        raise CheckpointError(
            f"the UNet takes {reprlib.repr(channels)} channels and the VAE gives "
            f"{latent.channels}: we run text to image ({sizes[0]}) and inpainting ({sizes[1]})"
        )
