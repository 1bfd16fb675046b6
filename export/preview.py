"""Fit of the map from latents to colours by which a run is previewed without its decoder.

The pictures that it is fitted on are dead leaves: shapes of all sizes and colours that cover each
other, with the edges, flat regions and scale invariance of natural images (Lee, Mumford and Huang
2001, doi 10.1023/A:1011109015675). The model's own VAE encodes and decodes them. Colours of its
decoder, averaged over the cells of the latents, are then regressed on the latents' channels and
their products, which most VAEs need for saturated colours.
"""

import math
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.engine import Engines
from latentforge.runtime.latent_colors import colors, features
from latentforge.runtime.loader import EngineLoader
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import MAX_COEFFICIENT, Latent, Manifest, PreviewMap
from latentforge.runtime.vae import Vae

__all__ = ["fit_preview", "leaves", "pooled"]

Array = NDArray[np.float32]

_log = escaping_logger("latentforge")

_SIDE = 96  # pixels, where the sizes of the engines are free
_PIXELS = 6 * _SIDE**2  # of all pictures together, at least
_SHAPES = (2, 4, 8, 16, 32, 64)  # of one picture
_SMALLEST, _LARGEST = 0.03, 0.5  # radius of a shape, as part of a picture's side
_WHITE = 0.35  # share of white and black shapes
_RIDGE = 1e-4
_MAX_PRODUCTS = 32  # channels up to which there are few enough products
_SEED = 0


def fit_preview(manifest: Manifest, directory: Path) -> PreviewMap | None:
    """Return the map of a model that was just exported; None without its decoder.

    Args:
        manifest: with the components.
        directory: with their files.

    Raises:
        BackendError: an engine of the VAE fails.
    """
    names = [name for name in ("vae_encoder", "vae_decoder") if name in manifest.components]
    if "vae_decoder" not in names:
        return None
    engines = Engines(EngineLoader(manifest=manifest, directory=directory, low_memory=True), names)
    vae, latent = Vae(latent=manifest.latent, engines=engines), manifest.latent
    try:
        latents = _latents(vae, manifest)
        targets = pooled(vae.decode(latents).clip(-1, 1), latent.downscale)
    finally:
        engines.close()
    return _fitted(latents, targets, latent)


def _latents(vae: Vae, manifest: Manifest) -> Array:
    """Return latents (n, channels, h, w) of pictures; random ones if there is no encoder."""
    latent, (height, width) = manifest.latent, _size(manifest)
    scale = latent.downscale
    count = math.ceil(_PIXELS / (height * width))
    rng = np.random.default_rng(_SEED)
    shapes = [_SHAPES[-1 - index % len(_SHAPES)] for index in range(count)]
    if "vae_encoder" not in manifest.components:
        cells = (height // scale, width // scale)
        return np.stack([leaves(rng, cells, latent.channels, each) for each in shapes])
    pictures = np.stack([leaves(rng, (height, width), 3, each) for each in shapes])
    return vae.encode(pictures.clip(-1, 1)).mean * np.float32(latent.scaling_factor)


def _size(manifest: Manifest) -> tuple[int, int]:
    """Return the height and width of the pictures: what the decoder is fixed to, or _SIDE."""
    latent = manifest.latent
    unit = latent.downscale * latent.multiple
    height, width = (
        max(unit, _SIDE // unit * unit) if isinstance(side, str) else side * latent.downscale
        for side in manifest.components["vae_decoder"].inputs["latent_sample"].shape[2:]
    )
    return height, width


def leaves(rng: np.random.Generator, size: tuple[int, int], channels: int, count: int) -> Array:
    """Return a picture (channels, height, width) of shaded shapes that cover each other.

    Args:
        rng: source of the shapes.
        size: height and width.
        channels: numbers of a colour, each about -1..1.
        count: shapes.
    """
    grid = np.mgrid[: size[0], : size[1]].astype(np.float32) / np.float32(max(size))
    y, x = grid.reshape(2, -1)
    picture = _shade(rng, y, x, channels)
    for _ in range(count):
        inside = np.flatnonzero(_shape(rng, y, x))
        picture[:, inside] = _shade(rng, y[inside], x[inside], channels)
    return picture.reshape(channels, *size)


def _shade(rng: np.random.Generator, y: Array, x: Array, channels: int) -> Array:
    """Return a random colour with a gradient at some pixels: (channels, pixels)."""
    color = rng.uniform(-1, 1, channels)
    if rng.random() < _WHITE:  # far more common in pictures than chance has them
        color[:] = rng.choice([-1, 1])
    slope = rng.normal(0, 0.25, (2, channels))
    parts = (color, slope[0], slope[1])
    base, down, across = (part.astype(np.float32)[:, None] for part in parts)
    shaded: Array = base + down * (y - 0.5) + across * (x - 0.5)
    return shaded


def _shape(rng: np.random.Generator, y: Array, x: Array) -> NDArray[np.bool_]:
    """Return the inside of a rotated ellipse, or of a box with round corners."""
    radius = _SMALLEST * (_LARGEST / _SMALLEST) ** rng.random()
    angle, (top, left) = rng.uniform(0, math.pi), rng.random(2)
    cos, sin = math.cos(angle), math.sin(angle)
    u = ((y - top) * cos + (x - left) * sin) / radius
    v = ((x - left) * cos - (y - top) * sin) / (radius * rng.uniform(0.5, 2))
    squares = u * u, v * v
    if rng.random() < 0.5:
        squares = squares[0] ** 4, squares[1] ** 4
    inside: NDArray[np.bool_] = squares[0] + squares[1] < 1
    return inside


def pooled(pixels: Array, factor: int) -> Array:
    """Return the means of (factor, factor) pixels of images (n, channels, height, width)."""
    n, channels, height, width = pixels.shape
    cells = pixels.reshape(n, channels, height // factor, factor, width // factor, factor)
    means: Array = cells.mean(axis=(3, 5))
    return means


def _fitted(latents: Array, targets: Array, latent: Latent) -> PreviewMap | None:
    """Return the map fitted on the left of all pictures, and judged on the rest."""
    border = latents.shape[3] * 3 // 4 or 1
    inputs = features(latents, products=latent.channels <= _MAX_PRODUCTS)
    solution = _regressed(_rows(inputs[..., :border]), _rows(targets[..., :border]))
    if not np.abs(solution).max() <= MAX_COEFFICIENT:  # also for NaN
        _log.warning("no map for previews fits this VAE: there will be none while a run lasts")
        return None
    preview = _record(solution, latent.channels)
    rest = slice(border if border < latents.shape[3] else 0, None)
    correlation = _correlation(colors(latents[..., rest], preview), targets[..., rest])
    return msgspec.structs.replace(preview, correlation=correlation)


def _rows(maps: Array) -> NDArray[np.float64]:
    """Return maps (n, channels, h, w) as rows, one for each cell."""
    return np.moveaxis(maps, 1, -1).reshape(-1, maps.shape[1]).astype(np.float64)


def _regressed(inputs: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients (inputs, 3) of a ridge regression, the constant's first."""
    rows = np.concatenate([np.ones_like(inputs[:, :1]), inputs], axis=1)
    normal = rows.T @ rows
    penalty = _RIDGE * np.diag(normal)
    penalty[0] = 0
    solution, *_ = np.linalg.lstsq(normal + np.diag(penalty), rows.T @ targets, rcond=None)
    return solution


def _record(solution: NDArray[np.float64], channels: int) -> PreviewMap:
    red, green, blue = solution.T.round(6).tolist()
    end = 1 + channels
    return PreviewMap(
        offset=(red[0], green[0], blue[0]),
        weights=(tuple(red[1:end]), tuple(green[1:end]), tuple(blue[1:end])),
        products=(tuple(red[end:]), tuple(green[end:]), tuple(blue[end:])),
        correlation=0.0,
    )


def _correlation(found: Array, expected: Array) -> float:
    """Return the correlation of all colours of two arrays; 0 if one has a single colour."""
    a, b = (array - array.mean() for array in (found.astype(np.float64), expected))
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return round(float((a * b).sum()) / scale, 4) if scale > 0 else 0.0
