"""optimum's directory layout, read and written; tests marked optimum run optimum-onnx itself."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("diffusers", exc_type=ImportError)

import onnx
from safetensors.numpy import load_file, save_file

from latentforge.__main__ import main
from latentforge.export.onnx import Dimensions
from latentforge.export.optimum import folder_of, spaced
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.compile.verify import verify
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Result

Copy = Callable[[Path], Path]
Tiny = Callable[[str], Path]
Generate = Callable[..., Mapping[str, NDArray[Any]]]

HERE = Path(__file__).parents[1]
COMPONENTS = ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"]
FOLDERS = [folder_of(name) for name in COMPONENTS]
CLASSES = {"sd": "ORTStableDiffusion", "sdxl": "ORTStableDiffusionXL"}
REQUEST = {"steps": 4, "seed": 5, "guidance_scale": 6.0}


@pytest.fixture(scope="module")
def arranged(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines for 32 x 32 pixels in optimum's layout. Copy before changing them."""
    target = tmp_path_factory.mktemp("arranged") / "bk-sdm"
    sizes = Dimensions(height=32, width=32)
    export(str(tiny("bk-sdm")), target, ExportRequest(dimensions=sizes, layout="optimum"))
    return target


@pytest.fixture(scope="module")
def texts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL's text encoders in optimum's layout; transformers 5's tokenizer_2/."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("texts")
    checkpoint = Path(shutil.copytree(tiny("sdxl"), folder / "checkpoint"))
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer_2")
    shutil.rmtree(checkpoint / "tokenizer_2")
    tokenizer.save_pretrained(checkpoint / "tokenizer_2")
    assert not (checkpoint / "tokenizer_2" / "vocab.json").exists()
    names = ("text_encoder", "text_encoder_2")
    sizes = Dimensions(batch=1)  # the fastest to export
    request = ExportRequest(components=names, dimensions=sizes, layout="optimum")
    export(str(checkpoint), folder / "engines", request)
    return folder / "engines"


def files(directory: Path) -> set[str]:
    return {f.relative_to(directory).as_posix() for f in directory.rglob("*") if f.is_file()}


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def generated(directory: Path, **changes: Any) -> Result:
    with load(directory, threads=1) as pipe:
        return pipe("a red fox", **{**REQUEST, **changes})


def edit(path: Path, change: Callable[[onnx.ModelProto], object], **options: Any) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path, **options)


# Writing


def test_files_of_the_directory(arranged: Path) -> None:
    expected = {"manifest.json", "model_index.json", "scheduler/scheduler_config.json"}
    expected |= {f"{name}/{file}" for name in FOLDERS for file in ("model.onnx", "config.json")}
    own = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    expected |= {f"tokenizer/{file}" for file in (*own, "special_tokens_map.json")}
    assert files(arranged) == expected
    manifest = Manifest.read(arranged)
    assert [c.file for c in manifest.components.values()] == [f"{f}/model.onnx" for f in FOLDERS]
    assert set(manifest.quality) == {*COMPONENTS, "image"}
    assert manifest.history[0].options["layout"] == "optimum"
    assert "image: one step runs" in [*verify(arranged)][-1]


def test_configurations_come_from_the_checkpoint(arranged: Path, tiny: Tiny) -> None:
    for name in ("text_encoder", "unet"):
        found, original = (read(d / name / "config.json") for d in (arranged, tiny("bk-sdm")))
        original.pop("_name_or_path", None)
        assert original.items() <= found.items()
    vae = read(arranged / "vae_decoder" / "config.json")
    assert vae == read(arranged / "vae_encoder" / "config.json")
    assert vae["scaling_factor"] == 0.18215
    index = read(arranged / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_a_missing_scaling_factor_is_added(arranged: Path, copy: Copy) -> None:
    """optimum's default differs from diffusers'."""
    directory = copy(arranged)
    for name in ("vae_decoder", "vae_encoder"):
        path = directory / name / "config.json"
        config = read(path)
        del config["scaling_factor"]
        path.write_text(json.dumps(config))
    target = directory.parent / "again"
    export(str(directory), target, ExportRequest(components=("vae_decoder",), layout="optimum"))
    assert read(target / "vae_decoder" / "config.json")["scaling_factor"] == 0.18215


def test_text_encoders_have_the_outputs_of_optimum(arranged: Path, texts: Path) -> None:
    hidden = [f"hidden_states.{index}" for index in range(3)]
    expected = {
        arranged: {"text_encoder": ["last_hidden_state", "pooler_output"]},
        texts: {
            "text_encoder": ["last_hidden_state", "pooler_output", *hidden],
            "text_encoder_2": ["text_embeds", "last_hidden_state", *hidden],
        },
    }
    for directory, encoders in expected.items():
        components = Manifest.read(directory).components
        for name, outputs in encoders.items():
            graph = onnx.load(directory / name / "model.onnx").graph
            assert [value.name for value in graph.output] == outputs
            assert list(components[name].outputs) == outputs


def test_tokenizers_have_the_files_of_transformers_4(texts: Path, tiny: Tiny) -> None:
    """From vocab.json and merges.txt, and from tokenizer.json if these are missing."""
    original = tiny("sdxl") / "tokenizer"
    for name in ("tokenizer", "tokenizer_2"):
        assert read(texts / name / "vocab.json") == read(original / "vocab.json")
        lines = (texts / name / "merges.txt").read_text().split("\n")
        assert lines[0].startswith("#version")
        assert lines[1:] == (original / "merges.txt").read_text().split("\n")[1:]
        config = read(texts / name / "tokenizer_config.json")
        assert config["model_max_length"] == 24 and config["pad_token"] == "<|endoftext|>"


def test_dimensions_have_blanks_for_io_binding() -> None:
    assert [spaced(size) for size in (4, "batch", "h*8", "h//8")] == [4, "batch", "h * 8", "h / 8"]


def test_optimum_supports_no_flexible_unet(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no optimum pipeline supports the UNet of deci"):
        export(str(tiny("decidiffusion-1")), tmp_path / "target", ExportRequest(layout="optimum"))
    with pytest.raises(SettingsError, match="layout must be one of 'plain', 'optimum', not 'flat'"):
        export(str(tiny("sd")), tmp_path / "target", ExportRequest(layout="flat"))  # type: ignore[arg-type]
    assert not (tmp_path / "target").exists()


# Reading


def test_graphs_are_copied_unchanged(arranged: Path, tmp_path: Path) -> None:
    manifest = export(str(arranged), tmp_path / "taken")
    expected = {"manifest.json", "tokenizer/tokenizer.json"}
    assert files(tmp_path / "taken") == expected | {f"{f}/model.onnx" for f in FOLDERS}
    for folder, (name, component) in zip(FOLDERS, manifest.components.items(), strict=True):
        assert component.sha256 == hash_file(arranged / folder / "model.onnx")
        assert component.sha256 == manifest.source.sha256[name]
        assert component.precision == "fp32"
    (stage,) = manifest.history
    assert stage.name == "import" and "torch" not in stage.tools and manifest.quality == {}
    assert stage.options == {"components": COMPONENTS, "height": 32, "width": 32}
    before, after = (generated(directory) for directory in (arranged, tmp_path / "taken"))
    assert np.array_equal(before.latents, after.latents)


def test_imported_graphs_can_be_written_in_the_same_layout(arranged: Path, tmp_path: Path) -> None:
    export(str(arranged), tmp_path / "again", ExportRequest(layout="optimum"))
    assert files(tmp_path / "again") == files(arranged)
    for name in files(arranged) - {"manifest.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (arranged / name).read_bytes(), name


def half_and_scalar(directory: Path) -> None:
    """Apply optimum's scalar timestep and external weights, and an output in fp16."""

    def scalar(model: onnx.ModelProto) -> None:
        timestep = next(value for value in model.graph.input if value.name == "timestep")
        timestep.type.tensor_type.shape.ClearField("dim")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
        for node in model.graph.node:
            node.input[:] = ["a_row" if name == "timestep" else name for name in node.input]
        node = onnx.helper.make_node("Reshape", ["timestep", "one"], ["a_row"])
        model.graph.node.insert(0, node)

    def half(model: onnx.ModelProto) -> None:
        (hidden,) = (v for v in model.graph.output if v.name == "last_hidden_state")
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["full" if name == hidden.name else name for name in names]
        hidden.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        model.graph.node.append(
            onnx.helper.make_node("Cast", ["full"], [hidden.name], to=onnx.TensorProto.FLOAT16)
        )

    beside = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 100}
    edit(directory / "unet" / "model.onnx", scalar, **beside)
    edit(directory / "text_encoder" / "model.onnx", half)


def test_other_dtypes_ranks_and_external_weights(
    arranged: Path, copy: Copy, tmp_path: Path
) -> None:
    directory = copy(arranged)
    half_and_scalar(directory)
    manifest = export(str(directory), tmp_path / "taken")
    unet, text = manifest.components["denoiser"], manifest.components["text_encoder"]
    assert unet.inputs["timestep"].shape == () and unet.precision == "fp32"
    assert [entry.file for entry in unet.data] == ["unet/model.onnx_data"]
    assert text.outputs["last_hidden_state"].dtype == "float16" and text.precision == "fp16"
    before, after = (generated(path) for path in (arranged, tmp_path / "taken"))
    assert 40 < psnr(before.latents, after.latents) < 120


def integer_timesteps(model: onnx.ModelProto) -> None:
    """Change the timestep to that of older releases of optimum."""
    timestep = next(value for value in model.graph.input if value.name == "timestep")
    timestep.type.tensor_type.elem_type = onnx.TensorProto.INT64
    for node in model.graph.node:
        node.input[:] = ["a_float" if name == "timestep" else name for name in node.input]
    cast = onnx.helper.make_node("Cast", ["timestep"], ["a_float"], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(0, cast)


def test_integer_timesteps_of_older_exports(
    arranged: Path, copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = copy(arranged)
    edit(directory / "unet" / "model.onnx", integer_timesteps)
    manifest = export(str(directory), tmp_path / "taken")
    assert manifest.components["denoiser"].inputs["timestep"].dtype == "int64"
    assert any("integer timesteps" in message for message in caplog.messages)
    before, after = (generated(path) for path in (arranged, tmp_path / "taken"))
    assert psnr(before.latents, after.latents) > 100  # PNDM's timesteps are integers


def test_class_names_of_optimum(arranged: Path, copy: Copy, tmp_path: Path) -> None:
    """optimum's save_pretrained writes its own classes and no vae/; the encoder is optional."""
    directory = copy(arranged)
    index = read(directory / "model_index.json")
    index["_class_name"] = "ORTStableDiffusionPipeline"
    (directory / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(directory / "vae_encoder")
    manifest = export(str(directory), tmp_path / "taken")
    assert manifest.family == "stable_diffusion" and list(manifest.components) == COMPONENTS[:3]


def test_chosen_components(arranged: Path, tmp_path: Path) -> None:
    manifest = export(str(arranged), tmp_path / "taken", ExportRequest(components=("vae_encoder",)))
    assert list(manifest.components) == list(manifest.source.sha256) == ["vae_encoder"]
    assert manifest.components["vae_encoder"].inputs["sample"].shape == ("batch", 3, 32, 32)


def test_weights_take_precedence_over_graphs(
    arranged: Path, copy: Copy, tmp_path: Path, tiny: Tiny
) -> None:
    """A hub repository may hold both, and the weights may be newer."""
    directory = copy(arranged)
    shutil.copy(
        tiny("sd") / "unet" / "diffusion_pytorch_model.safetensors", directory / "unet"
    )  # and no other weights
    with pytest.raises(CheckpointError, match="text_encoder holds no weights"):
        export(str(directory), tmp_path / "taken")


def test_sizes_are_fixed_already(arranged: Path, capsys: Any, tmp_path: Path) -> None:
    assert main(["export", str(arranged), str(tmp_path / "taken"), "--height", "64"]) == 2
    said = capsys.readouterr().err
    assert "fixed already" in said and said.count("\n") == 1


def tensor(model: onnx.ModelProto, location: str) -> None:
    """Move the largest weight to a file."""
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    weight.external_data.add(key="length", value=str(len(weight.raw_data)))
    weight.ClearField("raw_data")


def elsewhere(location: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "unet" / "model.onnx"
        model = onnx.load(path)
        tensor(model, location)
        path.write_bytes(model.SerializeToString())

    return damage


def link(directory: Path) -> None:
    (directory.parent / "secret").write_bytes(bytes(1 << 20))
    (directory / "unet" / "weights").symlink_to(directory.parent / "secret")
    elsewhere("weights")(directory)


def graph(name: str, change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    return lambda directory: edit(directory / name / "model.onnx", change)


def cut(directory: Path) -> None:
    path = directory / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:50_000])


def config(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    path.write_text(json.dumps({**read(path), "in_channels": 9}))


def poison(model: onnx.ModelProto) -> None:
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def rename(values: str, index: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        getattr(model.graph, values)[index].name = "other"

    return change


def narrow(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim.pop()


def whole(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64


def future(model: onnx.ModelProto) -> None:
    model.ir_version = 99


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda d: (d / "vae_decoder/model.onnx").unlink(), "no file .*vae_decoder"),
    "cut short": (cut, "unet/model.onnx is not an ONNX file"),
    "absolute": (elsewhere("/etc/hostname"), "weights in '/etc/hostname'"),
    "above": (elsewhere("../text_encoder/model.onnx"), "is not a file of its folder"),
    "in memory": (elsewhere("*/_ORT_MEM_ADDR_/*"), "is not a file of its folder"),
    "unnamed": (elsewhere(""), "weights in ''"),
    "no weights": (elsewhere("nowhere"), "no file .*nowhere"),
    "link": (link, "is a link out of"),
    "channels": (
        config,
        r"float32\[\?, 4, 16, 16\], but by .* float32\[batch, 9, 16, 16",
    ),
    "unknown input": (
        graph("unet", rename("input", 0)),
        "unexpected input 'other': .* sample, timestep, encoder_hidden_states",
    ),
    "no output": (graph("text_encoder", rename("output", 0)), "no output 'last_hidden_state'"),
    "rank": (graph("vae_decoder", narrow), r"latent_sample is float32\[\?, 4, 16\]"),
    "dtype": (graph("unet", whole), r"sample is int64\["),
    "version": (graph("unet", future), "onnxruntime refuses"),
    "nan": (graph("unet", poison), "NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories(case: str, arranged: Path, copy: Copy, tmp_path: Path) -> None:
    directory = copy(arranged)
    damage, expected = BAD[case]
    damage(directory)
    with pytest.raises(CheckpointError, match=expected) as caught:
        export(str(directory), tmp_path / "taken")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "taken").exists()


# With optimum-onnx itself


@pytest.fixture(scope="module")
def programs() -> Path:
    """The bin/ of an environment with optimum-onnx, created or updated if needed."""
    folder = Path(os.environ.get("LATENTFORGE_OPTIMUM_VENV", HERE.parent / ".venv-optimum"))
    requirements = (HERE / "optimum_onnx" / "requirements.txt").read_text()
    ready = folder / "requirements.txt"
    if not ready.is_file() or ready.read_text() != requirements:
        if not (folder / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "-r",
            HERE / "optimum_onnx" / "requirements.txt",
        ]
        subprocess.run([folder / "bin" / "python", *install], check=True)
        ready.write_text(requirements)
    return folder / "bin"


def called(*command: object) -> str:
    """Run a program of that environment and return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def checkpoints(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Tiny checkpoints that transformers 4 reads too.

    transformers 4 fills weights without this prefix with random numbers; version 5 omits it.
    """
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def checkpoint(name: str) -> Path:
        target = Path(shutil.copytree(tiny(name), folder / name))
        path = target / "text_encoder" / "model.safetensors"
        weights = {
            key if key.startswith("text_model.") else f"text_model.{key}": value
            for key, value in load_file(path).items()
        }
        save_file(weights, path, {"format": "pt"})
        return target

    return checkpoint


@pytest.fixture(scope="module")
def directories(
    programs: Path, checkpoints: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    """Directories by "sd" or "sdxl" and exporter: "optimum", or "latentforge" in its layout."""
    folder = tmp_path_factory.mktemp("directories")

    @cache
    def directory(name: str) -> Path:
        family, _, kind = name.partition(" ")
        checkpoint, target = checkpoints(family), folder / name.replace(" ", "-")
        if kind == "optimum":
            task = ("--task", "text-to-image")
            called(programs / "optimum-cli", "export", "onnx", "-m", checkpoint, *task, target)
        else:
            export(str(checkpoint), target, ExportRequest(layout="optimum"))
        return target

    yield directory


@pytest.fixture
def generate(programs: Path, tmp_path: Path) -> Generate:
    """A function that generates an image with one of optimum's pipelines."""

    def run(kind: str, directory: Path, *more: object) -> Mapping[str, NDArray[Any]]:
        request = ("--prompt", "a red fox", "--steps", 4, "--seed", 5, "--guidance", 6.0)
        script = HERE / "optimum_onnx" / "generate.py"
        called(programs / "python", script, kind, directory, tmp_path / "out", *request, *more)
        return {name: np.load(tmp_path / "out" / f"{name}.npy") for name in ("images", "latents")}

    return run


def check(reference: Mapping[str, NDArray[Any]], result: Result) -> None:
    """Check that images are equal at 8 bits, and not of a single colour."""
    assert np.ptp(reference["images"]) > 0.1
    assert psnr(reference["latents"], result.latents) >= 80
    assert psnr(reference["images"], to_array(result.images), peak=2.0) >= 50


@pytest.mark.optimum
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", CLASSES)
def test_imported_engines_match_optimum(
    family: str, directories: Tiny, generate: Generate, tmp_path: Path
) -> None:
    directory = directories(f"{family} optimum")
    manifest = export(str(directory), tmp_path / "taken")
    assert manifest.components["denoiser"].inputs["timestep"].shape == ()
    check(generate(f"{CLASSES[family]}Pipeline", directory), generated(tmp_path / "taken"))


@pytest.mark.optimum
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [(), ("--io-binding",)])
@pytest.mark.parametrize("family", CLASSES)
def test_engines_in_optimums_pipeline(
    family: str, more: tuple[str, ...], directories: Tiny, generate: Generate
) -> None:
    directory = directories(f"{family} latentforge")
    check(generate(f"{CLASSES[family]}Pipeline", directory, *more), generated(directory))


@pytest.mark.optimum
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["sd latentforge", "sd optimum", "sdxl latentforge"])
def test_image_to_image(name: str, directories: Tiny, generate: Generate, tmp_path: Path) -> None:
    directory = directories(name)
    cells = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    picture = Image.fromarray(cells.repeat(8, axis=0).repeat(8, axis=1))
    picture.save(tmp_path / "picture.png")
    kind = f"{CLASSES[name.split()[0]]}Img2ImgPipeline"
    reference = generate(kind, directory, "--image", tmp_path / "picture.png", "--strength", 0.6)
    if name.endswith("optimum"):
        export(str(directory), tmp_path / "taken")
        directory = tmp_path / "taken"
    check(reference, generated(directory, image=picture, strength=0.6))


@pytest.mark.optimum
@pytest.mark.timeout(1800)
def test_transformers_4_reads_our_tokenizers(programs: Path, texts: Path) -> None:
    prompt = "A photo of two red foxes, at night!"
    for name, entry in Manifest.read(texts).tokenizers.items():
        ours = Tokenizer(texts / entry.file, entry)([prompt])[0].tolist()
        script = HERE / "optimum_onnx" / "tokens.py"
        found = json.loads(called(programs / "python", script, texts / name, prompt))
        assert found == {"CLIPTokenizer": ours, "CLIPTokenizerFast": ours}
