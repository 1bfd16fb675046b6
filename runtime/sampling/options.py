"""Options of a checkpoint's scheduler that change the trajectory of a sampler."""

import math
from collections.abc import Collection
from typing import Literal, get_args

import msgspec
from msgspec.structs import replace

from latentforge.runtime.errors import ManifestError

__all__ = ["DEFAULT_OPTIONS", "MAX_TRAIN_STEPS", "SigmaSpacing", "SolverOptions"]

MAX_TRAIN_STEPS = 100_000
"""Largest number of training timesteps; each takes memory."""

SigmaSpacing = Literal["karras", "exponential", "beta", "lu"]
"""Spacing of sigma / alpha instead of the timesteps: see sampling/sigmas.py."""


class SolverOptions(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Options of a diffusers scheduler besides its noise schedule, under diffusers' names.

    A sampler reads those that its diffusers counterpart has and ignores the others, as from_config
    does there. None stands for the sampler's own default.

    Attributes:
        sigma_spacing: from use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and
            use_lu_lambdas.
        sigma_min, sigma_max: ends of that spacing; None: those of the schedule.
        interpolation_type: "log_linear" spaces sigma / alpha evenly in the logarithm.
        continuous_timesteps: the network's input is log(sigma / alpha) / 4 (timestep_type).
        final_sigmas_type: "zero" ends on the clean latent, "sigma_min" on the first training
            timestep.
        solver_order: order of a multistep or singlestep method, 1 to 3.
        solver_type: variant of the method's formula.
        lower_order_final: lower the order in the last steps.
        euler_at_final: take the last step with order 1.
        lambda_min_clipped: leave out training timesteps whose log(alpha / sigma) is below it.
        predict_x0: False: UniPC extrapolates the noise instead of the clean latent.
        disable_corrector: indices of the steps that UniPC does not correct.
        variance_type: variance of the noise that DDPM adds.
        clip_sample: clip the clean latent to +-clip_sample_range.
        original_inference_steps: number of levels that a consistency model was distilled on.
        timestep_scaling: factor of the timestep in a consistency model's boundary condition.
    """

    sigma_spacing: SigmaSpacing | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    continuous_timesteps: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    solver_order: Literal[1, 2, 3] | None = None
    solver_type: Literal["midpoint", "heun", "bh1", "bh2", "logrho"] | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool = False
    lambda_min_clipped: float | None = None
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        spacing = self.sigma_spacing
        if spacing not in (*get_args(SigmaSpacing), None):
            names = ", ".join(get_args(SigmaSpacing))
            raise ManifestError(f"schedule: unknown sigma_spacing {spacing!r}: choose from {names}")
        for name in ("sigma_min", "sigma_max", "clip_sample_range", "timestep_scaling"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ManifestError(f"schedule: {name} must be a positive number, not {value}")
        if self.sigma_min and self.sigma_max and self.sigma_min > self.sigma_max:
            raise ManifestError("schedule: sigma_min must not be above sigma_max")
        if self.lambda_min_clipped is not None and not math.isfinite(self.lambda_min_clipped):
            raise ManifestError("schedule: lambda_min_clipped must be finite")
        if not 1 <= self.original_inference_steps <= MAX_TRAIN_STEPS:
            raise ManifestError(
                f"schedule: original_inference_steps must be 1 to {MAX_TRAIN_STEPS}"
            )

    @property
    def clipping(self) -> "SolverOptions":
        """The options of a sampler that clips by default, as DDIM does in diffusers."""
        return replace(self, clip_sample=True) if self.clip_sample is None else self

    def key(self, field: str) -> str:
        """Return the name that diffusers has for the present value of a field."""
        if field == "sigma_spacing":
            what = "lambdas" if self.sigma_spacing == "lu" else "sigmas"
            return f"use_{self.sigma_spacing}_{what}"
        return "timestep_type" if field == "continuous_timesteps" else field

    def followed(self, keys: Collection[str]) -> "SolverOptions":
        """Return these options with the defaults in place of those that a sampler does not read."""
        ignored = [name for name in self.__struct_fields__ if self.key(name) not in keys]
        return replace(self, **{name: getattr(DEFAULT_OPTIONS, name) for name in ignored})


DEFAULT_OPTIONS = SolverOptions()
