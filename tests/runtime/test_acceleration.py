"""Acceleration at run time: plans, guidance intervals, cached steps and timesteps.

The engines are so simple that the result is known in closed form.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import TEXT_ENCODER, Handmade
from numpy.typing import NDArray

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx_ir as ir

from latentforge.__main__ import main
from latentforge.commands.describe import describe
from latentforge.runtime.acceleration import AccelerationPlan, StepPolicy, resolve_acceleration
from latentforge.runtime.backends.ort import ort_session
from latentforge.runtime.backends.ort.device_memory import OrtArray, Place
from latentforge.runtime.backends.ort.device_session import DeviceSession
from latentforge.runtime.backends.session import Session
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Component, FileEntry, Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.resolved_request import ResolvedRequest
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling import SAMPLERS, noise_plan
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.sampling.schedule import Schedule, Spacing
from latentforge.runtime.tensor import Feeds, TensorSpec

Array = NDArray[np.floating]

# With m the mean of the embedding, the cached feature is the sample times m - 1. The output adds
# the
# sample times m times a share, which is all that a cached step computes.
UNET = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample, float[batch, 4, h, w] cached_feature)
<float one = {1}, float share = {SHARE}, int64[3] axes = {1, 2, 3}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states)
  column = Unsqueeze(mean, axes)
  shifted = Sub(column, one)
  cached_feature = Mul(sample, shifted)
  factor = Mul(column, share)
  near = Mul(sample, factor)
  out_sample = Add(cached_feature, near)
}"""

CACHED = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[batch, 8, 2] encoder_hidden_states,
   float[batch, 4, h, w] cached_feature) => (float[batch, 4, h, w] out_sample)
<float share = {0.25}, int64[3] axes = {1, 2, 3}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states)
  column = Unsqueeze(mean, axes)
  factor = Mul(column, share)
  near = Mul(sample, factor)
  out_sample = Add(cached_feature, near)
}"""

SHARE, REDUCED_SHARE = 0.25, 0.5
NETWORKS = {"text_encoder": TEXT_ENCODER, "denoiser": UNET.replace("SHARE", str(SHARE))}
APPLE, A, EMPTY = [1, 3, 4, 5, 2, 2, 2, 2], [1, 3, 2, 2, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2, 2]
FEATURE = TensorSpec("float32", ("batch", 4, "latent_height", "latent_width"))
PLAN = AccelerationPlan(
    sampler="euler",
    steps=4,
    timesteps=(900, 600.5, 300, 20),
    guidance_interval=(0.4, 0.95),
    cached_steps=(1, 3),
)


def store(directory: Path, name: str, text: str) -> dict[str, Any]:
    """Write a graph of ONNX text, and return its file entry for the manifest."""
    path = directory / f"{name}.onnx"
    ir.save(ir.from_onnx_text(text), path)
    return msgspec.structs.asdict(FileEntry.of(path, directory))


def changed(directory: Path, components: Mapping[str, Component], **changes: Any) -> Path:
    manifest = Manifest.read(directory)
    complete = {**manifest.components, **components}
    msgspec.structs.replace(manifest, components=complete, **changes).write(directory)
    return directory


@pytest.fixture
def cut(handmade: Handmade) -> Callable[..., Path]:
    """Return a function that writes engines of the networks above, with or without a plan."""

    def write(
        name: str = "cut", acceleration: AccelerationPlan | None = None, **options: Any
    ) -> Path:
        directory = handmade(name, onnx=NETWORKS, **options)
        unet = Manifest.read(directory).components["denoiser"]
        outputs = {**unet.outputs, "cached_feature": FEATURE}
        reduced = UNET.replace("SHARE", str(REDUCED_SHARE))
        kept = {name: unet.inputs[name] for name in ("sample", "encoder_hidden_states")}
        parts = {
            "denoiser": msgspec.structs.replace(unet, outputs=outputs),
            "denoiser_reduced": msgspec.structs.replace(
                unet, outputs=outputs, **store(directory, "denoiser_reduced", reduced)
            ),
            "denoiser_cached": msgspec.structs.replace(
                unet,
                inputs={**kept, "cached_feature": FEATURE},
                **store(directory, "denoiser_cached", CACHED),
            ),
        }
        return changed(directory, parts, acceleration=acceleration)

    return write


@pytest.fixture
def pipe(cut: Callable[..., Path]) -> Pipeline:
    """A pipeline of the networks above, without a plan."""
    return load(cut(), threads=1)


def mean(ids: list[int]) -> float:
    """Return the mean of the embedding of a prompt of these tokens."""
    return float(np.mean(ids)) / 20


def noise(seed: int, count: int = 1) -> Array:
    return np.asarray(Generator(seed).randn((count, 4, 4, 6)), np.float64)


def by_hand(
    plan: NoisePlan,
    x: Array,
    positive: Sequence[float],
    *,
    negative: float = mean(EMPTY),
    scale: float = 7.5,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0, 1),
    cached_steps: Iterable[int] = (),
    share: float = SHARE,
) -> Array:
    """Compute first order steps of the networks above in float64, one row per prompt."""
    means = np.array([negative] * len(positive) + list(positive)).reshape(-1, 1, 1, 1)
    feature: Array | None = None
    for index, (start, end) in enumerate(plan.intervals):
        guided = interval[0] <= start.sigma <= interval[1]
        rows = np.concatenate([x, x]) if guided else x
        if index not in cached_steps or feature is None or len(feature) < len(rows):
            feature, near = rows * (means[-len(rows) :] - 1), share
        else:
            near = SHARE
        output = feature[-len(rows) :] + near * means[-len(rows) :] * rows
        if guided:
            low, high = np.split(output, 2)
            output = low + scale * (high - low)
            spread = high.std(axis=(1, 2, 3)) / output.std(axis=(1, 2, 3))
            output = output * (rescale * spread.reshape(-1, 1, 1, 1) + 1 - rescale)
        x = end.alpha * (x - start.sigma * output) / start.alpha + end.sigma * output
    return x


def close(result: Result, expected: Array) -> None:
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-4)


def watched(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that fills with the name and the rows of every run of a step engine."""
    runs: list[tuple[str, int]] = []
    for name in ("denoiser", "denoiser_cached", "denoiser_reduced"):
        session = pipe.load_engine(name).session

        def run(feeds: Feeds, name: str = name, original: Any = session.run) -> Any:
            runs.append((name, len(feeds["sample"])))
            return original(feeds)

        monkeypatch.setattr(session, "run", run)
    return runs


def ddim(pipe: Pipeline, steps: int) -> NoisePlan:
    return SAMPLERS["ddim"].plan(pipe.manifest.schedule, steps)


# Guidance interval


@pytest.mark.parametrize("interval", [(0, 1), (0.5, 0.9), (0, 0.7), (0.9, 0.9), (0.6, 1)])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_in_an_interval(
    pipe: Pipeline, interval: tuple[float, float], rescale: float
) -> None:
    settings: dict[str, Any] = {"steps": 6, "seed": 3, "guidance_rescale": rescale}
    result = pipe("a red apple", guidance_interval=interval, **settings)
    expected = by_hand(ddim(pipe, 6), noise(3), [mean(APPLE)], interval=interval, rescale=rescale)
    close(result, expected)


def test_guidance_takes_two_rows_only_inside_the_interval(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = watched(pipe, monkeypatch)
    pipe(["a", "a red apple"], steps=6, seed=3, guidance_interval=(0.5, 0.9))
    sigmas = [level.sigma for level, _ in ddim(pipe, 6).intervals]
    expected = [("denoiser", 4 if 0.5 <= sigma <= 0.9 else 2) for sigma in sigmas]
    assert runs == expected and {rows for _, rows in runs} == {2, 4}


def test_without_guidance_the_interval_changes_nothing(pipe: Pipeline) -> None:
    settings: dict[str, Any] = {"steps": 3, "seed": 3, "guidance_scale": 1}
    alone, within = pipe("a", **settings), pipe("a", guidance_interval=(0.5, 0.9), **settings)
    assert alone.latents.tobytes() == within.latents.tobytes()


def test_conditioning_is_sliced_once_for_all_steps(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backends recognize what they have on their device by its identity."""
    seen: list[Any] = []
    session = pipe.engines["denoiser"].session
    original = session.run

    def run(feeds: Feeds) -> Any:
        seen.append(feeds["encoder_hidden_states"])
        return original(feeds)

    monkeypatch.setattr(session, "run", run)
    pipe("a red apple", steps=8, guidance_interval=(0.5, 0.9))
    assert {len(array) for array in seen} == {1, 2} and len({id(array) for array in seen}) == 2
    assert not any(array.flags.writeable for array in seen)


# Step caching


@pytest.mark.parametrize("cached_steps", [(), (1,), (1, 2, 4), (1, 2, 3, 4, 5), (5,)])
def test_cached_steps_reuse_the_last_cached_feature(
    pipe: Pipeline, cached_steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pipe("a red apple", steps=6, seed=4, cached_steps=cached_steps)
    close(result, by_hand(ddim(pipe, 6), noise(4), [mean(APPLE)], cached_steps=cached_steps))
    runs = watched(pipe, monkeypatch)
    again = pipe.run(result.settings)
    assert again.latents.tobytes() == result.latents.tobytes()
    names = ["denoiser_cached" if index in cached_steps else "denoiser" for index in range(6)]
    assert [name for name, _ in runs] == names
    timings = {name: len(calls) for name, calls in again.timings.stages.items()}
    assert timings["denoiser"] == 6 - len(cached_steps)
    assert timings.get("denoiser_cached", 0) == len(cached_steps)


def test_cached_and_full_steps_differ(pipe: Pipeline) -> None:
    full, cached = pipe("a", steps=4, seed=1), pipe("a", steps=4, seed=1, cached_steps=(1, 2, 3))
    assert np.abs(full.latents - cached.latents).max() > 0.1


def test_the_feature_is_reused_where_guidance_ends(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without guidance the positive half of it is used; where the negative half is missing, the
    step is full."""
    runs = watched(pipe, monkeypatch)
    plan = ddim(pipe, 8)
    sigmas = [level.sigma for level, _ in plan.intervals]
    interval = (sigmas[5], sigmas[2])  # steps 2 to 5 are guided
    settings: dict[str, Any] = {"guidance_interval": interval, "cached_steps": (1, 2, 4, 6, 7)}
    result = pipe(["a", "a red apple"], steps=8, seed=4, **settings)
    full, cached = "denoiser", "denoiser_cached"
    assert runs == [
        (full, 2), (cached, 2),  # without guidance
        (full, 4),  # planned as cached, but the feature of the negative rows is missing
        (full, 4), (cached, 4), (full, 4),
        (cached, 2), (cached, 2),  # on the positive half of the feature
    ]  # fmt: skip
    expected = by_hand(
        plan,
        noise(4, 2),
        [mean(A), mean(APPLE)],
        interval=interval,
        cached_steps=settings["cached_steps"],
    )
    close(result, expected)


@pytest.mark.parametrize("max_rows", [1, 2, 3, None])
def test_a_batch_gives_what_its_prompts_give_alone(
    cut: Callable[..., Path], max_rows: int | None
) -> None:
    pipe = load(cut(), threads=1, max_rows=max_rows)
    prompts = ["a red apple", "a", "red"]
    cheap: dict[str, Any] = {"cached_steps": (1, 3), "guidance_interval": (0.4, 0.9), "steps": 5}
    together = pipe(prompts, seed=2, **cheap)
    means = [mean(APPLE), mean(A), mean([1, 4, 2, 2, 2, 2, 2, 2])]
    expected = by_hand(
        ddim(pipe, 5), noise(2, 3), means, interval=(0.4, 0.9), cached_steps=cheap["cached_steps"]
    )
    close(together, expected)


def test_a_feature_of_half_the_sides_needs_even_ones(pipe: Pipeline) -> None:
    """A feature of half the sides has a side rounded up where a latent's is odd."""
    cached = pipe.manifest.components["denoiser_cached"]
    half = ("batch", 4, "latent_height//2", "latent_width//2")
    inputs = {**cached.inputs, "cached_feature": TensorSpec("float32", half)}
    cached = msgspec.structs.replace(cached, inputs=inputs)
    manifest = msgspec.structs.replace(
        pipe.manifest,
        latent=msgspec.structs.replace(pipe.manifest.latent, multiple=1),
        components={**pipe.manifest.components, "denoiser_cached": cached},
    )
    settings = replace(pipe.settings("a", steps=4, cached_steps=(1,)), height=24)
    with pytest.raises(
        ShapeError, match="height must be a multiple of 16 for cached steps, not 24"
    ):
        ResolvedRequest.of(settings, manifest)
    full = replace(settings, cached_steps=())
    assert ResolvedRequest.of(full, manifest).settings == full


def test_interleaved_streams_do_not_share_a_feature(pipe: Pipeline) -> None:
    cheap: dict[str, Any] = {"steps": 6, "cached_steps": (1, 2, 4, 5)}
    first, second = ({"prompt": p, "seed": s, **cheap} for p, s in (("a red apple", 1), ("a", 2)))
    alone = [pipe(**first).latents, pipe(**second).latents]
    *_, (one, other) = zip(pipe.stream(**first), pipe.stream(**second), strict=True)
    assert one.latents.tobytes() == alone[0].tobytes()
    assert other.latents.tobytes() == alone[1].tobytes()
    close(one.result(), by_hand(ddim(pipe, 6), noise(1), [mean(APPLE)], cached_steps=(1, 2, 4, 5)))


def test_threads_do_not_share_a_feature(cut: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"steps": 6, "cached_steps": (1, 2, 4, 5)}
    prompts = ["a red apple", "a", "red", "apple"]
    pipe = load(cut("one"), threads=1)
    alone = [pipe(p, seed=s, **settings).latents.tobytes() for s, p in enumerate(prompts)]
    shared = load(cut("other"), threads=1)  # where the threads load the engine too
    turn = Barrier(len(prompts), timeout=60)

    def draw(job: tuple[int, str]) -> bytes:
        for step in shared.stream(job[1], seed=job[0], **settings):
            latents = step.latents
            turn.wait()  # so that all are between the same two steps
        return latents.tobytes()

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(draw, enumerate(prompts))) == alone


def test_every_nth_evaluation_is_full(pipe: Pipeline) -> None:
    result = pipe("a", steps=7, cache_interval=3)
    assert result.settings.cached_steps == (1, 2, 4, 5)
    assert pipe("a", steps=4, cache_interval=1).settings.cached_steps == ()
    assert pipe("a", steps=4, cache_interval=4).settings.cached_steps == (1, 2, 3)
    with pytest.raises(SettingsError, match="cache_interval 5 is longer than the run of 4 steps"):
        pipe("a", steps=4, cache_interval=5)
    with pytest.raises(SettingsError, match="exclude each other: give one"):
        pipe("a", steps=4, cache_interval=2, cached_steps=(1,))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("euler", "full cached full full"),
        ("heun", "full cached cached full full full full"),  # two at each level but the first
        ("pndm", "full cached cached full full"),  # its second step is taken twice
        ("unipc", "full cached full full"),
    ],
)
def test_evaluations_at_one_level_are_alike(
    pipe: Pipeline, sampler: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = watched(pipe, monkeypatch)
    pipe("a", sampler=sampler, steps=4, cached_steps=(1,))
    names = {"denoiser": "full", "denoiser_cached": "cached"}
    assert " ".join(names[name] for name, _ in runs) == expected


def test_a_part_of_the_schedule_begins_with_a_full_step(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are made as they are in the whole."""
    runs = watched(pipe, monkeypatch)
    request: dict[str, Any] = {"steps": 6, "seed": 1, "cached_steps": (1, 3, 5)}
    full, cached = "denoiser", "denoiser_cached"
    pipe("a", **request)
    assert [name for name, _ in runs] == [full, cached] * 3
    runs.clear()
    first = pipe("a", denoising_end=0.55, **request)
    assert [name for name, _ in runs] == [full, cached, full]
    runs.clear()
    pipe("a", image=first.latents, denoising_start=0.55, **request)
    assert [name for name, _ in runs] == [full, full, cached]


def test_a_partitioned_denoiser_gives_the_same(cut: Callable[..., Path]) -> None:
    """Outputs of the parts with a row per image are cut to the rows of the step."""
    whole = load(cut("whole"), threads=1)
    parted = load(hoisted(cut("parted")), threads=1)
    assert set(parted.engines) >= {"denoiser_prompt", "denoiser_time", "denoiser"}
    cheap: dict[str, Any] = {"cached_steps": (1, 4), "guidance_interval": (0.4, 0.9)}
    ours, theirs = (p(["a", "a red apple"], steps=6, seed=5, **cheap) for p in (parted, whole))
    np.testing.assert_allclose(ours.latents, theirs.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "interval, max_rows, downloaded",
    [
        ((0, 1), None, [(4,)]),  # rows of timesteps and prompts are made on the host
        ((0.5, 1), None, [(4,), (4, 4, 4, 6)]),  # steps without guidance take a slice of rows
        ((0, 1), 3, []),  # rows of several runs are joined on the host
    ],
)
def test_what_is_only_passed_on_stays_on_the_device(
    cut: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    interval: tuple[float, float],
    max_rows: int | None,
    downloaded: list[tuple[int, ...]],
) -> None:
    """The sessions of GPUs, with the CPU in the device's place, give the same latents."""
    downloads: list[tuple[int, ...]] = []
    original = OrtArray._download

    def download(array: OrtArray) -> Any:
        downloads.append(array.shape)
        return original(array)

    monkeypatch.setattr(OrtArray, "_download", download)
    directory, latents = hoisted(cut("parted")), []
    request: dict[str, Any] = {"steps": 6, "seed": 5, "cached_steps": (1, 3, 4)}
    for wrapper in (None, on_device(directory)):
        with load(directory, threads=1, max_rows=max_rows, wrap_session=wrapper) as pipe:
            result = pipe(["a", "a red apple"], guidance_interval=interval, **request)
            latents.append(result.latents.tobytes())
    assert latents[0] == latents[1] and downloads == downloaded


def on_device(directory: Path) -> Callable[[str, Session], Session]:
    """Return a wrapper that opens the denoiser's parts in sessions that keep outputs."""
    components = Manifest.read(directory).components

    def opened(name: str, session: Session) -> Session:
        if not name.startswith("denoiser"):
            return session
        part, settings = components[name], ort_session.new_settings({})
        graph = ort_session.open_session(directory / part.file, settings, ["CPUExecutionProvider"])
        return DeviceSession(graph, part, Place(kind="cpu"), graphs=True)

    return opened


PROMPT_PART = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 8, 2] encoder_hidden_states) => (float[batch] mean)
{ mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states) }"""
TIME_PART = """<ir_version: 9, opset_import: ["" : 17]>
m (float[rows] timestep, float[rows] mean) => (float[rows] shifted)
<float one = {1}> { shifted = Sub(mean, one) }"""
STEP_PART = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[batch] mean, float[batch] shifted)
  => (float[batch, 4, h, w] out_sample, float[batch, 4, h, w] cached_feature)
<float share = {0.25}, int64[3] axes = {1, 2, 3}>
{
  column = Unsqueeze(shifted, axes)
  cached_feature = Mul(sample, column)
  scaled = Mul(mean, share)
  factor = Unsqueeze(scaled, axes)
  near = Mul(sample, factor)
  out_sample = Add(cached_feature, near)
}"""
CACHED_PART = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[batch] mean, float[batch, 4, h, w] cached_feature)
  => (float[batch, 4, h, w] out_sample)
<float share = {0.25}, int64[3] axes = {1, 2, 3}>
{
  scaled = Mul(mean, share)
  factor = Unsqueeze(scaled, axes)
  near = Mul(sample, factor)
  out_sample = Add(cached_feature, near)
}"""


def hoisted(directory: Path) -> Path:
    """The same UNet in parts, of which the second has a row for each timestep and prompt."""
    manifest = Manifest.read(directory)
    unet = manifest.components["denoiser"]
    sample, _, text = unet.inputs.values()
    row, rows = (TensorSpec("float32", (size,)) for size in ("batch", "rows"))
    given = {"sample": sample, "mean": row}
    output = {"out_sample": unet.outputs["out_sample"]}
    signatures: dict[str, tuple[str, Mapping[str, TensorSpec], Mapping[str, TensorSpec]]] = {
        "denoiser_prompt": (PROMPT_PART, {"encoder_hidden_states": text}, {"mean": row}),
        "denoiser_time": (TIME_PART, {"timestep": rows, "mean": rows}, {"shifted": rows}),
        "denoiser": (STEP_PART, {**given, "shifted": row}, unet.outputs),
        "denoiser_cached": (CACHED_PART, {**given, "cached_feature": FEATURE}, output),
    }
    parts = {
        name: msgspec.structs.replace(
            unet, inputs=inputs, outputs=outputs, **store(directory, name, text)
        )
        for name, (text, inputs, outputs) in signatures.items()
    }
    others = {k: v for k, v in manifest.components.items() if k != "denoiser_reduced"}
    msgspec.structs.replace(manifest, components={**others, **parts}).write(directory)
    return directory


# Timesteps


SPACINGS: tuple[Spacing | None, ...] = ("leading", "trailing", "linspace", None)
CUSTOM = [name for name, sampler in SAMPLERS.items() if sampler.plan_from_timesteps]


def schedule(**changes: Any) -> Schedule:
    usual: dict[str, Any] = {"beta_kind": "scaled_linear", "beta_start": 0.00085}
    usual |= {"beta_end": 0.012, "spacing": "leading", "offset": 1}
    usual |= {"zero_terminal_snr": False, "final_alpha_one": False}
    return Schedule(**{**usual, **changes})


def test_samplers_that_take_custom_timesteps() -> None:
    assert set(CUSTOM) == {
        *("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"),
        *("ddpm", "tcd"),
    }


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero", [False, True])
def test_its_own_timesteps_give_its_own_plan(
    name: str, spacing: Spacing | None, zero: bool
) -> None:
    case = schedule(spacing=spacing, zero_terminal_snr=zero)
    for steps in (1, 2, 7, 10):
        own = SAMPLERS[name].plan(case, steps)
        times = [interval.start.timestep for interval in own.intervals]
        plan = noise_plan(name, case, steps, times)
        levels = [(a.end, b.start) for a, b in pairwise(own.intervals)]
        if all(end == start for end, start in levels):
            assert plan == own
        else:  # strides that do not divide the schedule leave gaps between the steps of DDIM
            assert name == "ddim" and len(plan.intervals) == steps
            assert [i.start for i in plan.intervals] == [i.start for i in own.intervals]


@pytest.mark.parametrize("name", CUSTOM)
def test_any_timesteps_make_a_chain(name: str) -> None:
    plan = noise_plan(name, schedule(), 4, (999, 850.25, 400, 3.5))
    assert [interval.start.timestep for interval in plan.intervals] == [999, 850.25, 400, 3.5]
    ends = [interval.end for interval in plan.intervals]
    assert ends[:-1] == [interval.start for interval in plan.intervals[1:]]
    for level, _ in plan.intervals:
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-6)
    below, above = (noise_plan(name, schedule(), 1, (t,)).intervals[0].start for t in (850, 851))
    ratios = [level.sigma / level.alpha for level in (below, plan.intervals[1].start, above)]
    assert ratios[1] == pytest.approx(0.75 * ratios[0] + 0.25 * ratios[2], rel=1e-6)


def test_custom_timesteps(pipe: Pipeline) -> None:
    times = (900.0, 500.5, 20.0)
    result = pipe("a red apple", sampler="euler", timesteps=times, seed=2)
    assert result.settings.steps == 3 and result.settings.timesteps == times
    plan = noise_plan("euler", pipe.manifest.schedule, 3, times)
    start = noise(2) * plan.scale
    close(result, by_hand(plan, start, [mean(APPLE)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampler": "pndm"},
            "pndm does not support custom timesteps; these samplers do: ddim, euler, ",
        ),
        ({"steps": 3}, "2 timesteps for 3 steps"),
        (
            {"timesteps": (1000, 3)},
            "timestep 1000 is not in the schedule, which goes from 0 to 999",
        ),
        ({"timesteps": (10, 10)}, "strictly decreasing"),
        ({"timesteps": (1, 10)}, "strictly decreasing"),
        ({"timesteps": (10, -1)}, "each of timesteps must be a number from 0"),
    ],
)
def test_refuses_timesteps(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipe.stream("a", **{"timesteps": (500, 3), **settings})


# A plan


@pytest.fixture
def planned(cut: Callable[..., Path]) -> Pipeline:
    return load(cut(acceleration=PLAN), threads=1)


def plan_from_timesteps(pipe: Pipeline, plan: AccelerationPlan) -> NoisePlan:
    return noise_plan(plan.sampler, pipe.manifest.schedule, plan.steps, plan.timesteps)


def test_a_request_follows_the_plan(planned: Pipeline) -> None:
    assert "denoiser_cached" not in planned.engines
    result = planned("a red apple", seed=7)
    plan = plan_from_timesteps(planned, PLAN)
    expected = by_hand(
        plan, noise(7) * plan.scale, [mean(APPLE)], interval=(0.4, 0.95), cached_steps=(1, 3)
    )
    close(result, expected)
    for name, value in PLAN.request.items():
        assert getattr(result.settings, name) == value
    assert result.settings.accelerated and not result.settings.unaccelerated
    assert "denoiser_cached" in planned.engines and "denoiser_reduced" not in planned.engines
    named = planned("a red apple", seed=7, sampler="euler", steps=4)
    assert named.settings == result.settings
    assert planned.run(result.settings).latents.tobytes() == result.latents.tobytes()


def test_unaccelerated_ignores_the_plan(planned: Pipeline) -> None:
    result = planned("a red apple", seed=7, unaccelerated=True)
    close(result, by_hand(ddim(planned, 4), noise(7), [mean(APPLE)]))
    assert not result.settings.accelerated and result.settings.unaccelerated
    assert set(planned.engines) == set(planned.manifest.required_components)
    other = planned("a", seed=7, unaccelerated=True, sampler="heun", steps=9)
    assert other.settings.sampler == "heun" and other.settings.steps == 9
    assert planned.run(result.settings).latents.tobytes() == result.latents.tobytes()


@pytest.mark.parametrize("request_", [{"steps": 20}, {"sampler": "ddim"}, {"timesteps": (900, 3)}])
def test_a_plan_for_another_schedule(planned: Pipeline, request_: dict[str, Any]) -> None:
    with pytest.raises(
        SettingsError, match="plan is for 'euler' with 4 steps, not .*--unaccelerated"
    ):
        planned.stream("a", **request_)


def test_the_request_overrides_the_plan(planned: Pipeline) -> None:
    full = planned("a", seed=1, cached_steps=(), guidance_interval=(0, 1), timesteps=()).settings
    assert not full.accelerated and (full.sampler, full.steps) == ("euler", 4)
    some = planned("a", seed=1, cache_interval=4, guidance_interval=(0.2, 0.5)).settings
    assert some == replace(
        full, **{**PLAN.request, "cached_steps": (1, 2, 3), "guidance_interval": (0.2, 0.5)}
    )


def test_a_variant_makes_the_full_steps(cut: Callable[..., Path]) -> None:
    plan = msgspec.structs.replace(PLAN, variant="denoiser_reduced", guidance_interval=None)
    pipe = load(cut(acceleration=plan), threads=1)
    result = pipe("a red apple", seed=7)
    steps = plan_from_timesteps(pipe, plan)
    expected = by_hand(
        steps,
        noise(7) * steps.scale,
        [mean(APPLE)],
        cached_steps=plan.cached_steps,
        share=REDUCED_SHARE,
    )
    close(result, expected)
    assert "denoiser_reduced" in pipe.engines


def test_strength_takes_the_end_of_the_plan(planned: Pipeline) -> None:
    whole = planned("a", seed=1)
    later = planned("a", seed=1, image=whole.latents, strength=0.5)
    assert later.settings.timesteps == PLAN.timesteps and later.settings.strength == 0.5
    assert (
        len(later.timings.stages["denoiser"]) == 1
        and len(later.timings.stages["denoiser_cached"]) == 1
    )


def test_engines_without_the_components(handmade: Handmade) -> None:
    pipe = load(handmade(onnx={**NETWORKS, "denoiser": PLAIN}), threads=1)
    for request in ({"cached_steps": (1,)}, {"cache_interval": 2}):
        with pytest.raises(SettingsError, match="these engines have no denoiser_cached"):
            pipe.stream("a", steps=4, **request)
    with pytest.raises(SettingsError, match="these engines have no denoiser_reduced"):
        pipe("a", steps=4, variant="denoiser_reduced")
    settings = pipe.settings("a", steps=4, seed=0)
    with pytest.raises(SettingsError, match="no denoiser_cached"):
        pipe.run(replace(settings, cached_steps=(1,)))
    assert pipe("a", steps=4, guidance_interval=(0.5, 0.9)).settings.accelerated


PLAIN = NETWORKS["denoiser"].replace(", float[batch, 4, h, w] cached_feature)", ")")


def test_the_manifest_limits_the_rows(
    cut: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = cut()
    unet = Manifest.read(directory).components["denoiser"]
    changed(directory, {"denoiser": msgspec.structs.replace(unet, max_rows=1)})
    pipe = load(directory, threads=1)
    assert pipe.engines["denoiser"].max_rows == 1 and pipe.engines["text_encoder"].max_rows is None
    runs = watched(pipe, monkeypatch)
    pipe("a", steps=2)
    assert runs == [("denoiser", 1)] * 4
    assert load(directory, max_rows=4).engines["denoiser"].max_rows == 4
    assert load(directory, low_memory=True).engines["denoiser"].max_rows == 1


# Resolution


def test_the_request_overrides_the_plan_and_the_plan_the_defaults() -> None:
    defaults = {"sampler": "ddim", "steps": 20, "guidance_scale": 7.5}
    assert resolve_acceleration(defaults, {"seed": 1}, None) == {**defaults, "seed": 1}
    planned = resolve_acceleration(defaults, {"cached_steps": (2,)}, PLAN)
    assert planned == {**defaults, **PLAN.request, "cached_steps": (2,)}
    request = {"unaccelerated": True, "steps": 6, "cache_interval": 3}
    expected = {**defaults, "unaccelerated": True, "steps": 6, "cached_steps": (1, 2, 4, 5)}
    assert resolve_acceleration(defaults, request, PLAN) == expected


def test_a_policy_decides_by_noise_level() -> None:
    plan = SAMPLERS["ddim"].plan(schedule(), 4)
    levels = [interval.start for interval in plan.intervals]
    interval = (levels[2].sigma, levels[1].sigma)
    policy = StepPolicy.of(interval, (1, 3, 9), plan)  # PNDM may have fewer intervals than steps
    assert [policy.applies_guidance(level) for level in levels] == [False, True, True, False]
    assert [policy.is_cached(level) for level in levels] == [False, True, False, True]
    whole = StepPolicy.of(None, (), plan)
    assert all(map(whole.applies_guidance, levels)) and not any(map(whole.is_cached, levels))


# Description and command line


def test_the_description_shows_the_plan(cut: Callable[..., Path]) -> None:
    plan = msgspec.structs.replace(PLAN, variant="denoiser_reduced", measured={"speedup": 2.125})
    text = describe(Manifest.read(cut(acceleration=plan)))
    assert (
        "plan        euler, 4 steps at 900, 600.5, 300, 20; guidance for sigma from 0.4 to" in text
    )
    assert (
        "cached steps 1, 3; full steps by denoiser_reduced: class B, unless unaccelerated" in text
    )
    assert "speedup 2.12" in text
    assert "plan " not in describe(Manifest.read(cut("bare")))


def test_the_command_line(cut: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    directory, picture = str(cut(acceleration=PLAN)), str(tmp_path / "image.png")

    def run(*more: str) -> tuple[int, str]:
        status = main(["run", directory, "a red apple", "-o", picture, "--seed", "1", *more])
        return status, capsys.readouterr().err

    assert run()[0] == run("--unaccelerated", "--steps", "3")[0] == 0
    assert run("--guidance-interval", "0.2:0.8", "--cache-interval", "2")[0] == 0
    status, message = run("--steps", "3")
    assert (
        status == 2
        and "plan is for 'euler' with 4 steps" in message
        and "--unaccelerated" in message
    )
    status, message = run("--unaccelerated", "--cache-interval", "9")
    assert status == 2 and "cache_interval 9 is longer than the run of 4 steps" in message
    with pytest.raises(SystemExit):
        run("--guidance-interval", "0.2")
