"""Recipes: what an optimization does, as data. TOML files that anyone can read and write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.prune import Prune, Sparsity
from latentforge.optimize.quantize import Int8, Scan, WeightOnly
from latentforge.optimize.recipes import names, text, tomllib
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.text import near_miss

__all__ = ["CalibrationSettings", "Precision", "Recipe", "read_recipe"]

Precision = Literal["fp32", "fp16", "int8", "int8-weights", "int4-weights"]

_MAX_BYTES = 1 << 20


class CalibrationSettings(Record, frozen=True, kw_only=True):
    """The denoising runs from which ranges and scores are taken.

    Attributes:
        prompts: how many of the prompt file's, beginning after those of the gate.
        inputs: how many of a component's calls are used, spread evenly over all steps.
    """

    prompts: int = 4
    inputs: int = 64

    def __post_init__(self) -> None:
        for name in ("prompts", "inputs"):
            if getattr(self, name) < 1:
                raise SettingsError(f"calibration: {name} is a number from 1 up")


class Recipe(Record, frozen=True, kw_only=True):
    """One way to optimize.

    Attributes:
        summary: what it is for, in a line.
        candidates: recipes to measure on this machine; the fastest that passes its gate is taken,
            and nothing else of this recipe counts.
        skip: passes not to run, of those that the target has.
        hoist: cut the UNet by what its nodes depend on.
        precision: by component; ``default`` stands for the others.
        int8: how activations and weights are quantized where the precision is ``int8``.
        weights: how weights alone are, where it is ``int8-weights`` or ``int4-weights``.
        scan: measure each int8 layer by itself and keep the worst in float; None keeps those that
            ``int8`` names.
        prune: what to take out of the UNet, if anything.
        sparsity: make the UNet's weights 2:4 sparse, if given.
        calibration: what is recorded to do so.
        gate: what the result has to reach.
    """

    summary: str
    candidates: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    hoist: bool = True
    precision: Mapping[str, Precision] = {}
    int8: Int8 = Int8()
    weights: WeightOnly = WeightOnly()
    scan: Scan | None = None
    prune: Prune | None = None
    sparsity: Sparsity | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    gate: Gate = Gate()

    @property
    def calibrated(self) -> bool:
        """Whether it needs to know what goes into the UNet."""
        int8 = self.precision_of("denoiser") == "int8"
        scored = self.sparsity is not None and self.sparsity.score == "activation"
        return int8 or scored or self.prune is not None

    def quantizes(self, component: str) -> bool:
        """Whether it stores a component's weights in few bits."""
        return self.precision_of(component) not in ("fp32", "fp16")

    def precision_of(self, component: str) -> Precision:
        """The precision of a component."""
        return self.precision.get(component, self.precision.get("default", "fp32"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe by its name, or from a TOML file.

    Raises:
        SettingsError: there is none, or it has a key or a value that recipes don't have; the
            message names the key, and the nearest that there is.
    """
    written = _text(name)
    try:
        data = tomllib.loads(written)
        _check_keys("", data, Recipe)
        return msgspec.convert(data, Recipe)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, SettingsError) as error:
        raise SettingsError(f"recipe {name}: {error}") from error


def _text(name: str) -> str:
    if name in names():
        return text(name)
    path = Path(name)
    if not path.is_file():
        raise SettingsError(f"no recipe {name!r} and no such file; {near_miss(name, names())}")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SettingsError(f"{path} is larger than 1 MiB: not a recipe")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the recipe {path}: {error}") from error


def _check_keys(where: str, data: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    """Refuse unknown keys at every level, by name and with the nearest known one."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            raise SettingsError(f"{where}no key {key!r}; {near_miss(key, list(fields))}")
        inner = next((t for t in (fields[key], *get_args(fields[key])) if _is_table(t)), None)
        if inner is not None and isinstance(value, dict):
            _check_keys(f"[{key}] ", value, inner)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
