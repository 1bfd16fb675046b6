"""diffusers' UNet with a searched structure: parts of it are left out or halved.

Module paths and names of weights are those of the whole UNet, which is the teacher of such a
student.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpBlock2D
from torch import Tensor, nn

from latentforge.export.models.searched_structure import (
    Choice,
    Importance,
    Kept,
    Repair,
    SearchedStructure,
    half,
    half_channels,
    list_sites,
)

__all__ = ["SearchedUNet2DConditionModel", "first_parts", "reduce_unet"]


def _with_structure(init: Callable[..., None]) -> Callable[..., None]:
    """Give a constructor the signature of UNet2DConditionModel's, and a structure.

    diffusers reads a configuration by the names in the signature.
    """
    whole = inspect.signature(UNet2DConditionModel.__init__)
    structure = inspect.signature(init).parameters["structure"]
    parameters = [*whole.parameters.values(), structure]
    init.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
    return init


class SearchedUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel with parts left out or halved.

    Args of its constructor are those of UNet2DConditionModel, and ``structure``, by
    SearchedStructure.to_config().

    Raises:
        CheckpointError: the structure is malformed, or not one of this UNet's.
    """

    larger_while_built = 16
    """Upper bound of how many times more weights the whole UNet has, which is built first."""

    @register_to_config  # type: ignore[untyped-decorator]
    @_with_structure
    def __init__(self, *, structure: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__(**config)
        sites = list_sites({**self.config, "structure": None})
        chosen = SearchedStructure.from_config(structure, sites)
        reduce_unet(self, chosen, first_parts(self, chosen))


def first_parts(unet: UNet2DConditionModel, structure: SearchedStructure) -> Importance:
    """Return the first half of the parts of each site that a structure halves.

    Args:
        unet: the whole UNet.
        structure: the structure.
    """
    names = [name for name, choice in structure.choices.items() if choice == "half"]
    return {name: _first_parts(unet.get_submodule(name)) for name in names}


def _first_parts(module: Any) -> Kept:
    if isinstance(module, ResnetBlock2D):
        return Kept(groups=tuple(range(half(module.norm2.num_groups))))
    return Kept(
        self_heads=tuple(range(half(module.attn1.heads))),
        cross_heads=tuple(range(half(module.attn2.heads))),
        channels=tuple(range(half_channels(module.ff.net[2].in_features))),
    )


def reduce_unet(
    unet: UNet2DConditionModel, structure: SearchedStructure, importance: Importance
) -> None:
    """Leave out and halve parts of a whole UNet, in place; its weights themselves do not change.

    Args:
        unet: the whole UNet.
        structure: a structure that SearchedStructure.check() accepts.
        importance: parts to keep of the sites that are halved, and repairs.
    """
    for name, choice in structure.choices.items():
        module: Any = unet.get_submodule(name)
        if isinstance(module, ResnetBlock2D):
            _reduce_resnet(unet, name, importance.get(name) if choice == "half" else None)
        elif isinstance(module, BasicTransformerBlock):
            _reduce_block(unet, name, choice, importance)
        else:
            _drop_stage(unet)
    for name, choice in structure.choices.items():
        if name in importance and choice in importance[name].repairs:
            _repair(unet, importance[name].repairs[choice])


def _repair(unet: UNet2DConditionModel, repair: Repair) -> None:
    for path, values in (*repair.replaced.items(), *repair.added.items()):
        module, _, name = path.rpartition(".")
        try:
            layer: Any = unet.get_submodule(module)
        except AttributeError:  # another choice leaves it out
            continue
        old = getattr(layer, name)
        value = torch.from_numpy(values).to(old)
        new = value if path in repair.replaced else old.detach() + value
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


class _DroppedResnet(nn.Module):
    """Identity in place of a resnet."""

    def forward(self, hidden: Tensor, *_: object) -> Tensor:
        """Return the hidden states."""
        return hidden


class _DroppedAttention(nn.Module):
    """Identity in place of a module of attention."""

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor]:
        """Return the hidden states in a tuple, as diffusers' module does."""
        return (hidden,)


class _ReducedUpBlock(UpBlock2D):
    """Up block in which a dropped resnet leaves its skip connection unused."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        upsample_size: Any = None,
        **conditioning: Any,
    ) -> Tensor:
        """Return the hidden states (batch, channels, h, w); arguments are diffusers'."""
        hidden, attentions = hidden_states, getattr(self, "attentions", ())
        rows = zip_longest(self.resnets, attentions, reversed(res_hidden_states_tuple))
        for resnet, attention, skip in rows:
            if not isinstance(resnet, _DroppedResnet):
                hidden = self._resnet(resnet, torch.cat([hidden, skip], dim=1), temb)
            if attention is not None:
                hidden = attention(hidden, **conditioning, return_dict=False)[0]
        for upsampler in self.upsamplers or ():
            hidden = upsampler(hidden, upsample_size)
        return hidden

    def _resnet(self, resnet: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(resnet, hidden, time)
        return resnet(hidden, time)


class _ReducedBlock(BasicTransformerBlock):
    """Transformer block without self-attention, feed-forward or both."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the hidden states (batch, tokens, channels); arguments are diffusers'.

        Checkpointing of activations passes them by position.
        """
        hidden, options = hidden_states, cross_attention_kwargs or {}
        if self.attn1 is not None:
            context = encoder_hidden_states if self.only_cross_attention else None
            values = self.norm1(hidden)
            hidden = self.attn1(values, context, attention_mask=attention_mask, **options) + hidden
        values, mask = self.norm2(hidden), encoder_attention_mask
        hidden = self.attn2(values, encoder_hidden_states, attention_mask=mask, **options) + hidden
        return hidden if self.ff is None else self.ff(self.norm3(hidden)) + hidden


def _reduce_resnet(unet: UNet2DConditionModel, name: str, kept: Kept | None) -> None:
    """Halve a resnet, or drop it if nothing is kept."""
    if kept is not None:
        _halve_resnet(unet.get_submodule(name), kept.groups)
        return
    path, _, index = name.rpartition(".")
    unet.get_submodule(path)._modules[index] = _DroppedResnet()
    block = unet.get_submodule(path.rpartition(".")[0])
    if name.startswith("up_blocks"):
        block.__class__ = _ReducedUpBlock


def _halve_resnet(resnet: Any, groups: Iterable[int]) -> None:
    norm = resnet.norm2
    channels = _channels(groups, norm.num_channels // norm.num_groups)
    resnet.conv1 = _sliced(resnet.conv1, outputs=channels)
    resnet.time_emb_proj = _sliced(resnet.time_emb_proj, outputs=channels)
    resnet.norm2 = _sliced(norm, outputs=channels)
    resnet.conv2 = _sliced(resnet.conv2, inputs=channels)


def _reduce_block(
    unet: UNet2DConditionModel, name: str, choice: Choice, importance: Importance
) -> None:
    """Halve or drop a transformer block or parts of it."""
    if choice == "drop":
        _drop_block(unet, name)
        return
    block: Any = unet.get_submodule(name)
    if choice == "half":
        _halve_block(block, importance[name])
        return
    block.__class__ = _ReducedBlock
    if choice != "no_feed_forward":
        block.norm1 = block.attn1 = None
    if choice != "no_self_attention":
        block.norm3 = block.ff = None


def _drop_block(unet: UNet2DConditionModel, name: str) -> None:
    """Drop a transformer block, and the module of attention that it leaves empty."""
    path, _, index = name.rpartition(".")
    blocks = unet.get_submodule(path)._modules
    del blocks[index]
    if not blocks:
        attentions, _, attention = path.rpartition(".transformer_blocks")[0].rpartition(".")
        unet.get_submodule(attentions)._modules[attention] = _DroppedAttention()


def _halve_block(block: Any, kept: Kept) -> None:
    for attention, heads in ((block.attn1, kept.self_heads), (block.attn2, kept.cross_heads)):
        _halve_attention(attention, heads)
    first, last = block.ff.net[0], block.ff.net[2]
    gates = [last.in_features + channel for channel in kept.channels]
    first.proj = _sliced(first.proj, outputs=[*kept.channels, *gates])
    block.ff.net._modules["2"] = _sliced(last, inputs=kept.channels)


def _halve_attention(attention: Any, heads: Sequence[int]) -> None:
    channels = _channels(heads, attention.inner_dim // attention.heads)
    for name in ("to_q", "to_k", "to_v"):
        setattr(attention, name, _sliced(getattr(attention, name), outputs=channels))
    attention.to_out._modules["0"] = _sliced(attention.to_out[0], inputs=channels)
    attention.heads = attention.sliceable_head_dim = len(heads)
    attention.inner_dim = attention.inner_kv_dim = len(channels)


def _drop_stage(unet: UNet2DConditionModel) -> None:
    """Drop the innermost level, whose up block comes first."""
    unet.down_blocks._modules.popitem()
    unet.down_blocks[-1].downsamplers = None
    unet.mid_block = None
    del unet.up_blocks._modules["0"]  # ModuleList's own deletion would rename the others
    unet.num_upsamplers -= 1


def _channels(parts: Iterable[int], size: int) -> list[int]:
    return [part * size + channel for part in parts for channel in range(size)]


_WIDTHS = (("out_channels", "out_features", "num_channels"), ("in_channels", "in_features"))


def _sliced(
    layer: Any,
    *,
    outputs: Sequence[int] | None = None,
    inputs: Sequence[int] | None = None,
) -> Any:
    """Return a layer with some of its output or input channels.

    Args:
        layer: convolution, linear layer or group norm, whose groups keep their size.
        outputs: channels to keep; None keeps all.
        inputs: likewise.
    """
    result = copy.copy(layer)
    result._parameters = dict(layer._parameters)
    for axis, channels in enumerate((outputs, inputs)):
        if channels is None:
            continue
        names = ("weight", "bias") if axis == 0 else ("weight",)
        for name in names:
            setattr(result, name, _selected(getattr(result, name), axis, channels))
        _set_width(result, _WIDTHS[axis], len(channels))
    return result


def _selected(weight: nn.Parameter | None, axis: int, channels: Sequence[int]) -> Any:
    if weight is None:
        return None
    index = torch.tensor(channels, device=weight.device)
    values = weight.detach().index_select(axis, index)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _set_width(layer: Any, names: Iterable[str], width: int) -> None:
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * width // layer.num_channels
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, width)
