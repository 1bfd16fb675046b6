"""Strict loading of a checkpoint's torch modules, in float32 and from safetensors only."""

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

# Messages of diffusers and transformers about a weight whose shape contradicts config.json.
_MISMATCHES = (
    re.compile(
        r"(?P<key>\S+) expected shape \S*?(?P<config>\[.*?\])\S* but got \S*?(?P<weights>\[.*?\])"
    ),
    re.compile(
        r"^(?P<key>\S+) *\| *MISMATCH.*?(?P<weights>\[.*?\]).*?(?P<config>\[.*?\])", re.MULTILINE
    ),
)


def load_module(checkpoint: Checkpoint, folder: str, kind: type[Any]) -> nn.Module:
    """Load a component of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        kind: a model class of diffusers or transformers. The checkpoint never names the class,
            so none of its code is run.

    Returns:
        The module in float32 and evaluation mode, without gradients.

    Raises:
        CheckpointError: weights and configuration contradict each other, a key is missing or
            unexpected, or a weight holds NaN or infinity.
    """
    checkpoint.config(folder)
    _, variant = checkpoint.weights(folder)
    path = checkpoint.path / folder
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} is an adapter of another model: merge it into that model first"
        )
    with quiet() as logged:
        try:
            module, info = kind.from_pretrained(
                path,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (
            Exception
        ) as error:  # the libraries have no common class, and a bad config raises anything
            reason = _mismatch(f"{error}\n{logged()}") or one_line(error)
            raise CheckpointError(f"cannot load {path}: {reason}") from error
    _check_keys(checkpoint, folder, info)
    check_finite(checkpoint, folder, module)
    return module.eval().requires_grad_(False)


def _mismatch(text: str) -> str | None:
    """Return a shape mismatch that a library's message describes, with both shapes, or None."""
    for pattern in _MISMATCHES:
        if match := pattern.search(text):
            return "config.json makes {key} {config}, but in the weights it is {weights}".format(
                **match.groupdict()
            )
    return None


def _check_keys(checkpoint: Checkpoint, folder: str, info: dict[str, Any]) -> None:
    """Refuse missing and unexpected keys.

    from_pretrained fills missing weights with random numbers and drops unexpected ones.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(
                f"{checkpoint.name}: the weights of {folder} do not match its config.json: "
                f"{len(keys)} {problem.replace('_', ' ')}, such as {keys[0]}"
            )


def check_finite(checkpoint: Checkpoint, folder: str, module: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        CheckpointError: one does; the message names it.
    """
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{checkpoint.name}: {folder} holds NaN or infinity in {name}: fetch it again"
            )


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Hide progress bars and log output of diffusers and transformers.

    Yields:
        A function that returns the messages logged so far, one per line.
    """
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
    """Log handler that keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def text(self) -> str:
        return "\n".join(self._messages)
