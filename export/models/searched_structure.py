"""Structure of a UNet that a search has made smaller: sites, their choices, and which was taken.

A site is a place in diffusers' UNet2DConditionModel, named by its module path; a choice is what
stands there. Blocks can be removed where the shapes of the tensors stay, as in BK-SDM (Kim et al.
2023, arXiv 2305.15798), or made narrower inside.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import CheckpointError

__all__ = [
    "Choice",
    "Importance",
    "Kept",
    "Repair",
    "SearchedStructure",
    "Site",
    "half",
    "half_channels",
    "list_sites",
]

Choice = Literal["keep", "half", "no_self_attention", "no_feed_forward", "cross_attention", "drop"]
"""What stands at a site.

A half resnet has half of its inner channels, and a half transformer block half of its heads and of
its feed-forward's channels. cross_attention has neither self-attention nor feed-forward.
"""

_WORDS: Mapping[Choice, str] = {
    "half": "halved",
    "no_self_attention": "without self-attention",
    "no_feed_forward": "without feed-forward",
    "cross_attention": "with cross-attention alone",
    "drop": "dropped",
}

_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", None),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Blocks that have a space, by the key of the configuration."""

_PLAIN = {
    "resnet_time_scale_shift": "default",
    "dual_cross_attention": False,
    "attention_type": "default",
    "cross_attention_norm": None,
}
"""Values that the blocks' parts have to have, by the key of the configuration."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Place in a UNet where something can be left out.

    Attributes:
        name: module path in diffusers' UNet2DConditionModel.
        kind: resnet, transformer block, or stage: the innermost level.
        choices: what can stand there; "keep" is the first.
        covers: names of the sites that vanish with a dropped stage.
    """

    name: str
    kind: Literal["resnet", "transformer_block", "stage"]
    choices: tuple[Choice, ...]
    covers: tuple[str, ...] = ()

    @property
    def block(self) -> str:
        """Name of the block that it is in: down_blocks.0, mid_block, up_blocks.2."""
        parts = self.name.split(".")
        return parts[0] if parts[0] == "mid_block" else ".".join(parts[:2])


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Weights that make up, on the average, for what a choice leaves out.

    Attributes:
        replaced: new weights, in the shapes that they have with the choice, by path in the UNet.
        added: what to add to biases, by path; one of a layer that is left out has no effect.
    """

    replaced: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    added: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Parts of a halved site that are kept, by index in the whole UNet, each in rising order.

    Attributes:
        groups: groups of a resnet's second norm, and so the channels between its convolutions.
        self_heads: heads of a transformer block's attn1.
        cross_heads: heads of its attn2.
        channels: channels of its feed-forward, after the gate.
        repairs: changes of weights that go with the choices at the site.
    """

    groups: tuple[int, ...] = ()
    self_heads: tuple[int, ...] = ()
    cross_heads: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    repairs: Mapping[Choice, Repair] = field(default_factory=dict, compare=False, repr=False)


Importance = Mapping[str, Kept]
"""Most important parts, and repairs, by name of the site; for every site that offers "half"."""


def half(parts: int) -> int:
    """Return how many groups or heads half of them are."""
    return -(-parts // 2)


def half_channels(channels: int) -> int:
    """Return how many channels half of a feed-forward's are: a multiple of 8."""
    return -(-channels // 16) * 8


@dataclass(frozen=True, kw_only=True)
class SearchedStructure:
    """Choice at each site of a UNet.

    Attributes:
        choices: by name of the site, those that are not "keep", without sites that vanish with a
            dropped stage.
    """

    choices: Mapping[str, Choice]

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def of(cls, choices: Mapping[str, Choice], sites: Sequence[Site]) -> "SearchedStructure":
        """Return the structure with these choices, without those that have no effect."""
        given = {name: choice for name, choice in choices.items() if choice != "keep"}
        gone = cls(choices=given).vanished(sites)
        return cls(choices={name: given[name] for name in given if name not in gone})

    @cached_property
    def key(self) -> str:
        """Short text that equal structures share."""
        lines = sorted(f"{name}={choice}" for name, choice in self.choices.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def choice(self, site: str) -> Choice:
        """Return what stands at a site; "keep" at one that vanishes with a stage."""
        return self.choices.get(site, "keep")

    def vanished(self, sites: Sequence[Site]) -> frozenset[str]:
        """Return the names of the sites that vanish with dropped stages."""
        dropped = (site for site in sites if site.covers and self.choice(site.name) == "drop")
        return frozenset(name for site in dropped for name in site.covers)

    def removed(self, sites: Sequence[Site]) -> frozenset[str]:
        """Return the names of the sites where nothing is left."""
        dropped = (name for name, choice in self.choices.items() if choice == "drop")
        return self.vanished(sites) | frozenset(dropped)

    def check(self, sites: Sequence[Site]) -> None:
        """Check that the structure is one of a UNet's with these sites.

        Raises:
            CheckpointError: a site is unknown or does not offer its choice, a choice has no
                effect, or no cross-attention is left; the message names the first one.
        """
        offered = {site.name: site.choices for site in sites}
        gone = self.vanished(sites)
        for name, choice in self.choices.items():
            _check_choice(name, choice, offered.get(name, ()))
            if name in gone:
                raise CheckpointError(f"structure: {name} vanishes with its stage: leave it out")
        attending = {site.name for site in sites if site.kind == "transformer_block"}
        if attending <= self.removed(sites):
            raise CheckpointError(
                "structure: no cross-attention is left, so the prompt would have no effect: keep "
                "one transformer block at least"
            )

    def is_valid(self, sites: Sequence[Site]) -> bool:
        """Return True if check() accepts the structure."""
        try:
            self.check(sites)
        except CheckpointError:
            return False
        return True

    @classmethod
    def from_config(cls, config: object, sites: Sequence[Site]) -> "SearchedStructure":
        """Read and check the ``structure`` of a student's config.json.

        Raises:
            CheckpointError: it is malformed, contradicts itself, or check() refuses it.
        """
        choices = config.get("choices") if isinstance(config, Mapping) else None
        if not isinstance(config, Mapping) or not isinstance(choices, Mapping):
            raise CheckpointError("structure of the unet must be an object with choices by site")
        structure = cls(choices=dict(choices))
        structure.check(sites)
        for key, count in structure.to_config(sites).items():
            if key != "choices" and key in config and config[key] != count:
                raise CheckpointError(
                    f"structure: {key} does not match the choices, which make it {count}"
                )
        return structure

    def to_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """Return the structure as from_config() reads it, with counts in DeciDiffusion's words.

        They count what is left in each block: its resnets, and its modules of attention, which
        hold one transformer block or more.
        """
        left = [site for site in sites if site.name not in self.removed(sites)]
        resnets = Counter(site.block for site in left if site.kind == "resnet")
        modules = {_module(site): site.block for site in left if site.kind == "transformer_block"}
        attentions = Counter(modules.values())
        blocks = dict.fromkeys(site.block for site in sites if site.kind != "stage")
        return {"choices": dict(sorted(self.choices.items()))} | {
            f"{prefix}_num_{kind}": _counts(prefix, blocks, counter)
            for prefix in ("down_blocks", "mid", "up_blocks")
            for kind, counter in (("resnets", resnets), ("attentions", attentions))
        }

    def words(self, sites: Sequence[Site]) -> str:
        """Return the structure in words: a line for each block that differs from the whole one."""
        gone = self.vanished(sites)
        stages = [site for site in sites if site.kind == "stage" and site.name in self.choices]
        lines = [f"{site.name} to {_opposite(site)} dropped" for site in stages]
        for block in dict.fromkeys(site.block for site in sites):
            inside = [s for s in sites if s.block == block and s.name not in gone]
            if parts := [text for kind in _KINDS for text in self._changes(kind, inside)]:
                lines.append(f"{block}: {', '.join(parts)}")
        return "\n".join(lines) or "as the whole UNet"

    def _changes(self, kind: str, sites: Sequence[Site]) -> Iterator[str]:
        """Yield texts such as "1 of 2 resnets dropped"."""
        names = [site.name for site in sites if site.kind == kind]
        counts = Counter(map(self.choice, names))
        for choice, word in _WORDS.items():
            if counts[choice]:
                yield f"{counts[choice]} of {len(names)} {_KINDS[kind]} {word}"


_KINDS = {"resnet": "resnets", "transformer_block": "transformer blocks"}


def _check_choice(name: object, choice: object, offered: Collection[str]) -> None:
    if not offered:
        raise CheckpointError(f"structure: the unet has no site {str(name)[:80]!r}")
    if choice == "keep" or choice not in offered:
        others = ", ".join(sorted(set(offered) - {"keep"}, key=get_args(Choice).index))
        raise CheckpointError(
            f"structure: {name} cannot be {str(choice)[:40]!r}, but {others or 'nothing'}; what "
            "is kept is left out"
        )


def _module(site: Site) -> str:
    """Return the module of attention that a transformer block is in."""
    return site.name.partition(".transformer_blocks.")[0]


def _counts(prefix: str, blocks: Collection[str], counter: Counter[str]) -> list[int] | int:
    if prefix == "mid":
        return counter["mid_block"]
    return [counter[block] for block in blocks if block.startswith(prefix)]


def _opposite(stage: Site) -> str:
    """Return the last block of those that a stage is made of."""
    return ".".join(stage.covers[-1].split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Block of a UNet: the widths of its hidden states, and the depths of its attentions."""

    name: str
    hidden: tuple[int, ...]
    width: int
    depths: tuple[int, ...]

    def sites(self, groups: int) -> Iterator[Site]:
        """Yield the sites in the order of the forward pass."""
        for index, hidden in enumerate(self.hidden):
            halves: tuple[Choice, ...] = ("half",) if half(groups) < groups else ()
            drop: tuple[Choice, ...] = ("drop",) if hidden == self.width else ()
            name, choices = f"{self.name}.resnets.{index}", ("keep", *halves, *drop)
            if halves or drop:
                yield Site(name=name, kind="resnet", choices=choices)
            path = f"{self.name}.attentions.{index}.transformer_blocks"
            for layer in range(self.depths[index] if index < len(self.depths) else 0):
                name = f"{path}.{layer}"
                yield Site(name=name, kind="transformer_block", choices=get_args(Choice))


def list_sites(config: Mapping[str, Any]) -> tuple[Site, ...]:
    """Return the sites of a UNet in the order of the forward pass, then its stage if it has one.

    Args:
        config: checked configuration of a UNet2DConditionModel, with all of its keys.

    Raises:
        CheckpointError: it has blocks of kinds that cannot be left out or halved, or is a student.
    """
    if config.get("structure") is not None:
        raise CheckpointError("a UNet with a structure is a student already: search its teacher's")
    _check_space(config)
    blocks = _blocks(config)
    sites = [site for block in blocks for site in block.sites(config["norm_num_groups"])]
    return (*sites, *_stage(config["block_out_channels"], sites))


def _check_space(config: Mapping[str, Any]) -> None:
    for key, types in _TYPES.items():
        given = [config[key]] if key == "mid_block_type" else config[key]
        if other := [kind for kind in given if kind not in types]:
            raise CheckpointError(
                f"a UNet with a {other[0]} in {key} has no space of structures to search: only "
                f"{' and '.join(str(kind) for kind in types if kind)} have one"
            )
    for key, value in {**_PLAIN, "norm_num_groups": config["norm_num_groups"] or 1}.items():
        if config.get(key) != value:
            raise CheckpointError(
                f"a UNet with {key} {config.get(key)!r} has no space of structures to search"
            )


def _blocks(config: Mapping[str, Any]) -> list[_Block]:
    """Return the blocks in the order of the forward pass, as UNet2DConditionModel builds them."""
    widths = tuple(config["block_out_channels"])
    layers = _by_level(config["layers_per_block"], len(widths))
    depths = _by_level(config["transformer_layers_per_block"], len(widths))
    reverse = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    entering = (widths[0], *widths[:-1]), (widths[-1], *widths[:0:-1])
    down = [
        _block(f"down_blocks.{i}", kind, entering[0][i], widths[i], layers[i], depths[i])
        for i, kind in enumerate(config["down_block_types"])
    ]
    up = [
        _block(f"up_blocks.{i}", kind, entering[1][i], widths[-1 - i], layers[-1 - i] + 1, deep)
        for i, (kind, deep) in enumerate(zip(config["up_block_types"], reverse, strict=True))
    ]
    return [*down, *_mid(config["mid_block_type"], widths[-1], depths[-1]), *up]


def _by_level(value: Any, levels: int) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else [value] * levels


def _block(name: str, kind: str, entering: int, width: int, resnets: int, depth: Any) -> _Block:
    depths = tuple(_by_level(depth, resnets))[:resnets] if kind.startswith("CrossAttn") else ()
    hidden = (entering, *[width] * (resnets - 1))
    return _Block(name=name, hidden=hidden, width=width, depths=depths)


def _mid(kind: str | None, width: int, depth: Any) -> list[_Block]:
    if kind is None:
        return []
    attends = kind == "UNetMidBlock2DCrossAttn"
    depths = tuple(_by_level(depth, 1))[:1] if attends else ()
    return [_Block(name="mid_block", hidden=(width,) * (1 + attends), width=width, depths=depths)]


def _stage(widths: Sequence[int], sites: Sequence[Site]) -> Iterator[Site]:
    """Yield the innermost level if the hidden states in front of it fit behind it."""
    last = f"down_blocks.{len(widths) - 1}"
    covers = tuple(s.name for s in sites if s.block in (last, "mid_block", "up_blocks.0"))
    if len(widths) > 1 and widths[-1] == widths[-2]:
        yield Site(name=last, kind="stage", choices=("keep", "drop"), covers=covers)
