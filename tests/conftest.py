"""Engine directories for tests: handmade, from a tiny checkpoint, and from the demo."""

import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing

from latentforge.runtime.files import hash_file
from latentforge.runtime.manifest import (
    Component,
    Conditioning,
    FileEntry,
    Latent,
    Manifest,
    RequestDefaults,
    TextEncoding,
    TokenizerEntry,
    WeightSource,
)
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.tensor import TensorSpec

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
os.environ["LATENTFORGE_CACHE"] = "off"  # nor write to the user's cache
os.environ["LATENTFORGE_THREADS"] = "1"  # a core for each of the processes that share the tests
os.environ["SYMPY_CACHE_SIZE"] = "100000"  # a tenth of an export's time, with free dimensions

Copy = Callable[[Path], Path]
Handmade = Callable[..., Path]

TOKENS, WIDTH = 8, 2
LATENT = TensorSpec("float32", ("batch", 4, "latent_height", "latent_width"))
PIXELS = TensorSpec("float32", ("batch", 3, "latent_height*8", "latent_width*8"))
TEXT = TensorSpec("float32", ("batch", TOKENS, WIDTH))
SIGNATURES = {
    "text_encoder": (
        {"input_ids": TensorSpec("int64", ("batch", TOKENS))},
        {"last_hidden_state": TEXT},
    ),
    "denoiser": (
        {
            "sample": LATENT,
            "timestep": TensorSpec("float32", (1,)),
            "encoder_hidden_states": TEXT,
        },
        {"out_sample": LATENT},
    ),
    "vae_decoder": ({"latent_sample": LATENT}, {"sample": PIXELS}),
    "vae_encoder": (
        {"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
        {"latent_parameters": TensorSpec("float32", ("batch", 8, "height//8", "width//8"))},
    ),
}
SCHEDULE = Schedule(
    beta_kind="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    spacing="leading",
    offset=1,
    zero_terminal_snr=False,
    final_alpha_one=False,
    options=SolverOptions(clip_sample=False),
)
# Each token id t becomes (t/20, t/20), so that the mean of an embedding identifies its prompt.
TEXT_ENCODER = """<ir_version: 9, opset_import: ["" : 17]>
m (int64[batch, 8] input_ids) => (float[batch, 8, 2] last_hidden_state)
<float scale = {0.05}, int64[1] axis = {2}>
{
  ids = Cast<to = 1>(input_ids)
  small = Mul(ids, scale)
  column = Unsqueeze(small, axis)
  last_hidden_state = Concat<axis = 2>(column, column)
}"""
TEXT_TO_IMAGE = ("text_encoder", "denoiser", "vae_decoder")


FIRST = (
    *("test_build.py", "test_docs.py", "test_families.py", "test_search.py", "test_cli.py"),
    *("test_optimize.py", "test_page.py", "test_engines.py", "test_export.py", "test_trainer.py"),
    *("test_scheduler_files.py", "test_cached_step.py", "test_compiler.py", "test_packaging.py"),
    *("test_surgery.py", "test_optimum.py", "test_distill.py", "test_partition.py"),
    *("test_student.py", "test_against_diffusers.py", "test_processes.py"),
)
"""The first two make the engines that others share; then come the longest, so that the processes
end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with files that several processes would otherwise wait for, at the start or end."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """Let Python search for garbage rarely, oldest objects above all: what was imported is much."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 100)
    if "latentforge.export.onnx" in sys.modules:
        _read_operators_once()


def _read_operators_once() -> None:
    """Let torch keep its table of ONNX operators, which it makes anew for each graph: a tenth."""
    with suppress(ImportError, AttributeError):  # another version of torch
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))


@pytest.fixture
def handmade(tmp_path: Path) -> Handmade:
    """A function that writes a valid engine directory, without torch and in milliseconds.

    It has the components that text to image needs, and those passed as ONNX text by name.
    Components without ONNX text use the null backend. `inputs` replaces inputs of the denoiser.
    """

    return partial(handmade_engines, tmp_path)


@pytest.fixture(scope="session")
def null_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handmade engine directory that no test changes."""
    return handmade_engines(tmp_path_factory.mktemp("null"))


def handmade_engines(
    folder: Path,
    name: str = "handmade",
    *,
    onnx: dict[str, str] | None = None,
    inputs: dict[str, TensorSpec] | None = None,
    **changes: Any,
) -> Path:
    """Write a valid engine directory into a folder: see handmade()."""
    directory = folder / name
    directory.mkdir()
    components = {
        part: _component(directory, part, (onnx or {}).get(part))
        for part in SIGNATURES
        if part in TEXT_TO_IMAGE or part in (onnx or {})
    }
    unet = components["denoiser"]
    components["denoiser"] = msgspec.structs.replace(unet, inputs={**unet.inputs, **(inputs or {})})
    manifest = {
        "name": name,
        "family": "stable_diffusion",
        "source": WeightSource(checkpoint="none", sha256={}),
        "prediction": "epsilon",
        "latent": Latent(channels=4, scaling_factor=0.5, downscale=8, multiple=2),
        "conditioning": Conditioning(
            encoders=(TextEncoding(component="text_encoder", tokenizer="tokenizer"),)
        ),
        "schedule": SCHEDULE,
        "defaults": RequestDefaults(
            sampler="ddim",
            steps=4,
            guidance_scale=7.5,
            guidance_rescale=0.0,
            height=32,
            width=48,
        ),
        "tokenizers": {"tokenizer": _tokenizer(directory)},
        "components": components,
    }
    Manifest(**{**manifest, **changes}).write(directory)
    return directory


def _component(directory: Path, name: str, onnx: str | None) -> Component:
    path = directory / f"{name}.onnx"
    if onnx is None:
        path.write_bytes(name.encode())
    else:
        import onnx_ir as ir

        ir.save(ir.from_onnx_text(onnx), path)
    inputs, outputs = SIGNATURES[name]
    return Component(
        **_entry(directory, path),
        backend="null" if onnx is None else "onnxruntime",
        precision="fp32",
        inputs=inputs,
        outputs=outputs,
    )


def _tokenizer(directory: Path) -> TokenizerEntry:
    words = {word: index for index, word in enumerate(["?", "<s>", "</s>", "a", "red", "apple"])}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.enable_padding(length=TOKENS, pad_id=2, pad_token="</s>")
    path = directory / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return TokenizerEntry(**_entry(directory, path), max_length=TOKENS)


def _entry(directory: Path, path: Path) -> dict[str, Any]:
    file = path.relative_to(directory).as_posix()
    entry = FileEntry(file=file, sha256=hash_file(path), bytes=path.stat().st_size)
    return {key: getattr(entry, key) for key in entry.__struct_fields__}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion checkpoint with random weights: 32 x 32 pixels from 16 x 16 latents."""
    return _shared(tmp_path_factory, "checkpoint/tiny", lambda path: _written("sd", path))


def _written(name: str, path: Path) -> Path:
    """Write the tiny checkpoint of a family, see tiny.py."""
    pytest.importorskip("diffusers", exc_type=ImportError)
    from checkpoints import write
    from tiny import TINY

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(TINY[name], path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the tiny checkpoint of a family, written once."""

    def checkpoint(name: str) -> Path:
        place = f"checkpoints/{name}"
        return _shared(tmp_path_factory, place, lambda path: _written(name, path))

    return checkpoint


@pytest.fixture(scope="session")
def tiny_engines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the tiny checkpoint, with all dimensions free. Copy them before changing them."""
    from latentforge.export.stage import export

    checkpoint = str(tiny_checkpoint)
    return _shared(tmp_path_factory, "engines/tiny", lambda path: export(checkpoint, path))


@pytest.fixture(scope="session")
def tiny_denoiser(
    tiny: Callable[[str], Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A function that returns engines of a family's denoiser, with all dimensions free.

    Each is exported once for all tests. Copy them before changing them.
    """
    pytest.importorskip("diffusers", exc_type=ImportError)
    from latentforge.export.stage import ExportRequest, export

    part = ExportRequest(components=("denoiser",))

    def engines(name: str) -> Path:
        if name == "sd":
            return Path(request.getfixturevalue("tiny_engines"))
        place = f"denoiser-{name}/{name}"  # a folder, and so a lock, for each
        return _shared(tmp_path_factory, place, lambda path: export(str(tiny(name)), path, part))

    return engines


@pytest.fixture(scope="session")
def small_engines(
    tiny_engines: Path,
    tiny_denoiser: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Tiny engines with the denoiser of bk-sdm, which has the fewest layers and variants."""
    return _shared(
        tmp_path_factory, "small/small", lambda path: _joined(tiny_engines, tiny_denoiser, path)
    )


def _joined(engines: Path, denoiser: Callable[[str], Path], path: Path) -> None:
    """Copy engines, and replace their denoiser by that of bk-sdm."""
    partial = Path(shutil.copytree(engines, path.with_name("partial")))
    shutil.copy(denoiser("bk-sdm") / "denoiser.onnx", partial)
    manifest, other = Manifest.read(engines), Manifest.read(denoiser("bk-sdm"))
    components = {**manifest.components, "denoiser": other.components["denoiser"]}
    msgspec.structs.replace(manifest, components=components).write(partial)
    partial.rename(path)


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the demo checkpoint. They take a minute: for tests that need real images."""
    pytest.importorskip("diffusers", exc_type=ImportError)
    from latentforge.export.stage import export

    return _shared(tmp_path_factory, "demo/demo", lambda path: export("demo", path))


@pytest.fixture
def quick_demo(demo_engines: Path, tmp_path: Path) -> Path:
    """A copy of the demo's engines with a default of six steps, for what any image serves."""
    directory = Path(shutil.copytree(demo_engines, tmp_path / "engines"))
    manifest = Manifest.read(directory)
    defaults = msgspec.structs.replace(manifest.defaults, steps=6)
    msgspec.structs.replace(manifest, defaults=defaults).write(directory)
    return directory


def _shared(factory: pytest.TempPathFactory, place: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that is made once, also if several processes share the tests."""
    from filelock import FileLock

    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / place
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.parent.with_suffix(".lock")):
        if not path.exists():
            make(path)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A function that copies a directory to a new place, where a test may damage it."""

    def copied(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / f"copy-{directory.name}"))

    return copied
