"""Structure of a flexible UNet, read from its configuration or inferred from its weights.

The structures of the two published networks were derived from
https://huggingface.co/Deci/DeciDiffusion-v1-0 and .../DeciDiffusion-v2-0: from the config.json of
the first, and from the file size of the second, which exactly one structure explains.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from latentforge.runtime.errors import CheckpointError

__all__ = [
    "DECIDIFFUSION_1",
    "DECIDIFFUSION_2",
    "BlockStructure",
    "FlexibleStructure",
    "Shapes",
    "check_equal",
    "shortened",
]

_MAX_BLOCKS = 16
_MAX_LAYERS = 64
_MAX_WIDTH = 1 << 16  # limit of channels, heads, sizes: far above real values

_LAYER = re.compile(
    r"((?:down|up)_blocks\.(?:0|[1-9][0-9]?)|mid_block)\.modules_list\.(0|[1-9][0-9]?)\.(\w+)\..+"
)
_KINDS = {
    **dict.fromkeys(("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"), "R"),
    **dict.fromkeys(("norm", "proj_in", "transformer_blocks", "proj_out"), "A"),
}
_CONTEXT = "transformer_blocks.0.attn2.to_k.weight"

Shapes = Mapping[str, Sequence[int]]
"""Shapes of weights by name."""

LayerKinds = Mapping[str, Mapping[int, str]]
"""R or A by block and index in its modules_list."""


@dataclass(frozen=True, kw_only=True)
class BlockStructure:
    """Structure of one block of the UNet.

    Attributes:
        in_channels: input channels; in an up block, channels of the last skip connection.
        out_channels: output channels, and channels between the layers.
        prev_channels: channels of the input from the previous block; up blocks only.
        layers: order of modules_list, R for a resnet and A for an attention.
        resample: the block ends with a downsampler (down) or an upsampler (mid, up).
    """

    in_channels: int
    out_channels: int
    prev_channels: int | None = None
    layers: str
    resample: bool

    @property
    def resnets(self) -> int:
        """Number of resnets."""
        return self.layers.count("R")

    @property
    def attentions(self) -> int:
        """Number of attentions."""
        return self.layers.count("A")

    def hidden_widths(self) -> list[int]:
        """Return the input channels of each resnet, without those of its skip connection."""
        first = self.in_channels if self.prev_channels is None else self.prev_channels
        return [first, *[self.out_channels] * (self.resnets - 1)]

    def skip_widths(self) -> list[int]:
        """Return the channels of each resnet's skip connection; 0 outside up blocks."""
        if self.prev_channels is None:
            return [0] * self.resnets
        return [*[self.out_channels] * (self.resnets - 1), self.in_channels]


@dataclass(frozen=True, kw_only=True)
class FlexibleStructure:
    """Structure of a flexible UNet.

    Attributes:
        down: down blocks, in the order of the forward pass.
        mid: mid block; None if there is none.
        up: up blocks, in the order of the forward pass.
        in_channels: channels of the noisy latents.
        out_channels: channels of the prediction.
        heads: attention heads of every attention.
        cross_attention_dim: width of the prompt's hidden states.
        time_width: width of the time embedding.
        sample_size: height and width of the latents of the training images.
        eps: epsilon of the resnets' group norms; that of the attentions is 1e-6.
        groups: groups of all group norms.
    """

    down: tuple[BlockStructure, ...]
    mid: BlockStructure | None
    up: tuple[BlockStructure, ...]
    in_channels: int = 4
    out_channels: int = 4
    heads: int = 8
    cross_attention_dim: int = 768
    time_width: int = 1280
    sample_size: int = 64
    eps: float = 1e-5
    groups: int = 32

    @property
    def multiple(self) -> int:
        """Divisor of the latents' height and width."""
        return int(2 ** sum(block.resample for block in self.down))

    @property
    def mixed(self) -> bool:
        """True if resnets and attentions alternate, False if all resnets come first."""
        return all(
            b.layers == _order(b.resnets, b.attentions, mixed=True) for b in self.blocks().values()
        )

    def blocks(self) -> dict[str, BlockStructure]:
        """Return all blocks by their names in the state dict, in the order of the forward pass."""
        mid = {} if self.mid is None else {"mid_block": self.mid}
        down = {f"down_blocks.{i}": block for i, block in enumerate(self.down)}
        return {**down, **mid, **{f"up_blocks.{i}": block for i, block in enumerate(self.up)}}

    def check(self) -> None:
        """Check that the blocks fit together.

        Raises:
            CheckpointError: a block does not fit; the message names the first one.
        """
        if not self.down or len(self.down) != len(self.up):
            raise CheckpointError(
                f"{len(self.down)} down blocks and {len(self.up)} up blocks do not form a UNet: "
                "it has one up block per down block"
            )
        for name, block in self.blocks().items():
            _check_block(self, name, block)
        if not self.mixed and any(b.layers != _sorted(b.layers) for b in self.blocks().values()):
            raise CheckpointError(
                "resnets and attentions alternate in some blocks but not in others"
            )
        if not any(block.attentions for block in self.blocks().values()):
            raise CheckpointError("there is no attention, so the prompt would have no effect")
        _check_wiring(self)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], keys: Collection[str] | None = None
    ) -> "FlexibleStructure":
        """Read the structure from the ``configurations`` of the hub's config.json.

        No published file shows how it denotes an absent mid block. Numbers that are null, negative
        or missing are taken for one; two zeros are, unless the weights hold a mid block.

        Args:
            config: the parsed config.json.
            keys: names of the weights, if available.

        Raises:
            CheckpointError: it is malformed. check() tests that the blocks fit together.
        """
        reader = _Reader(config.get("configurations"))
        down, up = reader.down_blocks(), reader.up_blocks()
        has_mid = any(key.startswith("mid_block.") for key in keys or ())
        top = _Reader(config)
        return cls(
            down=down,
            mid=reader.mid_block(down[-1].out_channels, has_mid=has_mid),
            up=up,
            in_channels=top.number("in_channels", default=4),
            out_channels=top.number("out_channels", default=4),
            heads=reader.number("num_attention_heads"),
            cross_attention_dim=reader.number("cross_attention_dim"),
            time_width=reader.number("temb_dim"),
            sample_size=reader.number("sample_size"),
            eps=reader.eps(),
        )

    @classmethod
    def from_weights(
        cls, shapes: Shapes, *, heads: int = 8, sample_size: int = 64, eps: float = 1e-5
    ) -> "FlexibleStructure":
        """Infer the structure from the names and shapes of the weights.

        Args:
            shapes: shape of each weight, by its name in the state dict.
            heads: attention heads, which the shapes do not determine; as published by default.
            sample_size: likewise.
            eps: likewise.

        Raises:
            CheckpointError: the weights are not those of a flexible UNet.
        """
        layers = _layer_kinds(shapes)
        down, hidden = _down_blocks(shapes, layers)
        context = next((key for key in shapes if key.endswith(_CONTEXT)), None)
        if context is None:
            raise CheckpointError("the weights hold no attention")
        return cls(
            down=down,
            mid=_mid_block(shapes, layers),
            up=_up_blocks(shapes, layers, hidden),
            in_channels=_dims(shapes, "conv_in.weight", 4)[1],
            out_channels=_dims(shapes, "conv_out.weight", 4)[0],
            heads=heads,
            cross_attention_dim=_dims(shapes, context, 2)[1],
            time_width=_dims(shapes, "time_embedding.linear_1.weight", 2)[0],
            sample_size=sample_size,
            eps=eps,
        )

    def to_config(self) -> dict[str, Any]:
        """Return the structure in the form of the hub's config.json, which from_config reads."""
        configurations = {
            "sample_size": self.sample_size,
            "temb_dim": self.time_width,
            "resnet_eps": self.eps,
            "resnet_act_fn": "silu",
            "num_attention_heads": self.heads,
            "cross_attention_dim": self.cross_attention_dim,
            "mix_block_in_forward": self.mixed,
            **_down_config(self.down),
            "add_upsample_mid_block": self.mid.resample if self.mid else None,
            "mid_num_resnets": self.mid.resnets - 1 if self.mid else None,
            "mid_num_attentions": self.mid.attentions if self.mid else None,
            **_up_config(self.up),
        }
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "cross_attention_dim": self.cross_attention_dim,
            "configurations": configurations,
        }


def _down_config(blocks: Sequence[BlockStructure]) -> dict[str, Any]:
    return {
        "down_blocks_in_channels": [block.in_channels for block in blocks],
        "down_blocks_out_channels": [block.out_channels for block in blocks],
        "down_blocks_num_resnets": [block.resnets for block in blocks],
        "down_blocks_num_attentions": [block.attentions for block in blocks],
        "add_downsample": [block.resample for block in blocks],
    }


def _up_config(blocks: Sequence[BlockStructure]) -> dict[str, Any]:
    return {
        "prev_output_channels": [block.prev_channels for block in blocks],
        "up_blocks_num_resnets": [block.resnets for block in blocks],
        "up_blocks_num_attentions": [block.attentions for block in blocks],
        "add_upsample": [block.resample for block in blocks],
    }


def _order(resnets: int, attentions: int, *, mixed: bool) -> str:
    """Return the order of a modules_list: R A R A A if mixed, R R A A A if not."""
    parts = ("R" * resnets, "A" * attentions)
    return "".join(chain.from_iterable(zip_longest(*parts, fillvalue="")) if mixed else parts)


def _sorted(layers: str) -> str:
    return _order(layers.count("R"), layers.count("A"), mixed=False)


def _down(
    in_channels: int, out_channels: int, layers: str, *, resample: bool = True
) -> BlockStructure:
    return BlockStructure(
        in_channels=in_channels, out_channels=out_channels, layers=layers, resample=resample
    )


def _up(
    in_channels: int, out_channels: int, prev_channels: int, layers: str, *, resample: bool = True
) -> BlockStructure:
    return BlockStructure(
        in_channels=in_channels,
        out_channels=out_channels,
        prev_channels=prev_channels,
        layers=layers,
        resample=resample,
    )


DECIDIFFUSION_1 = FlexibleStructure(
    down=(_down(320, 320, "RR"), _down(320, 640, "RAR"), _down(640, 1280, "RAAA")),
    mid=BlockStructure(in_channels=1280, out_channels=1280, layers="RARARRR", resample=True),
    up=(
        _up(640, 1280, 1280, "RARAAAAA"),
        _up(320, 640, 1280, "RARARA"),
        _up(320, 320, 640, "RRR", resample=False),
    ),
)
"""Structure of DeciDiffusion-v1-0, with 814,746,884 parameters."""

DECIDIFFUSION_2 = FlexibleStructure(
    down=(
        _down(320, 320, "RR"),
        _down(320, 640, "RAR"),
        _down(640, 1280, "RAAA", resample=False),
    ),
    mid=None,
    up=(
        _up(640, 1280, 1280, "RARAAAA"),
        _up(320, 640, 1280, "RARARA"),
        _up(320, 320, 640, "RRR", resample=False),
    ),
)
"""Structure of DeciDiffusion-v2-0, with 525,277,444 parameters."""


def _check_block(structure: FlexibleStructure, name: str, block: BlockStructure) -> None:
    if not block.layers.startswith("R"):
        raise CheckpointError(f"{name} does not start with a resnet")
    for width in (block.in_channels, block.out_channels):
        if width % structure.groups:
            raise CheckpointError(
                f"{name} has {width} channels, not a multiple of the {structure.groups} norm groups"
            )
    if block.attentions and block.out_channels % structure.heads:
        raise CheckpointError(
            f"{name} has {block.out_channels} channels, not a multiple of the "
            f"{structure.heads} heads"
        )


def _check_wiring(structure: FlexibleStructure) -> None:
    """Trace channels and resolution of hidden states and skip connections through all blocks.

        conv_in ──► down.0 ──► down.1 ──► mid ──► up.0 ──► up.1 ──► conv_out
           │           │          │                ▲        ▲
           └───────────┴──────────┴── skips (LIFO) ┴────────┘

    The down blocks push one skip per resnet and per downsampler but the last, the up blocks pop one
    per resnet. Both ends must agree on (channels, level); a level is the number of halvings.
    """
    hidden, level, skips = _trace_down(structure)
    if structure.mid is not None:
        _expect("mid_block", "input channels", structure.mid.in_channels, hidden)
        _expect("mid_block", "output channels", structure.mid.out_channels, hidden)
        level -= structure.mid.resample
    for index, block in enumerate(structure.up):
        name, mirror = f"up_blocks.{index}", structure.down[-1 - index]
        _expect(name, "input channels", block.prev_channels, hidden)
        _expect(name, "channels", block.out_channels, mirror.out_channels)
        for width in block.skip_widths():
            skip = skips.pop() if skips else None
            if skip != (width, level):
                raise CheckpointError(
                    f"{name} expects a skip of {width} channels, halved {level} times, but the "
                    f"down blocks provide {skip or 'none'}"
                )
        hidden, level = block.out_channels, level - block.resample
    if skips or level:
        raise CheckpointError(
            f"the up blocks leave {len(skips)} skips unused, and a size that is halved {level} "
            "times"
        )


def _trace_down(structure: FlexibleStructure) -> tuple[int, int, list[tuple[int, int]]]:
    """Return channels and level after the down blocks, and their skips as (channels, level)."""
    hidden, level = structure.down[0].in_channels, 0
    skips = [(hidden, level)]
    for index, block in enumerate(structure.down):
        _expect(f"down_blocks.{index}", "input channels", block.in_channels, hidden)
        hidden = block.out_channels
        skips += [(hidden, level)] * block.resnets
        level += block.resample
        if block.resample and index < len(structure.down) - 1:
            skips.append((hidden, level))
    return hidden, level, skips


def _expect(name: str, what: str, value: int | None, expected: int) -> None:
    if value != expected:
        raise CheckpointError(f"{name} has {value} {what}, expected {expected}")


class _Reader:
    """Reader of the ``configurations`` of a config.json, whose values may be of any type.

    Raises:
        CheckpointError: a value is missing or malformed; the message names it.
    """

    def __init__(self, values: object) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError("configurations is not a JSON object")
        self._values = values

    def down_blocks(self) -> tuple[BlockStructure, ...]:
        ins, outs = self._widths()
        layers = self._layers("down_blocks", len(ins))
        flags = self._flags("add_downsample", len(ins))
        return tuple(
            _down(width, out, order, resample=flag)
            for width, out, order, flag in zip(ins, outs, layers, flags, strict=True)
        )

    def up_blocks(self) -> tuple[BlockStructure, ...]:
        """Read the up blocks, which mirror the down blocks, from the lowest resolution up."""
        ins, outs = self._widths()
        prevs = self._numbers("prev_output_channels", len(ins))
        layers = self._layers("up_blocks", len(ins))
        flags = self._flags("add_upsample", len(ins))
        return tuple(
            _up(width, out, prev, order, resample=flag)
            for width, out, prev, order, flag in zip(
                ins[::-1], outs[::-1], prevs, layers, flags, strict=True
            )
        )

    def mid_block(self, width: int, *, has_mid: bool) -> BlockStructure | None:
        names = ("mid_num_resnets", "mid_num_attentions")
        values = [self._values.get(name) for name in names]
        skipped = all(v is None or (type(v) is int and v <= 0) for v in values)
        if skipped and not (has_mid and values == [0, 0]):
            return None
        resnets, attentions = (self.number(name, low=0, high=_MAX_LAYERS - 1) for name in names)
        upsample = self._values.get("add_upsample_mid_block")
        return BlockStructure(
            in_channels=width,
            out_channels=width,
            layers=_order(1 + resnets, attentions, mixed=self._mixed()),  # the block has one more
            resample=_flag("add_upsample_mid_block", False if upsample is None else upsample),
        )

    def number(
        self, name: str, *, low: int = 1, high: int = _MAX_WIDTH, default: int | None = None
    ) -> int:
        value = self._get(name) if default is None else self._values.get(name, default)
        return _number(name, value, low, high)

    def eps(self) -> float:
        """Read the epsilon of the resnets' norms; any activation but SiLU is refused."""
        if self._get("resnet_act_fn") not in ("silu", "swish"):
            raise CheckpointError(
                f"resnet_act_fn is {shortened(self._get('resnet_act_fn'))}, not silu"
            )
        value = self._get("resnet_eps")
        if type(value) is not float or not 0 < value < 1:
            raise CheckpointError(
                f"resnet_eps is {shortened(value)}: expected a number from 0 to 1"
            )
        return value

    def _widths(self) -> tuple[list[int], list[int]]:
        ins = self._numbers("down_blocks_in_channels")
        return ins, self._numbers("down_blocks_out_channels", len(ins))

    def _layers(self, kind: str, length: int) -> list[str]:
        resnets = self._numbers(f"{kind}_num_resnets", length, high=_MAX_LAYERS)
        attentions = self._numbers(f"{kind}_num_attentions", length, low=0, high=_MAX_LAYERS)
        mixed = self._mixed()
        return [_order(r, a, mixed=mixed) for r, a in zip(resnets, attentions, strict=True)]

    def _mixed(self) -> bool:
        return _flag("mix_block_in_forward", self._get("mix_block_in_forward"))

    def _numbers(
        self, name: str, length: int | None = None, *, low: int = 1, high: int = _MAX_WIDTH
    ) -> list[int]:
        values = self._list(name, length)
        return [_number(f"{name}[{i}]", value, low, high) for i, value in enumerate(values)]

    def _flags(self, name: str, length: int) -> list[bool]:
        return [_flag(f"{name}[{i}]", value) for i, value in enumerate(self._list(name, length))]

    def _list(self, name: str, length: int | None) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= _MAX_BLOCKS:
            raise CheckpointError(
                f"{name} is {shortened(value)}: expected a list with one entry per block"
            )
        if length not in (None, len(value)):
            raise CheckpointError(f"{name} has {len(value)} entries for {length} blocks")
        return value

    def _get(self, name: str) -> Any:
        if name not in self._values:
            raise CheckpointError(f"{name} is missing")
        return self._values[name]


def _number(name: str, value: object, low: int = 1, high: int = _MAX_WIDTH) -> int:
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(
            f"{name} is {shortened(value)}: expected an integer from {low} to {high}"
        )
    return value


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise CheckpointError(f"{name} is {shortened(value)}: expected true or false")
    return value


def shortened(value: object) -> str:
    """Return the repr of a value for an error message, at most 60 characters long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _layer_kinds(shapes: Shapes) -> LayerKinds:
    """Return the kind of each layer by block and index in modules_list, from the weights' names."""
    layers: dict[str, dict[int, str]] = {}
    for key in shapes:
        if (match := _LAYER.fullmatch(key)) and (kind := _KINDS.get(match[3])):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), kind)
    return layers


def _down_blocks(shapes: Shapes, kinds: LayerKinds) -> tuple[tuple[BlockStructure, ...], int]:
    """Return the down blocks, and the output channels of the last one."""
    blocks: list[BlockStructure] = []
    for name in _block_names(kinds, "down_blocks"):
        layers = _layers_of(kinds, name)
        out, width = _conv(shapes, name, 0)
        resample = _has_conv(shapes, f"{name}.downsamplers.0")
        blocks.append(_down(width, out, layers, resample=resample))
    return tuple(blocks), blocks[-1].out_channels


def _up_blocks(shapes: Shapes, kinds: LayerKinds, hidden: int) -> tuple[BlockStructure, ...]:
    """Return the up blocks.

    The input of a resnet is hidden states joined with a skip. The first and last resnet of a block
    determine the widths of both.
    """
    blocks: list[BlockStructure] = []
    for name in _block_names(kinds, "up_blocks"):
        layers = _layers_of(kinds, name)
        out, first = _conv(shapes, name, 0)
        last = _conv(shapes, name, layers.rindex("R"))[1]
        prev = first - out if layers.count("R") > 1 else hidden
        width = last - (out if layers.count("R") > 1 else prev)
        for what, value in (("input", prev), ("skip", width)):
            _number(f"the {what} channels of {name}", value)
        resample = _has_conv(shapes, f"{name}.upsamplers.0")
        blocks.append(_up(width, out, prev, layers, resample=resample))
        hidden = out
    return tuple(blocks)


def _mid_block(shapes: Shapes, kinds: LayerKinds) -> BlockStructure | None:
    if not any(key.startswith("mid_block.") for key in shapes):
        return None
    layers = _layers_of(kinds, "mid_block")
    out, width = _conv(shapes, "mid_block", 0)
    resample = _has_conv(shapes, "mid_block.upsamplers.0")
    return BlockStructure(in_channels=width, out_channels=out, layers=layers, resample=resample)


def _block_names(kinds: LayerKinds, kind: str) -> list[str]:
    numbers = sorted(int(name.split(".")[1]) for name in kinds if name.startswith(kind))
    if not numbers or numbers != list(range(len(numbers))) or len(numbers) > _MAX_BLOCKS:
        raise CheckpointError(
            f"the weights hold the {kind} {shortened(numbers)}: expected 1 to {_MAX_BLOCKS} "
            "blocks, numbered from 0"
        )
    return [f"{kind}.{number}" for number in numbers]


def _layers_of(kinds: LayerKinds, block: str) -> str:
    by_index = kinds.get(block, {})
    for index in range(max(1, len(by_index))):
        if index not in by_index:
            raise CheckpointError(f"the weights hold no {block}.modules_list.{index}")
    layers = "".join(by_index[index] for index in range(len(by_index)))
    if not layers.startswith("R"):
        raise CheckpointError(f"{block}.modules_list.0 is not a resnet in the weights")
    return layers


def _conv(shapes: Shapes, block: str, layer: int) -> tuple[int, int]:
    """Return output and input channels of a resnet."""
    out, width, *_ = _dims(shapes, f"{block}.modules_list.{layer}.conv1.weight", 4)
    return out, width


def _has_conv(shapes: Shapes, name: str) -> bool:
    return f"{name}.conv.weight" in shapes or f"{name}.conv.bias" in shapes


def _dims(shapes: Shapes, key: str, rank: int) -> list[int]:
    if key not in shapes:
        raise CheckpointError(f"the weights hold no {key}")
    shape = list(shapes[key])
    if len(shape) != rank:
        raise CheckpointError(f"{key} has the shape {shortened(shape)}: expected {rank} dimensions")
    return [_number(f"a dimension of {key}", size, high=2 * _MAX_WIDTH) for size in shape]


def check_equal(configured: FlexibleStructure, actual: FlexibleStructure, file: str) -> None:
    """Refuse a configuration that contradicts the weights.

    Args:
        configured: structure by the configuration.
        actual: structure by the weights.
        file: name of the configuration, for the message.

    Raises:
        CheckpointError: they differ; the message has both values of the first difference.
    """
    in_weights = _properties(actual)
    for description, value in _properties(configured).items():
        if description in in_weights and in_weights[description] != value:
            raise CheckpointError(
                f"{file} says {description.format(value)}, but the weights hold "
                f"{in_weights[description]}"
            )


def _properties(structure: FlexibleStructure) -> dict[str, int | str | None]:
    """Return the values of a structure by their description: counts first, then widths."""
    mid = structure.mid
    return {
        "{} down blocks": len(structure.down),
        "{} up blocks": len(structure.up),
        "{} resnets in mid_block (mid_num_resnets + 1)": mid.resnets if mid else 0,
        "{} attentions in mid_block": mid.attentions if mid else 0,
        **_block_properties(structure),
        "{} input channels": structure.in_channels,
        "{} output channels": structure.out_channels,
        "a time embedding of {}": structure.time_width,
        "a cross_attention_dim of {}": structure.cross_attention_dim,
    }


def _block_properties(structure: FlexibleStructure) -> dict[str, int | str | None]:
    properties: dict[str, int | str | None] = {}
    blocks = structure.blocks().items()
    for name, block in blocks:
        properties[f"{{}} resnets in {name}"] = block.resnets
        properties[f"{{}} attentions in {name}"] = block.attentions
    for name, block in blocks:
        sampler = "downsamplers" if name.startswith("down") else "upsamplers"
        properties[f"{{}} {sampler} in {name}"] = int(block.resample)
        properties[f"the order {{}} in {name}"] = block.layers
    for name, block in blocks:
        what = "channels in the last skip into" if name.startswith("up") else "channels into"
        properties[f"{{}} {what} {name}"] = block.in_channels
        properties[f"{{}} channels out of {name}"] = block.out_channels
        properties[f"{{}} channels from the block before {name}"] = block.prev_channels
    return properties
