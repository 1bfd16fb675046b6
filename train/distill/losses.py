"""Terms of the loss, and the rule by which they are weighed.

Every term is scaled so that its mean over the first batches is that of the prediction's; on top of
it comes a weight of its own. So no term takes over because of the units of its features, which
differ by orders of magnitude between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.text import near_miss
from latentforge.train.distill.batch import Comparison, Term
from latentforge.train.distill.module_outputs import ATTENTION

__all__ = ["TERMS", "chosen_weights", "mixed", "relative_scales", "rescaled"]

_EPSILON = 1e-6


def prediction_error(comparison: Comparison) -> Tensor:
    """Return the squared error of the prediction, weighted by timestep.

    BK-SDM (Kim et al. 2023, arXiv 2305.15798), equation 2.
    """
    squares = (comparison.student - comparison.teacher).square().flatten(1).mean(1)
    return (squares * comparison.weight).mean()


def feature_error(comparison: Comparison) -> Tensor:
    """Return the squared error of the blocks' outputs, each relative to the teacher's.

    BK-SDM, equation 3, normalized as in LAPTOP-Diff (Zhang et al. 2024, arXiv 2404.11098), since a
    few blocks with large values would be all of the sum.
    """
    pairs = [p for path, p in comparison.features.items() if not _is_attention(path)]
    return _relative_errors(comparison, pairs)


def attention_error(comparison: Comparison) -> Tensor:
    """Return the squared error of the outputs of self-attention, each relative to the teacher's.

    KOALA (Lee et al. 2024, arXiv 2312.04005), section 3.3: they are the features worth most.
    """
    pairs = [p for path, p in comparison.features.items() if _is_attention(path)]
    return _relative_errors(comparison, pairs)


TERMS: Mapping[str, tuple[float, Term]] = {
    "prediction": (1.0, prediction_error),
    "features": (0.5, feature_error),
    "attention": (0.5, attention_error),
}
"""Default weights and functions of the terms, by name."""


def chosen_weights(
    given: Mapping[str, float], terms: Mapping[str, tuple[float, Term]]
) -> dict[str, float]:
    """Return the weights of the terms that take part.

    Args:
        given: weights by name, of those that differ from the defaults.
        terms: those that this training can have, with their default weights.

    Raises:
        SettingsError: there is no such term, or no term is left.
    """
    for name in given:
        if name not in terms:
            raise SettingsError(
                f"no loss term {name!r} in this training; {near_miss(name, tuple(terms))}"
            )
    weights = {name: given.get(name, weight) for name, (weight, _) in terms.items()}
    left = {name: weight for name, weight in weights.items() if weight > 0}
    if not left:
        raise SettingsError("every loss term has weight 0: leave one of them above it")
    return left


def relative_scales(first: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the factor of each term, from the means of the first batches.

    A term that is 0 at first keeps its units.

    Args:
        first: mean of each term.
        weights: relative to the scaled terms.
    """
    base = next(iter(first.values())) if "prediction" not in first else first["prediction"]
    return {
        name: weight * (base / first[name] if base > 0 and first[name] > 0 else 1.0)
        for name, weight in weights.items()
    }


def mixed(guidance: Guidance, output: Tensor) -> Tensor:
    """Return guided outputs with gradients: see Guidance.mix()."""
    *others, negative, positive = output.chunk(guidance.rows)
    result = negative + guidance.scale * (positive - negative)
    for blind in others:
        result = result + (guidance.image_scale - 1) * (negative - blind)
    return rescaled(result, positive, guidance.rescale) if guidance.rescale else result


def rescaled(output: Tensor, positive: Tensor, phi: float) -> Tensor:
    """Return guided outputs with their deviation moved to that of the positive ones.

    See rescale_guidance().

    Args:
        output: guided, (images, channels, h, w).
        positive: of the prompts alone.
        phi: share of the move.
    """
    target, present = (t.std((1, 2, 3), correction=0, keepdim=True) for t in (positive, output))
    ratio = torch.where(present > 0, target / present.clamp_min(1e-12), torch.ones_like(present))
    return output * (phi * ratio + (1 - phi))


def _is_attention(path: str) -> bool:
    return path.rpartition(".")[2] == ATTENTION


def _relative_errors(comparison: Comparison, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over modules of sum |student - teacher|**2 / (sum |teacher|**2 + eps)."""
    if not pairs:
        return comparison.student.new_zeros(())
    errors = [(s.float() - t).square().sum() / (t.square().sum() + _EPSILON) for s, t in pairs]
    return torch.stack(errors).mean()
