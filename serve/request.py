"""Requests of clients, complete and checked, and the rows and batches that they run in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from secrets import randbits
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.denoising.depth import DepthInput
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.request_completion import complete_request
from latentforge.runtime.resolved_request import ResolvedRequest
from latentforge.runtime.settings import Settings

__all__ = ["Batch", "BatchKey", "ImageRequest", "Row", "seeds_from"]

Pixels = NDArray[np.uint8]
Depth = NDArray[np.float32]

_UNIT = 512 * 512
_SEEDS = 1 << 64


@dataclass(frozen=True)
class BatchKey:
    """Everything that the rows of one batch share.

    Attributes:
        model: name of the model.
        settings: of the request, without its prompts and its seeds.
        has_image: True if each row has an image to start from.
        mask: digest of the mask; empty if there is none.
    """

    model: str
    settings: Settings
    has_image: bool
    mask: str

    @cached_property
    def row_cost(self) -> float:
        """Work of one image: steps of 512 x 512 pixels without guidance."""
        return _row_cost(self.settings)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """Images that a client wants of one prompt, complete.

    Attributes:
        model: name of the model.
        settings: one prompt and one seed for each image, so that image i equals an image that is
            requested alone with its seed.
        image: pixels (h, w, 3) to start from.
        mask: light where to paint, (h, w).
        depth: depth of the image from -1 to 1, of the size of the latents (h, w).
        previews: previews that are wanted of each image while it runs.
    """

    model: str
    settings: Settings
    image: Pixels | None = None
    mask: Pixels | None = None
    depth: Depth | None = None
    previews: int = 0

    @classmethod
    def of(
        cls,
        model: str,
        manifest: Manifest,
        prompt: str,
        *,
        count: int = 1,
        image: Pixels | None = None,
        mask: Pixels | None = None,
        depth_map: DepthInput | None = None,
        previews: int = 0,
        **settings: Any,
    ) -> ImageRequest:
        """Complete a request for a model, and check all that can be checked without its engines.

        Args:
            model, image, mask, previews: see the attributes.
            manifest: of the model.
            prompt: text of all images.
            count: number of images.
            depth_map: of the image, as for Pipeline.__call__().
            settings: as for Pipeline.__call__(); ``seed`` is that of the first image, and None or
                absent draws it.

        Raises:
            SettingsError: a setting is unknown or out of range, or does not fit the model.
            ShapeError: the engines cannot make images of this size, or the mask has another size.
        """
        seed = settings.pop("seed", None)
        seeds = seeds_from(randbits(32) if seed is None else seed, count)
        complete = complete_request(
            manifest, (prompt,) * count, image=image, mask=mask, seed=seeds, **settings
        )
        resolved = ResolvedRequest.of(
            complete, manifest, image=image, mask=mask, depth_map=depth_map
        )
        depth = None if resolved.init.depth is None else resolved.init.depth[0, 0]
        return cls(
            model=model, settings=complete, image=image, mask=mask, depth=depth, previews=previews
        )

    @cached_property
    def key(self) -> BatchKey:
        """Key of the batches that its images may run in."""
        negative = ("",) if self.settings.negative_prompts else ()
        shared = replace(self.settings, prompts=("",), negative_prompts=negative, seed=0)
        return BatchKey(self.model, shared, self.image is not None, _digest(self.mask))

    @property
    def count(self) -> int:
        """Number of images."""
        return self.settings.count

    @property
    def cost(self) -> float:
        """Work of all images: steps of 512 x 512 pixels without guidance."""
        return _row_cost(self.settings) * self.count

    @property
    def bytes(self) -> int:
        """Bytes of its pictures."""
        parts = (self.image, self.mask, self.depth)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, job: str) -> tuple[Row, ...]:
        """Return the images of this request, as a job, to run in batches."""
        settings = self.settings
        negatives = settings.negative_prompts or (None,) * settings.count
        texts = zip(settings.prompts, negatives, settings.seeds, strict=True)
        return tuple(
            Row(
                job=job, index=index, prompt=prompt, negative=negative, seed=seed,
                image=self.image, depth=self.depth,
            )
            for index, (prompt, negative, seed) in enumerate(texts)
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One image of a job."""

    job: str
    index: int
    prompt: str
    negative: str | None
    seed: int
    image: Pixels | None = None
    depth: Depth | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows that run together, of one key.

    Attributes:
        id: number of the batch, never used again.
        key: the rows' key.
        rows: the rows.
        mask: (h, w), the same for all.
        previews: the most previews that one of the rows' jobs wants.
    """

    id: int
    key: BatchKey
    rows: tuple[Row, ...]
    mask: Pixels | None = None
    previews: int = 0

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.key.model

    @cached_property
    def settings(self) -> Settings:
        """Settings of all rows together."""
        negatives = tuple(row.negative for row in self.rows if row.negative is not None)
        return replace(
            self.key.settings,
            prompts=tuple(row.prompt for row in self.rows),
            negative_prompts=negatives,
            seed=tuple(row.seed for row in self.rows),
        )

    @property
    def images(self) -> tuple[Pixels, ...] | None:
        """Images to start from, one for each row, if the rows have any."""
        images = tuple(row.image for row in self.rows if row.image is not None)
        return images or None

    @property
    def depths(self) -> Depth | None:
        """Depth of the rows' images (rows, h, w), if the model takes it."""
        depths = [row.depth for row in self.rows if row.depth is not None]
        return np.stack(depths) if depths else None


def seeds_from(seed: Any, count: int) -> tuple[int, ...]:
    """Return seeds of consecutive images, from that of the first.

    Anything but an integer is returned as it is, for the settings to refuse it.
    """
    if type(seed) is not int:
        return (seed,) * count
    return tuple(s - _SEEDS if (s := seed + i) >= _SEEDS > seed else s for i in range(count))


def _row_cost(settings: Settings) -> float:
    """Return the work of one image: steps of 512 x 512 pixels without guidance."""
    pixels = settings.height * settings.width / _UNIT
    return _steps(settings) * pixels * settings.guidance_rows


def _steps(settings: Settings) -> float:
    """Return the number of steps that run, which strength and the fractions make fewer."""
    if settings.denoising_start is None and settings.denoising_end is None:
        return max(1, int(settings.steps * settings.strength))
    start = settings.denoising_start or 0.0
    end = 1.0 if settings.denoising_end is None else settings.denoising_end
    return max(1.0, settings.steps * (end - start))


def _digest(mask: Pixels | None) -> str:
    if mask is None:
        return ""
    content = hashlib.sha256(str(mask.shape).encode())
    content.update(mask.tobytes())
    return content.hexdigest()
