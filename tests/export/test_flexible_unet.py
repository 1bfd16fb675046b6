"""DeciDiffusion's UNet: structure, forward pass against a second implementation, and loading."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.models.flexible_structure import (
    DECIDIFFUSION_1,
    DECIDIFFUSION_2,
    BlockStructure,
    FlexibleStructure,
)
from latentforge.export.models.flexible_unet import (
    FlexibleUNet2DConditionModel,
    load_flexible_unet,
    structure_of,
)
from latentforge.runtime.errors import CheckpointError, SettingsError, ShapeError

FIRST: dict[str, Any] = {  # of DeciDiffusion-v1-0's flexible_unet/config.json, as published
    "sample_size": 64,
    "temb_dim": 1280,
    "resnet_eps": 1e-05,
    "resnet_act_fn": "silu",
    "num_attention_heads": 8,
    "cross_attention_dim": 768,
    "mix_block_in_forward": True,
    "down_blocks_in_channels": [320, 320, 640],
    "down_blocks_out_channels": [320, 640, 1280],
    "down_blocks_num_resnets": [2, 2, 1],
    "down_blocks_num_attentions": [0, 1, 3],
    "add_downsample": [True, True, True],
    "add_upsample_mid_block": True,
    "mid_num_resnets": 4,
    "mid_num_attentions": 2,
    "prev_output_channels": [1280, 1280, 640],
    "up_blocks_num_resnets": [2, 3, 3],
    "up_blocks_num_attentions": [6, 3, 0],
    "add_upsample": [True, True, False],
}
NO_MID = {"add_upsample_mid_block": None, "mid_num_resnets": 0, "mid_num_attentions": 0}
SECOND = {
    **FIRST,
    **NO_MID,
    "add_downsample": [True, True, False],
    "up_blocks_num_attentions": [5, 3, 0],
}
SMALL = {  # the same networks, narrow
    "sample_size": 16,
    "temb_dim": 48,
    "cross_attention_dim": 24,
    "down_blocks_in_channels": [32, 32, 64],
    "down_blocks_out_channels": [32, 64, 64],
    "prev_output_channels": [64, 64, 64],
}
NETWORKS = {
    "first": {**FIRST, **SMALL},
    "second": {**SECOND, **SMALL},
    "unmixed": {**FIRST, **SMALL, "mix_block_in_forward": False},
    "other": {  # two blocks, other heads, an attention right in the first one, one resnet above
        **FIRST,
        "sample_size": 16,
        "temb_dim": 32,
        "num_attention_heads": 4,
        "cross_attention_dim": 8,
        "down_blocks_in_channels": [32, 32],
        "down_blocks_out_channels": [32, 64],
        "down_blocks_num_resnets": [1, 2],
        "down_blocks_num_attentions": [2, 1],
        "add_downsample": [False, True],
        "mid_num_resnets": 0,
        "mid_num_attentions": 1,
        "prev_output_channels": [64, 64],
        "up_blocks_num_resnets": [3, 1],
        "up_blocks_num_attentions": [0, 2],
        "add_upsample": [False, False],
    },
}
FILE = "diffusion_pytorch_model.safetensors"


def structure(name: str) -> FlexibleStructure:
    keys = ["mid_block."] if NETWORKS[name]["mid_num_attentions"] else []
    return FlexibleStructure.from_config({"configurations": NETWORKS[name]}, keys)


@cache
def network(name: str) -> FlexibleUNet2DConditionModel:
    """A small network of random weights, in float64. Copy it before changing it."""
    torch.manual_seed(0)
    model = FlexibleUNet2DConditionModel(structure(name)).double().eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)  # so that no norm is an identity
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def on_meta(which: FlexibleStructure) -> FlexibleUNet2DConditionModel:
    with torch.device("meta"):
        return FlexibleUNet2DConditionModel(which)


def inputs(
    name: str, batch: int = 2, height: int = 16, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dim = NETWORKS[name]["cross_attention_dim"]
    sample = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    prompt = torch.randn(batch, 5, dim, generator=generator, dtype=torch.float64)
    return sample, torch.tensor([321.0]), prompt


# A second implementation of the network from torch functions, weight names and config.json.


class Written:
    """Forward pass of the original, or with one of its quirks fixed."""

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any], fix: str) -> None:
        self.weights, self.config, self.fix = weights, config, fix
        self.depth = len(config["add_downsample"])

    def __call__(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        self.prompt = prompt
        self.time = self.embed(timestep, len(sample))
        hidden = self.conv("conv_in", sample)
        hidden, skips = self.down(hidden)
        if "mid_block.modules_list.0.conv1.weight" in self.weights:
            hidden = self.mid(hidden)
        hidden = self.up(hidden, skips)
        return self.conv("conv_out", F.silu(self.norm("conv_norm_out", hidden, 1e-5)))

    def embed(self, timestep: Tensor, batch: int) -> Tensor:
        half = self.weights["conv_in.weight"].shape[0] // 2
        rates = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angles = timestep.double().reshape(-1, 1).expand(batch, 1) * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear(
            "time_embedding.linear_2", F.silu(self.linear("time_embedding.linear_1", waves))
        )

    def down(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = [hidden]
        for b in range(self.depth):
            for kind, layer in self.layers(f"down_blocks.{b}"):
                hidden = self.layer(kind, layer, hidden)
                if kind == "R":
                    skips.append(hidden)
                elif self.fix == "skip after attention":
                    skips[-1] = hidden
            if self.config["add_downsample"][b]:
                hidden = self.conv(f"down_blocks.{b}.downsamplers.0.conv", hidden, stride=2)
                if b < self.depth - 1 or self.fix == "last downsample is a skip":
                    skips.append(hidden)
        return hidden, skips

    def mid(self, hidden: Tensor) -> Tensor:
        if self.fix != "first resnet once":
            hidden = self.layer("R", "mid_block.modules_list.0", hidden)
        for kind, layer in self.layers("mid_block"):
            hidden = self.layer(kind, layer, hidden)
        return self.doubled("mid_block", hidden)

    def up(self, hidden: Tensor, skips: list[Tensor]) -> Tensor:
        for b in range(self.depth):
            for kind, layer in self.layers(f"up_blocks.{b}"):
                if kind == "R":
                    hidden = torch.cat([hidden, skips.pop()], dim=1)
                hidden = self.layer(kind, layer, hidden)
            hidden = self.doubled(f"up_blocks.{b}", hidden)
        return hidden

    def layers(self, block: str) -> Iterator[tuple[str, str]]:
        for index in range(99):
            name = f"{block}.modules_list.{index}"
            if f"{name}.norm1.weight" in self.weights:
                yield "R", name
            elif f"{name}.norm.weight" in self.weights:
                yield "A", name

    def layer(self, kind: str, name: str, hidden: Tensor) -> Tensor:
        return self.resnet(name, hidden) if kind == "R" else self.attention(name, hidden)

    def resnet(self, name: str, x: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x, 1e-5)))
        hidden = hidden + self.linear(f"{name}.time_emb_proj", F.silu(self.time))[..., None, None]
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden, 1e-5)))
        if f"{name}.conv_shortcut.weight" in self.weights:
            x = self.conv(f"{name}.conv_shortcut", x)
        return x + hidden

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6))
        hidden = hidden.flatten(2).transpose(1, 2)
        block = f"{name}.transformer_blocks.0"
        own = self.layer_norm(f"{block}.norm1", hidden)
        hidden = hidden + self.attend(f"{block}.attn1", own, own)
        hidden = hidden + self.attend(
            f"{block}.attn2", self.layer_norm(f"{block}.norm2", hidden), self.prompt
        )
        wide = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", hidden))
        value, gate = wide.chunk(2, dim=-1)
        hidden = hidden + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        hidden = hidden.transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.conv(f"{name}.proj_out", hidden)

    def attend(self, name: str, queries: Tensor, context: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.config["num_attention_heads"], -1)).transpose(1, 2)

        q, k, v = (
            heads(self.linear(f"{name}.to_{letter}", x))
            for letter, x in (("q", queries), ("k", context), ("v", context))
        )
        mixed = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.linear(f"{name}.to_out.0", mixed.transpose(1, 2).flatten(2))

    def doubled(self, block: str, x: Tensor) -> Tensor:
        if f"{block}.upsamplers.0.conv.weight" not in self.weights:
            return x
        wide = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return self.conv(f"{block}.upsamplers.0.conv", wide)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(
            x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps
        )

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def written(name: str, model: FlexibleUNet2DConditionModel, fix: str = "") -> Written:
    return Written(model.state_dict(), NETWORKS[name], fix)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


# The structure.


@pytest.mark.parametrize(
    ("which", "parameters", "tensors", "file_bytes"),
    [
        (DECIDIFFUSION_1, 814_746_884, 612, 1_629_570_384),
        (DECIDIFFUSION_2, 525_277_444, 480, 1_050_614_888),
    ],
)
def test_published_sizes(
    which: FlexibleStructure, parameters: int, tensors: int, file_bytes: int
) -> None:
    """The second file's size, to the byte, as the hub lists it."""
    weights = on_meta(which).state_dict()
    assert sum(value.numel() for value in weights.values()) == parameters
    assert len(weights) == tensors
    assert half_file_bytes(weights) == file_bytes


def half_file_bytes(weights: Mapping[str, Tensor]) -> int:
    """The size of a float16 safetensors file: 8 bytes, a padded JSON header, the weights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(weights):
        begin, end = end, end + 2 * weights[key].numel()
        shape = list(weights[key].shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end


def test_file_size_is_safetensors_own(tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in network("first").state_dict().items()}
    save_file(weights, tmp_path / FILE, metadata={"format": "pt"})
    assert (tmp_path / FILE).stat().st_size == half_file_bytes(weights)


def test_published_configurations() -> None:
    assert FlexibleStructure.from_config({"configurations": FIRST}) == DECIDIFFUSION_1
    assert FlexibleStructure.from_config({"configurations": SECOND}) == DECIDIFFUSION_2


@pytest.mark.parametrize("which", [DECIDIFFUSION_1, DECIDIFFUSION_2])
@pytest.mark.parametrize("mixed", [True, False])
def test_structure_from_weights(which: FlexibleStructure, mixed: bool) -> None:
    config = which.to_config()
    config["configurations"]["mix_block_in_forward"] = mixed
    configured = FlexibleStructure.from_config(config)
    assert (configured == which) is mixed
    assert FlexibleStructure.from_weights(shapes_of(on_meta(configured))) == configured


@pytest.mark.parametrize("name", NETWORKS)
def test_config_is_written_as_it_is_read(name: str) -> None:
    original = structure(name)
    keys = ["mid_block."] if original.mid else []
    assert FlexibleStructure.from_config(original.to_config(), keys) == original
    inferred = FlexibleStructure.from_weights(
        shapes_of(on_meta(original)), heads=original.heads, sample_size=original.sample_size
    )
    assert inferred == original


def test_orders() -> None:
    mixed, unmixed = structure("first"), structure("unmixed")
    assert [b.layers for b in mixed.blocks().values()] == [
        "RR", "RAR", "RAAA", "RARARRR", "RARAAAAA", "RARARA", "RRR",
    ]  # fmt: skip
    assert [b.layers for b in unmixed.blocks().values()] == [
        "RR", "RRA", "RAAA", "RRRRRAA", "RRAAAAAA", "RRRAAA", "RRR",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [None, 0, -1, "absent"])
def test_every_spelling_of_no_mid_block(number: object) -> None:
    config = {**SECOND, "mid_num_resnets": number, "mid_num_attentions": number}
    if number == "absent":
        del config["mid_num_resnets"], config["mid_num_attentions"]
    keys = shapes_of(on_meta(DECIDIFFUSION_2))
    assert FlexibleStructure.from_config({"configurations": config}, keys) == DECIDIFFUSION_2


def test_zeros_are_a_mid_block_where_the_weights_hold_one() -> None:
    """The mid block has one resnet more than mid_num_resnets."""
    config = {"configurations": {**FIRST, "mid_num_resnets": 0, "mid_num_attentions": 0}}
    mid = FlexibleStructure.from_config(config, ["mid_block.modules_list.0.conv1.weight"]).mid
    assert mid is not None and mid.layers == "R" and mid.resample


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down": DECIDIFFUSION_1.down[:2]}, ["2 down blocks", "3 up blocks"]),
        ({"mid": None}, ["up_blocks.0", "1280", "halved 3 times"]),
        ({"heads": 7}, ["640", "7"]),
        ({"groups": 33}, ["320", "33"]),
        ({"up": DECIDIFFUSION_1.up[::-1]}, ["up_blocks.0", "640", "1280"]),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], words: list[str]) -> None:
    refused(lambda: on_meta(replace(DECIDIFFUSION_1, **changes)), *words)


@pytest.mark.parametrize("layers", ["ARR", "RRA", "RR"])
def test_orders_of_no_published_kind(layers: str) -> None:
    """down_blocks.1 is RAR and all other blocks alternate; RR lacks an attention but is valid."""
    block = replace(DECIDIFFUSION_1.down[1], layers=layers)
    down = (DECIDIFFUSION_1.down[0], block, DECIDIFFUSION_1.down[2])
    changed = replace(DECIDIFFUSION_1, down=down)
    if layers == "RR":
        changed.check()
    else:
        refused(changed.check)


# The forward pass.


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 8)])
def test_forward_equals_the_second_implementation(name: str, size: tuple[int, int]) -> None:
    model = network(name)
    arguments = inputs(name, 2, *size)
    assert error(model(*arguments).sample, written(name, model)(*arguments)) < 1e-6


@pytest.mark.parametrize("fix", ["first resnet once", "skip after attention"])
def test_forward_keeps_the_quirks(fix: str) -> None:
    model = network("first")
    arguments = inputs("first")
    assert error(model(*arguments).sample, written("first", model, fix)(*arguments)) > 1e-3


def test_last_downsample_is_no_skip() -> None:
    """With that quirk fixed there is one skip too many, and the sizes do not match."""
    model = network("first")
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        written("first", model, "last downsample is a skip")(*inputs("first"))


@pytest.mark.parametrize("layer", ["down_blocks.2.modules_list.3", "mid_block.modules_list.0"])
def test_every_layer_counts(layer: str) -> None:
    """A trailing attention affects the output: it is not lost after the skip was taken."""
    model = deepcopy(network("first"))
    arguments = inputs("first")
    before = model(*arguments).sample
    for weight in model.get_submodule(layer).parameters():
        weight += 0.1
    assert error(model(*arguments).sample, before) > 1e-4


@pytest.mark.parametrize(
    "timestep",
    [
        321,
        321.0,
        torch.tensor(321),
        torch.tensor(321.0),
        torch.tensor([321]),
        torch.tensor([321.0]),
        torch.tensor([321, 321]),
        torch.tensor([321.0, 321.0], dtype=torch.float64),
    ],
    ids=str,
)
def test_timesteps_of_every_shape(timestep: Tensor | float) -> None:
    model = network("second")
    sample, step, prompt = inputs("second")
    expected = model(sample, step, prompt).sample
    output = model(sample, timestep, prompt, return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], expected)


def test_rows_have_their_own_timesteps() -> None:
    model = network("second")
    sample, _, prompt = inputs("second")
    both = model(sample, torch.tensor([10.0, 900.0]), prompt).sample
    for row, step in enumerate((10.0, 900.0)):
        one = model(sample[row : row + 1], step, prompt[row : row + 1]).sample
        assert error(both[row : row + 1], one) < 1e-9


def test_equal_blocks_are_not_taken_for_the_last() -> None:
    """If both down blocks are one object, the first still adds the skip of its downsampler."""
    down = BlockStructure(in_channels=32, out_channels=32, layers="RA", resample=True)
    up = replace(down, prev_channels=32, layers="RRA")
    mid = replace(down, layers="R")
    repeated = FlexibleStructure(
        down=(down, down), mid=mid, up=(up, replace(up, resample=False)), cross_attention_dim=8
    )
    model = FlexibleUNet2DConditionModel(repeated)
    prompt = torch.zeros(1, 2, 8)
    assert model(torch.zeros(1, 4, 8, 8), 1, prompt).sample.shape == (1, 4, 8, 8)


def test_requests_it_cannot_fulfil() -> None:
    model = network("first")
    sample, step, prompt = inputs("first")
    with pytest.raises(ShapeError, match="must be multiples of 8, not 16 x 12"):
        model(sample[..., :12], step, prompt)
    with pytest.raises(SettingsError, match="timestep_cond"):
        model(sample, step, prompt, timestep_cond=torch.zeros(1))
    with pytest.raises(SettingsError, match="added_cond_kwargs"):
        model(sample, step, prompt, added_cond_kwargs={})


def test_export_with_free_dimensions() -> None:
    name = "other"
    model = deepcopy(network(name)).float()
    sample, step, prompt = inputs(name)
    unit = structure(name).multiple
    batch = torch.export.Dim("batch")
    sides = {i: unit * torch.export.Dim(n) for i, n in ((2, "height"), (3, "width"))}
    program = torch.export.export(
        model,
        (sample.float(), step, prompt.float()),
        kwargs={"return_dict": False},
        dynamic_shapes={
            "sample": {0: batch, **sides},
            "timestep": None,
            "encoder_hidden_states": {0: batch},
            "return_dict": None,
        },
    ).module()
    for rows, height, width in ((1, 24, 16), (3, 12, 32)):
        sample, step, prompt = inputs(name, rows, height, width)
        arguments = sample.float(), step + 5, prompt.float()
        expected = model(*arguments, return_dict=False)[0]
        assert error(program(*arguments, return_dict=False)[0], expected) < 1e-6


def test_diffusers_pipeline_takes_it(tiny_checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline

    config = {**NETWORKS["first"], "cross_attention_dim": 32}
    torch.manual_seed(0)
    narrow = FlexibleStructure.from_config({"configurations": config})
    base = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    base.set_progress_bar_config(disable=True)
    pipeline = StableDiffusionPipeline(
        **{**base.components, "unet": FlexibleUNet2DConditionModel(narrow)},
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.time_cond_proj_dim is None
    image = pipeline("an owl", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


# Loading.


def written_checkpoint(
    path: Path, name: str = "first", *, weights: Mapping[str, Tensor] | None = None, **changes: Any
) -> Checkpoint:
    """A checkpoint of the small network; changes are of its ``configurations``."""
    folder = path / "flexible_unet"
    folder.mkdir()
    if weights is None:
        (folder / FILE).hardlink_to(saved(name))
    else:
        save_file(dict(weights), folder / FILE, metadata={"format": "pt"})
    config = {
        "_class_name": "FlexibleUNet2DConditionModel",
        "block_out_channels": [320, 640, 1280, 1280],  # unused, as in the published files
        "configurations": {**NETWORKS[name], **changes},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(name="small", path=path, index={})


@pytest.fixture(autouse=True, scope="module")
def _once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let ``saved`` write each weight file once, where checkpoints link to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are small, and threads wait for each other
    _FILES["directory"] = tmp_path_factory.mktemp("weights")
    yield
    _FILES.clear()
    torch.set_num_threads(threads)


_FILES: dict[str, Path] = {}


def saved(name: str) -> Path:
    if name not in _FILES:
        _FILES[name] = _FILES["directory"] / f"{name}.safetensors"
        save_file(small_weights(name), _FILES[name], metadata={"format": "pt"})
    return _FILES[name]


@cache
def small_weights(name: str = "first") -> dict[str, Tensor]:
    return {key: value.float() for key, value in network(name).state_dict().items()}


def refused(read: Callable[[], object], *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("name", NETWORKS)
def test_load_gives_the_saved_network(name: str, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path, name)
    model = load_flexible_unet(checkpoint)
    assert model.structure == structure(name) == structure_of(checkpoint)
    assert not model.training
    for key, value in model.state_dict(keep_vars=True).items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert not value.requires_grad
        assert torch.equal(value, small_weights(name)[key])


def test_save_pretrained_writes_what_load_reads(tmp_path: Path) -> None:
    model = deepcopy(network("other")).float()  # its 4 heads are in config.json alone
    model.save_pretrained(tmp_path / "flexible_unet")
    loaded = load_flexible_unet(Checkpoint(name="saved", path=tmp_path, index={}))
    assert loaded.structure == model.structure
    sample, step, prompt = inputs("other")
    arguments = sample.float(), step, prompt.float()
    assert torch.equal(loaded(*arguments).sample, model(*arguments).sample)


@pytest.mark.parametrize("config", [None, {}, {"sample_size": 64, "in_channels": 4}])
@pytest.mark.parametrize("name", ["first", "second", "unmixed"])
def test_load_without_configurations(name: str, config: object, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path, name)
    file = tmp_path / "flexible_unet" / "config.json"
    file.unlink() if config is None else file.write_text(json.dumps(config))
    assert load_flexible_unet(checkpoint).structure == replace(structure(name), sample_size=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_turns_half_precision_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {key: value.to(dtype) for key, value in small_weights().items()}
    checkpoint = written_checkpoint(tmp_path, weights=weights)
    folder = tmp_path / "flexible_unet"
    (folder / FILE).rename(folder / FILE.replace(".safetensors", ".fp16.safetensors"))
    for key, value in load_flexible_unet(checkpoint).state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[key].float())


def shard(folder: Path) -> tuple[Path, Path]:
    """Split the weight file in two."""
    weights = load_file(folder / FILE)
    keys = sorted(weights)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
    for name, half in zip(names, halves, strict=True):
        save_file({key: weights[key] for key in half}, folder / name)
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / FILE).unlink()
    return folder / names[0], folder / names[1]


def test_load_reads_shards(tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path)
    first, second = shard(tmp_path / "flexible_unet")
    loaded = load_flexible_unet(checkpoint).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in small_weights().items())
    twice = next(iter(load_file(first)))
    save_file({**load_file(second), twice: torch.zeros(1)}, second)
    refused(lambda: load_flexible_unet(checkpoint), "two files", twice)


def test_load_never_reads_the_placeholder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("no JSON")
    (tmp_path / "unet" / FILE).write_bytes(b"no weights")
    load_flexible_unet(written_checkpoint(tmp_path))


def test_load_refuses_pickles(tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path)
    folder = tmp_path / "flexible_unet"
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")
    refused(lambda: load_flexible_unet(checkpoint), "pickle", "diffusion_pytorch_model.bin")


KEY = "up_blocks.1.modules_list.4.norm2.bias"


@pytest.mark.parametrize("configured", [True, False])
def test_load_is_strict(configured: bool, tmp_path: Path) -> None:
    weights = small_weights()
    cases = {
        "missing": (weights | {KEY: None}, ["1 weights are missing", KEY]),
        "shape": (weights | {KEY: torch.zeros(63)}, ["1 weights", KEY, "(63,)", "(64,)"]),
        "rank": (
            weights | {"conv_in.weight": torch.zeros(32, 4)},
            ["conv_in.weight", "[32, 4]", "4 dimensions"],
        ),
        "type": (weights | {KEY: torch.zeros(64, dtype=torch.int8)}, [KEY, "I8"]),
        "nan": (weights | {KEY: torch.full((64,), math.nan)}, [KEY, "NaN"]),
        "inf": (weights | {KEY: torch.full((64,), math.inf)}, [KEY, "infinity"]),
    }
    for name, (changed, words) in cases.items():
        path = tmp_path / name
        path.mkdir()
        kept = {key: value for key, value in changed.items() if value is not None}
        checkpoint = written_checkpoint(path, weights=kept)
        if not configured:
            (path / "flexible_unet" / "config.json").unlink()
        refused(lambda checkpoint=checkpoint: load_flexible_unet(checkpoint), "small", *words)


def test_load_names_weights_without_a_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"ema.decay": torch.zeros(1), "steps": torch.zeros(1, dtype=torch.int64)}
    load_flexible_unet(written_checkpoint(tmp_path, weights=small_weights() | extra))
    (message,) = caplog.messages
    assert "2 of its weights, such as 'ema.decay'" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_blocks_num_attentions": [0, 1, 5]}, "5 attentions in down_blocks.2|hold 3"),
        ({"up_blocks_num_attentions": [5, 3, 0]}, "5 attentions in up_blocks.0|hold 6"),
        ({"down_blocks_num_resnets": [2, 3, 1]}, "3 resnets in down_blocks.1|hold 2"),
        ({"mid_num_resnets": 3}, "4 resnets in mid_block|hold 5"),
        ({"mid_num_attentions": 0}, "0 attentions in mid_block|hold 2"),
        (NO_MID, "1 resnets in mid_block|hold 5"),
        ({**NO_MID, "mid_num_resnets": -1}, "0 resnets in mid_block|hold 5"),
        ({"add_downsample": [True, True, False]}, "0 downsamplers in down_blocks.2|hold 1"),
        ({"add_upsample_mid_block": False}, "0 upsamplers in mid_block|hold 1"),
        ({"add_upsample": [True, True, True]}, "1 upsamplers in up_blocks.2|hold 0"),
        ({"mix_block_in_forward": False}, "the order RRA in down_blocks.1|hold RAR"),
        ({"down_blocks_out_channels": [32, 64, 128]}, "128 channels out of down_blocks.2|hold 64"),
        ({"down_blocks_in_channels": [32, 64, 64]}, "64 channels into down_blocks.1|hold 32"),
        ({"prev_output_channels": [64, 32, 64]}, "32 channels from the block before|hold 64"),
        ({"cross_attention_dim": 768}, "a cross_attention_dim of 768|hold 24"),
        ({"temb_dim": 1280}, "a time embedding of 1280|hold 48"),
    ],
)
def test_config_and_weights_contradict(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path, **changes)
    for read in (load_flexible_unet, structure_of):
        refused(
            lambda read=read: read(checkpoint), "flexible_unet/config.json says", *words.split("|")
        )


def test_config_has_a_mid_block_that_the_weights_lack(tmp_path: Path) -> None:
    changes = {"mid_num_resnets": 4, "mid_num_attentions": 2}
    checkpoint = written_checkpoint(tmp_path, "second", **changes)
    refused(lambda: load_flexible_unet(checkpoint), "5 resnets in mid_block", "hold 0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_blocks_num_resnets": [2, 10**9, 1]}, ["down_blocks_num_resnets[1]", "1000000000"]),
        ({"down_blocks_num_attentions": [0, -1, 3]}, ["down_blocks_num_attentions[1]", "-1"]),
        ({"down_blocks_in_channels": [32] * 1000}, ["down_blocks_in_channels", "list"]),
        ({"down_blocks_in_channels": []}, ["down_blocks_in_channels"]),
        ({"down_blocks_in_channels": None}, ["down_blocks_in_channels", "None"]),
        ({"down_blocks_out_channels": [32, 64]}, ["down_blocks_out_channels", "2", "3"]),
        ({"down_blocks_out_channels": [32, 64, 10**4000]}, ["down_blocks_out_channels[2]"]),
        ({"down_blocks_out_channels": [32, 64, "64"]}, ["down_blocks_out_channels[2]", "'64'"]),
        ({"up_blocks_num_resnets": [2, 3, 0]}, ["up_blocks_num_resnets[2]", "0"]),
        ({"up_blocks_num_resnets": [2, 3, True]}, ["up_blocks_num_resnets[2]", "True"]),
        ({"add_upsample": [1, 1, 0]}, ["add_upsample[0]", "true or false"]),
        ({"add_downsample": True}, ["add_downsample"]),
        ({"mix_block_in_forward": "yes"}, ["mix_block_in_forward", "'yes'"]),
        ({"mid_num_resnets": 1e9}, ["mid_num_resnets", "1000000000.0"]),
        ({"mid_num_attentions": -2}, ["mid_num_attentions", "-2"]),
        ({"add_upsample_mid_block": 1}, ["add_upsample_mid_block"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_attention_heads": 5}, ["64", "5 heads"]),
        ({"sample_size": [64, 64]}, ["sample_size", "[64, 64]"]),
        ({"resnet_eps": math.nan}, ["NaN"]),
        ({"resnet_eps": "1e-5"}, ["resnet_eps"]),
        ({"resnet_act_fn": "__import__('os')"}, ["resnet_act_fn", "not silu"]),
        ({"resnet_act_fn": ["silu"]}, ["resnet_act_fn"]),
        ({"temb_dim": 1 << 40}, ["temb_dim", str(1 << 40)]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_malformed_configurations(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    checkpoint = written_checkpoint(tmp_path, **changes)
    refused(lambda: load_flexible_unet(checkpoint), "small", *words)


@pytest.mark.parametrize("name", [key for key in FIRST if not key.startswith(("mid_", "add_up"))])
def test_missing_configuration(name: str, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path)
    file = tmp_path / "flexible_unet" / "config.json"
    config = json.loads(file.read_text())
    del config["configurations"][name]
    file.write_text(json.dumps(config))
    refused(lambda: load_flexible_unet(checkpoint), "config.json", f"{name} is missing")


@pytest.mark.parametrize("text", ["", "[]", '{"configurations": null}', '{"configurations": [1]}'])
def test_malformed_config_file(text: str, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(tmp_path)
    (tmp_path / "flexible_unet" / "config.json").write_text(text)
    refused(lambda: load_flexible_unet(checkpoint), "flexible_unet")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda shapes: {}, ["down_blocks"]),
        (lambda shapes: without(shapes, "down_blocks.1."), ["down_blocks", "[0, 2]"]),
        (
            lambda shapes: without(shapes, "up_blocks.0.modules_list.1."),
            ["no up_blocks.0.modules_list.1"],
        ),
        (
            lambda shapes: without(shapes, "mid_block.modules_list."),
            ["no mid_block.modules_list.0"],
        ),
        (lambda shapes: without(shapes, "conv_out."), ["no conv_out.weight"]),
        (
            lambda shapes: {k: v for k, v in shapes.items() if ".attn" not in k},
            ["no attention"],
        ),
        (
            lambda shapes: {
                **shapes,
                "down_blocks.0.modules_list.0.conv1.weight": (1 << 60, 0, 3, 3),
            },
            ["down_blocks.0.modules_list.0.conv1.weight", str(1 << 60)],
        ),
        (
            lambda shapes: {**shapes, "up_blocks.0.modules_list.0.conv1.weight": (64, 32, 3, 3)},
            ["input channels of up_blocks.0", "-32"],
        ),
        (
            lambda shapes: {f"down_blocks.0.modules_list.{9 * '9'}.conv1.weight": (1, 1, 1, 1)},
            ["down_blocks"],
        ),
    ],
)
def test_weights_of_something_else(
    edit: Callable[[dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]], words: list[str]
) -> None:
    shapes = edit(shapes_of(on_meta(structure("first"))))
    refused(lambda: FlexibleStructure.from_weights(shapes), *words)


def without(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}


def test_structure_is_plain_data() -> None:
    original = structure("first")
    again = asdict(original)
    parts = {
        "down": tuple(BlockStructure(**block) for block in again["down"]),
        "mid": BlockStructure(**again["mid"]),
        "up": tuple(BlockStructure(**block) for block in again["up"]),
    }
    assert FlexibleStructure(**{**again, **parts}) == original
    assert (DECIDIFFUSION_1.multiple, DECIDIFFUSION_2.multiple) == (8, 4)
