"""Tensors that components of known names have, and the order of a denoiser's parts."""

from collections.abc import Mapping

__all__ = [
    "CACHED_FEATURE",
    "DENOISER_INPUTS",
    "DENOISER_PARTS",
    "LATER_INPUTS",
    "REQUIRED_INPUTS",
    "REQUIRED_TENSORS",
    "Ranks",
]

Ranks = Mapping[str, tuple[int, ...]]
"""Allowed numbers of dimensions by tensor name."""

CACHED_FEATURE = "cached_feature"
"""Extra output of a full step, and input of a cached step (DeepCache)."""

REQUIRED_TENSORS: Mapping[str, tuple[Ranks, Ranks]] = {
    "denoiser": ({"sample": (4,)}, {"out_sample": (4,)}),
    "denoiser_time": ({"timestep": (1,)}, {}),
    "denoiser_cached": ({"sample": (4,), CACHED_FEATURE: (4,)}, {"out_sample": (4,)}),
    "vae_decoder": ({"latent_sample": (4,)}, {"sample": (4,)}),
    "vae_encoder": ({"sample": (4,)}, {"latent_parameters": (4,)}),
}
"""Inputs and outputs that components of these names have at least."""

DENOISER_PARTS = ("denoiser_prompt", "denoiser_time", "denoiser")
"""Components that a denoiser may be partitioned into, in the order in which they run."""

REQUIRED_INPUTS: Ranks = {"timestep": (0, 1), "encoder_hidden_states": (3,)}
"""Inputs besides ``sample`` that the parts of a denoiser together have at least."""

DENOISER_INPUTS = {"sample", *REQUIRED_INPUTS, "text_embeds", "time_ids", "timestep_cond"}
"""Inputs that the runtime can fill."""

LATER_INPUTS = {
    "denoiser_prompt": {"sample", "timestep"},
    "denoiser_time": {"sample"},
    "denoiser": set[str](),
}
"""Inputs that are not available yet when a part runs."""
