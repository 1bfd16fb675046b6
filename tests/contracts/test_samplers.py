"""Samplers against diffusers step by step, and against closed forms where there is one.

The network of the parity tests is synthetic but behaves like a trained one: nearly the exact
denoiser of Gaussian data, bent by a smooth function of position and time, so that latents stay
bounded and a wrong coefficient, level or timestep shows.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiers import further

from latentforge.runtime import sampling
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.levels import NoiseInterval, NoiseLevel, NoisePlan
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.prediction import PREDICTIONS, Prediction, prediction_type
from latentforge.runtime.sampling.sampler import Array
from latentforge.runtime.sampling.schedule import BetaKind, EDMSchedule, Schedule, Spacing

# torch tensors and numpy 2 disagree on a keyword of __array__, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 1, 1, 7)
STEPS = [1, 4, 20, *further(2, 10, 30, 50)]
STD = 0.5  # of the data

SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
SQUEEZED = {"squeezed_10": (10, 6), "squeezed_11": (11, 7)}
DECI = {
    "solver_type": "heun",
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -7.5,
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}
# The others are compared by the proof of the schedule: see tests/export/test_schedule_proof.py.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "unipc": ("UniPCMultistepScheduler", {}),
    "squeezed_10": ("DPMSolverMultistepScheduler", DECI),
    "squeezed_11": ("DPMSolverMultistepScheduler", DECI),
    "lcm": ("LCMScheduler", {}),
}
SPACINGS = [
    (name, spacing)
    for name in REFERENCES
    for spacing in ("leading", "trailing", "linspace")
    if spacing == "leading" or not re.search("lcm|karras|squeezed", name)  # which ignore it
]


EDM = EDMSchedule(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras")


def schedule_for(name: str) -> Schedule | EDMSchedule:
    return schedule() if SAMPLERS[name].schedule is Schedule else EDM


@cache
def schedule(
    beta_kind: BetaKind = "scaled_linear",
    spacing: Spacing = "leading",
    zero_terminal_snr: bool = False,
    final_alpha_one: bool = False,
) -> Schedule:
    return Schedule(
        beta_kind=beta_kind,
        beta_start=0.00085,
        beta_end=0.012,
        spacing=spacing,
        offset=1,
        zero_terminal_snr=zero_terminal_snr,
        final_alpha_one=final_alpha_one,
        options=SolverOptions(clip_sample=False),
    )


@dataclass(frozen=True)
class Network:
    """A synthetic network: (x, timestep) -> epsilon or v, computed in float64."""

    schedule: Schedule
    prediction: Prediction

    def __call__(self, x: Array, timestep: float) -> Array:
        square = np.interp(timestep, np.arange(1000), self.schedule.alphas_cumprod)
        alpha = math.sqrt(max(square, 1e-10))
        sigma = math.sqrt(1 - alpha**2)
        wide = x.astype(np.float64)
        bend = 0.2 * np.sin(2 * wide[..., ::-1] + timestep / 200)
        clean = wide * alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) + bend
        output = wide - alpha * clean if self.prediction == "epsilon" else alpha * wide - clean
        return (output / sigma).astype(np.float32)


@dataclass(frozen=True)
class Trajectory:
    latents: list[Array]
    timesteps: list[float]
    next_noise: float  # next value of the generator: shows how much was drawn


@dataclass(frozen=True)
class Part:
    """Part of a run: the steps taken, and whether half of an image is kept through them."""

    drop: int = 0
    count: int | None = None
    repaint: bool = False


WHOLE = Part()
IMAGE = np.cos(np.arange(14, dtype=np.float32)).reshape(SHAPE)
MASK = np.array([1, 1, 1, 1, 0, 0, 0], np.float32)  # 1 where to paint


def noised(noise: Array, level: NoiseLevel) -> Array:
    return np.float32(level.alpha) * IMAGE + np.float32(level.sigma) * noise


def sample(name: str, network: Network, steps: int, part: Part = WHOLE) -> Trajectory:
    timesteps: list[float] = []

    def denoise(x: Array, level: NoiseLevel) -> Array:
        assert x.dtype == np.float32
        timesteps.append(level.timestep)
        alpha, sigma = np.float32(level.alpha), np.float32(level.sigma)
        output = network(x, level.timestep)
        if network.prediction == "epsilon":
            return np.asarray((x - sigma * output) / alpha, x.dtype)
        return alpha * x - sigma * output

    def put_back(latents: Array, level: NoiseLevel) -> Array:
        return (1 - MASK) * noised(Generator(0).randn(SHAPE), level) + MASK * latents

    generator, sampler = Generator(0), SAMPLERS[name]
    plan = sampler.plan(network.schedule, steps).after(part.drop)
    plan = plan if part.count is None else plan.until(part.count)
    run = sampler.run(
        denoise,
        plan,
        lambda: generator.randn(SHAPE),
        prediction=network.prediction,
        latents=noised(generator.randn(SHAPE), plan.intervals[0].start) if part.drop else None,
        mask_blend=put_back if part.repaint else None,
    )
    latents = [step.latents for step in run]
    return Trajectory(latents, timesteps, generator.randn((1,)).item())


def sample_diffusers(
    name: str, network: Network, steps: int, part: Part = WHOLE, nudge: float = 0.0
) -> Trajectory:
    """The loop of a diffusers pipeline, its latents brought to the variance-preserving scale."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    scheduler = planned(name, network, steps)
    times = scheduler.timesteps[part.drop * scheduler.order :]
    times = times if part.count is None else times[: part.count * scheduler.order]
    if hasattr(scheduler, "set_begin_index"):  # else it searches, and fails where two are equal
        scheduler.set_begin_index(part.drop * scheduler.order)
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"generator": generator} if name in STOCHASTIC else {}
    image, mask = torch.from_numpy(IMAGE), torch.from_numpy(MASK)
    noise = torch.randn(SHAPE, generator=generator)
    x = noise * scheduler.init_noise_sigma * (1 + nudge)
    x = scheduler.add_noise(image, noise, times[:1]) if part.drop else x
    latents = []
    for index, t in enumerate(times):
        seen = scheduler.scale_model_input(x, t).numpy()
        output = torch.from_numpy(network(seen, float(t))) * (1 + nudge)
        x = scheduler.step(output, t, x, **options).prev_sample
        following = times[index + 1 : index + 2]
        if part.repaint:
            known = scheduler.add_noise(image, noise, following) if len(following) else image
            x = (1 - mask) * known + mask * x
        if name != "heun" or scheduler.state_in_first_order or not len(following):
            ratio = float(scheduler.sigmas[scheduler.step_index]) if name in EXPLODING else 0.0
            latents.append(x.numpy() / math.hypot(ratio, 1))
    next_noise = torch.randn(1, generator=generator).item()
    return Trajectory(latents, times.tolist(), next_noise)


def planned(name: str, network: Network, steps: int) -> Any:
    """The diffusers scheduler with its timesteps set, which for Deci's it squeezes first."""
    scheduler = reference(name, network)
    scheduler.set_timesteps(steps)
    if name in SQUEEZED:
        count, kept = SQUEEZED[name]
        times = scheduler.timesteps.tolist()
        stride = times[kept - 1] // (count - kept + 1)
        rest = [stride * index for index in range(count - kept, 0, -1)]
        scheduler.set_timesteps(timesteps=times[:kept] + rest)
    return scheduler


STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm"}
EXPLODING = {"euler", "euler_ancestral", "heun"}  # diffusers keeps their x as clean + ratio * noise


@cache
def reference(name: str, network: Network) -> Any:
    """The diffusers scheduler, made as users make it from a pipeline's scheduler config."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    kind, options = REFERENCES[name]
    schedule = network.schedule
    config = {
        "num_train_timesteps": schedule.train_steps,
        "beta_schedule": schedule.beta_kind,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.offset,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": schedule.final_alpha_one,
        "prediction_type": network.prediction,
        "clip_sample": False,
    }
    scheduler = getattr(diffusers, kind).from_config(config, **options)
    if schedule.zero_terminal_snr and name not in {"pndm", "heun", *SQUEEZED}:
        # The last bit of a rescaled table is MKL's: its square root is off in it for one value in
        # five. test_schedules.py compares the tables; here the steps are compared on the same one.
        scheduler.alphas_cumprod[:-1] = scheduler.betas.new_tensor(schedule.alphas_cumprod[:-1])
    return scheduler


def difference(a: Trajectory, b: Trajectory) -> float:
    pairs = zip(a.latents, b.latents, strict=True)
    return max(float(np.abs(x - y).max() / max(1, np.abs(y).max())) for x, y in pairs)


def impossible(name: str, case: Schedule, prediction: Prediction, steps: int) -> str | None:
    """Return the reason if diffusers itself gives no numbers."""
    if name in SQUEEZED and steps < SQUEEZED[name][1]:
        return "there are too few steps to squeeze"
    infinite = case.zero_terminal_snr and prediction == "epsilon"
    starts_at_the_end = name == "lcm" or (
        name == "ddim"
        and (case.spacing == "trailing" or (case.spacing == "linspace" and steps > 1))
    )
    if infinite and starts_at_the_end:
        return "epsilon does not determine the clean latent where alpha is 0"
    cosine = case.beta_kind == "squaredcos_cap_v2" and not case.zero_terminal_snr
    if name == "euler_ancestral" and cosine and case.spacing == "linspace" and steps == 4:
        return "diffusers takes the square root of a difference that rounds below 0"
    return None


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("beta_kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("name", "spacing"), SPACINGS)
def test_equals_diffusers(
    name: str,
    spacing: Spacing,
    beta_kind: BetaKind,
    zero_terminal_snr: bool,
    prediction: Prediction,
    steps: int,
) -> None:
    """Within 1e-4 at every step, at equal timesteps and with the same noise."""
    case = schedule(beta_kind, spacing, zero_terminal_snr)
    network = Network(case, prediction)
    if reason := impossible(name, case, prediction, steps):
        pytest.skip(reason)
    run, expected = sample(name, network, steps), sample_diffusers(name, network, steps)
    assert run.timesteps == expected.timesteps
    assert run.next_noise == expected.next_noise
    found = difference(run, expected)
    if not found < 1e-4:
        assert found < float32_limit(name, network, steps, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("repaint", [False, True], ids=["", "repaint"])
@pytest.mark.parametrize(("name", "spacing"), SPACINGS)
def test_parts_and_images_equal_diffusers(
    name: str, spacing: Spacing, repaint: bool, prediction: Prediction
) -> None:
    """Late starts from a noised image, early ends, and a part of the image put back."""
    network = Network(schedule("scaled_linear", spacing), prediction)
    steps = 16 if name in SQUEEZED else 10
    for drop, count in [(0, None), (1, None), (2, None), (5, None), (9, None), (0, 4), (3, 4)]:
        if repaint and count:
            continue  # diffusers puts the clean image back, at a scale that differs by scheduler
        part = Part(drop, count, repaint)
        run, expected = (
            sample(name, network, steps, part),
            sample_diffusers(name, network, steps, part),
        )
        assert run.timesteps == expected.timesteps
        assert run.next_noise == expected.next_noise
        assert difference(run, expected) < 1e-5, part


@pytest.mark.parametrize("name", REFERENCES)
def test_the_image_is_put_back_after_every_step(name: str) -> None:
    network = Network(schedule(), "epsilon")
    run, free = (sample(name, network, 16, Part(repaint=kept)) for kept in (True, False))
    level = SAMPLERS[name].plan(network.schedule, 16).intervals[1].start
    kept = noised(Generator(0).randn(SHAPE), level)[..., MASK == 0]
    np.testing.assert_array_equal(run.latents[0][..., MASK == 0], kept)
    np.testing.assert_array_equal(run.latents[-1][..., MASK == 0], IMAGE[..., MASK == 0])
    assert difference(run, free) > 0.1


def float32_limit(name: str, network: Network, steps: int, expected: Trajectory) -> float:
    """Return the accuracy of diffusers in float32 where alpha nearly vanishes at the first level.

    The clean latent then depends on differences that float32 hardly resolves. So the limit is a
    few times what an ulp or two in the network's output and the first latents changes, and the
    spacing of latents that start at clean + ratio * noise with a ratio in the thousands.
    """
    start, end = SAMPLERS[name].plan(network.schedule, steps).intervals[0]
    assert start.alpha < 1e-3
    moved = difference(expected, sample_diffusers(name, network, steps, nudge=3e-7))
    spacing = 4 * end.alpha / start.alpha * 2.0**-22 if name in EXPLODING else 0.0
    return max(8 * moved, spacing)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_can_end_on_the_clean_latent(name: str, prediction: Prediction) -> None:
    network = Network(schedule(final_alpha_one=True), prediction)
    run, expected = sample(name, network, 10), sample_diffusers(name, network, 10)
    assert difference(run, expected) < 1e-5
    other = sample(name, Network(schedule(), prediction), 10)
    assert difference(run, other) > 1e-3


# Closed forms: Gaussian data, of which the exact denoiser and the exact path are known.


def chain(ratios: NDArray[np.float64]) -> NoisePlan:
    """A plan through these values of sigma / alpha."""
    levels = [NoiseLevel(1 / math.hypot(r, 1), r / math.hypot(r, 1), r) for r in ratios.tolist()]
    return NoisePlan(tuple(NoiseInterval(*pair) for pair in pairwise(levels)))


def exact(x: Array, level: NoiseLevel) -> Array:
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    return x * np.float32(level.alpha * STD**2 / variance)


def deviation(level: NoiseLevel) -> float:
    """The standard deviation of noised data, with which every exact path scales."""
    return math.hypot(level.alpha * STD, level.sigma)


def no_noise() -> Array:
    raise AssertionError("a deterministic sampler drew noise")


def error(name: str, steps: int) -> float:
    if name == "pndm":  # its history is of equal steps, and its first step is taken twice
        plan = chain(np.linspace(2.0, 1.0, steps + 1))
        first, second, *rest = plan.intervals
        plan = NoisePlan((first, second, second, *rest), repeat_intervals=(first,))
    else:
        plan = chain(np.linspace(15.0 ** (1 / 7), 0.1 ** (1 / 7), steps + 1) ** 7)
    x = np.ones((1, 4, 2, 2), np.float32)
    run = SAMPLERS[name].run(exact, plan, no_noise, prediction="epsilon", latents=x)
    *_, last = run
    expected = deviation(plan.intervals[-1].end) / deviation(plan.intervals[0].start)
    return float(np.abs(last.latents - expected).max())


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("pndm", 3)]
    + [("squeezed_10", 2)],
)
def test_order_of_convergence(name: str, order: int) -> None:
    fewer = 10 if name == "pndm" else 40
    observed = math.log2(error(name, fewer) / error(name, 2 * fewer))
    assert order - 0.35 < observed < order + 0.6


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_fresh_noise_keeps_the_deviation(name: str) -> None:
    """Exact denoising of Gaussian data ends on the data's own standard deviation."""
    generator, sampler = Generator(3), SAMPLERS[name]
    plan = sampler.plan(schedule("scaled_linear", "trailing"), 200)
    run = sampler.run(exact, plan, lambda: generator.randn((100_000,)), prediction="epsilon")
    *_, last = run
    assert float(last.latents.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_reported(name: str) -> None:
    generator = Generator(1)
    sampler = sampling.get(name)
    plan = sampler.plan(schedule_for(name), 8)
    steps = list(sampler.run(exact, plan, lambda: generator.randn(SHAPE), prediction="epsilon"))
    count = {"pndm": 9, "pndm_prk": 17, "squeezed_10": 10, "squeezed_11": 11}.get(name, 8)
    assert [step.index for step in steps] == list(range(count))
    assert {step.count for step in steps} == {count}
    assert [step.level for step in steps] == [interval.start for interval in plan.intervals]
    assert all(step.latents.dtype == step.denoised.dtype == np.float32 for step in steps)
    assert all(step.latents.shape == step.denoised.shape == SHAPE for step in steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_computed_ahead(name: str) -> None:
    calls = 0

    def count(x: Array, level: NoiseLevel) -> Array:
        nonlocal calls
        calls += 1
        return exact(x, level)

    sampler = SAMPLERS[name]
    noise = Generator(1)
    plan = sampler.plan(schedule_for(name), 10)
    run = sampler.run(count, plan, lambda: noise.randn(SHAPE), prediction="epsilon")
    assert calls == 0
    next(run)
    assert calls == (2 if name in {"heun", "kdpm2", "kdpm2_ancestral"} else 1)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "heun", "unipc"])
def test_may_start_at_a_later_level(name: str) -> None:
    """As image to image does: the end of a plan, from a latent noised to where it starts."""
    sampler = SAMPLERS[name]
    plan = sampler.plan(schedule("scaled_linear", "trailing"), 100)
    rest = plan.of_strength(0.6)
    x = np.full((1, 1, 1, 1), deviation(rest.intervals[0].start), np.float32)
    *_, last = sampler.run(exact, rest, no_noise, prediction="epsilon", latents=x)
    assert float(last.latents.item()) == pytest.approx(deviation(rest.intervals[-1].end), rel=0.05)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="no sampler 'dpm': choose from ddim, pndm, pndm_prk, "):
        sampling.get("dpm")


def test_custom_timesteps_need_a_sampler_that_takes_them() -> None:
    message = "pndm does not support custom timesteps; these samplers do: ddim, euler, "
    with pytest.raises(SettingsError, match=message):
        sampling.noise_plan("pndm", schedule(), 2, (900, 3))
    assert sampling.noise_plan("ddim", schedule(), 0, (900, 3)).timesteps == [900, 3]


# Prediction types


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_type_inverts_itself(name: str) -> None:
    """Clean latent and noise give the output, and the output gives them back."""
    kind, level = PREDICTIONS[name], EDM.level(0.9) if "edm" in name else NoiseLevel(0.6, 0.8, 500)
    clean, noise = (Generator(seed).randn(SHAPE) for seed in (1, 2))
    x = np.float32(level.alpha) * clean + np.float32(level.sigma) * noise
    output = kind.output(x, clean, level)
    np.testing.assert_allclose(kind.clean(x, output, level), clean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kind.noise(x, output, level), noise, rtol=1e-4, atol=1e-5)
    expected = {
        "epsilon": noise,
        "v_prediction": level.alpha * noise - level.sigma * clean,
        "sample": clean,
    }
    if name in expected:
        np.testing.assert_allclose(output, expected[name], rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_needs_a_prediction_that_is_defined_there() -> None:
    level = NoiseLevel(0.0, 1.0, 999.0)
    with pytest.raises(SettingsError, match="epsilon prediction is undefined at zero terminal SNR"):
        prediction_type("epsilon").check(level)
    prediction_type("v_prediction").check(level)
    prediction_type("epsilon").check(NoiseLevel(1e-3, 1.0, 999.0))


def test_an_unknown_prediction_is_an_error() -> None:
    with pytest.raises(SettingsError, match="unknown prediction 'flow': choose from epsilon, v_"):
        prediction_type("flow")
    x = np.ones(SHAPE, np.float32)
    plan = chain(np.array([2.0, 1.0]))
    run = SAMPLERS["ddim"].run(exact, plan, no_noise, prediction="flow", latents=x)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="unknown prediction 'flow'"):
        next(run)


def test_rows_are_complete() -> None:
    for name, (scheduler, _) in REFERENCES.items():
        assert SAMPLERS[name].diffusers.name == scheduler
    assert all(name == sampler.name and sampler.summary for name, sampler in SAMPLERS.items())
