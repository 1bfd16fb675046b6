"""Strict loading of a checkpoint's torch modules, in float32 and from safetensors only."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import logging as transformers_logging

from latentforge.export.checkpoint import Checkpoint, warn_once
from latentforge.export.configs import read_config
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.text import one_line

__all__ = ["check_finite", "check_size", "load_module", "quiet", "warn_extra"]

_SLACK = 4
_SMALL = 1 << 10, 1 << 22  # weights and their elements that are built in any case, for a message

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
            of another shape, or a weight holds NaN or infinity.
    """
    config = check_size(checkpoint, folder, kind)
    _, variant = checkpoint.weights(folder)
    path = checkpoint.path / folder
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} is an adapter of another model: merge it into that model first"
        )
    # transformers takes its configuration as an object; from a file it would read more keys than
    # the class has, such as attn_implementation, which can name code to fetch.
    given = {"config": kind.config_class(**config)} if _is_transformer(kind) else {}
    with _explained(path):
        module, info = kind.from_pretrained(
            path,
            use_safetensors=True,
            variant=variant,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **given,
        )
    _check_keys(checkpoint, folder, info)
    check_finite(checkpoint, folder, module)
    return module.eval().requires_grad_(False)


def check_size(checkpoint: Checkpoint, folder: str, kind: type[Any]) -> dict[str, Any]:
    """Check that a configuration describes about as many weights as the checkpoint has.

    The module is built without memory for its weights, and no further than its weights would go.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        kind: a model class of diffusers or transformers.

    Returns:
        The configuration, by read_config().

    Raises:
        CheckpointError: the configuration is malformed, describes no module or one far larger than
            the weights.
    """
    config = read_config(checkpoint, folder, kind)
    path = checkpoint.path / folder
    excess = getattr(kind, "larger_while_built", 1)
    with _explained(path), torch.device("meta"), _bounded(checkpoint, folder, excess) as check:
        module = kind(kind.config_class(**config)) if _is_transformer(kind) else kind(**config)
        check([parameter.numel() for parameter in module.parameters()])
    return config


def _is_transformer(kind: type[Any]) -> bool:
    return hasattr(kind, "config_class")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any error of the libraries into a CheckpointError of one line, and hide their output."""
    with quiet() as logged:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # there is no common class, and a bad config raises anything
            reason = _mismatch(f"{error}\n{logged()}") or one_line(error)
            raise CheckpointError(f"cannot load {path}: {reason}") from error


@contextmanager
def _bounded(
    checkpoint: Checkpoint, folder: str, excess: int
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Stop building a module once it has far more weights, or larger ones, than the checkpoint.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        excess: how many times more there may be while it is built.

    Yields:
        A function that refuses sizes of weights which are far more, or larger.
    """
    sizes = [math.prod(shape) for shape in checkpoint.shapes(folder).values()]
    built = [0, 0]  # weights, and their elements

    def check(count: int, elements: int, slack: int) -> None:
        limits = max(slack * len(sizes), _SMALL[0]), max(slack * sum(sizes), _SMALL[1])
        if count > limits[0] or elements > limits[1]:
            raise CheckpointError(
                f"{checkpoint.name}: {folder}/config.json describes a module far larger than its "
                f"weights, which are {len(sizes)} with {sum(sizes)} elements: fetch it again"
            )

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        built[0] += 1
        built[1] += 0 if parameter is None else parameter.numel()
        check(built[0], built[1], _SLACK * excess)

    hook = register_module_parameter_registration_hook(add)
    try:
        yield lambda all_sizes: check(len(all_sizes), sum(all_sizes), _SLACK)
    finally:
        hook.remove()


def _mismatch(text: str) -> str | None:
    """Return a shape mismatch that a library's message describes, with both shapes, or None."""
    for pattern in _MISMATCHES:
        if match := pattern.search(text):
            return "config.json makes {key} {config}, but in the weights it is {weights}".format(
                **match.groupdict()
            )
    return None


def _check_keys(checkpoint: Checkpoint, folder: str, info: dict[str, Any]) -> None:
    """Refuse missing keys, which from_pretrained fills with random numbers; warn about others."""
    warn_extra(checkpoint, folder, sorted(map(str, info.get("unexpected_keys", ()))))
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(
                f"{checkpoint.name}: the weights of {folder} do not match its config.json: "
                f"{len(keys)} {problem.replace('_', ' ')}, such as {keys[0]}"
            )


def warn_extra(checkpoint: Checkpoint, folder: str, keys: Sequence[str]) -> None:
    """Warn about weights that the module has no place for, by the name of the first."""
    if keys:
        warn_once(
            f"{checkpoint.name}: {folder} does not use {len(keys)} of its weights, such as "
            f"{keys[0]}: they are left out, as in diffusers"
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
