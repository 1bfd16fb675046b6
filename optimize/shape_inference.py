"""Shapes of a graph's values, in terms of the free dimensions of its inputs."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.tensor import TensorSpec

__all__ = ["Shape", "Specs", "shapes", "specs_of"]

Shape = tuple[int | str | None, ...]
"""Sizes, free dimensions as in a TensorSpec, and None where a size is unknown."""

Specs = Mapping[str, TensorSpec]

_Sizes = Mapping[str, int]
_Numbers = tuple[int | None, ...] | None

# Sizes of the free dimensions in the two trials: primes, so that no product equals another, times
# a multiple of all factors by which networks downscale.
_PRIMES = ((3, 31), (5, 37), (7, 41), (11, 43), (13, 47), (17, 53), (19, 59), (23, 61), (29, 67))
_UNIT = 64


def specs_of(values: Iterable[ir.Value]) -> dict[str, TensorSpec]:
    """Return the specs of a graph's inputs or outputs by name, as in a manifest.

    Raises:
        SettingsError: a value has no type or shape.
    """
    specs = {}
    for value in values:
        if value.dtype is None or value.shape is None:
            raise SettingsError(
                f"input or output {value.name!r} has no type or no shape: export it with both"
            )
        sizes = [s if isinstance(s, int) else str(s.value).replace(" ", "") for s in value.shape]
        specs[str(value.name)] = TensorSpec(value.dtype.numpy().name, tuple(sizes))
    return specs


def shapes(model: ir.Model, inputs: Specs) -> dict[str, Shape]:
    """Return the shape of each value of known rank, by its name.

    Exporters name the dimensions of intermediate values inconsistently. So shapes are inferred for
    two choices of input sizes: a size that is the same in both is a number, and one that is the
    same multiple or fraction of one free dimension in both is that expression.

    Args:
        model: is not changed.
        inputs: specs of the graph's inputs.

    Raises:
        SettingsError: there are more free dimensions than can be distinguished.
    """
    free = dict.fromkeys(size for spec in inputs.values() for size in spec.shape)
    names = [size for size in free if isinstance(size, str) and size.isidentifier()]
    if len(names) > len(_PRIMES):
        raise SettingsError(
            f"the inputs have {len(names)} free dimensions, more than the {len(_PRIMES)} that can "
            "be distinguished: export with some of them fixed"
        )
    trials = [
        {name: _UNIT * pair[trial] for name, pair in zip(names, _PRIMES, strict=False)}
        for trial in (0, 1)
    ]
    first, second = (_inferred(model, inputs, sizes) for sizes in trials)
    merged = {name: _merged(shape, second[name], trials) for name, shape in first.items()}
    return {name: shape for name, shape in merged.items() if shape is not None}


def _inferred(model: ir.Model, inputs: Specs, sizes: _Sizes) -> dict[str, _Numbers]:
    """Return the shapes by value name for one choice of sizes.

    The graph's own annotations help with operators that shape inference does not know.
    """
    copy = model.clone()
    for value in copy.graph.inputs:
        value.shape = ir.Shape(inputs[str(value.name)].resolve(sizes))
    for node in copy.graph:
        for value in node.outputs:
            value.shape = _substituted(value.shape, sizes)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    values = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    return {name: _numbers(value.shape) for name, value in values.items()}


def _substituted(shape: ir.Shape | None, sizes: _Sizes) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape([s if isinstance(s, int) else sizes.get(str(s.value)) for s in shape])


def _numbers(shape: ir.Shape | None) -> _Numbers:
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in shape)


def _merged(first: _Numbers, second: _Numbers, trials: Sequence[_Sizes]) -> Shape | None:
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(_size(pair, trials) for pair in zip(first, second, strict=True))


def _size(pair: tuple[int | None, int | None], trials: Sequence[_Sizes]) -> int | str | None:
    """Return the dimension that has these sizes in the two trials, or None."""
    a, b = pair
    if not a or not b:
        return None
    if a == b:
        return a
    for name in trials[0]:
        x, y = trials[0][name], trials[1][name]
        if (a, b) == (x, y):
            return name
        if a % x == 0 and a // x * y == b:
            return f"{name}*{a // x}"
        if a < x and (x // (x // a), y // (x // a)) == (a, b):
            return f"{name}//{x // a}"
    return None
