"""UniPC of order two on the clean latent, with B2(h): Zhao et al. (2023), arXiv 2302.04867."""

import math

from latentforge.runtime.sampling.dpmpp_2m import plan_dpm, plan_dpm_from_timesteps
from latentforge.runtime.sampling.levels import NoiseInterval
from latentforge.runtime.sampling.moves import blend, ddim_move
from latentforge.runtime.sampling.multistep import Evaluation, midpoint
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)

__all__ = ["UNIPC"]


def _unipc(run: SamplerRun, x: Array) -> Updates:
    """Correct each step by the evaluation at its end, then predict the next step.

    The corrector makes the method third order. The predictor UniP-2 is DPM-Solver++(2M).
    """
    last: Evaluation | None = None
    before: Evaluation | None = None
    origin = x
    for interval in run.plan.intervals:
        now = Evaluation(interval.start, run.denoise(x, interval.start))
        if last is not None:
            step = NoiseInterval(last.level, now.level)
            x = ddim_move(origin, _corrected(now, last, before), step)
        origin = x
        x = ddim_move(x, midpoint(now, last, interval), interval)
        before, last = last, now
        x = yield x, now.denoised


def _corrected(now: Evaluation, last: Evaluation, before: Evaluation | None) -> Array:
    """Return the clean latent whose DDIM move from last to now equals that of UniC with B2(h)."""
    if before is None:
        return blend((1 / 2, last.denoised), (1 / 2, now.denoised))
    h = now.level.log_snr - last.level.log_snr
    r = (before.level.log_snr - last.level.log_snr) / h
    shrink = math.expm1(-h)
    phi_2 = shrink / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    # Weights of the two changes from last: a + b = phi_2 / B and a r + b = 2 phi_3 / B.
    a = (phi_2 - 2 * phi_3) / shrink / (1 - r)
    b = phi_2 / shrink - a
    return blend((1 - a / r - b, last.denoised), (a / r, before.denoised), (b, now.denoised))


UNIPC = Sampler(
    name="unipc",
    summary="UniPC, second order predictor and corrector (Zhao et al. 2023)",
    plan=plan_dpm,
    plan_from_timesteps=plan_dpm_from_timesteps,
    method=_unipc,
    diffusers=DiffusersScheduler(name="UniPCMultistepScheduler"),
)
