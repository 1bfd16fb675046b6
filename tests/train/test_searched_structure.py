"""Sites of UNets, and records of structures."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from tiny import TINY

from latentforge.export.models.searched_structure import (
    SearchedStructure,
    half,
    half_channels,
    list_sites,
)
from latentforge.runtime.errors import CheckpointError
from latentforge.train.student.importance import highest

SD_15: dict[str, Any] = {"cross_attention_dim": 768}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
TINIES = [name for name, one in TINY.items() if isinstance(one.unet, dict)]


def unet(config: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("config", [SD_15, SDXL, *(TINY[name].unet for name in TINIES)])
def test_sites_are_the_resnets_and_transformer_blocks_of_the_module(config: Any) -> None:
    model = unet(config)
    sites = list_sites(model.config)
    kinds = {"resnet": ResnetBlock2D, "transformer_block": BasicTransformerBlock}
    for kind, cls in kinds.items():
        modules = {name for name, module in model.named_modules() if isinstance(module, cls)}
        assert {site.name for site in sites if site.kind == kind} == modules
    assert all(site.choices[0] == "keep" and len(site.choices) > 1 for site in sites)


@pytest.mark.parametrize("config", [SD_15, SDXL, *(TINY[name].unet for name in TINIES)])
def test_a_resnet_is_dropped_only_where_the_hidden_states_keep_their_width(config: Any) -> None:
    model = unet(config)
    for site in list_sites(model.config):
        if site.kind == "resnet":
            resnet = model.get_submodule(site.name)
            index = int(site.name.rsplit(".", 1)[1])
            skips = _skip(model, site.block, index)
            assert ("drop" in site.choices) == (resnet.in_channels - skips == resnet.out_channels)


def _skip(model: Any, block: str, index: int) -> int:
    """Channels of the skip that a resnet of an up block takes; 0 elsewhere."""
    if not block.startswith("up_blocks"):
        return 0
    level = int(block.rpartition(".")[2])
    widths = list(model.config.block_out_channels)[::-1]
    last = index == len(model.up_blocks[level].resnets) - 1
    return int(widths[min(level + 1, len(widths) - 1)] if last else widths[level])


def test_only_equal_innermost_widths_have_a_stage() -> None:
    stage = list_sites(unet(SD_15).config)[-1]
    assert stage.name == "down_blocks.3" and stage.choices == ("keep", "drop")
    assert len(stage.covers) == 2 + 3 + 3
    assert {name.partition(".")[0] for name in stage.covers} == {
        *("down_blocks", "mid_block", "up_blocks")
    }
    assert not [site for site in list_sites(unet(SDXL).config) if site.kind == "stage"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D",) * 4}, "AttnDownBlock2D in down_block_types"),
        ({"up_block_types": ("SimpleCrossAttnUpBlock2D",) * 4}, "SimpleCrossAttnUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift 'scale_shift'"),
        ({"norm_num_groups": None}, "norm_num_groups None"),
        ({"attention_type": "gated"}, "attention_type 'gated'"),
    ],
)
def test_other_blocks_have_no_space(change: dict[str, Any], message: str) -> None:
    config = {**unet(SD_15).config, **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        list_sites(config)
    assert "no space of structures" in str(caught.value)


SITES = list_sites(unet(SD_15).config)
MIXED = SearchedStructure.of(
    {
        "down_blocks.0.resnets.1": "drop",
        "down_blocks.0.resnets.0": "half",
        "down_blocks.1.attentions.0.transformer_blocks.0": "drop",
        "up_blocks.2.attentions.1.transformer_blocks.0": "cross_attention",
        "up_blocks.2.resnets.1": "keep",
        "mid_block.resnets.0": "drop",
        "down_blocks.3": "drop",
    },
    SITES,
)


def test_of_leaves_out_choices_without_an_effect() -> None:
    assert MIXED.choices.keys() == {
        "down_blocks.0.resnets.1",
        "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.2.attentions.1.transformer_blocks.0",
        "down_blocks.3",
    }
    MIXED.check(SITES)
    assert MIXED.choice("down_blocks.0.resnets.1") == "drop"
    assert MIXED.choice("down_blocks.0.resnets.7") == "keep"
    assert "mid_block.resnets.0" in MIXED.removed(SITES)


def test_equal_structures_are_one_key() -> None:
    again = SearchedStructure(choices=dict(reversed(MIXED.choices.items())))
    assert again == MIXED and again.key == MIXED.key and len({again, MIXED}) == 1
    other = SearchedStructure(choices={**MIXED.choices, "down_blocks.0.resnets.1": "half"})
    assert other.key != MIXED.key and len({other, MIXED}) == 2


def test_config_has_the_counts_that_are_left() -> None:
    config = MIXED.to_config(SITES)
    assert config["down_blocks_num_resnets"] == [1, 2, 2, 0]
    assert config["down_blocks_num_attentions"] == [2, 1, 2, 0]
    assert (config["mid_num_resnets"], config["mid_num_attentions"]) == (0, 0)
    assert config["up_blocks_num_resnets"] == [0, 3, 3, 3]
    assert config["up_blocks_num_attentions"] == [0, 3, 3, 3]
    assert SearchedStructure.from_config(config, SITES) == MIXED
    assert SearchedStructure.from_config({"choices": config["choices"]}, SITES) == MIXED
    whole = SearchedStructure(choices={}).to_config(SITES)
    assert whole["mid_num_resnets"] == 2 and whole["up_blocks_num_attentions"] == [0, 3, 3, 3]


def test_an_attention_counts_until_its_last_block_is_gone() -> None:
    sites = list_sites(unet(SDXL).config)
    path = "down_blocks.2.attentions.1.transformer_blocks"
    nine = {f"{path}.{layer}": "drop" for layer in range(9)}
    left = SearchedStructure.of(nine, sites)  # type: ignore[arg-type]
    assert left.to_config(sites)["down_blocks_num_attentions"] == [0, 2, 2]
    gone = SearchedStructure.of({**nine, f"{path}.9": "drop"}, sites)  # type: ignore[dict-item]
    assert gone.to_config(sites)["down_blocks_num_attentions"] == [0, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": {"down_blocks.9.resnets.0": "drop"}}, "no site 'down_blocks.9.resnets.0'"),
        ({"choices": {"down_blocks.0.resnets.0": "cross_attention"}}, "but half, drop"),
        ({"choices": {"down_blocks.1.resnets.0": "drop"}}, "but half;"),
        ({"choices": {"down_blocks.0.resnets.0": "keep"}}, "cannot be 'keep'"),
        ({"choices": {"down_blocks.0.resnets.0": ["drop"]}}, "cannot be"),
        ({"choices": {"down_blocks.3": "drop", "mid_block.resnets.0": "half"}}, "vanishes"),
        (
            {"choices": {s.name: "drop" for s in SITES if s.kind == "transformer_block"}},
            "no cross-attention is left",
        ),
        ({"mid_num_resnets": 1}, "mid_num_resnets does not match the choices"),
        ({"up_blocks_num_resnets": [0, 3, 3]}, "up_blocks_num_resnets does not match"),
        ({"choices": ["drop"]}, "must be an object"),
    ],
)
def test_malformed_structures_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {**SearchedStructure(choices={}).to_config(SITES), **change}
    if "choices" in change:
        config = change
    with pytest.raises(CheckpointError, match=message) as caught:
        SearchedStructure.from_config(config, SITES)
    assert "\n" not in str(caught.value)
    for other in (None, 3, "drop", {}):
        with pytest.raises(CheckpointError, match="must be an object"):
            SearchedStructure.from_config(other, SITES)


def test_words_say_block_by_block_what_is_left_out() -> None:
    assert MIXED.words(SITES).splitlines() == [
        "down_blocks.3 to up_blocks.0 dropped",
        "down_blocks.0: 1 of 2 resnets halved, 1 of 2 resnets dropped",
        "down_blocks.1: 1 of 2 transformer blocks dropped",
        "up_blocks.2: 1 of 3 transformer blocks with cross-attention alone",
    ]
    assert SearchedStructure(choices={}).words(SITES) == "as the whole UNet"


def test_halves_are_rounded_up() -> None:
    assert [half(n) for n in (1, 2, 3, 5, 8, 32)] == [1, 1, 2, 3, 4, 16]
    assert [half_channels(n) for n in (8, 16, 24, 128, 1280, 5120)] == [8, 8, 16, 64, 640, 2560]


def test_one_group_cannot_be_halved() -> None:
    sites = list_sites(unet({**SD_15, "norm_num_groups": 1}).config)
    resnets = [site for site in sites if site.kind == "resnet"]
    assert resnets and not any("half" in site.choices for site in resnets)


def test_the_highest_are_chosen_in_rising_order() -> None:
    assert highest(torch.tensor([3.0, 1.0, 2.0, 3.0]), 2) == (0, 3)
    assert highest(torch.ones(4), 2) == (0, 1)
