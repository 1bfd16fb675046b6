"""Load the torch modules of a checkpoint: strictly, in float32, from safetensors alone."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.text import one_line

__all__ = ["check_finite", "load_module", "quiet"]

# How the two libraries say that a weight has another shape than the configuration makes it.
_MISMATCHES = (
    re.compile(
        r"(?P<key>\S+) expected shape \S*?(?P<told>\[.*?\])\S* but got \S*?(?P<held>\[.*?\])"
    ),
    re.compile(
        r"^(?P<key>\S+) *\| *MISMATCH.*?(?P<held>\[.*?\]).*?(?P<told>\[.*?\])", re.MULTILINE
    ),
)


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
    path = checkpoint.path / folder
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path} is an adapter to another model: merge it into that first")
    with quiet() as said:
        try:
            module, info = kind.from_pretrained(
                path,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # each library has its own, and a bad config raises any of them
            reason = _mismatch(f"{error}\n{said()}") or one_line(error)
            raise CheckpointError(f"cannot load {path}: {reason}") from error
    _check_keys(checkpoint, folder, info)
    check_finite(checkpoint, folder, module)
    return module.eval().requires_grad_(False)


def _mismatch(text: str) -> str | None:
    """What a library says of a weight's shape, with both numbers; None if it is not about that."""
    for pattern in _MISMATCHES:
        if found := pattern.search(text):
            return "config.json makes {key} {told}, and in the weights it is {held}".format(
                **found.groupdict()
            )
    return None


def _check_keys(checkpoint: Checkpoint, folder: str, info: dict[str, Any]) -> None:
    """from_pretrained fills gaps with random numbers and drops what it does not know."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(
                f"{checkpoint.name}: the weights of {folder} do not fit its config.json: "
                f"{len(keys)} {problem.replace('_', ' ')}, such as {keys[0]}"
            )


def check_finite(checkpoint: Checkpoint, folder: str, module: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        CheckpointError: a weight does, with its name.
    """
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{checkpoint.name}: {folder} holds NaN or infinity in {name}: fetch it again"
            )


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Hide what diffusers and transformers show on loading; what they log can be asked for."""
    records = _Records()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    handlers = [logger.handlers for logger in loggers]
    bars = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    try:
        for library in bars:
            library.disable_progress_bar()
        for logger in loggers:
            logger.handlers = [records]
        yield records.text
    finally:
        for logger, before in zip(loggers, handlers, strict=True):
            logger.handlers = before
        for library in bars:
            library.enable_progress_bar()


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def text(self) -> str:
        return "\n".join(self._messages)
