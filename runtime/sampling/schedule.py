"""Noise schedule of a discrete diffusion model."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.sampling.levels import CLEAN, NoiseLevel
from latentforge.runtime.sampling.options import DEFAULT_OPTIONS, MAX_TRAIN_STEPS, SolverOptions

__all__ = ["MAX_TRAIN_STEPS", "BetaKind", "EDMSchedule", "Schedule", "Spacing"]

BetaKind = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "explicit"]
Spacing = Literal["leading", "trailing", "linspace"]

_SPACINGS = get_args(Spacing)


class Schedule(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    dict=True,
    tag_field="kind",
    tag="discrete",
):
    """Noise schedule of a checkpoint: plain data, stored in the manifest under "schedule".

    It gives the amount of noise that the network saw at each training timestep: a latent at
    timestep t is x = alpha * clean + sigma * noise, where alpha**2 is the cumulative product of
    1 - beta up to t, and alpha**2 + sigma**2 = 1 (Ho et al. 2020, equation 4).

    Attributes:
        train_steps: number of training timesteps.
        beta_kind: formula of the betas.
        beta_start, beta_end: first and last beta of that formula.
        betas: one beta per training timestep, for beta_kind "explicit"; empty otherwise.
        spacing: spacing of the timesteps that samplers visit; None: each sampler's default in
            diffusers.
        offset: added to timesteps of "leading" spacing.
        zero_terminal_snr: rescale the betas so that the last training timestep is pure noise.
        final_alpha_one: True if DDIM and PNDM end on the clean latent, False if on the first
            training timestep; None: each sampler's default in diffusers.
        options: further options of the checkpoint's scheduler.
    """

    train_steps: int = 1000
    beta_kind: BetaKind
    beta_start: float
    beta_end: float
    betas: tuple[float, ...] = ()
    spacing: Spacing | None
    offset: int
    zero_terminal_snr: bool
    final_alpha_one: bool | None
    options: SolverOptions = DEFAULT_OPTIONS

    def __post_init__(self) -> None:
        for name, known in (("beta_kind", get_args(BetaKind)), ("spacing", (*_SPACINGS, None))):
            if getattr(self, name) not in known:
                names = ", ".join(filter(None, known))
                raise ManifestError(
                    f"schedule: unknown {name} {getattr(self, name)!r}: choose from {names}"
                )
        if self.train_steps > MAX_TRAIN_STEPS:
            raise ManifestError(
                f"schedule: train_steps is at most {MAX_TRAIN_STEPS}, not {self.train_steps}"
            )
        if self.train_steps < 1 or self.offset < 0:
            raise ManifestError("schedule: train_steps must be at least 1 and offset at least 0")
        if len(self.betas) != (self.train_steps if self.beta_kind == "explicit" else 0):
            raise ManifestError(
                f"schedule: {len(self.betas)} betas; an explicit schedule has one for each of its "
                f"{self.train_steps} training timesteps, and any other kind has none"
            )
        if not all(0 < beta < 1 for beta in self.betas or (self.beta_start, self.beta_end)):
            raise ManifestError("schedule: every beta must lie between 0 and 1")
        if self.offset > MAX_TRAIN_STEPS:
            raise ManifestError(f"schedule: offset is at most {MAX_TRAIN_STEPS}")
        with np.errstate(all="ignore"):
            self._check_noise()

    def _check_noise(self) -> None:
        """Refuse a schedule without noise, or one that is pure noise before its end."""
        square = self.alphas_cumprod
        if not (0 < square[0] < 1 and (square[:-1] > 0).all() and 0 <= square[-1] < 1):
            raise ManifestError(
                "schedule: its betas leave float32's range: at every training timestep the latent "
                "must hold noise, and before the last one also some of the image"
            )

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float32]:
        """alpha**2 at each training timestep, (train_steps,), rounded to float32 as in torch."""
        betas = self._betas()
        if self.zero_terminal_snr:
            betas = _rescaled(betas)
        product = _cumprod(np.float32(1) - betas)
        product.setflags(write=False)
        return product

    def at(self, timestep: float) -> NoiseLevel:
        """Return the level of a whole training timestep; the final level for a negative one.

        Raises:
            SettingsError: the timestep lies beyond the schedule.
        """
        index = int(timestep)
        if index >= self.train_steps:
            raise SettingsError(
                f"timestep {index}: the schedule ends at {self.train_steps - 1}; use fewer steps"
            )
        if index < 0 and self.final_alpha_one is not False:
            return CLEAN
        square = self.alphas_cumprod[max(index, 0)]
        sigma = math.sqrt(np.float32(1) - square)
        return NoiseLevel(math.sqrt(square), sigma, float(timestep))

    def followed(self, keys: Collection[str]) -> "Schedule":
        """Return the schedule without the options that a sampler does not read."""
        return replace(self, options=self.options.followed(keys))

    def check(self, timesteps: Sequence[float]) -> None:
        """Check that the network was trained on a range that holds these timesteps.

        Raises:
            SettingsError: one lies outside of the schedule.
        """
        for timestep in timesteps:
            if not 0 <= timestep <= self.train_steps - 1:
                raise SettingsError(
                    f"timestep {timestep:g} is not in the schedule, which goes from 0 to "
                    f"{self.train_steps - 1}"
                )

    def _betas(self) -> NDArray[np.float32]:
        match self.beta_kind:
            case "linear":
                return _linspace(self.beta_start, self.beta_end, self.train_steps)
            case "scaled_linear":  # of latent diffusion: linear in the square root
                ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
                return np.square(_linspace(*ends, self.train_steps))
            case "squaredcos_cap_v2":
                return _capped_betas(_cosine, self.train_steps)
            case "laplace":
                return _capped_betas(_laplace, self.train_steps)
            case "sigmoid":
                curve = 1 / (1 + np.exp(-_linspace(-6, 6, self.train_steps).astype(np.float64)))
                betas = curve * (self.beta_end - self.beta_start) + self.beta_start
                return np.asarray(betas, np.float32)
            case "explicit":
                return np.array(self.betas, np.float32)


class EDMSchedule(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="edm",
):
    """Noise schedule of a model in the preconditioning of Karras et al. (2022), table 1.

    The network sees x = (clean + sigma * noise) / sqrt(sigma**2 + sigma_data**2), and
    log(sigma) / 4 as its timestep.

    Attributes:
        train_steps: number of steps that can be taken.
        sigma_min, sigma_max: ends of the noise.
        sigma_data: standard deviation of the data.
        sigma_schedule: spacing of the steps.
        rho: exponent of the "karras" spacing.
        options: further options of the checkpoint's scheduler.
    """

    train_steps: int = 1000
    sigma_min: float
    sigma_max: float
    sigma_data: float
    sigma_schedule: Literal["karras", "exponential"]
    rho: float = 7.0
    options: SolverOptions = DEFAULT_OPTIONS

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ManifestError("schedule: sigma_min must be above 0 and below sigma_max")
        if not (0 < self.sigma_data < math.inf and 0 < self.rho < math.inf):
            raise ManifestError("schedule: sigma_data and rho must be positive numbers")
        if not 1 <= self.train_steps <= MAX_TRAIN_STEPS:
            raise ManifestError(
                f"schedule: train_steps must be between 1 and {MAX_TRAIN_STEPS}, not "
                f"{self.train_steps}"
            )

    def level(self, sigma: float) -> NoiseLevel:
        """Return the level of a standard deviation of noise, in the scale of the network."""
        alpha = 1 / math.hypot(sigma, self.sigma_data)
        return NoiseLevel(alpha, sigma * alpha, math.log(sigma) / 4 if sigma else 0.0)

    def check(self, timesteps: Sequence[float]) -> None:
        """Check custom timesteps, of which there are none here.

        Raises:
            SettingsError: there are some.
        """
        if timesteps:
            raise SettingsError("an EDM schedule has no timesteps to choose: set steps instead")


# Betas, rounded as torch rounds them.


def _linspace(first: float, last: float, count: int) -> NDArray[np.float32]:
    """Compute torch.linspace in float32: counted from the nearer end, each value rounded once."""
    start, stop = np.float32(first), np.float32(last)
    step = float((stop - start) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = start + step * index, float(stop) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), rising, falling).astype(np.float32)


def _capped_betas(alpha_bar: Callable[[float], float], count: int) -> NDArray[np.float32]:
    """Compute the betas of a curve of alpha**2 over time from 0 to 1, capped at 0.999."""
    times = [index / count for index in range(count + 1)]
    betas = [min(1 - alpha_bar(after) / alpha_bar(t), 0.999) for t, after in pairwise(times)]
    return np.array(betas, np.float32)


def _cosine(t: float) -> float:
    """Evaluate Nichol & Dhariwal (2021), equation 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Evaluate the Laplace schedule of Hang et al. (2024), arXiv 2407.03297, as diffusers does."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


def _rescaled(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shift and scale alpha to end at 0: Lin et al. (2023), arXiv 2305.08891, algorithm 1.

    The square root is rounded to nearest. torch takes it from MKL, which does not always do so,
    so torch's table may differ from this one in the last bit.
    """
    alpha = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = alpha[0], alpha[-1]
    squared = np.square((alpha - last) * (first / (first - last)))
    ratios: NDArray[np.float32] = np.concatenate([squared[:1], squared[1:] / squared[:-1]])
    return np.float32(1) - ratios


def _cumprod(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute torch.cumprod on the CPU: float64 accumulation, each result rounded to float32."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)
