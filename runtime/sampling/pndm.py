"""PNDM without Runge-Kutta steps (PLMS): Liu et al. (2022), arXiv 2202.09778."""

from msgspec.structs import replace

from latentforge.runtime.sampling.ddim import plan_ddim
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan
from latentforge.runtime.sampling.moves import blend, noise_move
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["ADAMS_BASHFORTH", "PNDM", "plan_pndm"]

# Weights of the mean of a function over the next step, from its last values, latest first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plan_pndm(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan DDIM's steps, the first of them twice because it is the only one without a history.

    diffusers' PNDM does not rescale to zero terminal SNR. Unlike its DDIM, it ends on the first
    training timestep by default.
    """
    ends_clean = schedule.final_alpha_one is True
    schedule = replace(schedule.followed(()), zero_terminal_snr=False, final_alpha_one=ends_clean)
    first, *rest = plan_ddim(schedule, steps).intervals
    if not rest:
        return NoisePlan((first,))
    intervals, stride = (first, rest[0], *rest), schedule.train_steps // steps
    repeats = [NoiseInterval(schedule.at(t.timestep + stride), t) for t, _ in intervals[1:]]
    return NoisePlan(intervals, repeat_intervals=tuple(repeats))


def _pndm(run: SamplerRun, x: Array) -> Updates:
    """Step as in equation 12: linear multistep over the network's own outputs.

    The first step has no history. If the plan has repeat_intervals, the second evaluation repeats
    that step from where it began, with the mean of the outputs at both of its ends.
    """
    outputs: list[Array] = []
    origin = x
    for index, interval in enumerate(run.plan.intervals):
        level = interval.start
        denoised = run.denoise(x, level)
        output = run.prediction.output(x, denoised, level)
        if index == 1 and run.plan.repeat_intervals:
            interval = run.plan.repeat_intervals[0]
            x, mean = origin, blend((1 / 2, output), (1 / 2, outputs[0]))
        else:
            outputs = [output, *outputs[:3]]
            mean = blend(*zip(ADAMS_BASHFORTH[len(outputs) - 1], outputs, strict=True))
        x = noise_move(x, run.prediction.noise(x, mean, interval.start), interval)
        x = yield x, denoised


PNDM = Sampler(
    name="pndm",
    summary="linear multistep of order four (Liu et al. 2022)",
    plan=plan_pndm,
    plan_from_timesteps=None,
    method=_pndm,
    diffusers=DiffusersScheduler(name="PNDMScheduler", options={"skip_prk_steps": True}),
)
