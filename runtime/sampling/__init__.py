"""Samplers by name.

A new sampler is one module here, with its noise plan, its method and the name of its diffusers
counterpart, and one row in the table below.
"""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from types import MappingProxyType

import numpy as np

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.ddim import DDIM
from latentforge.runtime.sampling.ddpm import DDPM
from latentforge.runtime.sampling.deis import DEIS
from latentforge.runtime.sampling.dpm_2m import DPM_2M, DPM_2M_SDE
from latentforge.runtime.sampling.dpmpp_2m import DPMPP_2M, DPMPP_2M_KARRAS
from latentforge.runtime.sampling.dpmpp_2m_sde import DPMPP_2M_SDE, DPMPP_2M_SDE_KARRAS
from latentforge.runtime.sampling.dpmpp_2s import DPM_2S, DPMPP_2S, DPMPP_2S_SDE
from latentforge.runtime.sampling.edm import EDM_DPMPP_2M, EDM_DPMPP_2M_SDE, EDM_EULER
from latentforge.runtime.sampling.euler import EULER
from latentforge.runtime.sampling.euler_ancestral import EULER_ANCESTRAL
from latentforge.runtime.sampling.heun import HEUN
from latentforge.runtime.sampling.kdpm2 import KDPM2
from latentforge.runtime.sampling.kdpm2_ancestral import KDPM2_ANCESTRAL
from latentforge.runtime.sampling.lcm import LCM
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.sampling.lms import LMS
from latentforge.runtime.sampling.pndm import PNDM
from latentforge.runtime.sampling.pndm_prk import PNDM_PRK
from latentforge.runtime.sampling.sampler import Sampler
from latentforge.runtime.sampling.schedule import EDMSchedule, Schedule
from latentforge.runtime.sampling.squeezed import SQUEEZED_10, SQUEEZED_11
from latentforge.runtime.sampling.tcd import TCD
from latentforge.runtime.sampling.unipc import UNIPC

__all__ = ["SAMPLERS", "get", "noise_plan", "plain"]

_ROWS = (
    DDIM,
    PNDM,
    PNDM_PRK,
    EULER,
    EULER_ANCESTRAL,
    HEUN,
    LMS,
    KDPM2,
    KDPM2_ANCESTRAL,
    DPMPP_2M,
    DPMPP_2M_KARRAS,
    DPMPP_2M_SDE,
    DPMPP_2M_SDE_KARRAS,
    DPMPP_2S,
    DPMPP_2S_SDE,
    DPM_2M,
    DPM_2M_SDE,
    DPM_2S,
    DEIS,
    UNIPC,
    DDPM,
    SQUEEZED_10,
    SQUEEZED_11,
    LCM,
    TCD,
    EDM_EULER,
    EDM_DPMPP_2M,
    EDM_DPMPP_2M_SDE,
)

SAMPLERS: Mapping[str, Sampler] = MappingProxyType({sampler.name: sampler for sampler in _ROWS})
"""All samplers by name."""


def get(name: str) -> Sampler:
    """Return the sampler of a name.

    Raises:
        SettingsError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise SettingsError(f"no sampler {reprlib.repr(name)}: choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def plain(schedule: Schedule | EDMSchedule) -> str:
    """Return the name of a first-order sampler of this kind of schedule, without fresh noise."""
    return (EULER if isinstance(schedule, Schedule) else EDM_EULER).name


def noise_plan(
    name: str, schedule: Schedule | EDMSchedule, steps: int, timesteps: Sequence[float] = ()
) -> NoisePlan:
    """Return the complete plan of a sampler.

    Args:
        name: of the sampler.
        schedule: of the checkpoint.
        steps: number of steps; ignored if there are timesteps.
        timesteps: strictly decreasing, may be fractional; the sampler's own if empty.

    Raises:
        SettingsError: there is no such sampler, it cannot take these steps or timesteps, or one of
            them is not in the schedule.
    """
    return _kept_plan(name, schedule, steps, tuple(timesteps))


@lru_cache(maxsize=16, typed=True)
def _kept_plan(
    name: str, schedule: Schedule | EDMSchedule, steps: int, timesteps: tuple[float, ...]
) -> NoisePlan:
    """Return a plan, of which the last ones are kept: a server needs the same for each request."""
    sampler = get(name)
    if not isinstance(schedule, sampler.schedule):
        raise SettingsError(_other_kind(sampler, schedule))
    try:
        with np.errstate(all="ignore"):
            plan = _noise_plan(sampler, schedule, steps, timesteps)
    except (ArithmeticError, ValueError, IndexError) as error:
        raise SettingsError(_no_plan(name, steps, str(error))) from error
    if not all(map(math.isfinite, (plan.scale, *chain.from_iterable(_levels(plan))))):
        raise SettingsError(_no_plan(name, steps, "a noise level is infinite or no number"))
    return plan


def _levels(plan: NoisePlan) -> Iterator[NoiseLevel]:
    for step in (*plan.intervals, *plan.repeat_intervals):
        yield from step
    yield from (step.middle for step in plan.solver if step.middle is not None)


def _no_plan(name: str, steps: int, reason: str) -> str:
    return (
        f"{name} cannot make {steps} steps along this noise schedule ({reason}): choose another "
        "sampler or number of steps"
    )


def _noise_plan(
    sampler: Sampler,
    schedule: Schedule | EDMSchedule,
    steps: int,
    timesteps: Sequence[float],
) -> NoisePlan:
    name = sampler.name
    if not timesteps:
        return sampler.plan(schedule, steps)
    if sampler.plan_from_timesteps is None or isinstance(schedule, EDMSchedule):
        able = ", ".join(row.name for row in _ROWS if row.plan_from_timesteps)
        raise SettingsError(f"{name} does not support custom timesteps; these samplers do: {able}")
    schedule.check(timesteps)
    return sampler.plan_from_timesteps(schedule, timesteps)


def _other_kind(sampler: Sampler, schedule: Schedule | EDMSchedule) -> str:
    able = ", ".join(row.name for row in _ROWS if isinstance(schedule, row.schedule))
    return (
        f"{sampler.name} cannot step along this model's noise schedule; these samplers can: {able}"
    )
