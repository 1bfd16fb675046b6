"""A manifest reads back as it was written, and a directory that differs from it is refused."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Handmade

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.files import hash_file
from latentforge.runtime.manifest import (
    FORMAT,
    AccelerationPlan,
    Component,
    Conditioning,
    FileEntry,
    Latent,
    Manifest,
    NoiseAugmentation,
    PreviewMap,
    RequestDefaults,
    ScheduleProof,
    Stage,
    TextEncoding,
    TokenizerEntry,
    WeightSource,
)
from latentforge.runtime.manifest.checks import DENOISER_INPUTS, REQUIRED_TENSORS
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.schedule import EDMSchedule, Schedule
from latentforge.runtime.tensor import TensorSpec

Tree = dict[str, Any]


@pytest.fixture
def engines(handmade: Handmade) -> Path:
    return handmade()


def load(directory: Path) -> Tree:
    content: Tree = json.loads((directory / "manifest.json").read_text())
    return content


def store(directory: Path, content: object) -> None:
    (directory / "manifest.json").write_text(json.dumps(content))


def refused(directory: Path, *names: str) -> str:
    """Return the message of the refusal: one line that contains these names."""
    with pytest.raises(ManifestError) as caught:
        Manifest.read(directory)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message
    return message


def at(tree: Any, path: str) -> Any:
    for key in path.split("/") if path else ():
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def test_round_trip(handmade: Handmade) -> None:
    stage = Stage(
        name="export", options={"opset": 20}, tools={"torch": "2"}, seconds=1.5, passes={"gelu": 3}
    )
    directory = handmade(history=(stage,), quality={"denoiser": {"psnr": 60.5}})
    manifest = Manifest.read(directory)
    assert manifest.history == (stage,)
    assert manifest.quality == {"denoiser": {"psnr": 60.5}}
    before = (directory / "manifest.json").read_bytes()
    manifest.write(directory)
    assert (directory / "manifest.json").read_bytes() == before
    assert Manifest.read(directory) == manifest


def test_files_lists_engines_data_and_tokenizers(engines: Path) -> None:
    files = {entry.file for entry in Manifest.read(engines).files}
    expected = {
        "text_encoder.onnx",
        "denoiser.onnx",
        "vae_decoder.onnx",
        "tokenizer/tokenizer.json",
    }
    assert files == expected


LEVELS = [
    "",
    "source",
    "latent",
    "schedule",
    "defaults",
    "tokenizers/tokenizer",
    "components/denoiser",
    "components/denoiser/inputs/sample",
    "components/denoiser/data/0",
    "history/0",
]


@pytest.mark.parametrize("level", LEVELS)
def test_refuses_an_unknown_key(handmade: Handmade, level: str) -> None:
    directory = handmade(history=(Stage(name="export", options={}, tools={}, seconds=0),))
    content = load(directory)
    part = content["components"]["denoiser"]
    part["data"] = [{key: part[key] for key in ("file", "sha256", "bytes")}]
    store(directory, content)
    Manifest.read(directory)
    at(content, level)["colour"] = "blue"
    store(directory, content)
    refused(directory, "colour", "export again")


REQUIRED = [
    "name",
    "family",
    "source",
    "prediction",
    "latent",
    "schedule",
    "defaults",
    "tokenizers",
    "components",
    "latent/channels",
    "latent/multiple",
    "defaults/steps",
    "schedule/beta_kind",
    "tokenizers/tokenizer/max_length",
    "components/denoiser/file",
    "components/denoiser/sha256",
    "components/denoiser/bytes",
    "components/denoiser/backend",
    "components/denoiser/inputs",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_refuses_a_missing_key(engines: Path, path: str) -> None:
    content = load(engines)
    *above, key = path.split("/")
    del at(content, "/".join(above))[key]
    store(engines, content)
    refused(engines, f"`{key}`", "manifest.json")


WRONG: list[tuple[str, object]] = [
    ("name", 3),
    ("name", None),
    ("format", "1"),
    ("format", True),
    ("prediction", "flow"),
    ("latent/channels", 0),
    ("latent/downscale", 8.5),
    ("latent/downscale", 10**9),
    ("latent/scaling_factor", 0),
    ("latent/scaling_factor", -1),
    ("latent/scaling_factor", "big"),
    ("schedule", []),
    ("schedule/beta_kind", "quadratic"),
    ("schedule/spacing", "random"),
    ("schedule/train_steps", 0),
    ("schedule/beta_end", 1.5),
    ("schedule/betas", [0.1]),
    ("defaults/steps", 0),
    ("defaults/steps", True),
    ("defaults/height", -64),
    ("defaults/guidance_scale", None),
    ("tokenizers", []),
    ("tokenizers/tokenizer/max_length", 2),
    ("tokenizers/tokenizer/max_length", 10**9),
    ("components", []),
    ("components/denoiser", None),
    ("components/denoiser/bytes", -1),
    ("components/denoiser/bytes", 1 << 60),
    ("components/denoiser/max_rows", 1 << 40),
    ("components/denoiser/inputs/sample/shape", [99999, 4, "h", "w"]),
    ("components/denoiser/inputs/sample/shape", [1 << 63, 4, "h", "w"]),
    ("components/denoiser/inputs/sample/shape", [1] * 9),
    ("components/denoiser/inputs/sample/shape", [1 << 20, 1 << 20]),
    ("defaults/sampler", "none"),
    ("defaults/steps", 10**6),
    ("defaults/height", 1 << 20),
    ("defaults/guidance_scale", -1),
    ("defaults/guidance_scale", 1e9),
    ("defaults/noise_level", 10**9),
    ("schedule/offset", 1 << 63),
    ("schedule/options", {"original_inference_steps": 10**9}),
    ("schedule/beta_start", 1e-30),
    ("components/denoiser/sha256", "0" * 63),
    ("components/denoiser/sha256", "A" * 64),
    ("components/denoiser/sha256", "0" * 64 + "\n"),
    ("components/denoiser/bytes", "12"),
    ("components/denoiser/inputs/sample/dtype", "O"),
    ("components/denoiser/inputs/sample/dtype", "f4"),
    ("components/denoiser/inputs/sample/dtype", "float32, float32"),
    ("components/denoiser/inputs/sample/shape", ["batch", 0]),
    ("components/denoiser/inputs/sample/shape", ["batch", -1]),
    ("components/denoiser/inputs/sample/shape", ["batch", True]),
    ("components/denoiser/inputs/sample/shape", ["batch", 1.5]),
    ("components/denoiser/inputs/sample/shape", ["a-b"]),
    ("components/denoiser/inputs/sample/shape", ["h*0"]),
    ("components/denoiser/inputs/sample/shape", ["h*" + "9" * 5000]),
    ("components/denoiser/inputs/sample/shape", ["h²"]),
    ("components/denoiser/inputs/sample/shape", [""]),
    ("quality", {"denoiser": {"psnr": "good"}}),
    ("history", [{}]),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{p}-{str(v)[:20]}" for p, v in WRONG])
def test_refuses_a_wrong_value(engines: Path, path: str, value: object) -> None:
    content = load(engines)
    *above, key = path.split("/")
    at(content, "/".join(above))[key] = value
    store(engines, content)
    refused(engines, "manifest.json", "export again")


UNFIT = [
    ("tokenizers", {}, "text_encoder has no tokenizer"),
    ("latent/channels", 5, "denoiser: sample has 4 channels, but latents have 5"),
    ("conditioning/channels", ["image"], "but latents + image have 8"),
    ("conditioning/channels", ["low_resolution"], "but latents + low_resolution have 7"),
    ("conditioning/channels", ["mask"], "no denoiser takes the channels mask"),
    ("schedule/train_steps", 10**9, "train_steps is at most 100000"),
    ("components/denoiser/inputs", {}, "denoiser: input 'sample' with 4 dimensions"),
    ("components/denoiser/inputs/sample/shape", [], "denoiser: input 'sample'"),
    ("components/denoiser/inputs/timestep/shape", ["batch", 1], "denoiser: input 'timestep'"),
    ("components/denoiser/outputs", {}, "denoiser: output 'out_sample'"),
    ("components/text_encoder/outputs", {}, "text_encoder: output 'last_hidden_state'"),
    ("components/vae_decoder/inputs/latent_sample/shape", ["batch", 3, 4, 4], "has 3 channels"),
    ("components/vae_decoder/outputs/sample/shape", ["batch"], "vae_decoder: output 'sample'"),
]


@pytest.mark.parametrize(("path", "value", "message"), UNFIT, ids=[case[2] for case in UNFIT])
def test_refuses_parts_that_do_not_fit_together(
    engines: Path, path: str, value: object, message: str
) -> None:
    content = load(engines)
    *above, key = path.split("/")
    at(content, "/".join(above))[key] = value
    store(engines, content)
    refused(engines, message, "manifest.json", "export again")


TIME_INPUTS = {"timestep": {"dtype": "float32", "shape": ["rows"]}}
KEYS = {"dtype": "float16", "shape": ["batch", 8, 2]}
EMBEDDED = {"dtype": "float32", "shape": ["rows", 4, 1, 1]}


@pytest.fixture
def parts(engines: Path) -> Tree:
    """A manifest of a denoiser partitioned into three components."""
    content = load(engines)
    components = content["components"]
    denoiser = components["denoiser"]
    prompt = {"encoder_hidden_states": denoiser["inputs"]["encoder_hidden_states"]}
    components["denoiser_prompt"] = {**denoiser, "inputs": prompt, "outputs": {"to_k": KEYS}}
    components["denoiser_time"] = {
        **denoiser,
        "inputs": TIME_INPUTS,
        "outputs": {"embedded": EMBEDDED},
    }
    once = {**EMBEDDED, "shape": [1, 4, 1, 1]}
    sample = denoiser["inputs"]["sample"]
    denoiser["inputs"] = {"sample": sample, "to_k": KEYS, "embedded": once}
    return content


def test_reads_a_partitioned_denoiser(engines: Path, parts: Tree) -> None:
    store(engines, parts)
    needed = Manifest.read(engines).required_components
    assert needed == ("text_encoder", "denoiser_prompt", "denoiser_time", "denoiser", "vae_decoder")


def test_reads_time_embeddings_that_depend_on_the_prompt(engines: Path, parts: Tree) -> None:
    time, denoiser = (parts["components"][name] for name in ("denoiser_time", "denoiser"))
    pooled = {"dtype": "float16", "shape": ["rows", 8, 2]}
    time["inputs"] = {**TIME_INPUTS, "to_k": pooled}
    denoiser["inputs"]["embedded"] = {**EMBEDDED, "shape": ["batch", 4, 1, 1]}
    store(engines, parts)
    Manifest.read(engines)
    time["inputs"] = {**TIME_INPUTS, "to_k": KEYS}
    store(engines, parts)
    refused(engines, "denoiser_time: input to_k is float16[batch, 8, 2]", "denoiser_prompt returns")


MISFITS = [
    ("denoiser/inputs/colour", KEYS, "denoiser: unexpected input 'colour': no component output"),
    (
        "denoiser_time/inputs/colour",
        KEYS,
        "denoiser_time: unexpected input 'colour': no component output",
    ),
    (
        "denoiser_prompt/inputs/timestep",
        KEYS,
        "denoiser_prompt: unexpected input 'timestep': no component output",
    ),
    (
        "denoiser_time/inputs/sample",
        KEYS,
        "denoiser_time: unexpected input 'sample': no component output",
    ),
    (
        "denoiser_prompt/inputs/embedded",
        KEYS,
        "denoiser_prompt: unexpected input 'embedded': no component output",
    ),
    (
        "denoiser_time/outputs/to_k",
        KEYS,
        "denoiser_time: output 'to_k' is already provided by denoiser_prompt",
    ),
    ("denoiser_time/outputs/sample", KEYS, "output 'sample' is already provided by the runtime"),
    (
        "denoiser_time/outputs/more",
        KEYS,
        "denoiser_time: output 'more' is not an input of a later part",
    ),
    (
        "denoiser_prompt/outputs/to_k/dtype",
        "float32",
        "denoiser: input to_k is float16[batch, 8, 2]",
    ),
    (
        "denoiser_prompt/outputs/to_k/shape",
        ["batch", 8, 3],
        "denoiser_prompt returns float16[batch, 8, 3]",
    ),
    ("denoiser/inputs/to_k/shape", [1, 8, 2], "denoiser: input to_k is float16[1, 8, 2]"),
    (
        "denoiser/inputs/embedded/shape",
        ["batch", 4, 1, 1],
        "denoiser: input embedded is float32[batch",
    ),
    ("denoiser/inputs/embedded/shape", [], "denoiser: input embedded is float32[]"),
    ("denoiser_time/inputs", {}, "denoiser_time: input 'timestep' with 1 dimensions"),
    (
        "denoiser_time/inputs/timestep/shape",
        [],
        "denoiser_time: input 'timestep' with 1 dimensions",
    ),
    ("denoiser_prompt/inputs", {}, "denoiser: input 'encoder_hidden_states' with 3 dimensions"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISFITS, ids=[c[0] for c in MISFITS])
def test_refuses_parts_of_a_denoiser_that_do_not_fit_together(
    engines: Path, parts: Tree, path: str, value: object, message: str
) -> None:
    *above, key = f"components/{path}".split("/")
    content = json.loads(json.dumps(parts))  # no part is shared
    at(content, "/".join(above))[key] = value
    store(engines, content)
    refused(engines, message, "manifest.json", "export again")


# Acceleration plans

FEATURE = {"dtype": "float32", "shape": ["batch", 6, "latent_height//2", "latent_width//2"]}
PLAN = {
    "sampler": "euler",
    "steps": 4,
    "timesteps": [900, 500.5, 20, 0],
    "guidance_interval": [0.3, 0.9],
    "cached_steps": [1, 3],
    "variant": "denoiser_reduced",
    "measured": {"speedup": 2.0},
}


@pytest.fixture
def accelerated(engines: Path) -> Tree:
    """A manifest with a plan and every component that a plan can name."""
    content = load(engines)
    components = content["components"]
    denoiser = components["denoiser"]
    denoiser["outputs"] = {**denoiser["outputs"], "cached_feature": FEATURE}
    inputs = {name: denoiser["inputs"][name] for name in ("sample", "timestep")}
    output = {"out_sample": denoiser["outputs"]["out_sample"]}
    cached = {**denoiser, "inputs": {**inputs, "cached_feature": FEATURE}, "outputs": output}
    components |= {
        "denoiser_cached": cached,
        "denoiser_reduced": dict(denoiser),
        "denoiser": denoiser,
    }
    content["acceleration"] = PLAN
    return content


def test_reads_a_plan(engines: Path, accelerated: Tree) -> None:
    store(engines, accelerated)
    manifest = Manifest.read(engines)
    assert manifest.required_components == ("text_encoder", "denoiser", "vae_decoder")
    assert manifest.acceleration is not None and manifest.acceleration.timesteps == (
        900,
        500.5,
        20,
        0,
    )
    assert manifest.acceleration.request == {
        "sampler": "euler",
        "steps": 4,
        "timesteps": (900, 500.5, 20, 0),
        "guidance_interval": (0.3, 0.9),
        "cached_steps": (1, 3),
        "variant": "denoiser_reduced",
    }


PREVIEW = {"offset": [0, 0, 0], "weights": [[1, 0, 0, 0]] * 3, "correlation": 0.5}
FIVE = [[1, 0, 0, 0, 0]] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [[1, 0, 0, 0]] * 2}, "preview.weights"),
        ({"weights": FIVE}, "preview: latents of 4 channels need 4 weights"),
        ({"weights": [[1, 0, 0, 0], [], []]}, "preview: latents of 4 channels need 4 weights"),
        ({"weights": [[1, 0, 0, 1e30]] * 3}, "preview.weights"),
        ({"products": FIVE}, "and 10 products or none"),
        ({"products": [[0] * 10, [], []]}, "and 10 products or none"),
        ({"offset": [0, 0, None]}, "preview.offset"),
        ({"correlation": 2}, "preview.correlation"),
        ({"more": 1}, "more"),
    ],
)
def test_refuses_a_preview_that_does_not_fit(
    engines: Path, changes: dict[str, object], message: str
) -> None:
    content = load(engines)
    for preview in (PREVIEW, {**PREVIEW, "products": [[0] * 10] * 3}):
        store(engines, {**content, "preview": preview})
        assert Manifest.read(engines).preview is not None
    store(engines, {**content, "preview": {**PREVIEW, **changes}})
    refused(engines, message, "export again")


def test_a_file_shared_by_components_counts_once(engines: Path, accelerated: Tree) -> None:
    alone = Manifest.read(engines)
    store(engines, accelerated)
    manifest = Manifest.read(engines)
    assert [entry.file for entry in manifest.files] == [entry.file for entry in alone.files]
    assert manifest.size == alone.size


MISPLANNED = [
    ("acceleration/steps", 5, "acceleration: 4 timesteps for 5 steps"),
    (
        "acceleration/timesteps",
        [900, 500, 500, 0],
        "acceleration: timesteps must be strictly decreasing",
    ),
    ("acceleration/timesteps", [1000, 500, 20, 0], "timestep 1000 is not in the schedule"),
    ("acceleration/timesteps", [900, 500, 20, -1], "timestep -1 is not in the schedule"),
    ("acceleration/guidance_interval", [0.9, 0.3], "acceleration: guidance_interval is two sigmas"),
    ("acceleration/guidance_interval", [0.3, 1.1], "acceleration: guidance_interval is two sigmas"),
    ("acceleration/guidance_interval", [0.3], "guidance"),
    ("acceleration/cached_steps", [0, 2], "acceleration: cached_steps are counted from 0"),
    ("acceleration/cached_steps", [3, 1], "acceleration: cached_steps are counted from 0"),
    ("acceleration/cached_steps", [1, 1], "acceleration: cached_steps are counted from 0"),
    ("acceleration/cached_steps", [4], "of 4 steps is always full: choose from 1 to 3"),
    ("acceleration/variant", "denoiser_prompt", "acceleration.variant"),
    ("acceleration/turbo", True, "turbo"),
    (
        "components/denoiser_cached",
        None,
        "acceleration: the plan uses denoiser_cached, which is not a component",
    ),
    (
        "components/denoiser_reduced",
        None,
        "acceleration: the plan uses denoiser_reduced, which is not a component",
    ),
    (
        "components/denoiser_cached/inputs/more",
        FEATURE,
        "denoiser_cached: more is float32[batch, 6,",
    ),
    (
        "components/denoiser_cached/inputs/cached_feature/shape",
        ["batch", 7, 1, 1],
        "cached_feature is",
    ),
    ("components/denoiser_cached/outputs", {}, "denoiser_cached: output 'out_sample'"),
    ("components/denoiser/outputs/cached_feature", None, "denoiser has no tensor of that name"),
    (
        "components/denoiser_reduced/inputs/more",
        FEATURE,
        "denoiser_reduced: its inputs and outputs differ",
    ),
    ("components/denoiser/max_rows", 0, "max_rows"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISPLANNED, ids=[c[2] for c in MISPLANNED])
def test_refuses_a_plan_that_does_not_fit(
    engines: Path, accelerated: Tree, path: str, value: object, message: str
) -> None:
    content = json.loads(json.dumps(accelerated))  # no part is shared
    *above, key = path.split("/")
    at(content, "/".join(above))[key] = value
    if value is None:
        del at(content, "/".join(above))[key]
    store(engines, content)
    refused(engines, message, "manifest.json", "export again")


# Damaged manifests


def test_reads_components_of_other_names(engines: Path) -> None:
    content = load(engines)
    content["components"]["another"] = content["components"]["denoiser"] | {"inputs": {}}
    store(engines, content)
    assert "another" in Manifest.read(engines).components


NOT_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b"\x00",
    b"\xff\xfe{}",
    b"{'format': 1}",
    b'{"format": 1} trailing',
    b'{"format": ' + b"1" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_refuses_content_that_is_not_a_manifest(engines: Path, content: bytes) -> None:
    (engines / "manifest.json").write_bytes(content)
    refused(engines, "manifest.json", "export again")


def test_random_damage_is_read_or_refused(engines: Path) -> None:
    """Random damage, with a fixed seed, raises no error but ManifestError."""
    rng = random.Random(0)
    path = engines / "manifest.json"
    original = path.read_bytes()
    tokens = [
        b"{",
        b"}",
        b"[",
        b'"',
        b",",
        b"null",
        b"-1",
        b"1e99",
        b"\\u0000",
        b"../",
        b"\xff",
        b"",
    ]
    refusals = 0
    for _ in range(1000):
        content = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 5))):
            start = rng.randrange(len(content))
            content[start : start + rng.choice((0, 1, 1, 8))] = rng.choice(tokens)
        path.write_bytes(content)
        try:
            Manifest.read(engines)
        except ManifestError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert 500 < refusals < 1000


def test_refuses_numbers_that_are_not_json(engines: Path) -> None:
    text = (engines / "manifest.json").read_text()
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        changed = re.sub(r'"scaling_factor": 0.5', f'"scaling_factor": {number}', text)
        assert changed != text
        (engines / "manifest.json").write_text(changed)
        refused(engines, "manifest.json")


def test_refuses_a_key_given_twice(engines: Path) -> None:
    text = (engines / "manifest.json").read_text()
    twice = text.replace('"channels": 4', '"channels": 4, "channels": 5')
    (engines / "manifest.json").write_text(twice)
    refused(engines, "'channels'", "occurs 2 times")


def test_refuses_a_huge_manifest_without_reading_it(engines: Path) -> None:
    with (engines / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would take a terabyte of memory
    refused(engines, "larger than 4 MiB")


def test_writes_no_manifest_that_it_would_refuse(engines: Path) -> None:
    manifest = Manifest.read(engines)
    before = (engines / "manifest.json").read_bytes()
    bad = msgspec.structs.replace(manifest, quality={"image": {"psnr": float("nan")}})
    with pytest.raises(ManifestError, match="psnr|quality"):
        bad.write(engines)
    assert (engines / "manifest.json").read_bytes() == before


# Files


def point_at(directory: Path, file: str) -> None:
    content = load(directory)
    content["components"]["denoiser"]["file"] = file
    store(directory, content)


@pytest.mark.parametrize(
    "file",
    [
        "../denoiser.onnx",
        "a/../../denoiser.onnx",
        "tokenizer/../denoiser.onnx",
        "..",
        "/etc/passwd",
        "//etc/passwd",
        "",
        ".",
        "./denoiser.onnx",
        "tokenizer//tokenizer.json",
        "tokenizer\\tokenizer.json",
        "C:denoiser.onnx",
        "denoiser.onnx.",
        "denoiser.onnx ",
        "nul.onnx",
        "x" * 300,
        "a/" * 3000,
        "denoiser.onnx\x00.txt",
        "denoiser\n.onnx",
        "\x1b[2J",
    ],
)
def test_refuses_a_path_outside_the_directory(engines: Path, file: str) -> None:
    (engines.parent / "denoiser.onnx").write_bytes(b"denoiser")
    point_at(engines, file)
    refused(engines, repr(file)[:100], "inside the engine directory")


@pytest.mark.parametrize("file", ["missing.onnx", "tokenizer", "denoiser.onnx/x"])
def test_refuses_a_path_without_a_file(engines: Path, file: str) -> None:
    point_at(engines, file)
    refused(engines, "no file", repr(file), "export again")


def test_follows_links_whose_target_has_the_hash(engines: Path) -> None:
    manifest = Manifest.read(engines)
    for name in ("denoiser.onnx", "tokenizer", "manifest.json"):
        (engines / name).rename(engines.parent / name)
        (engines / name).symlink_to(engines.parent / name)
    assert Manifest.read(engines) == manifest
    (engines.parent / "denoiser.onnx").write_bytes(b"denoisex")
    refused(engines, "denoiser.onnx", "sha256")


def test_a_snapshot_of_a_content_addressed_cache(engines: Path) -> None:
    manifest = Manifest.read(engines)
    snapshot, blobs = engines.parent / "cache" / "snapshots" / "abc", engines.parent / "cache/blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in engines.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(engines)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hash_file(path)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert Manifest.read(snapshot) == manifest


@pytest.mark.timeout(20)  # opening a pipe blocks
@pytest.mark.parametrize("name", ["denoiser.onnx", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/proc/self/environ", "/proc/kmsg", "."])
@pytest.mark.parametrize("hashes", [True, False])
def test_refuses_what_is_no_regular_file(
    engines: Path, name: str, target: str, hashes: bool
) -> None:
    os.mkfifo(engines / "pipe")
    (engines / name).unlink()
    (engines / name).symlink_to(engines / target)
    with pytest.raises(ManifestError):
        Manifest.read(engines, hashes=hashes)


def test_refuses_a_file_that_is_a_hole(engines: Path) -> None:
    os.truncate(engines / "denoiser.onnx", 1 << 40)
    content = load(engines)
    content["components"]["denoiser"]["bytes"] = 1 << 40
    store(engines, content)
    refused(engines, "mostly a hole")


def test_follows_a_link_that_stays_inside(engines: Path) -> None:
    (engines / "denoiser.onnx").rename(engines / "real.onnx")
    (engines / "denoiser.onnx").symlink_to("real.onnx")
    Manifest.read(engines)


def test_refuses_links_in_a_circle(engines: Path) -> None:
    (engines / "denoiser.onnx").unlink()
    (engines / "denoiser.onnx").symlink_to("denoiser.onnx")
    refused(engines, "no file", "'denoiser.onnx'")


def test_a_linked_engine_directory_is_fine(engines: Path) -> None:
    link = engines.parent / "link"
    link.symlink_to(engines, target_is_directory=True)
    assert Manifest.read(link) == Manifest.read(engines)


@pytest.mark.parametrize("name", ["denoiser.onnx", "tokenizer/tokenizer.json"])
def test_refuses_a_missing_file(engines: Path, name: str) -> None:
    (engines / name).unlink()
    refused(engines, repr(name), "export again")


def test_refuses_a_directory_where_a_file_should_be(engines: Path) -> None:
    (engines / "denoiser.onnx").unlink()
    (engines / "denoiser.onnx").mkdir()
    refused(engines, "no file", "'denoiser.onnx'")


@pytest.mark.parametrize("content", [b"denoise", b"", b"denoiser "])
def test_refuses_another_size(engines: Path, content: bytes) -> None:
    (engines / "denoiser.onnx").write_bytes(content)
    refused(engines, "denoiser.onnx", f"has {len(content)} bytes", "records 8", "export again")


@pytest.mark.parametrize("name", ["denoiser.onnx", "tokenizer/tokenizer.json"])
def test_refuses_a_flipped_bit(engines: Path, name: str) -> None:
    content = bytearray((engines / name).read_bytes())
    content[-1] ^= 1
    (engines / name).write_bytes(content)
    refused(engines, name, "sha256", "export again")
    Manifest.read(engines, hashes=False)


def test_checks_external_weights_too(engines: Path) -> None:
    content = load(engines)
    weights = {"file": "denoiser.onnx.data", "sha256": "0" * 64, "bytes": 3}
    content["components"]["denoiser"]["data"] = [weights]
    store(engines, content)
    refused(engines, "no file", "denoiser.onnx.data")
    (engines / "denoiser.onnx.data").write_bytes(b"abc")
    refused(engines, "denoiser.onnx.data", "sha256")


# Directories


def test_refuses_a_path_that_is_not_an_engine_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        refused(path, str(path), "latentforge build or export")
    with pytest.raises(SettingsError, match="the engine directory is a path that no file can have"):
        Manifest.read(tmp_path / ("x" * 300))


@pytest.mark.timeout(20)  # opening a pipe blocks
def test_refuses_a_manifest_that_is_not_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    refused(tmp_path, "manifest.json")
    (tmp_path / "manifest.json").rmdir()
    os.mkfifo(tmp_path / "manifest.json")
    refused(tmp_path, "manifest.json")


# The specification

SECTIONS: dict[str, tuple[type, ...]] = {
    "manifest.json": (Manifest,),
    "source": (WeightSource,),
    "latent": (Latent,),
    "preview": (PreviewMap,),
    "conditioning": (Conditioning, NoiseAugmentation, TextEncoding),
    "schedule": (Schedule,),
    "edm": (EDMSchedule,),
    "options": (SolverOptions,),
    "schedule_proof": (ScheduleProof,),
    "defaults": (RequestDefaults,),
    "acceleration": (AccelerationPlan,),
    "files": (FileEntry,),
    "tokenizers": (TokenizerEntry,),
    "components": (Component,),
    "tensors": (TensorSpec,),
    "stages": (Stage,),
}


def documented(text: str, section: str) -> dict[str, str]:
    """Return the type column by key of the tables in a section that list keys."""
    _, _, after = text.partition(f"# {section}\n")
    body = re.split(r"^#", after, maxsplit=1, flags=re.MULTILINE)[0]
    keys: dict[str, str] = {}
    for table in re.findall(r"\| key \| type \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", body):
        for row in table.splitlines():
            names, kind = row.split("|")[1:3]
            keys |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind.strip())
    return keys


@pytest.fixture(scope="module")
def specification() -> str:
    return (Path(__file__).parents[2] / "docs" / "format.md").read_text()


@pytest.mark.parametrize("section", SECTIONS)
def test_the_specification_lists_exactly_the_keys_that_are_read(
    specification: str, section: str
) -> None:
    fields = [field for kind in SECTIONS[section] for field in msgspec.structs.fields(kind)]
    if section in ("tokenizers", "components"):  # "files" lists these keys for both
        shared = {field.name for field in msgspec.structs.fields(FileEntry)}
        fields = [field for field in fields if field.name not in shared]
    keys = documented(specification, section)
    assert keys.keys() == {field.name for field in fields}
    optional = {key for key, kind in keys.items() if "optional" in kind}
    written = {"format"}  # has a default in code so that every writer writes this version
    assert optional == {field.name for field in fields if not field.required} - written


def test_the_specification_is_of_the_format_that_is_read(specification: str) -> None:
    assert specification.startswith(f"# The engine directory, format {FORMAT}\n")
    assert f"| `format` | integer | {FORMAT}," in specification


def test_the_specification_names_every_required_tensor(specification: str) -> None:
    for component, sides in REQUIRED_TENSORS.items():
        (row,) = re.findall(rf"^\| `{component}` \|.*`.*$", specification, flags=re.MULTILINE)
        for tensor in (name for side in sides for name in side):
            assert f"`{tensor}`" in row
    for name in DENOISER_INPUTS:
        assert f"`{name}`" in specification


def test_reads_engines_that_a_killed_process_set_aside(engines: Path) -> None:
    manifest = Manifest.read(engines)
    engines.rename(engines.with_name(f".{engines.name}.previous-0123abcd"))
    assert Manifest.read(engines) == manifest and engines.is_dir()


NAMES = (
    *("/some/where/x", "../../../evil", "..", ".", "", "a/b", "a\\b", "a:b", "a.b", "a b", "A"),
    *("nul\0", "-x", "x" * 65, "\ud800", "\x1b[31m", "e\u0301", "1st"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", ["components", "tokenizers"])
def test_names_never_become_paths(engines: Path, group: str, name: str) -> None:
    manifest = Manifest.read(engines)
    content = load(engines)
    content[group][name] = next(iter(content[group].values()))
    store(engines, content)
    refused(engines)
    entry = next(iter(getattr(manifest, group).values()))
    with pytest.raises(ManifestError):  # the writer refuses it too
        msgspec.structs.replace(manifest, **{group: {name: entry}}).write(engines)


SCHEDULES = {
    "no noise": {"beta_kind": "linear", "beta_start": 1e-30, "beta_end": 1e-10},
    "all noise": {"beta_kind": "linear", "beta_start": 0.9, "beta_end": 0.9},
    "one step of all noise": {
        "beta_kind": "explicit",
        "betas": [0.5],
        "train_steps": 1,
        "zero_terminal_snr": True,
    },
}


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_refuses_schedules_that_divide_by_zero(engines: Path, sampler: str, kind: str) -> None:
    content = load(engines)
    content["schedule"] |= SCHEDULES[kind]
    content["defaults"] |= {"sampler": sampler, "steps": 1}
    store(engines, content)
    refused(engines, "schedule")


STAGES: list[dict[str, Any]] = [
    {"name": "compile", "options": {}},
    {"name": "compile", "options": {"backends": [], "options": {}}},
    {"name": "compile", "options": {"backends": {"denoiser": "null"}, "options": {}}},
    {"name": "select", "options": {}},
    {"name": "build", "options": {}},
    {"name": "build", "options": {"estimated": {"seconds": 1, "memory": 1}}},
    {"name": "optimize", "options": {"sizing": {"reduced": "rows"}}},
    {"name": "optimize", "options": {"sizing": {"reduced": {"images": [2, 1]}}}},
    {"name": "optimize", "options": {"sizing": {"reduced": {"images": [1]}, "budget": 1}}},
    {"name": "search", "options": {"plans": 3, "gate": "", "plan": ""}},
    {"name": "export", "options": {"reference": {}}},
    {"name": "optimize", "options": {"recipe": "int8"}},
    {"name": "optimize", "options": {"recipe": [], "target": {}}},
    {"name": "optimize", "options": {"candidates": {"x": {}}}},
    {"name": "optimize", "options": {"layers": [{}]}},
    {"name": "optimize", "options": {}, "measured": {"denoiser": {"bytes_before": 1}}},
    {"name": "optimize", "options": {}, "measured": {"image": {"speedup": 0}}},
]


@pytest.mark.parametrize("stage", STAGES)
def test_refuses_a_stage_without_what_readers_need(engines: Path, stage: dict[str, Any]) -> None:
    content = load(engines)
    content["history"] = [{"tools": {}, "seconds": 0, **stage}]
    store(engines, content)
    refused(engines, f"history: {stage['name']}")


@pytest.mark.parametrize("depth", [500, 5000, 100_000])
def test_json_nested_too_deeply(engines: Path, depth: int) -> None:
    text = json.dumps({**load(engines), "history": 0})
    nested = '[{"name": "x", "options": {"a": ' + "[" * depth + "]" * depth + "}}]"
    (engines / "manifest.json").write_text(text.replace('"history": 0', f'"history": {nested}'))
    refused(engines)
