"""Recipes: how to optimize an engine directory, as data in a TOML file.

Reading a recipe loads records alone, no graph code.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.prune.records import PruneSettings, SparsitySettings
from latentforge.optimize.quantize.options import (
    Int8Settings,
    SensitivitySettings,
    WeightOnlySettings,
)
from latentforge.optimize.recipes import names, text, tomllib
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import read_file
from latentforge.runtime.record import Record
from latentforge.runtime.text import near_miss
from latentforge.runtime.validation import check_count, checked_path

__all__ = ["FLOATS", "MAX_PROMPTS", "CalibrationSettings", "Precision", "Recipe", "read_recipe"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights"]

FLOATS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""Precisions without quantization."""

MAX_PROMPTS = 10_000
"""Most prompts to calibrate with."""

_MAX_BYTES = 1 << 20
_MAX_SAMPLES = 1_000_000

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "": {"hoist": "hoist_invariants", "scan": "[sensitivity]", "weights": "[weight_only]"},
    "precision": {"unet": "denoiser"},
    "int8": {
        "keep": "exclude",
        "smooth": "smoothquant_alpha",
        "smooth_everywhere": "smoothquant_insert_mul",
    },
    "weight_only": {"keep": "exclude", "block": "block_size"},
    "sensitivity": {
        "share": "float_fraction",
        "by": 'benefit, "size" or "latency" instead of "bytes" or "seconds"',
    },
    "prune": {"keep": "exclude", "multiple": "channel_multiple"},
    "sparsity": {"keep": "exclude"},
    "calibration": {"inputs": "samples"},
}
"""Former keys of each table ("" is the top level) and their present names."""


class CalibrationSettings(Record, frozen=True, kw_only=True):
    """Denoising runs that are recorded for calibration.

    Activation ranges (quantize/calibration.py) and pruning scores come from these runs.

    Attributes:
        prompts: number of prompts of the prompt file, after those that the gate uses.
        samples: number of a component's recorded calls to use, spread evenly over all steps.
    """

    prompts: int = 4
    samples: int = 64

    def __post_init__(self) -> None:
        check_count("calibration: prompts", self.prompts, MAX_PROMPTS)
        check_count("calibration: samples", self.samples, _MAX_SAMPLES)


class Recipe(Record, frozen=True, kw_only=True):
    """Optimization of an engine directory.

    Attributes:
        summary: purpose of the recipe in one line, for ``optimize --help``.
        candidates: recipes to measure on this machine; the fastest that passes its gate is used,
            and no other key of this recipe applies except ``sensitivity``.
        skip: names of the target's passes that do not run.
        hoist_invariants: move the parts of the denoiser that do not depend on the sample out of
            the denoising loop (see partition/hoist.py).
        precision: precision by component; ``default`` applies to the components not named.
        int8: quantization of components whose precision is ``int8``.
        weight_only: quantization of components whose precision is ``int8-weights`` or
            ``int4-weights``.
        sensitivity: measure the error of each int8 layer, and leave the most sensitive in float;
            None leaves only those in float that ``int8.exclude`` names.
        prune: structured pruning of the denoiser, if any.
        sparsity: 2:4 sparsity of the denoiser's weights, if any.
        calibration: runs to record for int8 and for pruning.
        gate: required quality of the result.
    """

    summary: str
    candidates: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    hoist_invariants: bool = True
    precision: Mapping[str, Precision] = {}
    int8: Int8Settings = Int8Settings()
    weight_only: WeightOnlySettings = WeightOnlySettings()
    sensitivity: SensitivitySettings | None = None
    prune: PruneSettings | None = None
    sparsity: SparsitySettings | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    gate: Gate = Gate()

    @property
    def needs_calibration(self) -> bool:
        """True if the recipe needs recorded inputs of the denoiser."""
        int8 = self.precision_of("denoiser") == "int8"
        scored = self.sparsity is not None and self.sparsity.score == "activation"
        return int8 or scored or self.prune is not None

    @property
    def measures_layers(self) -> bool:
        """True if the sensitivity of the denoiser's layers is measured."""
        return self.sensitivity is not None and self.precision_of("denoiser") == "int8"

    @property
    def computes_bf16(self) -> bool:
        """True if a component multiplies in bfloat16."""
        return "bf16" in self.precision.values()

    def quantizes(self, component: str) -> bool:
        """Return True if a component's weights are stored in 8 or 4 bits."""
        return self.precision_of(component) not in FLOATS

    def precision_of(self, component: str) -> Precision:
        """Return the precision of a component."""
        return self.precision.get(component, self.precision.get("default", "fp32"))


@checked_arguments
def read_recipe(name: str) -> Recipe:
    """Read a recipe by name, or from a TOML file.

    Raises:
        SettingsError: there is no such recipe or file, or it has an unknown key or a wrong value;
            the message names the key, and its present name or the closest key that exists.
    """
    content = _text(name)
    try:
        data = tomllib.loads(content)
        _check_keys("", data, Recipe)
        return msgspec.convert(data, Recipe)
    except (ValueError, RecursionError, msgspec.ValidationError, SettingsError) as error:
        raise SettingsError(f"recipe {name}: {error}") from error


def _text(name: str) -> str:
    if name in names():
        return text(name)
    path = checked_path("recipe", name)
    if not path.is_file():
        raise SettingsError(f"no recipe {name!r} and no such file; {near_miss(name, names())}")
    try:
        return read_file(path, _MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the recipe {path}: {error}") from error


def _check_keys(table: str, data: Mapping[str, Any], record: type[msgspec.Struct]) -> None:
    """Refuse unknown keys of a table and its subtables, with the name to use instead."""
    fields = {field.name: field.type for field in msgspec.structs.fields(record)}
    for key, value in data.items():
        _check_renamed(table, key)
        if key not in fields:
            raise SettingsError(f"{_place(table)}no key {key!r}; {near_miss(key, list(fields))}")
        types = (fields[key], *get_args(fields[key]))
        subtable = next((type_ for type_ in types if _is_record(type_)), None)
        if subtable is not None and isinstance(value, dict):
            _check_keys(key, value, subtable)
        elif isinstance(value, dict):
            for inner in value:
                _check_renamed(key, inner)


def _check_renamed(table: str, key: str) -> None:
    if (present := _RENAMED.get(table, {}).get(key)) is not None:
        raise SettingsError(f"{_place(table)}{key!r} is called {present} now")


def _place(table: str) -> str:
    return f"[{table}] " if table else ""


def _is_record(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)
