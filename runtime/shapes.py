"""The sizes that engines are built for: ranges of free dimensions, and which one a run fits.

An engine of several shapes was built for each of them by itself: TensorRT's optimization profiles,
or one static graph a size. Outside of them it does not run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import msgspec

from latentforge.runtime.errors import SettingsError, ShapeError

__all__ = [
    "ANY",
    "Range",
    "Shapes",
    "Sizes",
    "bounding_range",
    "nearest",
    "parse_ranges",
    "sentence",
]

_MOST = 16_384


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The sizes of a dimension: the least, the one to be fastest at, and the most."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            given = f"{self.min}:{self.opt}:{self.max}"
            raise SettingsError(f"a range is MIN:OPT:MAX, in order and from 1 up, not {given}")

    @classmethod
    def of(cls, size: int) -> "Range":
        """One size alone."""
        return cls(size, size, size)

    @property
    def fixed(self) -> bool:
        """Whether it holds a single size."""
        return self.min == self.max

    def scaled(self, *, up: int = 1, down: int = 1) -> "Range":
        """The range of a dimension that is so many times larger, or smaller."""
        return Range(*(size * up // down for size in (self.min, self.opt, self.max)))

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        if self == ANY:
            return "any"
        return str(self.min) if self.fixed else f"{self.min}:{self.opt}:{self.max}"


ANY = Range(1, 1, 1 << 30)
"""What a dimension may be that nothing was said about."""

Shapes = Mapping[str, Range]
"""Sizes by free dimension that an engine takes together. One that is not named may have any."""


def parse_ranges(text: str) -> tuple[Range, ...]:
    """Ranges as the command line has them: ``512``, ``512,768`` or ``256:512:768``.

    Raises:
        SettingsError: it is something else, or a size is not in 1..16384.
    """
    return tuple(_range(part.strip(), text) for part in text.split(","))


def _range(part: str, text: str) -> Range:
    sizes = part.split(":")
    if len(sizes) not in (1, 3) or not all(s.isascii() and s.isdigit() for s in sizes):
        raise SettingsError(f"sizes are N, N,N,... or MIN:OPT:MAX, not {text!r}")
    least, usual, most = (int(size[:9]) for size in (sizes if len(sizes) == 3 else sizes * 3))
    if most > _MOST:
        raise SettingsError(f"a size is at most {_MOST}, and {text!r} has {most}")
    return Range(least, usual, most)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those that engines are to be built for; every combination of them makes one shape.

    Attributes:
        height, width: of the image, in pixels; nothing leaves them free.
        batch: rows of one run, of which guidance takes two an image; nothing leaves them free.
    """

    height: tuple[Range, ...] = ()
    width: tuple[Range, ...] = ()
    batch: tuple[Range, ...] = ()

    def or_else(self, other: "Sizes") -> "Sizes":
        """The same, with what is free here taken from another."""
        return Sizes(
            height=self.height or other.height,
            width=self.width or other.width,
            batch=self.batch or other.batch,
        )

    def shapes(
        self, dimensions: Iterable[str], downscale: int, rows: Range | None = None
    ) -> tuple[Shapes, ...]:
        """What a component with these free dimensions is built for.

        Args:
            dimensions: their names, as export gives them.
            downscale: pixels of a latent's pixel.
            rows: for the dimension of that name, in which all timesteps of a run stand; None
                leaves it free.
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
        """Those that are given, as parse_ranges takes them."""
        given = {"height": self.height, "width": self.width, "batch": self.batch}
        return {name: ",".join(map(str, ranges)) for name, ranges in given.items() if ranges}


def nearest(shapes: Sequence[Shapes], sizes: Mapping[str, int]) -> int | None:
    """The index of the shapes that hold these sizes; of several, the one with least to spare.

    None where there are no shapes, which allows any size.

    Raises:
        ShapeError: none of them does; the message lists them.
    """
    fits = [
        index
        for index, each in enumerate(shapes)
        if all(sizes[name] in allowed for name, allowed in each.items())
    ]
    if not fits:
        if not shapes:
            return None
        got = ", ".join(f"{name} {sizes[name]}" for name in shapes[0])
        raise ShapeError(f"these engines were not built for {got}; they take {sentence(shapes)}")
    return min(fits, key=lambda index: _spare(shapes[index], sizes))


def _spare(shapes: Shapes, sizes: Mapping[str, int]) -> tuple[int, int]:
    """How far a run is from what it is built for, and how much more it would hold."""
    away = sum(abs(sizes[name] - allowed.opt) for name, allowed in shapes.items())
    return away, sum(allowed.max - allowed.min for allowed in shapes.values())


def bounding_range(shapes: Sequence[Shapes]) -> Shapes:
    """The one range of each dimension that holds all of them, fastest where the first is."""
    return {
        name: Range(
            min(each[name].min for each in shapes),
            first.opt,
            max(each[name].max for each in shapes),
        )
        for name, first in (shapes[0] if shapes else {}).items()
    }


def sentence(shapes: Sequence[Shapes]) -> str:
    """Shapes in words, such as ``batch 1, height 512 or batch 2, height 512``."""
    return " or ".join(
        ", ".join(f"{name} {allowed}" for name, allowed in each.items()) for each in shapes
    )
