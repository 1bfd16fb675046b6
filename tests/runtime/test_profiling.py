"""Timings by stage, benchmarks of repeated runs, and profiles by layer."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from latentforge.runtime.backends import LayerTime
from latentforge.runtime.engine import Engine
from latentforge.runtime.manifest import Component
from latentforge.runtime.profiling import Benchmark, Profile
from latentforge.runtime.tensor import Feeds
from latentforge.runtime.timings import Stopwatch, Timings


def test_a_stopwatch_does_not_count_pauses() -> None:
    watch, start = Stopwatch(), time.perf_counter()
    with watch.running(), watch.stage("denoiser"):
        pass
    pause = time.perf_counter()
    time.sleep(0.05)
    pause = time.perf_counter() - pause
    with watch.running(), watch.stage("denoiser"):
        time.sleep(0.01)
    whole, timings = time.perf_counter() - start, watch.timings()
    assert len(timings.stages["denoiser"]) == 2
    assert 0.01 <= sum(timings.stages["denoiser"]) <= timings.total <= whole - pause


def test_time_outside_of_engines_is_the_samplers() -> None:
    timings = Timings({"text_encoder": (0.5,), "denoiser": (1.0, 4.0, 2.0)}, 8.0)
    assert timings.seconds == {"text_encoder": 0.5, "denoiser": 7.0, "sampler": 0.5}
    assert timings.step == 2.0
    assert str(timings) == "8.000 s (text_encoder 0.500, denoiser 7.000, sampler 0.500)"


def test_a_benchmark_does_not_count_its_first_run() -> None:
    totals = iter([9.0, 1.0, 3.0, 2.0])

    def run() -> Timings:
        total = next(totals)
        return Timings({"denoiser": (total / 2,)}, total)

    result = Benchmark.measure(run, batch_size=4, repetitions=3, versions={"onnxruntime": "1.0"})
    assert next(totals, None) is None
    assert result.first_inf_time == 9000 and result.batch_inf_time == 2000
    assert result.sample_inf_time == 500 and result.throughput == 2
    assert result.batch_inf_time_variance == pytest.approx(2e6 / 3)
    assert result.stages == {
        "denoiser": 1000, "sampler": 1000, "denoiser step": 1000, "total": 2000
    }  # fmt: skip
    assert (result.framework_type, result.framework_version) == ("onnxruntime", "1.0")


class Profiled:
    """Session with recorded layer times."""

    def __init__(self, *layers: LayerTime) -> None:
        self._layers = list(layers)

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        raise AssertionError("a profile runs nothing")

    def layers(self) -> list[LayerTime]:
        return self._layers

    def close(self) -> None:
        pass


def test_a_profile_sorts_the_layers_of_all_engines() -> None:
    part = Component(
        file="m.onnx",
        sha256="0" * 64,
        bytes=0,
        backend="null",
        precision="fp32",
        inputs={},
        outputs={},
    )
    sessions = {
        "denoiser": Profiled(LayerTime("a", "Conv", 1.0), LayerTime("b", "MatMul", 3.0)),
        "vae_decoder": Profiled(LayerTime("a", "Conv", 2.0)),
    }
    profile = Profile.of({name: Engine(name, part, session) for name, session in sessions.items()})
    assert [layer.name for layer in profile.layers] == ["denoiser/b", "vae_decoder/a", "denoiser/a"]
    assert profile.total == 6.0
    top = profile.top(1)
    assert len(top.layers) == 1 and "50.0%" in str(top) and "vae_decoder" not in str(top)
