"""Extrapolation of a network's outputs over a step, for the solvers of DPM-Solver's family.

Each of these solvers steps along one output: the clean latent, or the noise. First order takes the
present one; higher orders extrapolate it from the last ones over the step. The formulas are those
of Lu et al. (2022), arXiv 2206.00927 and 2211.01095, in the variants that diffusers has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray

from latentforge.runtime.sampling.levels import NoiseInterval, NoiseLevel, SolverStep
from latentforge.runtime.sampling.moves import (
    blend,
    ddim_move,
    noise_in,
    noise_move,
    renoise_move,
    shift_move,
)
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.sampler import Array, Noise, SamplerRun, Updates

__all__ = [
    "DATA",
    "DATA_SDE",
    "NOISE",
    "NOISE_SDE",
    "Algorithm",
    "Evaluation",
    "extrapolate",
    "lagrange_basis",
    "multistep",
    "multistep_orders",
]

_FEW_STEPS = 15  # below it, diffusers lowers the order at the end


class Evaluation(NamedTuple):
    """Output of the network at a noise level: the clean latent, or the noise."""

    level: NoiseLevel
    output: Array


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Quantity that a solver steps along, with or without fresh noise.

    Attributes:
        along_noise: True for the noise, False for the clean latent.
        stochastic: True for the solver of the stochastic differential equation.
    """

    along_noise: bool = False
    stochastic: bool = False

    def output(self, x: Array, denoised: Array, level: NoiseLevel) -> Array:
        """Return what the solver extrapolates, given the clean latent."""
        return noise_in(x, denoised, level) if self.along_noise else denoised

    def step_size(self, interval: NoiseInterval) -> float:
        """Return the signed step in log(alpha / sigma), as it stands in the formulas' exponent."""
        h = interval.end.log_snr - interval.start.log_snr
        if self.along_noise:
            return h
        return -2 * h if self.stochastic else -h

    def move(self, x: Array, output: Array, interval: NoiseInterval, noise: Noise) -> Array:
        """Step along an output; fresh noise is drawn if it is needed."""
        if self.stochastic:
            renoise = shift_move if self.along_noise else renoise_move
            return renoise(x, output, interval, noise())
        return (noise_move if self.along_noise else ddim_move)(x, output, interval)


DATA = Algorithm()
DATA_SDE = Algorithm(stochastic=True)
NOISE = Algorithm(along_noise=True)
NOISE_SDE = Algorithm(along_noise=True, stochastic=True)


def multistep_orders(
    count: int, options: SolverOptions, *, ends_clean: bool
) -> tuple[SolverStep, ...]:
    """Return the order of each step of a complete plan, lowered at its end as in diffusers.

    Args:
        count: number of steps.
        options: of the checkpoint's scheduler.
        ends_clean: True if the last step ends without noise, where only order 1 is defined.
    """
    order = options.solver_order or 2
    few = options.lower_order_final is not False and count < _FEW_STEPS
    orders = [order] * count
    if few and count > 1:
        orders[-2] = min(order, 2)
    if few or ends_clean or options.euler_at_final:
        orders[-1] = 1
    return tuple(SolverStep(order=order) for order in orders)


def multistep(run: SamplerRun, x: Array, algorithm: Algorithm = DATA) -> Updates:
    """Step along an output that is extrapolated from the last ones."""
    history: list[Evaluation] = []
    heun = run.plan.options.solver_type == "heun"
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        output = algorithm.output(x, denoised, interval.start)
        history = [Evaluation(interval.start, output), *history[:2]]
        order = min(solver.order if solver else 2, len(history))
        target = extrapolate(history[:order], interval, algorithm, heun=heun)
        x = algorithm.move(x, target, interval, run.noise)
        x = yield x, denoised


def extrapolate(
    history: Sequence[Evaluation], interval: NoiseInterval, algorithm: Algorithm, *, heun: bool
) -> Array:
    """Extrapolate an output over a step, polynomially in log(alpha / sigma).

    Args:
        history: the last one to three evaluations, latest first; as many as the order.
        interval: the step to take.
        algorithm: of the solver.
        heun: for order 2, integrate the extrapolated output exactly; else take its value at the
            middle of the step.
    """
    now = history[0]
    h = interval.end.log_snr - interval.start.log_snr
    if len(history) == 1 or h == 0 or math.isinf(h):
        return now.output
    size = algorithm.step_size(interval)
    slope = first_weight(size) if heun or len(history) == 3 else 1 / 2
    lasts = [now.level.log_snr - past.level.log_snr for past in history[1:]]
    if len(history) == 2:
        weight = slope * h / lasts[0]
        return blend((1 + weight, now.output), (-weight, history[1].output))
    return _third_order(history, (h / lasts[0], h / (lasts[1] - lasts[0])), slope, algorithm, size)


def lagrange_basis(nodes: Sequence[float]) -> list[NDArray[np.float64]]:
    """Return the coefficients of the Lagrange polynomials of some nodes, lowest power first."""
    basis = []
    for at, node in enumerate(nodes):
        others = [*nodes[:at], *nodes[at + 1 :]]
        scale = math.prod(node - other for other in others)
        basis.append(np.asarray(polynomial.polyfromroots(others) / scale, np.float64))
    return basis


def first_weight(size: float) -> float:
    """Return the weight of the first difference: 1/2 for small steps."""
    return 1 / size - 1 / math.expm1(size)


def second_weight(size: float, *, stochastic: bool) -> float:
    """Return the weight of the second difference.

    The sign of 1/2 is wrong in diffusers for the stochastic solvers, and images made with them
    depend on it.
    """
    half = -1 / 2 if stochastic else 1 / 2
    return ((math.expm1(size) - size) / size**2 - half) / math.expm1(size)


def _third_order(
    history: Sequence[Evaluation],
    ratios: tuple[float, float],
    slope: float,
    algorithm: Algorithm,
    size: float,
) -> Array:
    """Extrapolate from three evaluations; ratios are the step over each of the last two steps."""
    near, far = ratios
    # d1 = near (m0 - m1), d2 = far (m1 - m2), and the share of each past step in the two.
    share = far / (near + far)  # r0 / (r0 + r1), with r = 1 / ratio
    bend = second_weight(size, stochastic=algorithm.stochastic) * near * far / (near + far)
    d1, d2 = slope * (1 + share) + bend, -slope * share - bend
    weights = 1 + d1 * near, d2 * far - d1 * near, -d2 * far
    return blend(*((w, past.output) for w, past in zip(weights, history, strict=True)))
