"""Signatures of graphs and engines: their tensors, compared with those of the manifest."""

from collections.abc import Mapping

from latentforge.runtime.errors import BackendError
from latentforge.runtime.tensor import TensorSpec

__all__ = ["Signature", "check_signature"]

Signature = Mapping[str, tuple[str, tuple[int, ...] | None]]
"""Dtype and shape of a graph's tensors by name; -1 is a free size, None an unknown rank."""


def check_signature(
    kind: str, specs: Mapping[str, TensorSpec], tensors: Signature, *, further: bool = False
) -> None:
    """Refuse a graph whose tensors do not fit the manifest's specs.

    Args:
        kind: ``input`` or ``output``, with the place in front of it if there is one.
        specs: expected tensors by name.
        tensors: those of the graph.
        further: accept further tensors.

    Raises:
        BackendError: names, dtypes, ranks or sizes differ.
    """
    if specs.keys() - tensors.keys() or (not further and tensors.keys() - specs.keys()):
        raise BackendError(
            f"{kind}s: expected {', '.join(specs)} (manifest), found "
            f"{', '.join(tensors) or 'none'}: export again"
        )
    for name, spec in specs.items():
        dtype, shape = tensors[name]
        if dtype != spec.dtype or not _may_fit(shape, spec.shape):
            found = dtype if shape is None else f"{dtype}{list(shape)}"
            raise BackendError(
                f"{kind} {name}: expected {spec} (manifest), found {found}: export again"
            )


def _may_fit(shape: tuple[int, ...] | None, expected: tuple[int | str, ...]) -> bool:
    """Return True if a graph's shape can be the expected one at some sizes."""
    if shape is None or len(shape) != len(expected):
        return shape is None
    pairs = zip(shape, expected, strict=True)
    return all(not isinstance(b, int) or a in (-1, b) for a, b in pairs)
