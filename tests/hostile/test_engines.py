"""Damaged engine directories are refused in one line, or do what their manifest says."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from conftest import TEXT_ENCODER, Handmade
from watched import failures, watched

pytest.importorskip("onnx")
from hostile_engines import DECODER, DENOISER, Case, external_weights

from latentforge.commands.describe import describe
from latentforge.runtime import generation
from latentforge.runtime.compile.rebuild import rebuild_hint
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.files import MANIFEST_FILE
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import FileEntry, Manifest

FEW = range(400)
FULL = range(10_000)
ONNX = {"text_encoder": TEXT_ENCODER, "denoiser": DENOISER, "vae_decoder": DECODER}


def compiled(source: Path, target: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "latentforge", "compile", str(source), str(target), *options]
    subprocess.run(command, check=True, capture_output=True)
    return target


def optimized(source: Path, target: Path) -> Path:
    """Optimize for the CPU's own kernels, without timing."""
    command = [sys.executable, "-m", "latentforge", "optimize", str(source), str(target)]
    subprocess.run([*command, "--repeats", "0"], check=True, capture_output=True)
    return target


def with_external_weights(engines: Path) -> Path:
    path = engines / "denoiser.onnx"
    external_weights(path)
    content = msgspec.json.decode((engines / MANIFEST_FILE).read_bytes())
    entry = content["components"]["denoiser"]
    entry |= msgspec.to_builtins(FileEntry.of(path, engines))
    data = engines / "denoiser.onnx.data"
    entry["data"] = [msgspec.to_builtins(FileEntry.of(data, engines))]
    (engines / MANIFEST_FILE).write_bytes(msgspec.json.encode(content))
    return engines


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def differing(directory: Path, manifest: Manifest) -> list[str]:
    """Return the files whose hash is not that of the manifest."""
    return [
        entry.file
        for entry in manifest.files
        if hashlib.sha256((directory / entry.file).read_bytes()).hexdigest() != entry.sha256
    ]


def check(bases: Sequence[Path], place: Path, indices: Iterable[int]) -> Counter[str]:
    """Run cases, and return how many ended in each way."""
    place.mkdir()
    outside = place / "outside"
    outside.mkdir()
    (outside / "diary").write_text("mine")
    originals = [digests(base) for base in bases]

    def run(index: int) -> None:
        directory = place / "case"
        shutil.rmtree(directory, ignore_errors=True)
        Case(index, bases).make(directory)
        os.chdir(outside)
        use(directory)

    def name(index: int) -> str:
        directory = place / "named"
        shutil.rmtree(directory, ignore_errors=True)
        return Case(index, bases).make(directory)

    outcomes = list(watched(run, list(indices)))
    ends = Counter(outcome.end for outcome in outcomes)
    print(dict(ends), max(outcome.seconds for outcome in outcomes))
    failed = failures(outcomes, name)
    assert not failed, "\n".join(failed)
    shutil.rmtree(place / "case")
    shutil.rmtree(place / "named", ignore_errors=True)
    assert digests(place) == {"outside/diary": hashlib.sha256(b"mine").hexdigest()}
    assert [digests(base) for base in bases] == originals
    return ends


def use(directory: Path) -> None:
    """Load a directory, describe it and draw a picture; it has to be what its manifest says."""
    with load(directory) as pipeline:
        manifest = pipeline.manifest
        assert not differing(directory, manifest)
        assert describe(manifest).replace("\n", "").isprintable()
        rebuild_hint(manifest, directory)
        steps = {"steps": min(2, manifest.schedule.train_steps), "unaccelerated": True}
        result = pipeline("a red apple", height=32, width=48, seed=0, **steps)
        assert [image.size for image in result.images] == [(48, 32)]


@pytest.fixture
def bases(handmade: Handmade) -> list[Path]:
    return [
        handmade("null"),
        handmade("graphs", onnx=ONNX),
        with_external_weights(handmade("external", onnx=ONNX)),
    ]


def test_the_good_directories_work(bases: list[Path]) -> None:
    for base in bases:
        use(base)


def test_damaged_engines(bases: list[Path], tmp_path: Path) -> None:
    ends = check(bases, tmp_path / "cases", FEW)
    assert ends["refused"] > len(FEW) / 2 and ends["works"] > len(FEW) / 20


def test_outputs_of_other_shapes(handmade: Handmade) -> None:
    for index, (size, shape) in enumerate([(0, 1), (2, "batch"), (1, 3)]):
        directory = handmade(f"case-{index}")
        content = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes())
        content["components"]["denoiser"]["outputs"]["out_sample"]["shape"][size] = shape
        (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(content))
        with load(directory) as pipeline, pytest.raises(BackendError, match="has the shape"):
            pipeline("a red apple")


def test_arithmetic_of_a_sampler_is_refused(
    handmade: Handmade, monkeypatch: pytest.MonkeyPatch
) -> None:
    def divided(*_: object) -> Iterator[float]:
        yield 1 / 0

    monkeypatch.setattr(generation, "_sample", divided)
    with load(handmade()) as pipeline, pytest.raises(SettingsError, match="another sampler"):
        pipeline("a red apple")


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_all_damaged_engines(bases: list[Path], small_engines: Path, tmp_path: Path) -> None:
    graphs = bases[1]
    more = [
        compiled(graphs, tmp_path / "optimized", "--backend", "onnxruntime"),
        compiled(graphs, tmp_path / "openvino", "--backend", "openvino"),
        small_engines,
        optimized(small_engines, tmp_path / "native"),
    ]
    ends = check([*bases, *more], tmp_path / "cases", FULL)
    assert ends["refused"] > len(FULL) / 2
