"""DeciDiffusion's UNet, whose blocks hold any number of resnets and attentions in one list.

A checkpoint has it in ``flexible_unet/``. The original class is in the checkpoint's own
pipeline.py, which is never run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from latentforge.export.checkpoint import Checkpoint, read_json
from latentforge.export.models.flexible_structure import (
    BlockStructure,
    FlexibleStructure,
    Shapes,
    check_equal,
    shortened,
)
from latentforge.export.modules import check_finite, warn_extra
from latentforge.runtime.errors import CheckpointError, SettingsError, ShapeError

__all__ = ["FlexibleUNet2DConditionModel", "load_flexible_unet", "structure_of"]

_FLOATS = ("F16", "BF16", "F32", "F64")


class _Layers(nn.Module):
    """Base of the blocks: resnets and attentions in one list."""

    def __init__(self, structure: FlexibleStructure, block: BlockStructure) -> None:
        super().__init__()
        pairs = zip(block.hidden_widths(), block.skip_widths(), strict=True)
        widths = (hidden + skip for hidden, skip in pairs)
        self.modules_list = nn.ModuleList(
            _resnet(structure, next(widths), block.out_channels)
            if kind == "R"
            else _attention(structure, block.out_channels)
            for kind in block.layers
        )

    def _run(
        self,
        layer: nn.Module,
        hidden: Tensor,
        time: Tensor,
        prompt: Tensor,
        options: dict[str, Any] | None,
    ) -> Tensor:
        """Pass (batch, channels, h, w) through one layer."""
        if isinstance(layer, ResnetBlock2D):
            return layer(hidden, time)
        return layer(
            hidden,
            encoder_hidden_states=prompt,
            cross_attention_kwargs=options,
            return_dict=False,
        )[0]


class _DownBlock(_Layers):
    """Down block."""

    def __init__(self, structure: FlexibleStructure, index: int) -> None:
        block = structure.down[index]
        super().__init__(structure, block)
        width = block.out_channels
        # Under the name "conv" the convolution would be registered twice.
        sampler = [Downsample2D(width, use_conv=True, name="op")] if block.resample else []
        self.downsamplers = nn.ModuleList(sampler)
        self.last = index == len(structure.down) - 1

    def forward(
        self, hidden: Tensor, time: Tensor, prompt: Tensor, options: dict[str, Any] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the hidden states (batch, channels, h, w) and the skips for the up blocks."""
        skips = []
        for layer in self.modules_list:
            hidden = self._run(layer, hidden, time, prompt, options)
            if isinstance(layer, ResnetBlock2D):  # the skip is taken before a following attention
                skips.append(hidden)
        if self.downsamplers:
            hidden = _resampled(self.downsamplers, hidden)
            if not self.last:  # the last downsampled output goes to the mid block only
                skips.append(hidden)
        return hidden, skips


class _MidBlock(_Layers):
    """Mid block."""

    def __init__(self, structure: FlexibleStructure, block: BlockStructure) -> None:
        super().__init__(structure, block)
        self.upsamplers = _upsamplers(block)

    def forward(
        self, hidden: Tensor, time: Tensor, prompt: Tensor, options: dict[str, Any] | None
    ) -> Tensor:
        # The first resnet runs twice: the original calls the first entry and then loops over the
        # whole list. This looks like an oversight, but the weights were trained with it.
        for layer in (self.modules_list[0], *self.modules_list):
            hidden = self._run(layer, hidden, time, prompt, options)
        return _resampled(self.upsamplers, hidden)


class _UpBlock(_Layers):
    """Up block."""

    def __init__(self, structure: FlexibleStructure, block: BlockStructure) -> None:
        super().__init__(structure, block)
        self.upsamplers = _upsamplers(block)

    def forward(
        self,
        hidden: Tensor,
        skips: list[Tensor],
        time: Tensor,
        prompt: Tensor,
        options: dict[str, Any] | None,
    ) -> Tensor:
        """Return the hidden states; each resnet pops one skip off the end of the list."""
        for layer in self.modules_list:
            if isinstance(layer, ResnetBlock2D):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(layer, hidden, time, prompt, options)
        return _resampled(self.upsamplers, hidden)


def _resnet(structure: FlexibleStructure, in_channels: int, out_channels: int) -> nn.Module:
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=structure.time_width,
        groups=structure.groups,
        eps=structure.eps,
        non_linearity="silu",
    )


def _attention(structure: FlexibleStructure, channels: int) -> nn.Module:
    return Transformer2DModel(
        num_attention_heads=structure.heads,
        attention_head_dim=channels // structure.heads,
        in_channels=channels,
        norm_num_groups=structure.groups,
        cross_attention_dim=structure.cross_attention_dim,
    )


class _Upsampler(nn.Module):
    """diffusers' Upsample2D without its branch for 64 rows, which would fix a traced batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Upsample (batch, channels, h, w) to (batch, channels, 2h, 2w)."""
        return self.conv(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _upsamplers(block: BlockStructure) -> nn.ModuleList:
    return nn.ModuleList([_Upsampler(block.out_channels)] if block.resample else [])


def _resampled(samplers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for sampler in samplers:
        hidden = sampler(hidden)
    return hidden


class FlexibleUNet2DConditionModel(ModelMixin, ConfigMixin):
    """Flexible UNet, a drop-in for UNet2DConditionModel in diffusers' pipelines.

    Its weights have the names of DeciDiffusion's checkpoints. ``FlexibleStructure.from_config``
    reads its ``config``, so ``load_flexible_unet`` loads what save_pretrained writes.

    Raises:
        CheckpointError: the blocks of the structure do not fit together.
    """

    def __init__(self, structure: FlexibleStructure) -> None:
        super().__init__()
        structure.check()
        self.register_to_config(**structure.to_config(), time_cond_proj_dim=None)
        self.structure = structure
        first, last = structure.down[0].in_channels, structure.up[-1].out_channels
        self.conv_in = nn.Conv2d(structure.in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, structure.time_width)
        self.down_blocks = nn.ModuleList(
            _DownBlock(structure, index) for index in range(len(structure.down))
        )
        self.mid_block = None if structure.mid is None else _MidBlock(structure, structure.mid)
        self.up_blocks = nn.ModuleList(_UpBlock(structure, b) for b in structure.up)
        self.conv_norm_out = nn.GroupNorm(structure.groups, last, eps=structure.eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, structure.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict from noisy latents.

        Args:
            sample: latents (batch, in_channels, h, w); h and w are multiples of the structure's
                ``multiple``.
            timestep: one for all rows, as a number or of shape () or (1,), or (batch,).
            encoder_hidden_states: hidden states of the prompt (batch, tokens, cross_attention_dim).
            timestep_cond: must be None; diffusers' pipelines pass it.
            cross_attention_kwargs: passed on to the attention processors.
            added_cond_kwargs: must be None; diffusers' pipelines pass it.
            return_dict: return an object with ``sample`` rather than a tuple.

        Returns:
            The prediction (batch, out_channels, h, w).

        Raises:
            ShapeError: height or width of the latents is not such a multiple.
            SettingsError: a conditioning input that this network does not have.
        """
        if timestep_cond is not None or added_cond_kwargs is not None:
            raise SettingsError("a flexible UNet takes no timestep_cond and no added_cond_kwargs")
        self._check_size(sample)
        conditions = (self._embed(timestep, sample), encoder_hidden_states, cross_attention_kwargs)
        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            hidden, saved = block(hidden, *conditions)
            skips += saved
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, *conditions)
        for block in self.up_blocks:
            hidden = block(hidden, skips, *conditions)
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _embed(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """Return the time embedding (batch, time_width)."""
        steps = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        steps = steps.reshape(-1).expand(sample.shape[0])
        return self.time_embedding(self.time_proj(steps).to(sample.dtype))

    def _check_size(self, sample: Tensor) -> None:
        unit = self.structure.multiple
        height, width = sample.shape[-2:]
        if height % unit != 0 or width % unit != 0:
            raise ShapeError(
                f"height and width of the latents must be multiples of {unit}, "
                f"not {height} x {width}"
            )


def load_flexible_unet(
    checkpoint: Checkpoint, folder: str = "flexible_unet"
) -> FlexibleUNet2DConditionModel:
    """Load a flexible UNet from safetensors, strictly and in float32.

    The structure is that of the ``configurations`` in config.json, which must match the weights.
    Without them it is inferred from the weights, with 8 heads, which shapes do not determine. No
    code of the checkpoint is run.

    Returns:
        The module in evaluation mode, without gradients.

    Raises:
        CheckpointError: there are no weights, they are pickles, damaged, or hold NaN or infinity;
            config.json is malformed or contradicts the weights; a weight is missing or of another
            shape. Weights that the structure has no place for are ignored with a warning.
    """
    files, _ = checkpoint.weights(folder)
    with _prefixed(f"{checkpoint.name}: {folder}"):
        shapes = _read_shapes(files)
        structure = _structure(checkpoint.path / folder, shapes)
        with torch.device("meta"):  # no memory until the weights are loaded
            module = FlexibleUNet2DConditionModel(structure)
        names = _check_shapes(module, shapes)
    warn_extra(checkpoint, folder, [shortened(key) for key in shapes if key not in names])
    module.load_state_dict(_read_weights(files, names), strict=True, assign=True)
    check_finite(checkpoint, folder, module)
    return module.eval().requires_grad_(False)


def structure_of(checkpoint: Checkpoint, folder: str = "flexible_unet") -> FlexibleStructure:
    """Return the structure that load_flexible_unet would build, reading headers of weights only.

    Raises:
        CheckpointError: as in load_flexible_unet, as far as the headers show.
    """
    files, _ = checkpoint.weights(folder)
    with _prefixed(f"{checkpoint.name}: {folder}"):
        structure = _structure(checkpoint.path / folder, _read_shapes(files))
        structure.check()
    return structure


def _structure(directory: Path, shapes: Shapes) -> FlexibleStructure:
    file = directory / "config.json"
    config = read_json(file) if file.exists() else {}
    if "configurations" not in config:
        return FlexibleStructure.from_weights(shapes)
    with _prefixed("config.json"):
        configured = FlexibleStructure.from_config(config, shapes)
    actual = FlexibleStructure.from_weights(
        shapes, heads=configured.heads, sample_size=configured.sample_size, eps=configured.eps
    )
    check_equal(configured, actual, f"{directory.name}/config.json")
    return configured


def _check_shapes(module: nn.Module, shapes: Shapes) -> set[str]:
    """Compare names and shapes before any weight is read, and return the names to read."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if missing := [key for key in expected if key not in shapes]:
        raise CheckpointError(f"{len(missing)} weights are missing, such as {missing[0]}")
    wrong = [key for key, shape in expected.items() if tuple(shapes[key]) != shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights have a wrong shape, such as {wrong[0]}: "
            f"{tuple(shapes[wrong[0]])}, expected {expected[wrong[0]]}"
        )
    return set(expected)


def _read_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():
                weight = opened.get_slice(key)
                if key in shapes:
                    raise CheckpointError(f"two files contain {shortened(key)}")
                if weight.get_dtype() not in _FLOATS and key.endswith((".weight", ".bias")):
                    raise CheckpointError(
                        f"{shortened(key)} has dtype {weight.get_dtype()}: expected a float of "
                        "16 bits or more"
                    )
                shapes[key] = tuple(weight.get_shape())
    return shapes


def _read_weights(files: Sequence[Path], names: set[str]) -> dict[str, Tensor]:
    """Read weights in float32, converting one at a time to avoid a second copy."""
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in names.intersection(opened.keys()):
                weights[key] = opened.get_tensor(key).float()
    return weights


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    """Prepend a prefix to the messages of CheckpointErrors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}: {error}") from error
