"""Load the torch modules of a checkpoint: strictly, in float32, from safetensors alone."""

from typing import Any

import torch
from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.errors import CheckpointError

__all__ = ["load_module"]


def load_module(checkpoint: Checkpoint, folder: str, kind: type[Any]) -> nn.Module:
    """Load a component as ``kind``, a model class of diffusers or transformers.

    The class comes from us and never from the checkpoint, so no code of its is run.

    Returns:
        The module in float32 and evaluation mode, without gradients.

    Raises:
        CheckpointError: weights and configuration do not fit, a key is missing or left over,
            or a weight holds NaN or infinity.
    """
    checkpoint.config(folder)
    _, variant = checkpoint.weights(folder)
    try:
        module, info = kind.from_pretrained(
            checkpoint.path / folder,
            use_safetensors=True,
            variant=variant,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot load {checkpoint.path / folder}: {first}") from error
    _check_keys(checkpoint, folder, info)
    _check_finite(checkpoint, folder, module)
    return module.eval().requires_grad_(False)


def _check_keys(checkpoint: Checkpoint, folder: str, info: dict[str, Any]) -> None:
    """from_pretrained fills gaps with random numbers and drops what it does not know."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(
                f"{checkpoint.name}: the weights of {folder} do not fit its config.json: "
                f"{len(keys)} {problem.replace('_', ' ')}, such as {keys[0]}"
            )


def _check_finite(checkpoint: Checkpoint, folder: str, module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{checkpoint.name}: {folder} holds NaN or infinity in {name}: fetch it again"
            )
