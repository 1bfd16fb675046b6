"""Sizes that engines are built for: ranges of free dimensions, and the choice among them for a run.

An engine with several shapes was built for each of them separately, as TensorRT optimization
profiles or as one static graph per size. It does not run at other sizes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import msgspec

from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.validation import shown

__all__ = [
    "ANY",
    "Range",
    "Shapes",
    "Sizes",
    "bounding_range",
    "format_shapes",
    "nearest",
]


_MAX = 1 << 62  # the products of sizes stay numbers of 64 bits where libraries take them


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Range of sizes of a dimension: minimum, optimum (to be fastest at) and maximum."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        sizes = self.min, self.opt, self.max
        whole = all(type(size) is int for size in sizes)
        if not whole or not 1 <= self.min <= self.opt <= self.max <= _MAX:
            text = ":".join(map(shown, sizes))
            raise SettingsError(
                f"a range is MIN:OPT:MAX, in ascending order and from 1 up, not {text}"
            )

    @classmethod
    def of(cls, size: int) -> "Range":
        """Return the range that holds a single size."""
        return cls(size, size, size)

    @property
    def fixed(self) -> bool:
        """True if the range holds a single size."""
        return self.min == self.max

    def scaled(self, *, up: int = 1, down: int = 1) -> "Range":
        """Return the range multiplied by up and divided by down, both integers."""
        return Range(*(size * up // down for size in (self.min, self.opt, self.max)))

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        if self == ANY:
            return "any"
        return str(self.min) if self.fixed else f"{self.min}:{self.opt}:{self.max}"


ANY = Range(1, 1, 1 << 30)
"""Range of a dimension without limits."""

Shapes = Mapping[str, Range]
"""Ranges by free dimension that an engine supports together; other dimensions may have any size."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes to build engines for; every combination of them becomes one shape.

    Attributes:
        height, width: sides of the image, in pixels; free if empty.
        batch: rows of one engine run; free if empty. Classifier-free guidance takes two rows per
            image.
    """

    height: tuple[Range, ...] = ()
    width: tuple[Range, ...] = ()
    batch: tuple[Range, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def with_defaults(self, other: "Sizes") -> "Sizes":
        """Return the sizes with those that are free here taken from other."""
        chosen = {name: ranges or getattr(other, name) for name, ranges in vars(self).items()}
        return Sizes(**chosen)

    def shapes(
        self, dimensions: Iterable[str], downscale: int, rows: Range | None = None
    ) -> tuple[Shapes, ...]:
        """Return the shapes to build a component with these free dimensions for.

        Args:
            dimensions: names of the free dimensions, as export writes them.
            downscale: image pixels per latent pixel and side.
            rows: range of the dimension that holds all timesteps of a run; None leaves it free.
        """
        axes: dict[str, tuple[Range, ...]] = {
            "batch": self.batch,
            "rows": (rows,) if rows else (),
            "height": self.height,
            "width": self.width,
            "latent_height": tuple(side.scaled(down=downscale) for side in self.height),
            "latent_width": tuple(side.scaled(down=downscale) for side in self.width),
        }
        named = {name: axes[name] for name in dimensions if axes.get(name)}
        combined = [dict(zip(named, ranges, strict=True)) for ranges in product(*named.values())]
        return tuple(shapes for shapes in combined if shapes)

    def asdict(self) -> dict[str, str]:
        """Return the sizes that are not free, in the command line's notation."""
        given = {name: ranges for name, ranges in vars(self).items() if ranges}
        return {name: ",".join(map(str, ranges)) for name, ranges in given.items()}


def nearest(shapes: Sequence[Shapes], sizes: Mapping[str, int]) -> int | None:
    """Return the index of the shapes that fit the sizes of a run's free dimensions best.

    The best are the shapes whose optimum is nearest, and then the narrowest. The index is None if
    there are no shapes, which allows any size.

    Raises:
        ShapeError: no shapes contain the sizes; the message lists all shapes.
    """
    if not shapes:
        return None
    fits = [
        index
        for index, ranges in enumerate(shapes)
        if all(sizes[name] in allowed for name, allowed in ranges.items())
    ]
    if not fits:
        got = ", ".join(f"{name} {sizes[name]}" for name in shapes[0])
        raise ShapeError(
            f"these engines were not built for {got}; they take {format_shapes(shapes)}"
        )
    return min(fits, key=lambda index: _distance(shapes[index], sizes))


def _distance(shapes: Shapes, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the distance of a run from the optimum, and the width of the ranges."""
    distance = sum(abs(sizes[name] - allowed.opt) for name, allowed in shapes.items())
    return distance, sum(allowed.max - allowed.min for allowed in shapes.values())


def bounding_range(shapes: Sequence[Shapes]) -> Shapes:
    """Return one range per dimension that contains all shapes, with the optimum of the first."""
    return {
        name: Range(
            min(ranges[name].min for ranges in shapes),
            first.opt,
            max(ranges[name].max for ranges in shapes),
        )
        for name, first in (shapes[0] if shapes else {}).items()
    }


def format_shapes(shapes: Sequence[Shapes]) -> str:
    """Return shapes as text, such as ``batch 1, height 512 or batch 2, height 512``."""
    return " or ".join(
        ", ".join(f"{name} {allowed}" for name, allowed in ranges.items()) for ranges in shapes
    )
