"""Students: what is left computes what the whole UNet computes with zeros in place of the rest."""

import json
import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from tiny import TINY
from torch import Tensor, nn

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.families.parts import UNet, load_unet
from latentforge.export.models.searched_structure import (
    Choice,
    Importance,
    Kept,
    SearchedStructure,
    Site,
    list_sites,
)
from latentforge.export.models.searched_unet import SearchedUNet2DConditionModel
from latentforge.export.onnx import Dimensions
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.errors import CheckpointError, SettingsError, TargetError
from latentforge.train.student.importance import measured_importance
from latentforge.train.student.inherit import applied, student_module
from latentforge.train.student.writer import RECORD, write_student

EQUAL_WIDTHS = {  # an innermost level that can be dropped, with attention around it
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 3,
    "norm_num_groups": 8,
}
SHAPES: Mapping[str, Any] = {
    "stage": EQUAL_WIDTHS,
    **{name: TINY[name].unet for name in ("sd", "sd-2", "ssd-1b", "upscaler")},
}


def teacher(config: Mapping[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def predict(unet: Any, batch: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    labels = None if unet.config.num_class_embeds is None else torch.tensor([20] * batch)
    shape = batch, unet.config.in_channels, size, size
    added = {
        "text_embeds": torch.randn(batch, 48, generator=generator),
        "time_ids": torch.randint(0, 64, (batch, 6), generator=generator),
    }
    prediction: Tensor = unet(
        torch.randn(shape, generator=generator),
        torch.tensor(301.0),
        torch.randn(batch, 24, width, generator=generator),
        class_labels=labels,
        added_cond_kwargs=added if unet.config.addition_embed_type else None,
    ).sample
    return prediction


def importance_of(unet: Any) -> Importance:
    return measured_importance(unet, lambda: predict(unet))


def without_repairs(unet: Any) -> Importance:
    return {name: replace(kept, repairs={}) for name, kept in importance_of(unet).items()}


# the zeros that a choice is equal to


def with_zeros(unet: Any, structure: SearchedStructure, importance: Importance) -> Any:
    """Copy of the whole UNet that computes what a student does, by weights of zero."""
    model = deepcopy(unet)
    for name, choice in structure.choices.items():
        module = model.get_submodule(name)
        edit = _zero_resnet if isinstance(module, ResnetBlock2D) else _zero_block
        edit(module, choice, importance.get(name, Kept()))
    for name, module in model.named_modules():
        path, count = f"{name}.transformer_blocks", len(getattr(module, "transformer_blocks", ()))
        if count and all(structure.choice(f"{path}.{i}") == "drop" for i in range(count)):
            _zero(module.proj_out)
    return model


def _zero(layer: nn.Module) -> None:
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()


def _zero_resnet(resnet: Any, choice: Choice, kept: Kept) -> None:
    if choice == "half":
        _zero_inputs(resnet.conv2, resnet.norm2.num_groups, kept.groups)
        return
    _zero(resnet.conv2)
    if resnet.conv_shortcut is not None:  # passes the hidden states, without the skip
        _zero(resnet.conv_shortcut)
        for channel in range(resnet.out_channels):
            resnet.conv_shortcut.weight[channel, channel] = 1


def _zero_block(block: Any, choice: Choice, kept: Kept) -> None:
    attention, cross, last = block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]
    if choice == "half":
        _zero_inputs(attention, block.attn1.heads, kept.self_heads)
        _zero_inputs(cross, block.attn2.heads, kept.cross_heads)
        _zero_inputs(last, last.in_features, kept.channels)
    if choice in ("no_self_attention", "cross_attention", "drop"):
        _zero(attention)
    if choice in ("no_feed_forward", "cross_attention", "drop"):
        _zero(last)
    if choice == "drop":
        _zero(cross)


def _zero_inputs(layer: Any, parts: int, kept: tuple[int, ...]) -> None:
    size = layer.weight.shape[1] // parts
    for part in set(range(parts)) - set(kept):
        layer.weight[:, part * size : (part + 1) * size] = 0


def test_the_reference_changes_with_every_choice() -> None:
    unet = teacher(SHAPES["sd"])
    whole, kept = predict(unet), without_repairs(unet)
    for site in list_sites(unet.config):
        for choice in site.choices[1:]:
            structure = SearchedStructure(choices={site.name: choice})
            assert not torch.allclose(predict(with_zeros(unet, structure, kept)), whole), choice


@pytest.mark.parametrize("shape", ["sd", "upscaler"])
def test_each_choice_is_the_whole_unet_with_zeros(shape: str) -> None:
    unet = teacher(SHAPES[shape])
    kept = without_repairs(unet)
    for site in list_sites(unet.config):
        for choice in site.choices[1:] if site.kind != "stage" else ():
            structure = SearchedStructure(choices={site.name: choice})
            expected = predict(with_zeros(unet, structure, kept))
            with applied(unet, structure, kept):
                assert_close(predict(unet), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_structures_are_the_whole_unet_with_zeros(shape: str) -> None:
    unet = teacher(SHAPES[shape])
    sites, kept = list_sites(unet.config), without_repairs(unet)
    whole = predict(unet)
    for structure in random_structures(sites, 6):
        if structure.vanished(sites):
            continue
        student = student_module(unet, structure, kept)
        assert_close(predict(student), predict(with_zeros(unet, structure, kept)))
        assert torch.equal(predict(unet), whole)


def random_structures(sites: tuple[Site, ...], count: int) -> list[SearchedStructure]:
    rng = random.Random(0)
    found: list[SearchedStructure] = []
    while len(found) < count:
        chosen = {site.name: rng.choice(site.choices) for site in sites if rng.random() < 0.6}
        structure = SearchedStructure.of(chosen, sites)
        try:
            structure.check(sites)
        except CheckpointError:  # without cross-attention
            continue
        found.append(structure)
    return found


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 20, 9])
def test_without_its_stage_a_unet_is_the_one_with_a_level_less(size: int) -> None:
    """BK-SDM's tiny networks are made so (Kim et al. 2023): diffusers itself is the reference."""
    unet = teacher(SHAPES["stage"])
    structure = SearchedStructure(choices={"down_blocks.2": "drop"})
    smaller = {
        **EQUAL_WIDTHS,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "mid_block_type": None,
    }
    reference = teacher(smaller)
    student = student_module(unet, structure, {})
    names = {"up_blocks.1": "up_blocks.0", "up_blocks.2": "up_blocks.1"}
    weights = {
        ".".join([names.get(block := ".".join(key.split(".")[:2]), block), *key.split(".")[2:]]): w
        for key, w in student.state_dict().items()
    }
    reference.load_state_dict(weights)
    assert torch.equal(predict(student, size=size), predict(reference, size=size))
    assert torch.equal(predict(UNet(student).model, size=16), predict(reference, size=16))


def test_a_student_shares_the_weights_that_stay_whole() -> None:
    unet = teacher(SHAPES["sd"])
    sites = list_sites(unet.config)
    before = {name: weight.data_ptr() for name, weight in unet.named_parameters()}
    values = {name: weight.clone() for name, weight in unet.named_parameters()}
    structure = random_structures(sites, 1)[0]
    student = student_module(unet, structure, without_repairs(unet))
    halved = [name for name, choice in structure.choices.items() if choice == "half"]
    for name, weight in student.named_parameters():
        if not name.startswith(tuple(halved)):
            assert weight.data_ptr() == before[name]
    assert all(torch.equal(weight, values[name]) for name, weight in unet.named_parameters())
    assert len(dict(student.named_parameters())) < len(before)


def test_a_teacher_is_itself_again_after_an_error() -> None:
    unet = teacher(SHAPES["stage"])
    whole, names = predict(unet), [name for name, _ in unet.named_modules()]
    structure = SearchedStructure(
        choices={"down_blocks.2": "drop", "up_blocks.2.resnets.1": "drop"}
    )
    with pytest.raises(ZeroDivisionError), applied(unet, structure, {}):
        assert not torch.equal(predict(unet), whole)
        raise ZeroDivisionError
    assert torch.equal(predict(unet), whole)
    assert [name for name, _ in unet.named_modules()] == names
    assert type(unet) is UNet2DConditionModel and "structure" not in unet.config


def test_a_teacher_that_is_wrapped_for_export_takes_any_sides() -> None:
    wrapped = UNet(teacher(SHAPES["stage"]))
    unet: Any = wrapped.model
    structure = SearchedStructure(choices={"down_blocks.2": "drop"})
    plain = student_module(teacher(SHAPES["stage"]), structure, {})
    for size in (16, 18, 15):
        with applied(unet, structure, {}):
            assert_close(predict(unet, size=size), predict(plain, size=size))


def test_gradient_checkpointing_changes_no_prediction() -> None:
    unet = teacher(SHAPES["sd"])
    structure = SearchedStructure(choices={"up_blocks.0.resnets.1": "drop"})
    student = student_module(unet, structure, {}).train().requires_grad_(True)
    plain = predict(student)
    student.enable_gradient_checkpointing()
    recomputed = predict(student)
    recomputed.square().mean().backward()
    assert torch.equal(recomputed, plain)
    assert all(weight.grad is not None for weight in student.up_blocks[0].parameters())


# importance


def test_what_important_parts_leave_out_matters_less() -> None:
    """Halves with the other parts change the outputs of their resnets more, taken together."""
    unet = teacher(SHAPES["stage"])
    kept = {name: parts for name, parts in importance_of(unet).items() if parts.groups}
    opposite = {name: Kept(groups=others(parts.groups, 8)) for name, parts in kept.items()}
    errors = [sum(halved_error(unet, name, each) for name in kept) for each in (kept, opposite)]
    assert errors[0] < 0.9 * errors[1]


def halved_error(unet: Any, name: str, importance: Importance) -> float:
    """Mean squared change of a resnet's output when it is halved."""
    outputs: list[Tensor] = []
    for choices in ({}, {name: "half"}):
        with applied(unet, SearchedStructure(choices=choices), importance):  # type: ignore[arg-type]
            resnet = unet.get_submodule(name)
            hook = resnet.register_forward_hook(lambda _, __, output: outputs.append(output))
            predict(unet)
            hook.remove()
    return float((outputs[0] - outputs[1]).square().mean())


@pytest.mark.parametrize("shape", ["sd-2", "ssd-1b"])
def test_repairs_make_students_better(shape: str) -> None:
    """The mean that is lost is given back, on other states than those it was measured on."""
    unet = teacher(SHAPES[shape])
    repaired, bare = importance_of(unet), without_repairs(unet)
    whole = predict(unet, seed=2)
    errors: dict[Choice, list[float]] = {}
    for site in list_sites(unet.config):
        for choice in site.choices[1:]:
            row = []
            for each in (repaired, bare):
                with applied(unet, SearchedStructure(choices={site.name: choice}), each):
                    row.append(float((predict(unet, seed=2) - whole).square().mean()))
            errors[choice] = [a + b for a, b in zip(errors.get(choice, [0, 0]), row, strict=True)]
    for choice in ("half", "no_self_attention", "no_feed_forward", "cross_attention"):
        assert errors[choice][0] < 0.9 * errors[choice][1], choice


def test_what_follows_from_the_rest_is_no_loss() -> None:
    """Groups that repeat one are replaced by them: the second convolution is refit."""
    unet = teacher(SHAPES["sd"])
    resnet = unet.mid_block.resnets[0]
    for layer in (resnet.conv1, resnet.time_emb_proj, resnet.norm2):
        for weight in layer.parameters():
            weight[:] = weight[:8].repeat(8, *[1] * (weight.dim() - 1))
    name, whole = "mid_block.resnets.0", predict(unet)
    structure = SearchedStructure(choices={name: "half"})
    errors = []
    for kept in (importance_of(unet), without_repairs(unet)):
        with applied(unet, structure, kept):
            errors.append(float((predict(unet) - whole).abs().max()))
    assert errors[0] < 0.1 * errors[1]


def others(kept: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(index for index in range(count) if index not in kept)


def test_a_part_that_carries_nothing_is_not_kept() -> None:
    unet = teacher(SHAPES["sd"])
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.to_out[0].weight[:, :16] = 0  # the first of two heads
    block.attn2.to_out[0].weight[:, 16:] = 0
    block.ff.net[2].weight[:, ::2] = 0
    unet.mid_block.resnets[0].conv2.weight[:, :32] = 0  # the first half of the groups
    kept = importance_of(unet)
    parts = kept["down_blocks.0.attentions.0.transformer_blocks.0"]
    assert (parts.self_heads, parts.cross_heads) == ((1,), (0,))
    assert parts.channels == tuple(range(1, 128, 2))
    assert kept["mid_block.resnets.0"].groups == (4, 5, 6, 7)


def test_importance_needs_a_run_and_every_halved_site() -> None:
    unet = teacher(SHAPES["sd"])
    with pytest.raises(SettingsError, match="no states"):
        measured_importance(unet, lambda: None)
    structure = SearchedStructure(choices={"down_blocks.0.resnets.0": "half"})
    with pytest.raises(SettingsError, match=r"down_blocks\.0\.resnets\.0"):
        student_module(unet, structure, {})
    predict(unet)  # no hook is left that would count this run
    assert not any(module._forward_pre_hooks for module in unet.modules())


# checkpoints


CHOICES: Mapping[str, Choice] = {
    "down_blocks.0.resnets.0": "half",
    "down_blocks.0.attentions.0.transformer_blocks.0": "half",
    "mid_block.resnets.0": "drop",
    "mid_block.attentions.0.transformer_blocks.0": "drop",
    "up_blocks.0.resnets.0": "drop",
    "up_blocks.1.attentions.0.transformer_blocks.0": "cross_attention",
    "up_blocks.1.attentions.1.transformer_blocks.0": "no_self_attention",
}


@pytest.fixture(scope="module")
def written(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SearchedUNet2DConditionModel]:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    unet: Any = load_unet(checkpoint)
    structure = SearchedStructure(choices=CHOICES)
    student = student_module(unet, structure, importance_of(unet))
    target = tmp_path_factory.mktemp("students") / "student"
    write_student(checkpoint, student, target, {"request": "speedup 2"})
    return target, student


def test_a_written_student_loads_as_what_it_was(
    written: tuple[Path, SearchedUNet2DConditionModel],
) -> None:
    target, student = written
    loaded = load_unet(open_checkpoint(str(target)))
    assert type(loaded) is SearchedUNet2DConditionModel
    assert torch.equal(predict(loaded), predict(student))
    assert json.loads((target / RECORD).read_text()) == {"request": "speedup 2"}
    weights = target / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode == (target / RECORD).stat().st_mode


def test_a_student_is_nobodys_teacher(
    written: tuple[Path, SearchedUNet2DConditionModel],
) -> None:
    with pytest.raises(CheckpointError, match="is a student already"):
        student_module(written[1], SearchedStructure(choices={}), {})


def test_diffusers_refuses_a_student_instead_of_drawing_noise(
    written: tuple[Path, SearchedUNet2DConditionModel],
) -> None:
    with pytest.raises(Exception, match="latentforge|SearchedUNet2DConditionModel"):
        StableDiffusionPipeline.from_pretrained(written[0])


def test_a_student_has_the_rest_of_its_teacher(
    written: tuple[Path, SearchedUNet2DConditionModel], tiny_checkpoint: Path
) -> None:
    target = written[0]
    for path in sorted(tiny_checkpoint.rglob("*")):
        name = path.relative_to(tiny_checkpoint)
        if path.is_file() and name.parts[0] not in ("unet", "model_index.json"):
            assert (target / name).read_bytes() == path.read_bytes()
    student, whole = (
        json.loads((path / "unet" / "config.json").read_text())
        for path in (target, tiny_checkpoint)
    )
    assert {**whole, "_class_name": "SearchedUNet2DConditionModel"} == {
        key: value for key, value in student.items() if key != "structure"
    }
    assert student["structure"]["choices"] == CHOICES
    assert student["structure"]["mid_num_resnets"] == 1


@pytest.mark.thorough
def test_a_student_exports_with_its_teachers_names(
    written: tuple[Path, SearchedUNet2DConditionModel], tmp_path: Path
) -> None:
    """Export compares the graphs with the module, and an image with one by diffusers' pipeline."""
    sizes = Dimensions(batch=1, height=32, width=32)  # the fastest to export
    manifest = export(str(written[0]), tmp_path / "engines", ExportRequest(dimensions=sizes))
    assert manifest.components["denoiser"].file
    graph = (tmp_path / "engines" / manifest.components["denoiser"].file).read_bytes()
    assert b"up_blocks.1.attentions.1.transformer_blocks.0.attn2" in graph
    assert b"up_blocks.1.attentions.1.transformer_blocks.0.attn1" not in graph
    assert b"mid_block.resnets.0" not in graph and b"mid_block.resnets.1" in graph
    assert b"mid_block.attentions" not in graph


def test_weights_keep_the_precision_of_the_teacher(
    tiny_checkpoint: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = copy(tiny_checkpoint)
    kind: Any = UNet2DConditionModel.from_pretrained(source / "unet").to(torch.float16)
    kind.save_pretrained(source / "unet")
    checkpoint = open_checkpoint(str(source))
    unet: Any = load_unet(checkpoint)
    structure = SearchedStructure(choices={"mid_block.resnets.0": "half"})
    write_student(
        checkpoint, student_module(unet, structure, importance_of(unet)), tmp_path / "s", {}
    )
    weights = load_file(tmp_path / "s" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert weights["mid_block.resnets.0.conv1.weight"].shape[0] == 32


def test_a_target_that_exists_is_left_alone(
    written: tuple[Path, SearchedUNet2DConditionModel], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(TargetError, match="exists"):
        write_student(open_checkpoint(str(tiny_checkpoint)), written[1], tmp_path / "there", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "file"]


def test_a_hostile_index_leads_nowhere_else(
    written: tuple[Path, SearchedUNet2DConditionModel],
    tiny_checkpoint: Path,
    copy: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    source = copy(tiny_checkpoint)
    (source.parent / "secret.json").write_text("{}")
    (source / "vae" / "weights.bin").write_bytes(b"pickle")
    opened = open_checkpoint(str(source))
    places = ("..", "/etc", "../..", "vae/..", "")
    index = {**opened.index, **{place: ["diffusers", "X"] for place in places}}
    hostile = Checkpoint(name="hostile", path=source, index=index)
    write_student(hostile, written[1], tmp_path / "student", {})
    names = {path.name for path in (tmp_path / "student").rglob("*")}
    assert not names & {"secret.json", "weights.bin", "passwd"}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (None, "must be an object with choices"),
        ({"choices": {"down_blocks.7.resnets.0": "drop"}}, "no site 'down_blocks.7.resnets.0'"),
        ({"choices": {}}, "in the weights it is"),
        ({"choices": {**CHOICES, "up_blocks.1.resnets.0": "half"}}, "in the weights it is"),
        ("drop", "must be an object with choices"),
        (["drop"], "structure must be dict"),
    ],
)
def test_a_structure_that_is_not_the_weights_is_refused(
    written: tuple[Path, SearchedUNet2DConditionModel],
    copy: Callable[[Path], Path],
    structure: object,
    message: str,
) -> None:
    target = copy(written[0])
    path = target / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "structure": structure}))
    checkpoint = open_checkpoint(str(target))
    with pytest.raises(CheckpointError, match=message) as caught:
        family_of(checkpoint).plan(checkpoint)
        load_unet(checkpoint)
    assert "\n" not in str(caught.value)
