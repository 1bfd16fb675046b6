"""Devices and precisions of participants in torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentforge.benchmark import BenchRequest, benchmark
from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.reference.devices import DeviceClock, placed, single_precision_noise
from latentforge.export.reference.eager import EagerPipeline
from latentforge.measure.bench.placement import Placement
from latentforge.measure.peers import participant
from latentforge.runtime.errors import DeviceError, SettingsError
from latentforge.runtime.image import psnr
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import resolve
from latentforge.runtime.timings import Stopwatch

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("eager", "cuda:fp16"),
        ("eager@cpu", "cpu:fp16"),
        ("eager@:bf16", "cuda:bf16"),
        ("compile@cpu:fp32", "cpu:fp32"),
        ("sd-cpp", "cpu:fp32"),
    ],
)
def test_what_a_name_leaves_out_is_the_engines_own(text: str, expected: str) -> None:
    made = participant(text, Path("."), default=Placement("cuda", "fp16"))
    assert (made.name, str(made.placement)) == (text, expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("eager@gpu:fp16", "no device 'gpu' in 'gpu:fp16'.*cpu, cuda"),
        ("eager@cuda:half", "no precision 'half'.*fp32, fp16, bf16"),
        ("eager@", "expected DEVICE:PRECISION"),
        ("eager@cpu:", "expected DEVICE:PRECISION"),
        ("eager@cpu:fp16:fp32", "no precision 'fp16:fp32'"),
        ("sd-cpp@cuda:fp16", "sd-cpp takes no device and precision; eager, compile do"),
        ("egaer@cuda", "no peer 'egaer': did you mean 'eager'"),
    ],
)
def test_wrong_placements_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        participant(text, Path("."))


@pytest.mark.parametrize(
    "backend, precision, expected",
    [
        ("onnxruntime", "fp32", "cpu:fp32"),
        ("openvino", "bf16", "cpu:bf16"),
        ("onnxruntime", "int8", "cpu:fp32"),
        ("onnxruntime-cuda", "fp16", "cuda:fp16"),
        ("tensorrt", "int8", "cuda:fp16"),
    ],
)
def test_placement_of_engines(
    tiny_engines: Path, backend: str, precision: str, expected: str
) -> None:
    manifest = Manifest.read(tiny_engines, hashes=False)
    parts = {**manifest.components}
    changed = msgspec_replace(parts["denoiser"], backend=backend, precision=precision)
    parts["denoiser"] = changed
    assert str(Placement.of(msgspec_replace(manifest, components=parts))) == expected


def msgspec_replace(record: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(record, **changes)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_eager_computes_in_the_precision_it_names(
    tiny_checkpoint: Path, tiny_engines: Path, precision: str, dtype: torch.dtype
) -> None:
    """The UNet gets and returns it, and its image is that of float32, only less exact."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    settings = resolve(
        Manifest.read(tiny_engines).defaults, "a cat", {"seed": 3, "steps": 2, "sampler": "ddim"}
    )
    exact = EagerPipeline(checkpoint)(settings)
    rough = EagerPipeline(checkpoint, placement=Placement("cpu", precision))
    seen: list[torch.dtype] = []
    unet = rough._parts["unet"]
    unet.register_forward_hook(lambda _, given, made: seen.extend([given[0].dtype, made[0].dtype]))
    result = rough(settings)
    assert set(seen) == {dtype} and rough.bytes == EagerPipeline(checkpoint).bytes / 2
    difference = psnr(
        np.asarray(exact.images[0], float), np.asarray(result.images[0], float), peak=255
    )
    assert 20 < difference < 100
    assert len(result.timings.stages["denoiser"]) == 2


def test_compiled_on_a_gpu_the_image_is_the_same_and_each_step_is_timed(
    tiny_checkpoint: Path, tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With functions that stand for torch's code, which write all outputs to the same memory."""
    settings = resolve(
        Manifest.read(tiny_engines).defaults, "a cat", {"seed": 3, "steps": 2, "sampler": "ddim"}
    )
    pipeline = EagerPipeline(open_checkpoint(tiny_checkpoint))
    expected = pipeline(settings)
    modes: list[str] = []
    memory: dict[Any, torch.Tensor] = {}

    def compiled(function: Any, mode: str = "default") -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            made = function(*args, **kwargs)
            if not isinstance(made, tuple):
                return made
            return (memory.setdefault(function, torch.empty_like(made[0])).copy_(made[0]),)

        modes.append(mode)
        return run

    monkeypatch.setattr(torch, "compile", compiled)
    pipeline._clock.is_gpu = True
    pipeline.compile()
    pipeline._clock.is_gpu = False
    for _ in range(2):
        result = pipeline(settings)
        np.testing.assert_array_equal(result.latents, expected.latents)
        assert len(result.timings.stages["denoiser"]) == 2
    assert modes == ["default", "max-autotune", "max-autotune"]


def test_half_precision_shares_the_noise_of_single_precision() -> None:
    expected = torch.randn(100, generator=torch.Generator().manual_seed(1))
    with single_precision_noise():
        seeded = torch.Generator().manual_seed(1)
        made = torch.randn(100, generator=seeded, dtype=torch.float16)
        assert torch.randn(2, dtype=torch.float64).dtype == torch.float64
    assert made.dtype == torch.float16 and torch.equal(made, expected.half())
    own = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float16)
    assert not torch.equal(own, made)


class _Event:
    """CUDA event by the order of records: each is a millisecond after the one before."""

    count = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.count += 1
        self.at = _Event.count

    def elapsed_time(self, end: "_Event") -> float:
        return float(end.at - self.at)


def test_gpu_calls_are_timed_by_events_after_synchronising(monkeypatch: Any) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(_Event.count))
    clock, watch = DeviceClock("cuda"), Stopwatch()
    step = clock.timed(lambda value: value + 1, watch, "denoiser")
    assert [step(1), step(2)] == [2, 3] and not watch.timings().stages
    clock.finish(watch)
    assert waited == [4] and watch.timings().stages == {"denoiser": (0.001, 0.001)}
    clock.finish(watch)
    assert len(watch.timings().stages["denoiser"]) == 2


@NO_GPU
def test_a_missing_gpu_is_refused_by_name_before_anything_starts(
    tiny_engines: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "latentforge", "bench", tiny_engines, "--repeats", "1"]
    done = subprocess.run(
        [*map(str, command), "--against", "eager@cuda:fp16"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "eager@cuda:fp16: torch finds no CUDA GPU here" in lines[0]
    assert "eager@cpu:fp32" in lines[0]
    with pytest.raises(DeviceError, match="cuda:fp16.*finds no CUDA GPU"):
        placed(torch.nn.Linear(1, 1), Placement("cuda", "fp16"))


def test_the_probe_imports_nothing_from_the_working_directory(
    tiny_engines: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from latentforge import benchmark as module

    (tmp_path / "torch.py").write_text("open('hijacked', 'w')")
    monkeypatch.chdir(tmp_path)
    peer = participant("eager@cuda:fp16", tiny_engines)
    if torch.cuda.is_available():
        module._require_device(peer)
    else:
        with pytest.raises(DeviceError):
            module._require_device(peer)
    assert not (tmp_path / "hijacked").exists()


@pytest.mark.thorough
def test_bench_says_what_each_participant_runs_on(tiny_engines: Path) -> None:
    against = ["eager", "eager@cpu:bf16"]
    request = BenchRequest(
        engines=[tiny_engines], against=against, settings={"steps": 1}, repeats=1
    )
    from latentforge.measure.bench.summary import summary

    results = benchmark(request)
    by_name = {entry.name: entry for entry in results.entries}
    assert [e.status for e in results.entries] == ["ok"] * 3, summary(results)
    assert by_name["eager"].placement == "cpu fp32"
    assert by_name["eager@cpu:bf16"].placement == "cpu bf16"
    assert by_name["eager@cpu:bf16"].psnr is not None and by_name["eager@cpu:bf16"].psnr < 100
    table = summary(results)
    assert "runs on" in table and "cpu bf16" in table and "eager@cpu:bf16" in table
