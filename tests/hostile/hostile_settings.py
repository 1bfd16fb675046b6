"""Requests with one to three hostile arguments, by number."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentforge.runtime.settings import Request

__all__ = ["VALUES", "request"]

_NAMES = (*Request.__annotations__, "prompt", "image", "mask", "depth_map", "max_rows", "nonsense")


def _truncated() -> Image.Image:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:700]))


def _closed() -> Image.Image:
    image = Image.new("RGB", (32, 32))
    image.close()
    return image


def _fifo() -> str:
    if not Path("fifo").exists():
        os.mkfifo("fifo")
    return "fifo"


VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: value for value in (None, True, False, 0, 1, 2, -1, 3.5, "", "a", b"a")),
    *(lambda value=value: value for value in (2**31, 2**63, 2**64, -(2**63) - 1, 10**5000, 1e308)),
    *(lambda value=value: value for value in (float("nan"), float("inf"), -0.0, 1 + 2j, ..., int)),
    *(lambda value=value: value for value in ((), [], {}, set(), [None], ["a", 3], [[1], 2], "2")),
    *(
        lambda value=value: value
        for value in ("\ud800", "a\0b", "e" + "\u0301" * 10**5, "\x1b[31m")
    ),
    *(lambda value=value: value for value in ("a " * 5_000_000, "euler", "lcm", "denoiser_cached")),
    *(lambda value=value: value for value in (8, 32, 64, 10**6, (32, 48), (0, 0), (0.2, 0.8))),
    *(lambda value=value: value for value in ("/dev/zero", "/dev/tty", "/", "/nowhere", Path("/"))),
    *(lambda value=value: value for value in (object(), range(3), range(10**6), iter([1]), print)),
    *(lambda kind=kind: kind(3) for kind in (np.int8, np.int64, np.uint64, np.float16, np.float32)),
    *(
        lambda shape=shape: np.zeros(shape, np.float32)
        for shape in ((), (0,), (3,), (4, 4), (9,) * 5)
    ),
    *(
        lambda kind=kind: np.ones((8, 8, 3), kind)
        for kind in ("u1", "i4", ">f4", "O", "M8[s]", "U3")
    ),
    *(
        lambda mode=mode: Image.new(mode, (32, 32))
        for mode in ("RGB", "1", "P", "CMYK", "F", "I;16")
    ),
    *(lambda size=size: Image.new("RGB", size) for size in ((0, 0), (1, 1), (1, 20_000), (48, 32))),
    *(lambda: np.full((32, 48, 3), np.nan), lambda: np.ones((8, 8, 3), "u1")[::-1, ::-2]),
    *(lambda: [10**9] * 100_000, lambda: ["a"] * 2000, lambda: {"a": {"b": [1] * 1000}}),
    *(_truncated, _closed, _fifo, lambda: np.array(["a", None], object), lambda: np.float64("nan")),
    *(
        lambda: np.ones((1, 4, 4, 6), np.float16),
        lambda: np.bool_(True),
        lambda: np.datetime64(0, "s"),
    ),
)


def request(index: int) -> dict[str, Any]:
    """Return the arguments of a case, for Pipeline.__call__()."""
    rng = random.Random(index)
    names = rng.sample(_NAMES, rng.choice((1, 1, 1, 2, 3)))
    return {"prompt": "a red apple", "steps": 1, **{name: rng.choice(VALUES)() for name in names}}
