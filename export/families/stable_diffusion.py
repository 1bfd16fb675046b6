"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a KL autoencoder.

Rombach et al. (2022), arXiv 2112.10752. Inputs and outputs have the names that optimum's
ONNX exports gave them.
"""

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.types import ComponentPlan, Family, Plan
from latentforge.export.modules import load_module
from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.manifest import Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = ["STABLE_DIFFUSION"]


class TextEncoder(nn.Module):
    """Token ids (batch, tokens) to hidden states (batch, tokens, width) after the final norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


class UNet(nn.Module):
    """Noisy latents (batch, channels, h, w), timestep (1,) and prompt to the prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output = self.model(sample, timestep, encoder_hidden_states, return_dict=False)
        return output[0]


class Decoder(nn.Module):
    """Latents (batch, channels, h, w), divided by the scaling factor, to pixels in -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.encoder = model.quant_conv = None  # half of the weights, and no use here
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class Encoder(nn.Module):
    """Pixels in -1..1 to the mean and log variance of their latents, stacked by channel."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.decoder = model.post_quant_conv = None
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.model.encoder(sample)
        return moments if self.model.quant_conv is None else self.model.quant_conv(moments)


def _text_encoder(checkpoint: Checkpoint) -> ComponentPlan:
    config = checkpoint.config("text_encoder")
    tokens, width = config["max_position_embeddings"], config["hidden_size"]
    return ComponentPlan(
        name="text_encoder",
        folder="text_encoder",
        load=lambda source: TextEncoder(load_module(source, "text_encoder", CLIPTextModel)),
        inputs={"input_ids": TensorSpec("int64", ("batch", tokens))},
        outputs={"last_hidden_state": TensorSpec("float32", ("batch", tokens, width))},
    )


def _unet(checkpoint: Checkpoint, latent: Latent) -> ComponentPlan:
    config = checkpoint.config("unet")
    text = checkpoint.config("text_encoder")
    sample = TensorSpec("float32", ("batch", latent.channels, "latent_height", "latent_width"))
    context = ("batch", text["max_position_embeddings"], config["cross_attention_dim"])
    return ComponentPlan(
        name="unet",
        folder="unet",
        load=lambda source: UNet(load_module(source, "unet", UNet2DConditionModel)),
        inputs={
            "sample": sample,
            "timestep": TensorSpec("float32", (1,)),
            "encoder_hidden_states": TensorSpec("float32", context),
        },
        outputs={"out_sample": sample},
        multiples={"latent_height": latent.multiple, "latent_width": latent.multiple},
    )


def _vae_decoder(latent: Latent) -> ComponentPlan:
    scale = latent.downscale
    size = (f"latent_height*{scale}", f"latent_width*{scale}")
    shape = ("batch", latent.channels, "latent_height", "latent_width")
    return ComponentPlan(
        name="vae_decoder",
        folder="vae",
        load=lambda source: Decoder(load_module(source, "vae", AutoencoderKL)),
        inputs={"latent_sample": TensorSpec("float32", shape)},
        outputs={"sample": TensorSpec("float32", ("batch", 3, *size))},
    )


def _vae_encoder(latent: Latent) -> ComponentPlan:
    scale = latent.downscale
    size = (f"height//{scale}", f"width//{scale}")
    return ComponentPlan(
        name="vae_encoder",
        folder="vae",
        load=lambda source: Encoder(load_module(source, "vae", AutoencoderKL)),
        inputs={"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
        outputs={"latent_parameters": TensorSpec("float32", ("batch", 2 * latent.channels, *size))},
        multiples={"height": scale, "width": scale},
    )


def _latent(checkpoint: Checkpoint) -> Latent:
    unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
    return Latent(
        channels=vae["latent_channels"],
        scaling_factor=vae.get("scaling_factor", 0.18215),
        downscale=2 ** (len(vae["block_out_channels"]) - 1),
        multiple=2 ** (len(unet["block_out_channels"]) - 1),
    )


def _plan(checkpoint: Checkpoint) -> Plan:
    try:
        latent = _latent(checkpoint)
        components = (
            _text_encoder(checkpoint),
            _unet(checkpoint, latent),
            _vae_decoder(latent),
            _vae_encoder(latent),
        )
        size = int(checkpoint.config("unet")["sample_size"]) * latent.downscale
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.name}: a config.json has no key {error}") from error
    except (TypeError, ValueError, ManifestError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: a config.json makes no sense: {error}"
        ) from error
    return Plan(
        components=components,
        tokenizers={"tokenizer": "tokenizer"},
        latent=latent,
        sample_size=size,
        steps=50,
        guidance_scale=7.5,
    )


STABLE_DIFFUSION = Family(
    name="stable_diffusion", pipelines=("StableDiffusionPipeline",), plan=_plan
)
