"""Samplers: each turns a denoiser and a plan into a run of latents, one yield a step.

A denoiser maps (x, level) to its guess of the clean latent, with x = alpha * clean +
sigma * noise; guidance and engines are its business. Samplers keep x in that variance-preserving
scale, where every step is finite at zero terminal SNR. Seen there, many of them differ only in
their levels and in which clean latent they aim at, so most of the work is done by three moves:

    ddim     x' = alpha' D + sigma' (x - alpha D) / sigma
    slope    x' = alpha' (x - sigma e) / alpha + sigma' e
    renoise  x' = alpha' D + sigma' (r (x - alpha D) / sigma + sqrt(1 - r**2) z)

with D a clean latent, e a noise, z fresh noise, a prime for the level arrived at, and r the
ratio of sigma' / alpha' to sigma / alpha. For e = (x - alpha D) / sigma, slope is ddim.

A new sampler is one generator function here and one row in SAMPLERS. It goes on from the latents
that it is sent, which are those it yielded unless a part of a picture was put back into them.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.schedule import (
    CLEAN,
    PLANNERS_FROM_TIMESTEPS,
    NoiseInterval,
    NoiseLevel,
    NoisePlan,
    Planner,
    Prediction,
    Schedule,
    plan_ddim,
    plan_dpm,
    plan_dpm_karras,
    plan_euler,
    plan_heun,
    plan_lcm,
    plan_pndm,
    plan_squeezed_10,
    plan_squeezed_11,
)

__all__ = ["SAMPLERS", "Array", "Denoiser", "Keep", "Noise", "Sampler", "SamplerStep", "get"]

Array = NDArray[np.float32]
Denoiser = Callable[[Array, NoiseLevel], Array]
Noise = Callable[[], Array]
Keep = Callable[[Array, NoiseLevel], Array]


@dataclass(frozen=True)
class SamplerStep:
    """What one step gave: the latents after it, and the clean latent it was heading for.

    `level` is where the step started, so the sigmas of a run fall from about 1.
    """

    index: int
    count: int
    level: NoiseLevel
    latents: Array
    denoised: Array


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every method is given beside the first latents."""

    denoise: Denoiser
    intervals: tuple[NoiseInterval, ...]
    again: tuple[NoiseInterval, ...]
    noise: Noise
    prediction: Prediction
    keep: Keep


# After each interval: the latents and the denoised out, the latents to go on from in.
_Moves = Generator[tuple[Array, Array], Array, None]
_Method = Callable[[_Run, Array], _Moves]


@dataclass(frozen=True)
class Sampler:
    """A name, a line of help, which levels to visit, and what to do between them."""

    name: str
    summary: str
    plan: Planner
    method: _Method

    @property
    def takes_timesteps(self) -> bool:
        """Whether it takes timesteps that are not its own."""
        return self.plan in PLANNERS_FROM_TIMESTEPS

    def plan_from_timesteps(self, schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
        """The plan of given timesteps, strictly falling, which need not be whole.

        Raises:
            SettingsError: the sampler has only its own, or one is not in the schedule.
        """
        if not self.takes_timesteps:
            able = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.takes_timesteps)
            raise SettingsError(f"{self.name} takes no timesteps but its own; these do: {able}")
        schedule.check(timesteps)
        return PLANNERS_FROM_TIMESTEPS[self.plan](schedule, timesteps)

    def run(
        self,
        denoise: Denoiser,
        plan: NoisePlan,
        noise: Noise,
        *,
        prediction: Prediction,
        latents: Array | None = None,
        keep: Keep | None = None,
    ) -> Iterator[SamplerStep]:
        """Sample along the plan, yielding after each of its intervals.

        Args:
            denoise: the clean latent that the network sees in (x, level).
            plan: what `plan` gave, or a part of it.
            noise: gives standard normal noise of the latents' shape; asked first for the latents
                to start from, then whenever a stochastic sampler needs more.
            prediction: what the network puts out; PNDM averages just that.
            latents: where to start instead, already at the level where the plan starts.
            keep: what to go on from instead of the latents, given them and the level where the
                next interval starts, which is clean after the last. To repaint a part of a
                picture, it puts the rest back at that level (Lugmayr et al. 2022, equation 8).
                Heun's method asks it also halfway, since it evaluates the network there.
        """
        x = _blend((plan.scale, noise())) if latents is None else latents
        task = _Run(
            denoise=denoise,
            intervals=plan.intervals,
            again=plan.again,
            noise=noise,
            prediction=prediction,
            keep=keep or _as_it_is,
        )
        moves = self.method(task, x)
        levels = [interval.start for interval in plan.intervals]
        for index, (level, following) in enumerate(pairwise([*levels, CLEAN])):
            x, denoised = moves.send(x) if index else next(moves)
            x = task.keep(x, following)
            yield SamplerStep(index, len(levels), level, x, denoised)


def _as_it_is(x: Array, _: NoiseLevel) -> Array:
    return x


# The three moves. Weights are computed in float64, arrays in float32.


def _blend(*terms: tuple[float, Array]) -> Array:
    """The weighted sum of arrays."""
    products = [np.float32(weight) * array for weight, array in terms]
    return sum(products[1:], start=products[0])


def _ddim_move(x: Array, denoised: Array, interval: NoiseInterval) -> Array:
    start, end = interval
    keep = end.sigma / start.sigma
    return _blend((keep, x), (end.alpha - keep * start.alpha, denoised))


def _slope_move(x: Array, slope: Array, interval: NoiseInterval) -> Array:
    start, end = interval
    keep = end.alpha / start.alpha
    return _blend((keep, x), (end.sigma - keep * start.sigma, slope))


def _renoise_move(x: Array, denoised: Array, interval: NoiseInterval, fresh: Array) -> Array:
    start, end = interval
    ratio = end.sigma * start.alpha / (end.alpha * start.sigma)
    keep = ratio * end.sigma / start.sigma
    spread = end.sigma * math.sqrt(1 - ratio**2)
    return _blend((keep, x), (end.alpha - keep * start.alpha, denoised), (spread, fresh))


# Methods: what happens between the levels.


def _first_order(run: _Run, x: Array) -> _Moves:
    """Song et al. (2021), equation 12 with eta 0, which is Euler's method in sigma / alpha."""
    for interval in run.intervals:
        denoised = run.denoise(x, interval.start)
        x = _ddim_move(x, denoised, interval)
        x = yield x, denoised


def _ancestral(run: _Run, x: Array) -> _Moves:
    """An Euler step to less noise than planned, and fresh noise up to it: DDPM's step."""
    for interval in run.intervals:
        denoised = run.denoise(x, interval.start)
        x = _renoise_move(x, denoised, interval, run.noise())
        x = yield x, denoised


def _heun(run: _Run, x: Array) -> _Moves:
    """Karras et al. (2022), algorithm 1: two evaluations a step, one in the last."""
    for interval in run.intervals:
        denoised = run.denoise(x, interval.start)
        ahead = _ddim_move(x, denoised, interval)
        if interval.end.sigma > 0:
            ahead = run.keep(ahead, interval.end)
            slope = _noise_in(x, denoised, interval.start)
            denoised = run.denoise(ahead, interval.end)
            mean = _blend((1 / 2, slope), (1 / 2, _noise_in(ahead, denoised, interval.end)))
            ahead = _slope_move(x, mean, interval)
        x = yield ahead, denoised


# For the mean of a function over the next step from its last values, latest first.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _pndm(run: _Run, x: Array) -> _Moves:
    """Liu et al. (2022), equation 12: linear multistep over the network's own outputs.

    The first step has no history to use. So where the plan says how, the second evaluation takes
    that step again, from where it began, with the mean of the outputs at both ends.
    """
    outputs: list[Array] = []
    origin = x
    for index, interval in enumerate(run.intervals):
        denoised = run.denoise(x, interval.start)
        output = _output(x, denoised, interval.start, run.prediction)
        if index == 1 and run.again:
            interval = run.again[0]
            x, mixed = origin, _blend((1 / 2, output), (1 / 2, outputs[0]))
        else:
            outputs = [output, *outputs[:3]]
            mixed = _blend(*zip(_ADAMS_BASHFORTH[len(outputs) - 1], outputs, strict=True))
        x = _slope_move(x, _slope_of(x, mixed, interval.start, run.prediction), interval)
        x = yield x, denoised


def _dpmpp_2m(run: _Run, x: Array, aim: "_Aim") -> _Moves:
    """DPM-Solver++(2M): Lu et al. (2022, arXiv 2211.01095), algorithm 2, which aims _midway."""
    last: _Evaluation | None = None
    for interval in run.intervals:
        now = _Evaluation(interval.start, run.denoise(x, interval.start))
        x = _ddim_move(x, aim(now, last, interval), interval)
        last = now
        x = yield x, now.denoised


def _dpmpp_2m_sde(run: _Run, x: Array) -> _Moves:
    """SDE-DPM-Solver++(2M) of the same paper: the noise of the step is drawn anew."""
    last: _Evaluation | None = None
    for interval in run.intervals:
        now = _Evaluation(interval.start, run.denoise(x, interval.start))
        x = _renoise_move(x, _midway(now, last, interval), interval, run.noise())
        last = now
        x = yield x, now.denoised


def _unipc(run: _Run, x: Array) -> _Moves:
    """UniPC of order two on the clean latent, with B2(h): Zhao et al. (2023, arXiv 2302.04867).

    Each evaluation first corrects the step that led to it, which makes it third order in all;
    UniP-2, which is DPM-Solver++(2M), then predicts the next.
    """
    last: _Evaluation | None = None
    before: _Evaluation | None = None
    origin = x
    for interval in run.intervals:
        now = _Evaluation(interval.start, run.denoise(x, interval.start))
        if last is not None:
            x = _ddim_move(
                origin, _corrected(now, last, before), NoiseInterval(last.level, now.level)
            )
        origin = x
        x = _ddim_move(x, _midway(now, last, interval), interval)
        before, last = last, now
        x = yield x, now.denoised


def _lcm(run: _Run, x: Array) -> _Moves:
    """Multistep latent consistency sampling, Luo et al. (2023, arXiv 2310.04378).

    Each step jumps to the clean latent; all but the last noise it again.
    """
    for interval in run.intervals:
        start, end = interval
        # The boundary condition of consistency models, with sigma_data 0.5 and 10 t for the time.
        time = 10 * start.timestep
        skip, out = 0.25 / (time**2 + 0.25), time / math.sqrt(time**2 + 0.25)
        denoised = _blend((out, run.denoise(x, start)), (skip, x))
        x = _blend((end.alpha, denoised), (end.sigma, run.noise())) if end.sigma else denoised
        x = yield x, denoised


# What the methods share.


class _Evaluation(NamedTuple):
    """What the denoiser said at a level."""

    level: NoiseLevel
    denoised: Array


_Aim = Callable[[_Evaluation, _Evaluation | None, NoiseInterval], Array]


def _midway(now: _Evaluation, last: _Evaluation | None, interval: NoiseInterval) -> Array:
    """The clean latent extrapolated halfway into the interval, unless it ends without noise."""
    if last is None or interval.end.sigma == 0:
        return now.denoised
    return _extrapolated(now, last, interval, 1 / 2)


def _mean(now: _Evaluation, last: _Evaluation | None, interval: NoiseInterval) -> Array:
    """The mean over the interval of the clean latent on a line through the last two.

    Its weights are those of the exact solution, proposition 4.1 of the paper, where algorithm 2 and
    _midway take the value at the middle: diffusers has both, and calls this one "heun". The step
    to the first training step is first order, as it is there in runs of less than 15 steps.
    """
    if last is None or interval.end.timestep == 0:
        return now.denoised
    h = interval.end.log_snr - now.level.log_snr
    return _extrapolated(now, last, interval, -1 / math.expm1(-h) - 1 / h)


def _extrapolated(
    now: _Evaluation, last: _Evaluation, interval: NoiseInterval, fraction: float
) -> Array:
    """The clean latent on that line, so far into the interval in log(alpha / sigma)."""
    h = interval.end.log_snr - now.level.log_snr
    weight = fraction * h / (now.level.log_snr - last.level.log_snr)
    return _blend((1 + weight, now.denoised), (-weight, last.denoised))


def _corrected(now: _Evaluation, last: _Evaluation, before: _Evaluation | None) -> Array:
    """The clean latent whose DDIM move from last to now is that of UniC with B2(h)."""
    if before is None:
        return _blend((1 / 2, last.denoised), (1 / 2, now.denoised))
    h = now.level.log_snr - last.level.log_snr
    r = (before.level.log_snr - last.level.log_snr) / h
    shrink = math.expm1(-h)
    phi_2 = shrink / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    # Weights of the two changes from last: a + b = phi_2 / B and a r + b = 2 phi_3 / B.
    a = (phi_2 - 2 * phi_3) / shrink / (1 - r)
    b = phi_2 / shrink - a
    return _blend((1 - a / r - b, last.denoised), (a / r, before.denoised), (b, now.denoised))


def _noise_in(x: Array, denoised: Array, level: NoiseLevel) -> Array:
    return _blend((1 / level.sigma, x), (-level.alpha / level.sigma, denoised))


def _output(x: Array, denoised: Array, level: NoiseLevel, prediction: Prediction) -> Array:
    """What the network put out: epsilon = noise, or v = alpha * noise - sigma * clean."""
    if prediction == "epsilon":
        return _noise_in(x, denoised, level)
    return _blend((level.alpha / level.sigma, x), (-1 / level.sigma, denoised))


def _slope_of(x: Array, output: Array, level: NoiseLevel, prediction: Prediction) -> Array:
    """The noise that an output stands for at x."""
    return output if prediction == "epsilon" else _blend((level.alpha, output), (level.sigma, x))


_at_the_middle = partial(_dpmpp_2m, aim=_midway)
_on_the_mean = partial(_dpmpp_2m, aim=_mean)

_ROWS = (
    Sampler("ddim", "first order, deterministic (Song et al. 2021)", plan_ddim, _first_order),
    Sampler("pndm", "linear multistep of order four (Liu et al. 2022)", plan_pndm, _pndm),
    Sampler("euler", "first order (Karras et al. 2022)", plan_euler, _first_order),
    Sampler("euler_ancestral", "Euler, with fresh noise at each step", plan_euler, _ancestral),
    Sampler("heun", "second order, two evaluations a step", plan_heun, _heun),
    Sampler("dpmpp_2m", "DPM-Solver++, second order multistep", plan_dpm, _at_the_middle),
    Sampler("dpmpp_2m_karras", "dpmpp_2m at Karras' levels", plan_dpm_karras, _at_the_middle),
    Sampler("dpmpp_2m_sde", "dpmpp_2m, with fresh noise at each step", plan_dpm, _dpmpp_2m_sde),
    Sampler(
        "dpmpp_2m_sde_karras", "dpmpp_2m_sde at Karras' levels", plan_dpm_karras, _dpmpp_2m_sde
    ),
    Sampler(
        "unipc", "UniPC, second order predictor and corrector (Zhao et al. 2023)", plan_dpm, _unipc
    ),
    Sampler(
        "squeezed_10",
        "DeciDiffusion 2.0's: 16 steps squeezed into 10",
        plan_squeezed_10,
        _on_the_mean,
    ),
    Sampler(
        "squeezed_11",
        "DeciDiffusion 2.0's: 16 steps squeezed into 11",
        plan_squeezed_11,
        _on_the_mean,
    ),
    Sampler("lcm", "for latent consistency models, 1 to 8 steps (Luo et al. 2023)", plan_lcm, _lcm),
)

SAMPLERS: Mapping[str, Sampler] = MappingProxyType({sampler.name: sampler for sampler in _ROWS})


def get(name: str) -> Sampler:
    """The sampler of that name."""
    if name not in SAMPLERS:
        raise SettingsError(f"no sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
