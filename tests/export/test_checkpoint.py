"""Checkpoints: damage is reported in one line, and no code of a checkpoint is run."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from numpy.typing import NDArray

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from latentforge.__main__ import main
from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ExportPlan, family_of
from latentforge.export.modules import load_module
from latentforge.export.schedulers import default_sampler, prediction_of, schedule_of
from latentforge.export.tokenizers import write_tokenizer
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.text import one_line

Copy = Callable[[Path], Path]
Weights = dict[str, NDArray[np.generic]]

KINDS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
UNET = "unet/diffusion_pytorch_model.safetensors"
KEYS = {  # one weight of each component
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "unet": "conv_norm_out.weight",
    "vae": "decoder.conv_out.weight",
}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, copy: Copy) -> Path:
    return copy(tiny_checkpoint)


def weight_file(path: Path, folder: str) -> Path:
    return next((path / folder).glob("*.safetensors"))


def edit_weights(path: Path, folder: str, edit: Callable[[Weights], object]) -> None:
    file = weight_file(path, folder)
    weights = {key: value.copy() for key, value in load_file(file).items()}
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_all(path: Path, scratch: Path) -> None:
    """Read everything that export reads of a checkpoint."""
    opened = open_checkpoint(str(path))
    family_of(opened).plan(opened)
    config = opened.config("scheduler", "scheduler_config.json")
    schedule_of(config), prediction_of(config), default_sampler(config)
    scratch.mkdir()
    write_tokenizer(opened, "tokenizer", scratch)
    for folder, kind in KINDS.items():
        load_module(opened, folder, kind)


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what latentforge logged: transformers' reports reach the root logger in CI."""
    return [row.getMessage() for row in caplog.records if row.name.startswith("latentforge")]


def refused(read: Callable[[], object], *names: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for name in names:
        assert name in message
    return message


def load(path: Path, folder: str) -> Callable[[], object]:
    return lambda: load_module(open_checkpoint(str(path)), folder, KINDS[folder])


def test_a_valid_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    read_all(checkpoint, tmp_path / "scratch")
    opened = open_checkpoint(str(checkpoint))
    assert opened.pipeline_class == "StableDiffusionPipeline"
    assert opened.license is None and opened.sidecar == {}
    assert default_sampler(opened.config("scheduler", "scheduler_config.json")) == "pndm"


# Paths and names that are not checkpoints


def test_refuses_paths_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(lambda: open_checkpoint(str(tmp_path / "empty")), "no model_index.json")
    refused(lambda: open_checkpoint(str(tmp_path / "missing")), "missing", "hub id org/model")
    for name in ("", "x" * 5000, "a/" * 3000, "a\0b", "-", "a b", "https://hub/org/model"):
        refused(partial(open_checkpoint, name))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pt", "gguf"])
def test_refuses_a_single_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"x")
    message = refused(lambda: open_checkpoint(str(path)), str(path), "from_single_file")
    assert ("can run code" in message) == (suffix in ("ckpt", "pt"))


def test_a_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    for name in ("nobody/nothing", "nobody/nothing@v1", "../nothing", "./nothing"):
        refused(partial(open_checkpoint, name), f"{name} is not a directory", "hub")
    assert time.monotonic() - start < 10


def hub(source: Path, target: Path, downloaded: list[str]) -> Callable[..., str]:
    """Return a substitute for the download that copies the files that match the patterns."""

    def snapshot_download(
        repository: str, *, revision: str | None, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        files = [path.relative_to(source).as_posix() for path in source.rglob("*.*")]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, target / file)
            downloaded.append(file)
        return str(target)

    return snapshot_download


@pytest.mark.parametrize("family", ["sd", "decidiffusion-1"])
def test_downloads_only_needed_files(
    tiny: Callable[[str], Path], copy: Copy, tmp_path: Path, monkeypatch: Any, family: str
) -> None:
    """No pickles, no code, and not DeciDiffusion's three-gigabyte placeholder."""
    source, downloaded = copy(tiny(family)), list[str]()
    for name in ("unet/model.bin", "pipeline.py", "unet/diffusion_pytorch_model.safetensors"):
        (source / name).touch()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", hub(source, tmp_path / "cache", downloaded)
    )
    opened = open_checkpoint("Deci/model")
    assert family_of(opened).plan(opened)
    assert not any(file.endswith((".bin", ".py")) for file in downloaded)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (weights in downloaded) == (family == "sd")


def test_an_unknown_pipeline_lists_the_supported_ones(checkpoint: Path) -> None:
    for name in ("KandinskyPipeline", "__import__", None, ["a"], 3):
        edit_json(checkpoint / "model_index.json", _class_name=name)
        opened = open_checkpoint(str(checkpoint))
        refused(partial(family_of, opened), str(name), "StableDiffusionPipeline")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_malformed_json(checkpoint: Path, file: str, content: bytes) -> None:
    (checkpoint / file).write_bytes(content)
    refused(lambda: open_checkpoint(str(checkpoint)).config("unet"), file, "JSON")


def test_json_that_is_missing_a_directory_or_huge(checkpoint: Path) -> None:
    path = checkpoint / "unet" / "config.json"
    path.unlink()
    refused(lambda: open_checkpoint(str(checkpoint)).config("unet"), str(path), "incomplete")
    path.mkdir()
    refused(lambda: open_checkpoint(str(checkpoint)).config("unet"), str(path), "incomplete")
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: open_checkpoint(str(checkpoint)).config("unet"), str(path), "larger than")


@pytest.mark.parametrize("folder", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_component(checkpoint: Path, tmp_path: Path, folder: str) -> None:
    (checkpoint / folder).rename(tmp_path / "aside")
    refused(lambda: read_all(checkpoint, tmp_path / "scratch"), f"no {folder}/", "incomplete")


FILES = ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_config(checkpoint: Path, tmp_path: Path, file: str) -> None:
    (checkpoint / file).unlink()
    refused(lambda: read_all(checkpoint, tmp_path / "scratch"), file)


def drop_key(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


def test_an_absent_key_has_the_default_of_the_class(checkpoint: Path) -> None:
    for key in ("in_channels", "out_channels"):  # 4 in diffusers and in this checkpoint
        drop_key(checkpoint / "unet" / "config.json", key)
    plan(checkpoint)
    drop_key(checkpoint / "text_encoder" / "config.json", "hidden_size")
    refused(lambda: plan(checkpoint), "512", "32")


def plan(path: Path) -> ExportPlan:
    opened = open_checkpoint(str(path))
    return family_of(opened).plan(opened)


HUGE = 2**31
MALFORMED: list[tuple[str, dict[str, object]]] = [
    ("text_encoder", {"num_hidden_layers": HUGE}),
    ("text_encoder", {"num_hidden_layers": 50_000}),
    ("text_encoder", {"num_hidden_layers": 0}),
    ("text_encoder", {"num_hidden_layers": True}),
    ("text_encoder", {"vocab_size": 10**12}),
    ("text_encoder", {"vocab_size": 1_000_000}),
    ("text_encoder", {"hidden_size": 10**6}),
    ("text_encoder", {"num_attention_heads": HUGE}),
    ("text_encoder", {"max_position_embeddings": 10**9}),
    ("text_encoder", {"max_position_embeddings": "77"}),
    ("text_encoder", {"projection_dim": 1.5}),
    ("text_encoder", {"layer_norm_eps": "small"}),
    ("text_encoder", {"hidden_act": ["gelu"]}),
    ("text_encoder", {"quantization_config": {"quant_method": "gptq"}}),
    ("text_encoder", {"per_layer_config": {"0": {"hidden_size": 1}}}),
    ("unet", {"layers_per_block": HUGE}),
    ("unet", {"layers_per_block": [1, 30_000]}),
    ("unet", {"layers_per_block": -1}),
    ("unet", {"layers_per_block": "2"}),
    ("unet", {"transformer_layers_per_block": 10**6}),
    ("unet", {"block_out_channels": [32, 10**9]}),
    ("unet", {"block_out_channels": [32, 2**18]}),
    ("unet", {"block_out_channels": 64}),
    ("unet", {"block_out_channels": [[[[[[64]]]]]]}),
    ("unet", {"attention_head_dim": 2**40}),
    ("unet", {"cross_attention_dim": {"a": 1}}),
    ("unet", {"cross_attention_dim": [32, 48]}),
    ("unet", {"conv_in_kernel": 2**20}),
    ("unet", {"norm_eps": 1e300}),
    ("unet", {"norm_eps": True}),
    ("unet", {"act_fn": "\x1b[31m"}),
    ("unet", {"sample_size": None}),
    ("unet", {"sample_size": 0}),
    ("unet", {"sample_size": [16]}),
    ("unet", {"sample_size": [16, "24"]}),
    ("unet", {"sample_size": 1 << 19}),
    ("vae", {"layers_per_block": HUGE}),
    ("vae", {"scaling_factor": "0.18"}),
    ("vae", {"scaling_factor": True}),
    ("vae", {"scaling_factor": 0}),
    ("vae", {"scaling_factor": -1.0}),
    ("vae", {"scaling_factor": 1e-30}),
    ("vae", {"scaling_factor": 1e400}),
    ("vae", {"scaling_factor": None}),
    ("vae", {"latent_channels": [4]}),
    ("vae", {"latents_mean": "0"}),
]


@pytest.mark.parametrize(("folder", "changes"), MALFORMED, ids=str)
def test_malformed_values_are_refused_before_anything_is_built(
    checkpoint: Path, folder: str, changes: dict[str, object]
) -> None:
    edit_json(checkpoint / folder / "config.json", **changes)
    start = time.monotonic()
    key = next(iter(changes))
    message = refused(lambda: plan(checkpoint), str(checkpoint))
    assert key in message or "far larger" in message or "cannot load" in message, message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "-NaN", "Infinity", "9" * 400 + ".0"])
@pytest.mark.parametrize("folder", KINDS)
def test_values_that_no_number_or_text_has(checkpoint: Path, folder: str, value: str) -> None:
    path = checkpoint / folder / "config.json"
    key = {"text_encoder": "layer_norm_eps", "unet": "norm_eps", "vae": "scaling_factor"}[folder]
    content = {**json.loads(path.read_text()), key: "HERE"}
    path.write_text(json.dumps(content).replace('"HERE"', value))
    refused(lambda: plan(checkpoint), f"{folder}/config.json")


UNSUPPORTED: list[dict[str, object]] = [
    {"num_class_embeds": 10},
    {"class_embed_type": "timestep"},
    {"class_embed_type": "identity"},
    {"dual_cross_attention": True},
    {"out_channels": 8},
    {"addition_embed_type": "text_image"},
    {"addition_embed_type": "text"},
    {"encoder_hid_dim": 64},
    {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 64},
    {"attention_type": "gated"},
]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=str)
def test_unets_that_need_other_inputs(checkpoint: Path, changes: dict[str, object]) -> None:
    """Whole checkpoints: their weights are those of the configuration."""
    config = {**json.loads((checkpoint / "unet" / "config.json").read_text()), **changes}
    UNet2DConditionModel(
        **{key: value for key, value in config.items() if not key.startswith("_")}
    ).save_pretrained(checkpoint / "unet")
    key = next(iter(changes))
    refused(lambda: plan(checkpoint), "8 channels" if key == "out_channels" else key)


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        ("text_encoder", "LDMBertModel"),
        ("text_encoder", "BertModel"),
        ("text_encoder", "T5EncoderModel"),
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("vae", "VQModel"),
        ("vae", "ConsistencyDecoderVAE"),
        ("unet", "UNetMotionModel"),
    ],
)
def test_components_of_other_classes(checkpoint: Path, folder: str, named: str) -> None:
    edit_json(checkpoint / "model_index.json", **{folder: ["transformers", named]})
    refused(lambda: plan(checkpoint), f"{folder} is a {named}", "supported: ")
    edit_json(checkpoint / "model_index.json", **{folder: None})
    key = "architectures" if folder == "text_encoder" else "_class_name"
    value = [named] if folder == "text_encoder" else named
    edit_json(checkpoint / folder / "config.json", **{key: value})
    refused(lambda: plan(checkpoint), f"{folder} is a {named}", "supported: ")


@pytest.mark.parametrize(
    "changes",
    [{}, {"shift_factor": 0.0, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}],
    ids=["absent", "neutral"],
)
def test_neutral_normalizations_of_latents(checkpoint: Path, changes: dict[str, object]) -> None:
    edit_json(checkpoint / "vae" / "config.json", **changes)
    assert plan(checkpoint).latent.scaling_factor == 0.18215
    for key, value in (("shift_factor", 0.1), ("latents_mean", [0, 0, 0, 1]), ("latents_std", [2])):
        edit_json(checkpoint / "vae" / "config.json", **{key: value})
        refused(lambda: plan(checkpoint), key)
        edit_json(checkpoint / "vae" / "config.json", **{key: None})


@pytest.mark.parametrize(
    ("size", "version", "pixels"),
    [
        ([16, 24], "0.42.1", (32, 48)),
        (20, "0.42.1", (40, 40)),
        (32, "0.8.0", (128, 128)),  # diffusers takes 64: early releases wrote 32 for every model
        (32, "0.8.0.dev0", (128, 128)),
        (96, "0.8.0", (192, 192)),
    ],
)
def test_sample_size(checkpoint: Path, size: object, version: str, pixels: tuple[int, int]) -> None:
    edit_json(checkpoint / "unet" / "config.json", sample_size=size, _diffusers_version=version)
    assert plan(checkpoint).sample_size == pixels


@pytest.mark.parametrize(
    ("folder", "key"), [("unet", "use_foo"), ("vae", "decoder_kind"), ("text_encoder", "windows")]
)
def test_an_unknown_key_is_named(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, folder: str, key: str
) -> None:
    plan(checkpoint)
    assert caplog.messages == []
    edit_json(checkpoint / folder / "config.json", **{key: 3})
    plan(checkpoint)
    (message,) = own_messages(caplog)
    assert key in message and folder in message


def test_settings_of_transformers_are_not_read(checkpoint: Path) -> None:
    """Such as attn_implementation, by which transformers fetches and runs code of a hub."""
    file = checkpoint / "text_encoder" / "config.json"
    edit_json(file, attn_implementation="org/kernels", return_dict=False, num_labels=HUGE)
    plan(checkpoint)
    module = load_module(open_checkpoint(str(checkpoint)), "text_encoder", CLIPTextModel)
    assert module.config._attn_implementation == "sdpa"
    assert module(torch.zeros(1, 24, dtype=torch.int64)).last_hidden_state.shape == (1, 24, 32)


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("text_encoder", {"num_attention_heads": 0}),
        ("text_encoder", {"hidden_size": 0}),
        ("text_encoder", {"hidden_act": "os.system"}),
        ("text_encoder", {"vocab_size": 10**12}),
        ("text_encoder", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"down_block_types": ["Evil", "Evil"]}),
        ("unet", {"act_fn": "exec"}),
        (
            "unet",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ),
        ("vae", {"up_block_types": ["UpDecoderBlock2D", "Evil"]}),
        ("vae", {"layers_per_block": "x"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_invalid_config_values(
    checkpoint: Path, folder: str, changes: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(checkpoint / folder / "config.json", **changes)
    refused(load(checkpoint, folder), str(checkpoint))
    assert capfd.readouterr() == ("", "")  # the message contains the libraries' output


# Weights


def test_pickles(checkpoint: Path) -> None:
    weights = checkpoint / UNET
    weights.rename(weights.with_suffix(".bin"))
    refused(load(checkpoint, "unet"), "diffusion_pytorch_model.bin", "pickle", "safe_serialization")


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / UNET).unlink()
    refused(load(checkpoint, "unet"), str(checkpoint / "unet"), "no weights")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_truncated_weights(checkpoint: Path, keep: int) -> None:
    file = checkpoint / UNET
    file.write_bytes(file.read_bytes()[:keep])
    refused(load(checkpoint, "unet"), str(file), "damaged or truncated", "fetch it again")


HEADERS = [
    b"\xff" * 8 + b"{}",
    struct.pack("<Q", 1 << 40),
    struct.pack("<Q", 2) + b"{}" + bytes(100),
    struct.pack("<Q", 8) + b"garbage!",
    struct.pack("<Q", 60)
    + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}    '.ljust(60),
    b"\x80\x04\x95 a pickle under a false name",
    b"PK\x03\x04" + bytes(100),
]


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_garbage_for_weights(checkpoint: Path, content: bytes) -> None:
    (checkpoint / UNET).write_bytes(content)
    refused(load(checkpoint, "unet"), str(checkpoint / UNET), "damaged")


@pytest.mark.parametrize("folder", KINDS)
def test_a_missing_weight(checkpoint: Path, folder: str) -> None:
    key = some_key(checkpoint, folder)
    edit_weights(checkpoint, folder, lambda weights: weights.pop(key))
    refused(load(checkpoint, folder), folder, "1 missing keys", key.removeprefix("text_model."))


@pytest.mark.parametrize("folder", KINDS)
def test_a_weight_without_a_place_is_named(
    checkpoint: Path,
    folder: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    extra = {"surplus.weight": np.zeros(3, np.float32), "text_projection.weight": np.eye(2)}
    edit_weights(checkpoint, folder, lambda weights: weights.update(extra))
    load(checkpoint, folder)()
    load(checkpoint, folder)()
    (message,) = own_messages(caplog)
    assert f"{folder} does not use 2 of its weights, such as surplus.weight" in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("folder", KINDS)
@pytest.mark.parametrize("text", ["\x1b[31m", "\u202e", "\x9b", "a\nok  forged", "\x00"])
def test_weights_whose_names_control_a_terminal(
    checkpoint: Path, folder: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = some_key(checkpoint, folder)
    edit_weights(checkpoint, folder, lambda weights: weights.update({text: weights.pop(key)}))
    assert refused(load(checkpoint, folder), folder).isprintable()
    assert all(message.isprintable() for message in own_messages(caplog))


def test_what_export_prints_of_names_of_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"\x1b[31m\u202e\x9b\nforged": np.zeros(3, np.float32)}
    edit_weights(checkpoint, "text_encoder", lambda weights: weights.update(extra))
    key = some_key(checkpoint, "text_encoder")
    edit_weights(checkpoint, "text_encoder", lambda weights: weights.pop(key))
    assert main(["export", str(checkpoint), str(tmp_path / "engines")]) == 2
    lines = capsys.readouterr().err.split("\n")
    assert all(line.isprintable() and not line.startswith("forged") for line in lines)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("folder", KINDS)
def test_a_weight_of_another_shape(checkpoint: Path, folder: str) -> None:
    key = some_key(checkpoint, folder)
    wrong = {key: np.zeros((3, 3), np.float32)}
    edit_weights(checkpoint, folder, lambda weights: weights.update(wrong))
    refused(load(checkpoint, folder), folder, "shape", key.removeprefix("text_model."))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("folder", KINDS)
def test_a_weight_that_is_nan(checkpoint: Path, folder: str, bad: float) -> None:
    key = some_key(checkpoint, folder)
    edit_weights(checkpoint, folder, lambda weights: weights[key].fill(bad))
    refused(load(checkpoint, folder), folder, "NaN or infinity", key.removeprefix("text_model."))


def some_key(path: Path, folder: str) -> str:
    """Return the name of an existing weight, with the prefix of this version of transformers."""
    names = list(load_file(weight_file(path, folder)))
    return next(name for name in names if KEYS[folder].endswith(name) or name == KEYS[folder])


def test_position_ids_of_old_text_encoders_are_accepted(checkpoint: Path) -> None:
    ids = {"text_model.embeddings.position_ids": np.arange(24)[None]}
    edit_weights(checkpoint, "text_encoder", lambda weights: weights.update(ids))
    load(checkpoint, "text_encoder")()


def test_old_names_of_attention_in_the_vae(checkpoint: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(weights: Weights) -> None:
        for key in [key for key in weights if "attentions" in key]:
            old = key
            for new_name, old_name in names.items():
                old = old.replace(new_name, old_name)
            weights[old] = weights.pop(key)

    edit_weights(checkpoint, "vae", age)
    load(checkpoint, "vae")()


CONTRADICTIONS: list[tuple[str, str, dict[str, object], tuple[str, ...]]] = [
    ("sd", "unet", {"cross_attention_dim": 48}, ("48", "32", "text_encoder")),
    ("sd", "unet", {"in_channels": 9}, ("conv_in.weight", "[32, 9, 3, 3]", "[32, 4, 3, 3]")),
    ("sd", "unet", {"in_channels": 5}, ("5 channels", "4", "9")),
    ("sd", "unet", {"block_out_channels": [32, 96]}, ("[96]", "[64]")),
    ("sd", "text_encoder", {"intermediate_size": 128}, ("128", "64", "mlp")),
    ("sd", "text_encoder", {"num_hidden_layers": 2}, ("16 missing keys", "layers.1.")),
    ("sd", "vae", {"latent_channels": 8}, ("4 channels", "8")),
    ("sd", "vae", {"latents_mean": [0.5] * 4}, ("latents_mean",)),
    ("sdxl", "unet", {"addition_embed_type": None}, ("text_time", "None")),
    ("sdxl", "unet", {"addition_time_embed_dim": 4}, ("48", "72")),
    ("sdxl", "unet", {"class_embed_type": "timestep"}, ("class_embed_type", "timestep")),
    ("sdxl", "text_encoder", {"hidden_size": 48}, ("64", "80")),
    ("decidiffusion-1", "text_encoder", {"hidden_size": 48}, ("32", "48")),
    ("sd", "unet", {"num_class_embeds": 10}, ("num_class_embeds", "None", "10")),
    ("pix2pix", "unet", {"in_channels": 4}, ("4 channels", "latents + image", "8")),
    ("pix2pix", "unet", {"time_cond_proj_dim": 16}, ("embedded guidance",)),
    ("sd-depth", "unet", {"in_channels": 4}, ("4 channels", "latents + depth", "5")),
    ("upscaler", "unet", {"num_class_embeds": None}, ("350", "None classes")),
    ("upscaler", "unet", {"num_class_embeds": 350}, ("350", "350 classes")),
    ("upscaler", "unet", {"class_embed_type": "timestep"}, ("class_embed_type", "timestep")),
]


@pytest.mark.parametrize(("family", "folder", "changes", "words"), CONTRADICTIONS)
def test_a_configuration_that_contradicts_the_weights(
    tiny: Callable[[str], Path],
    copy: Copy,
    family: str,
    folder: str,
    changes: dict[str, object],
    words: tuple[str, ...],
) -> None:
    path = copy(tiny(family))
    edit_json(path / folder / "config.json", **changes)
    opened = open_checkpoint(str(path))

    def load_all() -> None:
        for component in family_of(opened).plan(opened).components:
            component.load(opened)

    refused(load_all, *words)


# Variants and shards


@pytest.mark.parametrize("folder", KINDS)
@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "mine-2"])
def test_a_variant_is_used_if_there_is_nothing_else(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, folder: str, variant: str
) -> None:
    file = weight_file(checkpoint, folder)
    file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    assert open_checkpoint(str(checkpoint)).weights(folder)[1] == variant
    load(checkpoint, folder)()
    (message,) = own_messages(caplog)
    assert f"using {variant}" in message and folder in message


def test_plain_weights_come_before_variants(checkpoint: Path) -> None:
    file, opened = checkpoint / UNET, open_checkpoint(str(checkpoint))
    order = ["non_ema", "b", "a", "bf16", "fp16", "fp32", "ema"]
    for variant in order:
        shutil.copy(file, file.with_name(f"{file.stem}.{variant}.safetensors"))
    assert opened.weights("unet")[1] is None
    file.unlink()
    for variant in reversed(order):
        assert opened.weights("unet")[1] == variant
        file.with_name(f"{file.stem}.{variant}.safetensors").unlink()


def test_weights_under_another_name(checkpoint: Path) -> None:
    file = checkpoint / UNET
    file.rename(file.with_name("pytorch_lora_weights.safetensors"))
    refused(load(checkpoint, "unet"), "pytorch_lora_weights", "diffusion_pytorch_model")
    (checkpoint / "unet" / "pytorch_lora_weights.safetensors").rename(
        file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors")
    )
    refused(load(checkpoint, "unet"), "no index of its shards")


def shard(path: Path, names: tuple[str, str]) -> Path:
    """Split the UNet's weights into two files with an index."""
    weights = load_file(path / UNET)
    (path / UNET).unlink()
    first, second = (
        {k: v for i, (k, v) in enumerate(weights.items()) if i % 2 == j} for j in (0, 1)
    )
    for name, part in zip(names, (first, second), strict=True):
        save_file(part, path / "unet" / name, metadata={"format": "pt"})
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    where = {**dict.fromkeys(first, names[0]), **dict.fromkeys(second, names[1])}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


SHARDS = ("part-1.safetensors", "part-2.safetensors")


def test_shards(checkpoint: Path) -> None:
    shard(checkpoint, SHARDS)
    files, _ = open_checkpoint(str(checkpoint)).weights("unet")
    assert [file.name for file in files] == list(SHARDS)
    load(checkpoint, "unet")()
    (checkpoint / "unet" / SHARDS[1]).write_bytes(b"cut")
    refused(load(checkpoint, "unet"), SHARDS[1], "damaged")
    (checkpoint / "unet" / SHARDS[1]).unlink()
    refused(load(checkpoint, "unet"), SHARDS[1], "not there")


@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
def test_shards_of_a_variant(checkpoint: Path, folder: str) -> None:
    file = weight_file(checkpoint, folder)
    first = f"{file.stem}.fp16-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), first)}
    (checkpoint / folder / f"{file.stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
    file.rename(file.with_name(first))
    files, variant = open_checkpoint(str(checkpoint)).weights(folder)
    assert [file.name for file in files] == [first] and variant == "fp16"
    load(checkpoint, folder)()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/tmp/x.safetensors",
        "..",
        "",
        "a/x.safetensors",
        "x.bin",
        "x\n.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_shards_outside_the_folder(checkpoint: Path, name: object) -> None:
    index = shard(checkpoint, SHARDS)
    content = json.loads(index.read_text())
    for place in (checkpoint, checkpoint / "unet"):
        (place / "x.safetensors").write_bytes((checkpoint / "unet" / SHARDS[0]).read_bytes())
        (place / "x.bin").write_bytes((checkpoint / "unet" / SHARDS[0]).read_bytes())
    content["weight_map"] |= {"conv_in.weight": name}
    index.write_text(json.dumps(content))
    refused(load(checkpoint, "unet"), "shard", repr(name), "not there")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]"])
def test_an_index_without_weights(checkpoint: Path, content: str) -> None:
    index = shard(checkpoint, SHARDS)
    index.write_text(content)
    refused(load(checkpoint, "unet"), index.name)


def test_weights_as_single_file_and_as_shards(checkpoint: Path) -> None:
    whole = (checkpoint / UNET).read_bytes()
    shard(checkpoint, SHARDS)
    (checkpoint / UNET).write_bytes(whole)
    refused(load(checkpoint, "unet"), "remove one of them")


# Code


@pytest.fixture
def trap(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint with code in every place where a library looks for it."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\nraise SystemExit('executed')\n"
    names = ["pipeline", "modeling", "modeling_evil", "tokenization_evil", "__init__", "evil"]
    for folder in ("", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in names:
            (checkpoint / folder / f"{name}.py").write_text(code)
    auto = {name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")}
    for folder in KINDS:
        edit_json(
            checkpoint / folder / "config.json",
            auto_map=auto,
            custom_pipelines={"evil": {}},
            trust_remote_code=True,
        )
    edit_json(
        checkpoint / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
        trust_remote_code=True,
    )
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", _class_name="Evil")
    edit_json(
        checkpoint / "model_index.json",
        unet=["pipeline", "UNet2DConditionModel"],
        vae=["evil", "AutoencoderKL"],
        scheduler=["os", "system"],
        custom=["evil", "Evil"],
    )
    yield checkpoint
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_code_is_never_run(trap: Path, tmp_path: Path) -> None:
    refused(lambda: read_all(trap, tmp_path / "first"), "'Evil' is no scheduler of diffusers")
    edit_json(trap / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler")
    read_all(trap, tmp_path / "scratch")
    edit_json(trap / "model_index.json", unet=["pipeline", "Evil"])
    refused(lambda: plan(trap), "unet is a Evil")


def test_refuses_adapters(checkpoint: Path) -> None:
    base = {"base_model_name_or_path": "../../elsewhere"}
    (checkpoint / "text_encoder" / "adapter_config.json").write_text(json.dumps(base))
    refused(load(checkpoint, "text_encoder"), "adapter")


# Tokenizer, scheduler, sidecar, model card


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[1, 2"])
def test_a_damaged_tokenizer(
    checkpoint: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    path = checkpoint / "tokenizer" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    opened = open_checkpoint(str(checkpoint))
    refused(lambda: write_tokenizer(opened, "tokenizer", tmp_path), str(checkpoint / "tokenizer"))


def test_truncated_merges(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint / "tokenizer" / "merges.txt"
    opened = open_checkpoint(str(checkpoint))
    write_tokenizer(opened, "tokenizer", tmp_path)
    assert caplog.messages == []
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-20]) + "\n")
    (tmp_path / "again").mkdir()
    write_tokenizer(opened, "tokenizer", tmp_path / "again")
    (message,) = own_messages(caplog)
    assert "no merge produces 20 tokens" in message and "truncated" in message


def test_a_tokenizer_with_dropout(checkpoint: Path, tmp_path: Path) -> None:
    """transformers' CLIPTokenizer takes the file of a fast tokenizer without its dropout."""
    opened = open_checkpoint(str(checkpoint))
    entry = write_tokenizer(opened, "tokenizer", tmp_path)
    content = json.loads((tmp_path / entry.file).read_text())
    file = checkpoint / "tokenizer" / "tokenizer.json"
    for name, dropout in (("null", None), ("zero", 0.0)):
        content["model"]["dropout"] = dropout
        file.write_text(json.dumps(content))
        (tmp_path / name).mkdir()
        assert write_tokenizer(opened, "tokenizer", tmp_path / name).sha256 == entry.sha256
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    refused(lambda: write_tokenizer(opened, "tokenizer", tmp_path), "dropout of 0.5")


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("size", [3, 0, "x"])
def test_a_text_encoder_for_another_tokenizer(
    checkpoint: Path, tmp_path: Path, key: str, size: object
) -> None:
    edit_json(checkpoint / "text_encoder" / "config.json", **{key: size})
    opened = open_checkpoint(str(checkpoint))
    refused(lambda: write_tokenizer(opened, "tokenizer", tmp_path), "text_encoder", key)


@pytest.mark.parametrize("length", [0, -1, 10**30, 1e30, "77", True, [77], None])
def test_an_impossible_length(checkpoint: Path, tmp_path: Path, length: object) -> None:
    edit_json(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    opened = open_checkpoint(str(checkpoint))
    refused(lambda: write_tokenizer(opened, "tokenizer", tmp_path), "model_max_length")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": -1},
        {"num_train_timesteps": 1_000_000_000},
        {"num_train_timesteps": True},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": ["linear"]},
        {"beta_start": None},
        {"beta_end": 2},
        {"trained_betas": 3},
        {"trained_betas": [0.1, "x"]},
        {"trained_betas": [0.1, 0.2]},
        {"timestep_spacing": "other"},
        {"rescale_betas_zero_snr": "yes"},
        {"set_alpha_to_one": 1},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": {"a": 1}},
    ],
    ids=str,
)
def test_invalid_schedules(checkpoint: Path, changes: dict[str, object]) -> None:
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", **changes)
    config = open_checkpoint(str(checkpoint)).config("scheduler", "scheduler_config.json")
    refused(lambda: (schedule_of(config), prediction_of(config)), "scheduler_config.json")


def test_the_sidecar(checkpoint: Path) -> None:
    sidecar = {"name": "Tiny", "license": "MIT", "defaults": {"steps": 4}, "more": None}
    (checkpoint / "latentforge.json").write_text(json.dumps(sidecar))
    opened = open_checkpoint(str(checkpoint))
    assert opened.license == "MIT" and opened.sidecar["defaults"] == {"steps": 4}
    for wrong in ({"name": 3}, {"license": ["MIT"]}, {"defaults": "none"}):
        (checkpoint / "latentforge.json").write_text(json.dumps(wrong))
        refused(lambda: opened.sidecar, "latentforge.json", next(iter(wrong)))


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: openrail\ntags: [a]\n---\n# Model", "openrail"),
        ("---\ntags: [a]\n---\nlicense: no", None),
        ("no header", None),
        ("---\nlicense: never closed", None),
        ("\ufffd\x00", None),
    ],
)
def test_the_licence_of_the_model_card(checkpoint: Path, card: str, license: str | None) -> None:
    (checkpoint / "README.md").write_text(card)
    assert open_checkpoint(str(checkpoint)).license == license


def test_a_model_card_that_is_a_directory(checkpoint: Path) -> None:
    (checkpoint / "README.md").mkdir()
    assert open_checkpoint(str(checkpoint)).license is None


def test_the_hash_of_the_weights(checkpoint: Path) -> None:
    import hashlib

    content = (checkpoint / UNET).read_bytes()
    assert open_checkpoint(str(checkpoint)).sha256("unet") == hashlib.sha256(content).hexdigest()
    shard(checkpoint, SHARDS)
    parts = [hashlib.sha256((checkpoint / "unet" / name).read_bytes()) for name in SHARDS]
    both = hashlib.sha256("".join(part.hexdigest() for part in parts).encode()).hexdigest()
    assert open_checkpoint(str(checkpoint)).sha256("unet") == both


def test_one_line() -> None:
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(AssertionError()) == "AssertionError"
    assert len(one_line(ValueError("x" * 10_000))) == 300


def test_the_demo_is_a_checkpoint() -> None:
    demo: Checkpoint = open_checkpoint("demo")
    assert family_of(demo).name == "stable_diffusion" and demo.license
