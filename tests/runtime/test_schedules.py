"""Schedules against diffusers' tables and timesteps, and against a table printed in a paper."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import SCHEDULE

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.ddim import plan_ddim
from latentforge.runtime.sampling.dpmpp_2m import plan_dpm, plan_dpm_karras
from latentforge.runtime.sampling.euler import plan_euler
from latentforge.runtime.sampling.heun import plan_heun
from latentforge.runtime.sampling.lcm import plan_lcm
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.pndm import plan_pndm
from latentforge.runtime.sampling.sampler import Planner
from latentforge.runtime.sampling.schedule import BetaKind, Schedule, Spacing

# torch tensors and numpy 2 disagree on a keyword of __array__, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

plan_squeezed_10, plan_squeezed_11 = (SAMPLERS[f"squeezed_{n}"].plan for n in (10, 11))

BETA_KINDS: list[BetaKind] = ["linear", "scaled_linear", "squaredcos_cap_v2"]
BASE = msgspec.structs.replace(SCHEDULE, options=SolverOptions())


def but(**changes: Any) -> Schedule:
    return msgspec.structs.replace(BASE, **changes)


def reference(kind: str, schedule: Schedule, **options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    config = {
        "num_train_timesteps": schedule.train_steps,
        "beta_schedule": schedule.beta_kind if not schedule.betas else "linear",
        "trained_betas": list(schedule.betas) or None,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.offset,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": schedule.final_alpha_one,
        "skip_prk_steps": True,
    }
    return getattr(diffusers, kind).from_config(config, **options)


@pytest.mark.parametrize("ends", [(0.00085, 0.012), (0.0001, 0.02), (0.0015, 0.0195)])
@pytest.mark.parametrize("beta_kind", BETA_KINDS)
@pytest.mark.parametrize("train_steps", [1000, 999, 50, 1])
def test_table_is_torchs(beta_kind: BetaKind, ends: tuple[float, float], train_steps: int) -> None:
    """To the last bit: float32 accumulated in float64, counted from the nearer end."""
    start, end = ends
    case = but(beta_kind=beta_kind, beta_start=start, beta_end=end, train_steps=train_steps)
    expected = reference("DDIMScheduler", case).alphas_cumprod.numpy()
    np.testing.assert_array_equal(case.alphas_cumprod, expected, strict=True)


@pytest.mark.parametrize("beta_kind", BETA_KINDS)
def test_rescaled_table_is_torchs_except_for_square_roots(beta_kind: BetaKind) -> None:
    """MKL's square root, which torch takes here, is not always rounded to nearest."""
    case = but(beta_kind=beta_kind, zero_terminal_snr=True)
    expected = reference("DDIMScheduler", case).alphas_cumprod.numpy()
    assert case.alphas_cumprod[-1] == expected[-1] == 0
    alphas = np.sqrt(case.alphas_cumprod), np.sqrt(expected)
    np.testing.assert_allclose(*alphas, rtol=0, atol=5e-7)


def test_explicit_betas() -> None:
    betas = tuple(np.linspace(0.001, 0.02, 40).tolist())
    case = but(beta_kind="explicit", betas=betas, train_steps=40)
    expected = reference("DDIMScheduler", case).alphas_cumprod.numpy()
    np.testing.assert_array_equal(case.alphas_cumprod, expected, strict=True)


REFERENCES: dict[str, tuple[Planner, str, dict[str, Any]]] = {
    "ddim": (plan_ddim, "DDIMScheduler", {}),
    "pndm": (plan_pndm, "PNDMScheduler", {}),
    "euler": (plan_euler, "EulerDiscreteScheduler", {}),
    "heun": (plan_heun, "HeunDiscreteScheduler", {}),
    "dpm": (plan_dpm, "DPMSolverMultistepScheduler", {}),
    "unipc": (plan_dpm, "UniPCMultistepScheduler", {}),
    "karras": (plan_dpm_karras, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "lcm": (plan_lcm, "LCMScheduler", {}),
}
PLANNERS = [*(row[0] for row in REFERENCES.values()), plan_squeezed_10, plan_squeezed_11]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", REFERENCES)
def test_timesteps_are_diffusers(name: str, spacing: Spacing) -> None:
    """For every number of steps up to 50, and a few beyond."""
    planner, kind, options = REFERENCES[name]
    case = but(spacing=spacing)
    scheduler = reference(kind, case, **options)
    for steps in [*range(1, 51), 99, 100, 150, 200]:
        if name == "lcm" and steps > 50:
            break
        scheduler.set_timesteps(steps)
        assert evaluated(name, planner(case, steps)) == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("name", ["euler", "heun", "dpm", "unipc", "karras"])
@pytest.mark.parametrize("beta_kind", BETA_KINDS)
def test_levels_are_diffusers(name: str, beta_kind: BetaKind) -> None:
    planner, kind, options = REFERENCES[name]
    case = but(beta_kind=beta_kind, spacing="linspace")
    scheduler = reference(kind, case, **options)
    scheduler.set_timesteps(25)
    sigmas = scheduler.sigmas.numpy()
    sigmas = np.append(sigmas[:-1:2], sigmas[-1]) if name == "heun" else sigmas
    levels = [interval.start for interval in planner(case, 25).intervals]
    ratios = [level.sigma / level.alpha for level in levels]
    np.testing.assert_allclose([*ratios, 0], sigmas, rtol=1e-6)


def evaluated(name: str, plan: NoisePlan) -> list[float]:
    """Return the timesteps at which the sampler of that plan evaluates the network."""
    levels: list[NoiseLevel] = []
    for start, end in plan.intervals:
        levels.append(start)
        if name == "heun" and end.sigma > 0:
            levels.append(end)
    return [level.timestep for level in levels]


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("linspace", [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
        ("trailing", [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]),
    ],
)
def test_spacings_of_the_paper(spacing: Spacing, expected: list[int]) -> None:
    """Lin et al. (2023), table 2, for 10 of 1000 steps; the paper counts from 1, we from 0."""
    plan = plan_ddim(but(spacing=spacing, offset=0), 10)
    assert [interval.start.timestep + 1 for interval in plan.intervals] == expected


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_levels_are_finite_and_falling(
    planner: Planner, spacing: Spacing, zero_terminal_snr: bool
) -> None:
    plan = planner(but(spacing=spacing, zero_terminal_snr=zero_terminal_snr), 20)
    for start, end in plan.intervals:
        for level in (start, end):
            assert all(type(value) is float and math.isfinite(value) for value in level)
            assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-6)
        assert start.log_snr <= end.log_snr
    assert 0.5 < plan.scale <= 1


DECI_16 = [998, 936, 873, 811, 748, 686, 624, 561, 499, 437, 374, 312, 250, 187, 125, 62]


@pytest.mark.parametrize(
    ("planner", "expected"),
    [
        (plan_squeezed_10, [*DECI_16[:6], 548, 411, 274, 137]),
        (plan_squeezed_11, [*DECI_16[:7], 496, 372, 248, 124]),
    ],
)
def test_squeezes_like_deci(planner: Planner, expected: list[int]) -> None:
    """Both modes of DeciDiffusion 2.0 on its own schedule, down to the first training step."""
    case = but(beta_kind="squaredcos_cap_v2", zero_terminal_snr=True, spacing="trailing")
    plan = planner(case, 16)
    assert evaluated("dpm", plan) == expected
    assert plan.intervals[-1].end == pytest.approx(but(beta_kind="squaredcos_cap_v2").at(0))


@pytest.mark.parametrize("beta_kind", BETA_KINDS)
def test_squeezes_the_timesteps_of_diffusers(beta_kind: BetaKind) -> None:
    """diffusers computes the same timesteps with the noisiest clipped; Deci uses 16 steps."""
    case = but(beta_kind=beta_kind, spacing="linspace")
    scheduler = reference("DPMSolverMultistepScheduler", case, lambda_min_clipped=-7.5)
    for steps in range(7, 100):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        assert steps != 16 or (times == DECI_16) == (beta_kind == "squaredcos_cap_v2")
        tail = [times[6] // 5 * index for index in (4, 3, 2, 1)]
        assert evaluated("dpm", plan_squeezed_11(case, steps)) == times[:7] + tail
        tail = [times[5] // 5 * index for index in (4, 3, 2, 1)]
        assert evaluated("dpm", plan_squeezed_10(case, steps)) == times[:6] + tail


STRENGTHS = [0.05, 0.29, 0.5, 0.58, 0.999, 1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", REFERENCES)
def test_strength_counts_like_diffusers(name: str, spacing: Spacing) -> None:
    """Compared with the method of its image-to-image pipeline."""
    pipelines = pytest.importorskip("diffusers", exc_type=ImportError)
    planner, kind, options = REFERENCES[name]
    scheduler = reference(kind, but(spacing=spacing), **options)
    pipe = SimpleNamespace(scheduler=scheduler)
    for steps in (1, 2, 7, 50):
        scheduler.set_timesteps(steps)
        plan = planner(but(spacing=spacing), steps)
        for strength in STRENGTHS:
            counted = pipelines.StableDiffusionImg2ImgPipeline.get_timesteps
            times, count = counted(pipe, steps, strength, None)
            if count:
                assert evaluated(name, plan.of_strength(strength)) == times.tolist()
            else:
                with pytest.raises(
                    SettingsError, match=f"{strength:g} of {steps} steps leaves no step"
                ):
                    plan.of_strength(strength)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"heun"}))
def test_fractions_count_like_diffusers(name: str, spacing: Spacing) -> None:
    """Compared with the method of its refiner, and with the loop of its base pipeline."""
    pipelines = pytest.importorskip("diffusers", exc_type=ImportError)
    planner, kind, options = REFERENCES[name]
    case = but(spacing=spacing)
    scheduler = reference(kind, case, **options)
    counted = pipelines.StableDiffusionXLImg2ImgPipeline.get_timesteps
    for steps in (2, 10, 25):
        scheduler.set_timesteps(steps)
        plan, whole = planner(case, steps), scheduler.timesteps.tolist()
        for fraction in (0.2, 0.5005, 0.8):
            times, _ = counted(SimpleNamespace(scheduler=scheduler), steps, 1, None, fraction)
            if len(times):
                assert evaluated(name, plan.between(1000, start=fraction)) == times.tolist()
            times = [t for t in whole if t >= round(1000 - fraction * 1000)]
            if times:
                assert evaluated(name, plan.between(1000, end=fraction)) == times


@pytest.mark.parametrize("planner", PLANNERS)
def test_parts_make_a_whole(planner: Planner) -> None:
    plan = planner(BASE, 20)
    bounds = [0.0, 0.3, 0.8, 1.0]
    parts = [plan.between(1000, start=start, end=end) for start, end in pairwise(bounds)]
    assert sum((part.intervals for part in parts), start=()) == plan.intervals
    assert plan.between(1000) == plan.of_strength(1) == plan.after(0) == plan


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda plan: plan.of_strength(1.5), "strength must be between 0 and 1, not 1.5"),
        (lambda plan: plan.of_strength(math.nan), "between 0 and 1, not nan"),
        (lambda plan: plan.of_strength(0.1), "strength 0.1 of 8 steps leaves no step"),
        (lambda plan: plan.between(1000, start=0.6, end=0.6), "0.6 .* the start below the end"),
        (lambda plan: plan.between(1000, start=-0.1), "denoising_start -0.1"),
        (lambda plan: plan.between(1000, end=80), "denoising_end 80"),
        (lambda plan: plan.between(1000, end=0.1), "8 steps: none lies between denoising_start 0"),
        (lambda plan: plan.between(1000, start=0.5, end=0.51), "denoising_end 0.51; use more"),
    ],
)
def test_refuses_parts_without_steps(part: Callable[[NoisePlan], NoisePlan], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        part(plan_pndm(BASE, 8))


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    first = plan_ddim(but(zero_terminal_snr=True, spacing="trailing"), 10).intervals[0].start
    assert first == NoiseLevel(alpha=0.0, sigma=1.0, timestep=999.0)
    assert first.log_snr == -math.inf


def test_final_level() -> None:
    ends = [plan_ddim(but(final_alpha_one=one), 5).intervals[-1].end for one in (True, False)]
    assert (ends[0].alpha, ends[0].sigma) == (1.0, 0.0)
    assert ends[1].sigma == pytest.approx(math.sqrt(0.00085), rel=1e-4)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_refuses_impossible_step_counts(planner: Planner, steps: int) -> None:
    with pytest.raises(SettingsError, match="choose between 1 and 1000"):
        planner(BASE, steps)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: plan_lcm(BASE, 51), "takes at most 50"),
        (lambda: plan_squeezed_10(BASE, 5), "5 steps cannot be squeezed into 10: use 16"),
        (lambda: plan_squeezed_11(BASE, 6), "6 steps cannot be squeezed into 11: use 16"),
        (lambda: plan_squeezed_11(but(train_steps=9), 8), "cannot be squeezed"),
        (lambda: plan_ddim(BASE, 1000), "the schedule ends at 999; use fewer steps"),
        (lambda: plan_dpm(but(spacing="linspace"), 1000), "steps are too many"),
        (lambda: plan_dpm(BASE, 1000), "steps are too many"),
    ],
)
def test_refuses_steps_that_do_not_fit(plan: Callable[[], NoisePlan], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"beta_kind": "odd"},
            "unknown beta_kind 'odd': choose from linear, scaled_linear, ",
        ),
        ({"spacing": "even"}, "unknown spacing 'even': choose from leading, trailing, linspace"),
        ({"train_steps": 0}, "train_steps must be at least 1"),
        ({"offset": -1}, "offset at least 0"),
        ({"beta_start": 0.0}, "every beta must lie between 0 and 1"),
        ({"beta_end": math.nan}, "every beta must lie between 0 and 1"),
        ({"beta_kind": "explicit"}, "0 betas; an explicit schedule has one for each of its 1000"),
        ({"betas": (0.1, 0.2)}, "2 betas; .* any other kind has none"),
        ({"beta_kind": "explicit", "betas": (0.1, 2.0), "train_steps": 2}, "every beta"),
    ],
)
def test_rejects_invalid_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        but(**changes)


def test_is_plain_data() -> None:
    """The cached table is not a field that a manifest would store."""
    case = but(beta_kind="explicit", betas=(0.1, 0.2), train_steps=2)
    assert case.alphas_cumprod is case.alphas_cumprod
    assert not case.alphas_cumprod.flags.writeable
    assert msgspec.json.decode(msgspec.json.encode(case), type=Schedule) == case
