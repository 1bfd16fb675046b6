"""Recordings kept for later runs: found again, checked, bounded, and never a reason to fail."""

import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Handmade

from latentforge.optimize import references
from latentforge.optimize.recording import (
    CallRecording,
    RecordingRequest,
    read_recording,
    record,
    sample_evenly,
)
from latentforge.optimize.references import recorded
from latentforge.runtime.cache import cache_folder
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress

DENOISER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample)
{
  mean = ReduceMean<keepdims = 0>(encoder_hidden_states)
  scaled = Mul(sample, mean)
  out_sample = Add(scaled, timestep)
}"""
REQUEST = RecordingRequest(prompts=("a", "red apple"), settings={"steps": 3})

Run = Callable[..., CallRecording]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def engines(handmade: Handmade) -> Path:
    return handmade(onnx={"denoiser": DENOISER})


@pytest.fixture
def run(engines: Path, tmp_path: Path) -> Run:
    """Function that records, or finds, a request."""

    def recording(request: RecordingRequest = REQUEST, source: Path = engines) -> CallRecording:
        folder = tmp_path / f"scratch-{time.monotonic_ns()}"
        with Progress(1) as progress:
            return recorded(source, request, folder, progress, "reference")

    return recording


def equal(one: CallRecording, other: CallRecording) -> bool:
    """Return True if images, latents, settings and calls are the same."""
    for a, b in zip(one.results, other.results, strict=True):
        pixels = (np.asarray(image) for result in (a, b) for image in result.images)
        if a.settings != b.settings or not np.array_equal(*pixels):
            return False
        if not np.array_equal(a.latents, b.latents):
            return False
    return one.calls.keys() == other.calls.keys() and all(
        np.array_equal(x.feeds[key], y.feeds[key])
        for name in one.calls
        for x, y in zip(one.calls[name], other.calls[name], strict=True)
        for key in x.feeds
    )


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def test_a_second_run_draws_nothing(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(references, "record", None)  # calling it would raise
    assert equal(run(), first) and len(entries(cache)) == 1
    assert oct(cache.stat().st_mode)[-3:] == "700"


def test_whatever_changes_the_images_is_another_entry(run: Run, cache: Path, engines: Path) -> None:
    run()
    run(msgspec.structs.replace(REQUEST, prompts=("a", "apple")))
    run(msgspec.structs.replace(REQUEST, settings={"steps": 4}))
    run(msgspec.structs.replace(REQUEST, calls=2))
    manifest = Manifest.read(engines)
    defaults = msgspec.structs.replace(manifest.defaults, guidance_scale=3.0)
    msgspec.structs.replace(manifest, defaults=defaults).write(engines)
    run()
    assert len(entries(cache)) == 5


def test_another_history_is_the_same_entry(run: Run, cache: Path, engines: Path) -> None:
    run()
    manifest = Manifest.read(engines)
    msgspec.structs.replace(manifest, quality={"image": {"psnr": 1.0}}).write(engines)
    run()
    assert len(entries(cache)) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "pickle": lambda path: path.write_bytes(pickle.dumps([1])),
    "directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_recorded_again(damage: str, run: Run, cache: Path) -> None:
    first = run()
    (entry,) = entries(cache)
    for name in ("index", next(entry.glob("*.npy")).name):
        DAMAGE[damage](entry / name)
        assert equal(run(), first)
        assert equal(read_recording(entry, check=True), first)  # mended


def test_the_cache_is_bounded(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    (first,) = entries(cache)
    size = sum(path.stat().st_size for path in first.iterdir())
    leftover = cache / ".partial-dead"
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    os.utime(first, (1, 1))
    monkeypatch.setattr(references, "MAX_BYTES", int(1.5 * size))
    run(msgspec.structs.replace(REQUEST, prompts=("a", "apple")))
    assert len(entries(cache)) == 1 and not first.exists() and not leftover.exists()
    monkeypatch.setattr(references, "MAX_BYTES", 10)
    run(msgspec.structs.replace(REQUEST, prompts=("apple", "a")))
    assert len(entries(cache)) == 1


def test_a_cache_that_cannot_be_written(run: Run, cache: Path) -> None:
    cache.parent.write_text("a file in its place")
    assert run().results and run().results


@pytest.mark.parametrize("value", ["", "off"])
def test_no_cache(value: str, run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTFORGE_CACHE", value)
    assert cache_folder() is None and run().results and not cache.exists()


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/latentforge")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid by the specification
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/latentforge")


def test_concurrent_runs_share_an_entry(run: Run, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: run(), range(4)))
    assert all(equal(each, made[0]) for each in made) and len(entries(cache)) == 1


def test_calls_are_evenly_spaced_over_all(engines: Path, tmp_path: Path) -> None:
    made = []
    for count in (100, 3):
        (folder := tmp_path / str(count)).mkdir()
        request = msgspec.structs.replace(REQUEST, calls=count, components=("denoiser",))
        with Progress(1) as progress:
            made.append(record(engines, request, folder, progress, ""))
    every, few = (recording.feeds("denoiser") for recording in made)
    assert len(every) == 6 and len(few) == 3 and made[0].calls.keys() == {"denoiser"}
    for one, other in zip(sample_evenly(every, 3), few, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
    counts = [len(list((tmp_path / name).glob("*.npy"))) for name in ("100", "3")]
    assert counts[1] < counts[0]  # the other arrays are deleted


def test_settings_of_a_run_are_checked(run: Run, cache: Path) -> None:
    with pytest.raises(SettingsError, match="stps"):
        run(msgspec.structs.replace(REQUEST, settings={"stps": 4}))
    assert entries(cache) == []
