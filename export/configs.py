"""Configurations of components, checked against the classes of diffusers and transformers."""

import inspect
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from latentforge.export.checkpoint import Checkpoint, warn_once
from latentforge.runtime.errors import CheckpointError

__all__ = ["read_config", "select_class"]

_MAX_NUMBER = 1 << 20
_MAX_ITEMS = 64
_MAX_TEXT = 200
_MAX_DEPTH = 4

_REGISTERED = ("block_out_channels", "force_upcast")
"""Keys that autoencoders of diffusers write without reading them."""

_REFUSED = ("quantization_config", "per_layer_config")
"""Keys outside of a class's signature that change its weights or layers."""

_GENERAL = {
    "self",
    *inspect.signature(PreTrainedConfig).parameters,
    *GenerationConfig().to_dict(),
    "model_type",
    "torch_dtype",
    "auto_map",
}
"""Keys of any transformers configuration; none changes the hidden states."""


def select_class(checkpoint: Checkpoint, folder: str, kinds: Sequence[type[Any]]) -> type[Any]:
    """Return the class of a component that the checkpoint names, or the first if it names none.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        kinds: the classes that can be exported.

    Raises:
        CheckpointError: it names another class.
    """
    named = checkpoint.class_name(folder)
    if named is None:
        return kinds[0]
    for kind in kinds:
        if kind.__name__ == named:
            return kind
    supported = " or ".join(kind.__name__ for kind in kinds)
    raise CheckpointError(
        f"{checkpoint.name}: {folder} is a {reprlib.repr(named)[1:-1]}, which cannot be exported; "
        f"supported: {supported}"
    )


def read_config(checkpoint: Checkpoint, folder: str, kind: type[Any]) -> dict[str, Any]:
    """Return a component's configuration, with the defaults of its class for absent keys.

    Keys that the class does not have are left out with a warning.

    Args:
        checkpoint: the checkpoint.
        folder: of the component.
        kind: a model class of diffusers or transformers.

    Raises:
        CheckpointError: the configuration is missing or malformed, a value is not of the type
            that the class declares or out of range, or the weights are quantized.
    """
    content = checkpoint.config(folder)
    source = f"{checkpoint.name}: {folder}/config.json"
    settings = getattr(kind, "config_class", kind)
    nested = content.get(getattr(settings, "base_config_key", ""))
    content = nested if isinstance(nested, dict) else content
    for key in _REFUSED:
        if content.get(key) is not None:
            raise CheckpointError(f"{source}: {key} is not supported: give the original weights")
    parameters = _parameters(settings)
    given = {key: value for key, value in content.items() if key in parameters}
    for key, value in given.items():
        _check_value(source, key, value, inspect.formatannotation(parameters[key].annotation))
    _warn_unknown(source, settings, content.keys() - parameters.keys(), content)
    return {**{key: row.default for key, row in parameters.items()}, **given}


def _parameters(settings: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class, without those of all transformers configurations."""
    general = _GENERAL if issubclass(settings, PreTrainedConfig) else {"self", "args", "kwargs"}
    parameters = inspect.signature(settings.__init__).parameters
    return {key: value for key, value in parameters.items() if key not in general}


def _warn_unknown(
    source: str, settings: type[Any], keys: set[str], content: Mapping[str, Any]
) -> None:
    """Warn about keys that the class does not have, without those that turn something off."""
    known = _GENERAL if issubclass(settings, PreTrainedConfig) else {*_REGISTERED, *_REFUSED}
    unknown = sorted(key for key in keys - known if not key.startswith("_") and content[key])
    if unknown:
        warn_once(
            f"{source}: {len(unknown)} keys, such as {reprlib.repr(unknown[0])}, are not known to "
            f"{settings.__name__} and have no effect"
        )


def _check_value(source: str, key: str, value: Any, annotation: str) -> None:
    """Refuse a value of another type than the annotation, or far out of any useful range.

    Lists are as deep as diffusers happens to nest them: their items are checked, not their depth.
    None is left to the class, since checkpoints have it where the class declares a flag.
    """
    single = re.sub(r"(tuple|list)\[.*\]", "", annotation)
    listed = single != annotation or key == "sample_size"
    names = set(re.findall(r"\w+", annotation))
    if isinstance(value, list):
        right = listed and all(_is_one_of(item, names) for item in _leaves(value))
    else:
        right = value is None or _is_one_of(value, set(re.findall(r"\w+", single)))
    if not right:
        raise CheckpointError(f"{source}: {key} must be {annotation}, not {reprlib.repr(value)}")
    for item in _leaves(value):
        if problem := _range_problem(key, item):
            raise CheckpointError(f"{source}: {key} is {problem}: {reprlib.repr(value)}")


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the items of nested lists; a list at the largest depth is an item itself."""
    if not isinstance(value, list) or depth == _MAX_DEPTH:
        yield value
        return
    for item in value:
        yield from _leaves(item, depth + 1)


def _is_one_of(value: Any, names: set[str]) -> bool:
    kind = type(value).__name__
    return value is None or kind in names or (kind == "int" and "float" in names)


def _range_problem(key: str, value: Any) -> str | None:
    """Return the reason why a value cannot be meant, or None."""
    if isinstance(value, str) and (len(value) > _MAX_TEXT or not value.isprintable()):
        return "not a name"
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= _MAX_NUMBER):
        return "out of range"
    least = -1 if key.endswith("_id") else 0
    if type(value) is int and not least <= value <= _MAX_NUMBER:
        return "out of range"
    return None
