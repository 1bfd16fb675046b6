"""Noise schedules, and which of their levels each family of samplers visits.

A schedule says how much noise the network saw at each of its training timesteps. A latent at
timestep t is x = alpha * clean + sigma * noise, with alpha**2 the cumulative product of 1 - beta
up to t and alpha**2 + sigma**2 = 1 (Ho et al. 2020, equation 4). Samplers differ in which
timesteps they visit: Lin et al. (2023, arXiv 2305.08891, table 2) name three spacings, and the
diffusers schedulers, whose choices are followed here to the last rounding, read each in their
own way. A planner turns a schedule and a number of steps into a Plan; there is one for each way.
Where the timesteps may be anybody's, a follower makes the Plan of given ones.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from latentforge.runtime.errors import ManifestError, SettingsError

__all__ = [
    "CLEAN",
    "PLANNERS_FROM_TIMESTEPS",
    "BetaKind",
    "Follower",
    "NoiseInterval",
    "NoiseLevel",
    "NoisePlan",
    "Planner",
    "Prediction",
    "Schedule",
    "Spacing",
    "plan_ddim_from_timesteps",
    "plan_dpm_from_timesteps",
    "plan_euler_from_timesteps",
    "plan_heun_from_timesteps",
    "plan_lcm_from_timesteps",
    "plan_ddim",
    "plan_dpm",
    "plan_dpm_karras",
    "plan_euler",
    "plan_heun",
    "plan_lcm",
    "plan_pndm",
    "plan_squeezed_10",
    "plan_squeezed_11",
]

BetaKind = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "explicit"]
Spacing = Literal["leading", "trailing", "linspace"]

_SPACINGS = get_args(Spacing)
Prediction = Literal["epsilon", "v_prediction"]

_NEARLY_ZERO = 2.0**-24  # stands in for alpha**2 = 0 where a sampler works with sigma / alpha
_LCM_STEPS = 50  # how many levels a latent consistency model was distilled on
_KARRAS_RHO = 7.0
_SQUEEZED_FROM = 16  # the number of steps that Deci's squeezing is made for
_SQUEEZED_LOG_SNR = -7.5  # training steps below it are left out


class NoiseLevel(NamedTuple):
    """One point of a schedule: x = alpha * clean + sigma * noise.

    Both are finite at zero terminal SNR, where alpha is 0. The timestep is what the network is
    told, and need not be whole; at a level that is only arrived at, nobody asks for it.
    """

    alpha: float
    sigma: float
    timestep: float

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), the lambda of Lu et al. (2022); infinite where either is 0."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = NoiseLevel(1.0, 0.0, 0.0)
"""No noise at all: where most samplers end."""


class NoiseInterval(NamedTuple):
    """One step of a sampler: from one noise level to a lower one (or, at the end, the same)."""

    start: NoiseLevel
    end: NoiseLevel


@dataclass(frozen=True)
class NoisePlan:
    """The steps of one run. Usually an interval starts where the last one ended, but not always.

    Sampling starts from `scale` times standard normal noise, or from a latent noised to where
    the first interval starts, as it must once intervals were dropped from the front.

    Attributes:
        intervals: one for each evaluation of the network, or for each two of Heun's.
        scale: the standard deviation of the first latents.
        again: PNDM's second evaluation takes the first step again and leaves its own interval
            out. For every interval but the first, this is the one to take if it comes second.
    """

    intervals: tuple[NoiseInterval, ...]
    scale: float = 1.0
    again: tuple[NoiseInterval, ...] = ()

    @property
    def steps(self) -> int:
        """How many steps a whole plan has, of which PNDM's repetition is none."""
        return len(self.intervals) - bool(self.again)

    def after(self, count: int) -> "NoisePlan":
        """The plan without its first intervals, to start late: no step knows of those dropped.

        For PNDM this is what diffusers does and hardly what it means: the new second step is the
        one that becomes a repetition, so the part it was to cover is never covered.
        """
        intervals, again = self.intervals[count:], self.again[count:]
        return dataclasses.replace(self, intervals=intervals, again=again)

    def until(self, count: int) -> "NoisePlan":
        """The first intervals alone, to end early; none of them becomes a last step by that."""
        return dataclasses.replace(self, intervals=self.intervals[:count])

    def of_strength(self, strength: float) -> "NoisePlan":
        """The last part of a whole plan, which repaints a picture as much as strength says.

        That is SDEdit (Meng et al. 2022), its steps rounded down as diffusers rounds them.

        Raises:
            SettingsError: no step is left.
        """
        if not 0 <= strength <= 1:
            raise SettingsError(f"strength lies between 0 and 1; {strength:g} does not")
        kept = int(self.steps * strength)
        if not kept:
            raise SettingsError(
                f"strength {strength:g} of {self.steps} steps leaves none; take more of either"
            )
        return self.after(self.steps - kept)

    def between(self, schedule: "Schedule", *, start: float = 0.0, end: float = 1.0) -> "NoisePlan":
        """The steps of a whole plan that lie between two fractions of the way to the picture.

        These are diffusers' denoising_start and denoising_end, with which one model hands over
        to another (Podell et al. 2023, arXiv 2307.01952, section 2.5). Parts that share a
        boundary share no step and leave none out, also of Heun's, where diffusers does half of
        one in the first part and all of it again in the second.

        Raises:
            SettingsError: no step is left.
        """
        if not 0 <= start < end <= 1:
            raise SettingsError(
                f"denoising_start {start:g} and denoising_end {end:g}: take two numbers between "
                "0 and 1, the start the lower"
            )
        total = schedule.train_steps
        skipped, kept = (
            sum(level.timestep >= round(total - part * total) for level, _ in self.intervals)
            for part in (start, end)
        )
        if skipped >= kept:
            raise SettingsError(
                f"{self.steps} steps: none lies between denoising_start {start:g} and "
                f"denoising_end {end:g}; take more"
            )
        return self.until(kept).after(skipped)


Planner = Callable[["Schedule", int], NoisePlan]

Follower = Callable[["Schedule", Sequence[float]], NoisePlan]
"""Makes a Plan of timesteps, strictly falling, that need not be whole."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A checkpoint's noise schedule: plain data, stored in the manifest under "schedule".

    Where spacing or final_alpha_one is None, each sampler takes what diffusers takes for it.
    """

    train_steps: int = 1000
    beta_kind: BetaKind
    beta_start: float
    beta_end: float
    betas: tuple[float, ...] = ()  # one for each training step, when beta_kind is "explicit"
    spacing: Spacing | None
    offset: int  # added to "leading" timesteps
    zero_terminal_snr: bool  # rescale, so that the last training step is pure noise
    final_alpha_one: (
        bool | None
    )  # DDIM and PNDM end on the clean latent, not on the first training step

    def __post_init__(self) -> None:
        for name, known in (("beta_kind", get_args(BetaKind)), ("spacing", (*_SPACINGS, None))):
            if getattr(self, name) not in known:
                names = ", ".join(filter(None, known))
                raise ManifestError(
                    f"schedule: no {name} {getattr(self, name)!r}; there are {names}"
                )
        if self.train_steps < 1 or self.offset < 0:
            raise ManifestError("schedule: train_steps is at least 1, and offset at least 0")
        if len(self.betas) != (self.train_steps if self.beta_kind == "explicit" else 0):
            raise ManifestError(
                f"schedule: {len(self.betas)} betas; an explicit schedule has one for each of its "
                f"{self.train_steps} training steps, and any other has none"
            )
        if not all(0 < beta < 1 for beta in self.betas or (self.beta_start, self.beta_end)):
            raise ManifestError("schedule: every beta lies between 0 and 1")

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float32]:
        """alpha**2 at each training timestep, rounded to float32 where torch does."""
        betas = self._betas()
        if self.zero_terminal_snr:
            betas = _rescaled(betas)
        product = _cumprod(np.float32(1) - betas)
        product.setflags(write=False)
        return product

    def at(self, timestep: float) -> NoiseLevel:
        """The level of a whole training timestep; below the first lies the final level."""
        index = int(timestep)
        if index >= self.train_steps:
            raise SettingsError(
                f"timestep {index}: the schedule ends at {self.train_steps - 1}; take fewer steps"
            )
        if index < 0 and self.final_alpha_one is not False:
            return CLEAN
        square = self.alphas_cumprod[max(index, 0)]
        sigma = math.sqrt(np.float32(1) - square)
        return NoiseLevel(math.sqrt(square), sigma, float(timestep))

    def level(self, timestep: float) -> NoiseLevel:
        """The level of any timestep: between whole ones, sigma / alpha is on a line."""
        return self.at(timestep) if timestep == int(timestep) else _levels_at(self, [timestep])[0]

    def check(self, timesteps: Sequence[float]) -> None:
        """Refuse timesteps that the network was never trained for.

        Raises:
            SettingsError: one lies outside of the schedule.
        """
        for timestep in timesteps:
            if not 0 <= timestep <= self.train_steps - 1:
                raise SettingsError(
                    f"timestep {timestep:g} is not in the schedule, which has those from 0 to "
                    f"{self.train_steps - 1}"
                )

    def _betas(self) -> NDArray[np.float32]:
        match self.beta_kind:
            case "linear":
                return _linspace(self.beta_start, self.beta_end, self.train_steps)
            case "scaled_linear":  # latent diffusion's: linear in the square root
                ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
                return np.square(_linspace(*ends, self.train_steps))
            case "squaredcos_cap_v2":
                return _cosine_betas(self.train_steps)
            case "explicit":
                return np.array(self.betas, np.float32)


# Betas, rounded as torch rounds them.


def _linspace(first: float, last: float, count: int) -> NDArray[np.float32]:
    """torch.linspace in float32: counted from the nearer end, each value rounded once."""
    start, stop = np.float32(first), np.float32(last)
    step = float((stop - start) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = start + step * index, float(stop) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), rising, falling).astype(np.float32)


def _cosine_betas(count: int) -> NDArray[np.float32]:
    """Nichol & Dhariwal (2021), equation 17, with beta capped at 0.999."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [index / count for index in range(count + 1)]
    betas = [min(1 - alpha_bar(after) / alpha_bar(t), 0.999) for t, after in pairwise(times)]
    return np.array(betas, np.float32)


def _rescaled(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shift and scale alpha to end at 0: Lin et al. (2023), algorithm 1.

    The square root is rounded to nearest. The one torch takes from MKL is not always, so its
    tables may differ from this in the last bit.
    """
    alpha = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = alpha[0], alpha[-1]
    squared = np.square((alpha - last) * (first / (first - last)))
    ratios: NDArray[np.float32] = np.concatenate([squared[:1], squared[1:] / squared[:-1]])
    return np.float32(1) - ratios


def _cumprod(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """torch.cumprod on the CPU: accumulated in float64, every result rounded to float32."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


# Planners: which levels each family of samplers visits.


def plan_ddim(schedule: Schedule, steps: int) -> NoisePlan:
    """Whole timesteps, each left by one stride: a step need not end where the next one starts."""
    stride = schedule.train_steps // _checked(schedule, steps)
    times = np.round(_spaced(schedule, steps, "leading")).tolist()
    return NoisePlan(tuple(NoiseInterval(schedule.at(t), schedule.at(t - stride)) for t in times))


def plan_pndm(schedule: Schedule, steps: int) -> NoisePlan:
    """DDIM's steps with the first one taken again, since it is the only one with no history.

    diffusers' PNDM knows no rescaling to zero terminal SNR, and unlike its DDIM ends on the first
    training step unless told otherwise.
    """
    ends_clean = schedule.final_alpha_one is True
    schedule = replace(schedule, zero_terminal_snr=False, final_alpha_one=ends_clean)
    first, *rest = plan_ddim(schedule, steps).intervals
    if not rest:
        return NoisePlan((first,))
    intervals, stride = (first, rest[0], *rest), schedule.train_steps // steps
    again = [NoiseInterval(schedule.at(t.timestep + stride), t) for t, _ in intervals[1:]]
    return NoisePlan(intervals, again=tuple(again))


def plan_euler(schedule: Schedule, steps: int) -> NoisePlan:
    """Timesteps that need not be whole, down to the clean latent.

    The first latent is noise of standard deviation sigma unless the spacing is "leading", where
    it is 1: the two ways in which diffusers starts, told apart by the spacing.
    """
    times = _spaced(schedule, _checked(schedule, steps), "linspace").astype(np.float32)
    return plan_euler_from_timesteps(schedule, times.tolist())


def plan_heun(schedule: Schedule, steps: int) -> NoisePlan:
    """Euler's levels; diffusers' Heun knows no rescaling to zero terminal SNR."""
    return plan_euler(replace(schedule, zero_terminal_snr=False), steps)


def plan_dpm(schedule: Schedule, steps: int) -> NoisePlan:
    """Whole timesteps spaced as if the clean latent were one of them, for DPM-Solver and UniPC."""
    extra = schedule.spacing != "trailing"
    times = np.round(_spaced(schedule, _checked(schedule, steps) + extra, "linspace"))[:steps]
    return plan_dpm_from_timesteps(schedule, times.tolist())


def plan_dpm_karras(schedule: Schedule, steps: int) -> NoisePlan:
    """sigma / alpha as in Karras et al. (2022), equation 5, over the schedule's whole range."""
    ratios = _ratios(schedule)
    ends = float(ratios[-1]) ** (1 / _KARRAS_RHO), float(ratios[0]) ** (1 / _KARRAS_RHO)
    ramp = np.linspace(0, 1, _checked(schedule, steps))
    chosen = (ends[0] + ramp * (ends[1] - ends[0])) ** _KARRAS_RHO
    times = _timesteps_of(ratios, chosen)
    # diffusers means to feed the cosine schedule fractions, but drops them.
    whole = np.floor(times) if schedule.beta_kind == "squaredcos_cap_v2" else np.round(times)
    return NoisePlan(_chain(_levels(chosen, whole)))


def plan_lcm(schedule: Schedule, steps: int) -> NoisePlan:
    """An even choice of the 50 levels of distillation, highest first (Luo et al. 2023, 4.3)."""
    limit = min(_LCM_STEPS, schedule.train_steps)
    if _checked(schedule, steps) > limit:
        raise SettingsError(f"{steps} steps: a latent consistency model takes at most {limit}")
    skip = schedule.train_steps // limit
    index = np.linspace(0, limit, steps, endpoint=False).astype(np.int64)
    return plan_lcm_from_timesteps(schedule, [(limit - i) * skip - 1 for i in index.tolist()])


def _plan_squeezed(schedule: Schedule, steps: int, *, count: int, kept: int) -> NoisePlan:
    """DeciDiffusion 2.0's: the first few of the planned steps, then fewer and longer ones.

    `steps` are those before squeezing; there are always `count` after it, evenly spaced below
    the last that is kept. Timesteps are plan_dpm's in "linspace", without the noisiest training
    steps. There is no rescaling to zero terminal SNR, and the last step ends on the first
    training step.
    """
    schedule = replace(schedule, zero_terminal_snr=False)
    total = np.searchsorted(_ratios(schedule), math.exp(-_SQUEEZED_LOG_SNR), side="right")
    planned = np.round(np.linspace(0, total - 1, _checked(schedule, steps) + 1)[:0:-1])
    stride = planned[kept - 1] // (count - kept + 1) if steps >= kept else 0
    if not stride:
        raise SettingsError(
            f"{steps} steps cannot be squeezed into {count}; take {_SQUEEZED_FROM}, as is usual"
        )
    times = np.append(planned[:kept], stride * np.arange(count - kept, -1, -1))
    return NoisePlan(_chain(_levels_at(schedule, times.tolist()))[:-1])


plan_squeezed_10: Planner = partial(_plan_squeezed, count=10, kept=6)
"""Deci's squeeze mode "10,6"."""

plan_squeezed_11: Planner = partial(_plan_squeezed, count=11, kept=7)
"""Deci's squeeze mode "11,7"."""


# Followers: levels of timesteps that anybody chose. Each step ends where the next one starts.


def plan_ddim_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Down to what plan_ddim ends on, by the last of the strides."""
    stride = timesteps[-2] - timesteps[-1] if len(timesteps) > 1 else schedule.train_steps
    last = schedule.at(min(timesteps[-1] - stride, -1))
    levels = [*(schedule.level(t) for t in timesteps), last]
    return NoisePlan(tuple(NoiseInterval(*pair) for pair in pairwise(levels)))


def plan_euler_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Down to the clean latent, starting as plan_euler does."""
    levels = _levels_at(schedule, timesteps)
    scale = 1.0 if schedule.spacing == "leading" else levels[0].sigma
    return NoisePlan(_chain(levels), scale)


def plan_heun_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Euler's, without a rescaling to zero terminal SNR."""
    return plan_euler_from_timesteps(replace(schedule, zero_terminal_snr=False), timesteps)


def plan_dpm_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Down to the clean latent, for DPM-Solver and UniPC."""
    return NoisePlan(_chain(_levels_at(schedule, timesteps)))


def plan_lcm_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Down to the clean latent, whether or not the model was distilled on these."""
    return NoisePlan(_chain([schedule.level(t) for t in timesteps]))


PLANNERS_FROM_TIMESTEPS: Mapping[Planner, Follower] = MappingProxyType(
    {
        plan_ddim: plan_ddim_from_timesteps,
        plan_euler: plan_euler_from_timesteps,
        plan_heun: plan_heun_from_timesteps,
        plan_dpm: plan_dpm_from_timesteps,
        plan_lcm: plan_lcm_from_timesteps,
    }
)
"""By the planner whose levels they have. The others' levels are no function of timesteps."""


def _checked(schedule: Schedule, steps: int) -> int:
    if not 1 <= steps <= schedule.train_steps:
        raise SettingsError(f"{steps} steps: take between 1 and {schedule.train_steps}")
    return steps


def _spaced(schedule: Schedule, count: int, habit: Spacing) -> NDArray[np.float64]:
    """Falling timesteps in one of the three spacings of Lin et al. (2023), table 2.

    The habit of a sampler is the spacing that it takes where the schedule names none.
    """
    total = schedule.train_steps
    match schedule.spacing or habit:
        case "leading":
            return np.arange(float(count))[::-1] * (total // count) + schedule.offset
        case "trailing":
            return np.round(np.arange(total, 0.0, -total / count)[:count]) - 1
        case "linspace":
            return np.linspace(0, total - 1, count)[::-1]


def _ratios(schedule: Schedule) -> NDArray[np.float32]:
    """sigma / alpha at each training timestep, kept finite at zero terminal SNR."""
    square = schedule.alphas_cumprod.copy()
    if schedule.zero_terminal_snr:
        square[-1] = _NEARLY_ZERO
    ratios: NDArray[np.float32] = np.sqrt((np.float32(1) - square) / square)
    return ratios


def _ratios_at(schedule: Schedule, times: NDArray[np.floating]) -> NDArray[np.float64]:
    ratios = _ratios(schedule)
    return np.asarray(np.interp(times, np.arange(len(ratios)), ratios), np.float64)


def _timesteps_of(ratios: NDArray[np.float32], chosen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the chosen values of sigma / alpha lie between the timesteps, by their logarithms."""
    logs, target = np.log(ratios), np.log(chosen)
    below = np.clip(np.searchsorted(logs, target, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[below] - target) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1), np.float64)


def _levels_at(schedule: Schedule, timesteps: Sequence[float]) -> list[NoiseLevel]:
    """The levels of timesteps, with sigma / alpha on a line between those of whole ones."""
    times = np.array(timesteps, np.float64)
    return _levels(_ratios_at(schedule, times), times)


def _levels(ratios: NDArray[np.float64], times: NDArray[np.floating]) -> list[NoiseLevel]:
    """Levels from sigma / alpha, which diffusers rounds to float32."""
    levels = []
    for ratio, time in zip(ratios.astype(np.float32).tolist(), times.tolist(), strict=True):
        alpha = 1 / math.hypot(ratio, 1)
        levels.append(NoiseLevel(alpha, ratio * alpha, time))
    return levels


def _chain(levels: Sequence[NoiseLevel]) -> tuple[NoiseInterval, ...]:
    """Each level to the next, and the last to the clean latent."""
    intervals = tuple(NoiseInterval(*pair) for pair in pairwise([*levels, CLEAN]))
    for start, end in intervals:
        if start.log_snr >= end.log_snr:
            raise SettingsError(
                f"{len(levels)} steps are too many: the one at timestep {start.timestep:g} would "
                "remove no noise; take fewer"
            )
    return intervals
