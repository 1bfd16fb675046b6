"""Component plans that several families share, made from a checkpoint's configurations.

Inputs and outputs have the names of optimum's ONNX exports.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.configs import read_config, select_class
from latentforge.export.families.types import ComponentPlan, FamilyDefaults, ImageSize
from latentforge.export.models.searched_unet import SearchedUNet2DConditionModel
from latentforge.export.modules import check_size, load_module
from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.manifest import ImageChannels, Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "check_context",
    "check_unet",
    "component_config",
    "defaults",
    "flag",
    "inpainting",
    "latent_space",
    "load_unet",
    "overflows_fp16",
    "reading",
    "sample_size",
    "text_encoder",
    "tokens",
    "unet",
    "unet_config",
    "unet_multiple",
    "vae",
]

_LEVELS: Mapping[type[Any], tuple[str, str]] = {
    AutoencoderKL: ("block_out_channels", "block_out_channels"),
    AutoencoderTiny: ("encoder_block_out_channels", "decoder_block_out_channels"),
    AsymmetricAutoencoderKL: ("down_block_out_channels", "up_block_out_channels"),
}
"""Keys with an item for each level of the encoder and of the decoder, by class of autoencoder."""

_VAES = tuple(_LEVELS)
_UNETS = (UNet2DConditionModel, SearchedUNet2DConditionModel)
_MAX_SIDE = 4096  # of latents: images of 32768 pixels


_NO_CONDITIONING = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "num_class_embeds": None,
    "dual_cross_attention": False,
    "class_embeddings_concat": False,
    "attention_type": "default",
}

_ANY_SIDES = {
    *("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Blocks of UNet2DConditionModel that downsample by a convolution and upsample to a given size."""


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

    A UNet of any sides upsamples to the sides of its skip connections, which diffusers' own does
    only for sides that its factor does not divide: a traced graph has one way for all sides.
    A noise level (batch, 1) is a class label.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if isinstance(model, UNet2DConditionModel) and unet_multiple(model.config) == 1:
            _upsample_to_skips(model)

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
        # DeciDiffusion's UNet takes none.
        labels = {} if noise_level is None else {"class_labels": noise_level[:, 0].to(torch.int64)}
        output = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            **labels,
            timestep_cond=timestep_cond,
            added_cond_kwargs=None if text_embeds is None else added,
            return_dict=False,
        )
        return output[0]


def _upsample_to_skips(model: UNet2DConditionModel) -> None:
    """Let each upsampling restore the sides from before the downsampling that it mirrors."""
    sides: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda *_: sides.clear())

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        sides.append((height, width))

    def upsample(conv: nn.Module, hidden: Tensor, *_: object, **__: object) -> Tensor:
        size = sides.pop()
        double = tuple(2 * side for side in hidden.shape[-2:])
        fixed = all(isinstance(side, int) for side in (*size, *double))
        # Doubling has constant scales, which more libraries have rules for.
        by: dict[str, Any] = {"scale_factor": 2.0} if fixed and size == double else {"size": size}
        enlarged: Tensor = conv(functional.interpolate(hidden, mode="nearest", **by))
        return enlarged

    for block in model.down_blocks:
        for layer in block.downsamplers or ():
            layer.register_forward_pre_hook(record)
    for block in model.up_blocks:
        for layer in block.upsamplers or ():
            layer.forward = partial(upsample, layer.conv)


class VaeDecoder(nn.Module):
    """VAE decoder: latents (batch, channels, h, w), unscaled, to pixels in -1..1.

    Mean and deviation of the latents by channel, where there are any, are undone first.
    """

    def __init__(self, model: Any, statistics: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        model.encoder = model.quant_conv = None  # half of the weights, and unused here
        self.model = model
        self.statistics = statistics

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.statistics is not None:
            mean, deviation = self.statistics
            latent_sample = latent_sample * deviation + mean
        return self.model.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """VAE encoder: pixels in -1..1 to mean and log variance of the latents, joined by channel.

    AutoencoderTiny has no variance: the output is the latents themselves. Where there are mean and
    deviation of the latents by channel, the distribution is normalized by them.
    """

    def __init__(self, model: Any, statistics: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        model.decoder = model.post_quant_conv = None
        self.model = model
        self.statistics = statistics

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.model.encoder(sample)
        if (quant_conv := getattr(self.model, "quant_conv", None)) is not None:
            moments = quant_conv(moments)
        if self.statistics is None:
            return moments
        mean, deviation = self.statistics
        center, log_variance = moments.chunk(2, dim=1)
        shifted = log_variance.clamp(-30, 20) - 2 * deviation.log()
        return torch.cat([(center - mean) / deviation, shifted], dim=1)


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
    config = component_config(checkpoint, name, select_class(checkpoint, name, [kind]))
    if not config["num_hidden_layers"]:
        raise CheckpointError(f"{checkpoint.name}: {name} has no layers: num_hidden_layers is 0")
    tokens, width = config["max_position_embeddings"], config["hidden_size"]
    hidden = TensorSpec("float32", ("batch", tokens, width))
    pooled = {
        "text_embeds": TensorSpec("float32", ("batch", config["projection_dim"])),
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


def component_config(checkpoint: Checkpoint, folder: str, kind: type[Any]) -> dict[str, Any]:
    """Return a component's checked configuration, with its class's defaults for absent keys.

    Where the checkpoint has weights and not graphs alone, they are compared with it.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        kind: a model class of diffusers or transformers.

    Raises:
        CheckpointError: the configuration is malformed, or describes a far larger module.
    """
    weights = any((checkpoint.path / folder).glob("*.safetensors"))
    return (check_size if weights else read_config)(checkpoint, folder, kind)


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
        module: loads the module, if load_unet() does not.
        added: widths of additional inputs (batch, width), by name.

    Raises:
        CheckpointError: the channels do not match the latents.
    """
    if images and config.get("time_cond_proj_dim") and images != ("mask", "masked_image"):
        raise CheckpointError(
            "the UNet takes an image and embedded guidance (time_cond_proj_dim), a combination "
            "that no diffusers pipeline supports"
        )
    channels, predicted = latent.sample_channels(images), config.get("out_channels")
    if config["in_channels"] != channels:
        raise CheckpointError(
            f"the UNet takes {reprlib.repr(config['in_channels'])} channels, but "
            f"{' + '.join(('latents', *images))} have {channels}"
        )
    if predicted not in (None, latent.channels):
        raise CheckpointError(
            f"the UNet predicts {reprlib.repr(predicted)} channels, but latents have "
            f"{latent.channels}: a learned variance is not supported"
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
        module=module or partial(load_unet, folder=folder),
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


def load_unet(checkpoint: Checkpoint, folder: str = "unet") -> nn.Module:
    """Load diffusers' UNet of a checkpoint, or a student of it, by load_module().

    Raises:
        CheckpointError: it is of another class, or load_module() refuses it.
    """
    return load_module(checkpoint, folder, select_class(checkpoint, folder, _UNETS))


def unet_multiple(config: Mapping[str, Any]) -> int:
    """Return the number that the sides of a UNet's latents are multiples of, 1 for any sides.

    diffusers' UNet2DConditionModel takes any sides where its blocks upsample to a given size.
    """
    known = {*config["down_block_types"], *config["up_block_types"]} <= _ANY_SIDES
    if known and config.get("downsample_padding", 1) == 1:
        return 1
    return int(2 ** (len(config["block_out_channels"]) - 1))


def vae(
    checkpoint: Checkpoint, latent: Latent, *, overflows_fp16: bool = False
) -> tuple[ComponentPlan, ComponentPlan]:
    """Return the plans of the autoencoder's decoder and encoder, in this order.

    Args:
        checkpoint: the checkpoint.
        latent: the latent space, by latent_space().
        overflows_fp16: its values exceed the range of half precision.
    """
    kind = select_class(checkpoint, "vae", _VAES)
    scale = latent.downscale
    shape = ("batch", latent.channels, "latent_height", "latent_width")
    pixels = ("batch", 3, f"latent_height*{scale}", f"latent_width*{scale}")
    statistics = _statistics(read_config(checkpoint, "vae", kind))
    encoded = latent.channels if kind is AutoencoderTiny else 2 * latent.channels
    moments = ("batch", encoded, f"height//{scale}", f"width//{scale}")
    shared: Mapping[str, Any] = {
        "folder": "vae",
        "part": "vae",
        "module": partial(load_module, folder="vae", kind=kind),
        "overflows_fp16": overflows_fp16,
    }
    decoder = ComponentPlan(
        name="vae_decoder",
        wrap=partial(VaeDecoder, statistics=statistics),
        inputs={"latent_sample": TensorSpec("float32", shape)},
        outputs={"sample": TensorSpec("float32", pixels)},
        **shared,
    )
    encoder = ComponentPlan(
        name="vae_encoder",
        wrap=partial(VaeEncoder, statistics=statistics),
        inputs={"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
        outputs={"latent_parameters": TensorSpec("float32", moments)},
        multiples={"height": scale, "width": scale},
        **shared,
    )
    return decoder, encoder


def overflows_fp16(checkpoint: Checkpoint) -> bool:
    """Return True if diffusers' pipelines that regard it run the VAE in float32 alone.

    They do unless AutoencoderKL has a force_upcast of false; the other classes never have it.
    """
    kind = select_class(checkpoint, "vae", _VAES)
    config = read_config(checkpoint, "vae", kind)
    return kind is AutoencoderKL and config["force_upcast"] is not False


def latent_space(checkpoint: Checkpoint, multiple: int, *, normalized: bool = False) -> Latent:
    """Return the latent space of the checkpoint's VAE.

    Args:
        checkpoint: the checkpoint.
        multiple: divisor of the latents' height and width, by the denoiser's downsampling.
        normalized: the pipeline normalizes latents by latents_mean and latents_std.

    Raises:
        CheckpointError: the VAE is of an unsupported class, or normalizes latents in a way that
            the runtime does not support.
    """
    kind = select_class(checkpoint, "vae", _VAES)
    config = component_config(checkpoint, "vae", kind)
    _check_normalization(checkpoint, config, normalized=normalized)
    fields = {
        "channels": config["latent_channels"],
        "scaling_factor": config["scaling_factor"],
        "downscale": _downscale(checkpoint, kind, config),
        "multiple": multiple,
        "masked_decoder": kind is AsymmetricAutoencoderKL,
    }
    try:
        return msgspec.convert(fields, Latent)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{checkpoint.name}: vae/config.json: {error}") from error


def _check_normalization(
    checkpoint: Checkpoint, config: Mapping[str, Any], *, normalized: bool
) -> None:
    """Refuse a normalization of latents that the pipeline does not make."""
    neutral = {"latents_mean": 0, "latents_std": 1, "shift_factor": 0}
    changed = [key for key, value in neutral.items() if not _is_all(config.get(key), value)]
    statistics = [config.get(key) for key in ("latents_mean", "latents_std")]
    sizes = {len(value) if isinstance(value, list) else 0 for value in statistics}
    if normalized and "shift_factor" not in changed and sizes == {config["latent_channels"]}:
        if all(type(item) in (int, float) for value in statistics for item in value or ()):
            if min(statistics[1] or [0]) > 0:
                return
    if changed:
        raise CheckpointError(
            f"{checkpoint.name}: vae has a {changed[0]} other than {neutral[changed[0]]}, which "
            f"is not supported in a {checkpoint.pipeline_class}"
        )


def _is_all(value: Any, neutral: int) -> bool:
    items = value if isinstance(value, list) else [neutral if value is None else value]
    return all(item == neutral for item in items)


def _statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation of the latents, (1, channels, 1, 1) each, if both are given."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None or (_is_all(mean, 0) and _is_all(deviation, 1)):
        return None
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1)


def _downscale(checkpoint: Checkpoint, kind: type[Any], config: Mapping[str, Any]) -> int:
    """Return the pixels per latent along one side, equal for encoder and decoder."""
    down, up = (len(config[key]) - 1 for key in _LEVELS[kind])
    factor = config.get("upsampling_scaling_factor", 2)
    pixels = config["in_channels"], config["out_channels"]
    if down != up or factor != 2 or pixels != (3, 3):
        raise CheckpointError(
            f"{checkpoint.name}: the vae must have as many levels in its decoder as in its "
            f"encoder, each of factor 2, and 3 channels of pixels, not {down} and {up} levels of "
            f"factor {factor}, and {pixels[0]} and {pixels[1]} channels"
        )
    return int(2**down)


def sample_size(checkpoint: Checkpoint, config: Mapping[str, Any], latent: Latent) -> ImageSize:
    """Return the height and width of an image in pixels, by the UNet's sample_size.

    Args:
        checkpoint: the checkpoint, named in the error.
        config: configuration of the UNet; its sample_size is one side of the latents or both.
        latent: the latent space.

    Raises:
        CheckpointError: the UNet has no sample_size, or one that is not one or two sides.
    """
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    valid = [side for side in sides if type(side) is int and 1 <= side <= _MAX_SIDE]
    if len(sides) != 2 or valid != sides:
        raise CheckpointError(
            f"{checkpoint.name}: sample_size of the unet must be one or two sides of 1 to "
            f"{_MAX_SIDE}, not {reprlib.repr(size)}"
        )
    height, width = (side * latent.downscale for side in valid)
    return height, width


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
    except (TypeError, ValueError, LookupError, ArithmeticError, ManifestError) as error:
        raise CheckpointError(f"{checkpoint.name}: a config.json is invalid: {error}") from error


def unet_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checked configuration of the checkpoint's UNet, with one width of its context.

    Raises:
        CheckpointError: it is malformed, of another class than UNet2DConditionModel and students
            of it, or its blocks differ in the width of the context.
    """
    kind = select_class(checkpoint, "unet", _UNETS)
    config = component_config(checkpoint, "unet", kind)
    width = config["cross_attention_dim"]
    first, *others = width if isinstance(width, list) and width else [width]
    if type(first) is not int or any(other != first for other in others):
        raise CheckpointError(
            f"{checkpoint.name}: cross_attention_dim of the unet must be one width for all "
            f"blocks, not {reprlib.repr(width)}"
        )
    return {**config, "cross_attention_dim": first}


def flag(checkpoint: Checkpoint, key: str, default: bool) -> bool:
    """Return a flag of model_index.json.

    Raises:
        CheckpointError: it is neither true nor false.
    """
    value = checkpoint.index.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(
            f"{checkpoint.name}: {key} in model_index.json must be true or false, not "
            f"{reprlib.repr(value)}"
        )
    return default if value is None else value


def check_unet(
    checkpoint: Checkpoint, config: Mapping[str, Any], expected: Mapping[str, object]
) -> None:
    """Refuse a UNet with other conditioning inputs than its pipeline has.

    Args:
        checkpoint: the checkpoint, named in the error.
        config: configuration of the UNet.
        expected: keys of the conditioning inputs that the pipeline has; all others are off.

    Raises:
        CheckpointError: the configuration has another kind of added conditioning.
    """
    for key, value in {**_NO_CONDITIONING, **expected}.items():
        given = config.get(key)
        if given != value and (given or value):
            raise CheckpointError(
                f"{checkpoint.name}: {key} of the unet of a {checkpoint.pipeline_class} must be "
                f"{value}, not {reprlib.repr(given)}"
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
