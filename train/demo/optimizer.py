"""Optimizer with Muon for the weight matrices of a network and Adam for all other weights.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) replaces the
momentum of a weight matrix by the nearest orthogonal matrix, computed by a Newton-Schulz iteration.
Its updates are scaled to the size of Adam's (Liu and others, arXiv:2502.16982), so that learning
rates of both are comparable.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "groups", "orthogonalize"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return ``matrices`` (count, rows, columns) with all singular values near 1.

    The singular vectors are kept. All factors are polynomials of the Gram matrix, so the iteration
    runs on matrices of the smaller side.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, steps).mT
    a, b, c = _COEFFICIENTS
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = matrices @ matrices.mT
    product = gram
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if step else factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product @ matrices


def groups(model: nn.Module, matrices: float, others: float, tokens: float) -> list[dict[str, Any]]:
    """Return parameter groups of ``model`` by kind of weight.

    The first and last convolutions have too few channels to gain from Muon. A row of the token
    embeddings gets gradients rarely and needs larger steps.

    Args:
        model: the model to train.
        matrices: peak learning rate of weight matrices.
        others: peak learning rate of all other weights.
        tokens: peak learning rate of token embeddings.
    """
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "others": [], "tokens": []}
    for name, weight in model.named_parameters():
        if "token_embedding" in name:
            kinds["tokens"].append(weight)
        elif weight.ndim < 2 or any(part in name for part in ("conv_in", "conv_out", "embedding.")):
            kinds["others"].append(weight)
        else:
            kinds["matrices"].append(weight)
    peaks = {"matrices": matrices, "others": others, "tokens": tokens}
    return [
        {"params": weights, "peak": peaks[kind], "orthogonal": kind == "matrices"}
        for kind, weights in kinds.items()
        if weights
    ]


class Muon(torch.optim.Optimizer):
    """Optimizer: Muon for groups marked ``orthogonal``, Adam for the others."""

    def __init__(self, parameters: Iterable[dict[str, Any]], decay: float = 0.02) -> None:
        """Initialize from groups(); ``decay`` is the weight decay of the matrices."""
        super().__init__(parameters, {"lr": 0.0, "decay": decay})

    def schedule(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["orthogonal"]:
                self._muon(weights, group["lr"], group["decay"])
            else:
                for weight in weights:
                    self._adam(weight, self.state[weight], group["lr"])

    def _muon(self, weights: list[Tensor], rate: float, decay: float) -> None:
        # Matrices of one shape are batched: far fewer and larger operations.
        shapes: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            shapes.setdefault(weight.flatten(1).shape, []).append(weight)
        for shape, batch in shapes.items():
            updates = orthogonalize(torch.stack([self._momentum(weight) for weight in batch]))
            for weight, update in zip(batch, updates, strict=True):
                weight.mul_(1 - rate * decay)
                weight.add_(update.reshape(weight.shape), alpha=-rate * 0.2 * max(shape) ** 0.5)

    def _momentum(self, weight: Tensor) -> Tensor:
        """Update the momentum of ``weight``, and return Nesterov's update as a matrix."""
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 0.05)
        return gradient.lerp(state["momentum"], 0.95).flatten(1)

    @staticmethod
    def _adam(weight: Tensor, state: dict[str, Any], rate: float) -> None:
        gradient = weight.grad
        assert gradient is not None
        if "count" not in state:
            state.update(count=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        mean, square = state["mean"], state["square"]
        state["count"] = count = state["count"] + 1
        mean.lerp_(gradient, 0.1)
        square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        size = (square / (1 - 0.99**count)).sqrt_().add_(1e-8)
        weight.addcdiv_(mean, size, value=-rate / (1 - 0.9**count))
