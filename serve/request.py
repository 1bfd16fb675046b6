"""Requests of clients, complete and checked, and the rows and batches that they run in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from secrets import randbits
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.denoising.depth import DepthInput
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.request_completion import complete_request
from latentforge.runtime.resolved_request import ResolvedRequest
from latentforge.runtime.settings import Settings, check_prompts, check_seeds

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

    Requests of text alone that ask for the same, but for their prompts and seeds, share settings
    that were checked once: a server with many times its load refuses most of what it completes.

    Attributes:
        model: name of the model.
        shared: settings of the request without its prompts and its seeds.
        prompt: text of all images.
        negative: what they should not show; None is not the same as an empty one.
        seeds: one for each image, so that image i equals an image that is requested alone with its
            seed.
        image: pixels (h, w, 3) to start from.
        mask: light where to paint, (h, w).
        depth: depth of the image from -1 to 1, of the size of the latents (h, w).
        previews: previews that are wanted of each image while it runs.
    """

    model: str
    shared: Settings
    prompt: str
    negative: str | None
    seeds: tuple[int, ...]
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
            settings: as for Pipeline.__call__(), each of a type that can be hashed; ``seed`` is
                that of the first image, and None or absent draws it.

        Raises:
            SettingsError: a setting is unknown or out of range, or does not fit the model.
            ShapeError: the engines cannot make images of this size, or the mask has another size.
        """
        seed, negative = settings.pop("seed", None), settings.pop("negative_prompt", None)
        seeds = seeds_from(randbits(32) if seed is None else seed, count)
        check_prompts((prompt,), () if negative is None else (negative,))
        check_seeds(seeds, count)
        if negative is not None:
            settings["negative_prompt"] = ""
        if image is None and mask is None and depth_map is None:
            shared, depth = _shared_by_texts(_ByIdentity(manifest), **settings), None
        else:
            resolved = _resolved(manifest, image, mask, depth_map, **settings)
            depth = None if resolved.init.depth is None else resolved.init.depth[0, 0]
            shared = resolved.settings
        return cls(
            model=model, shared=shared, prompt=prompt, negative=negative, seeds=seeds,
            image=image, mask=mask, depth=depth, previews=previews,
        )  # fmt: skip

    @cached_property
    def settings(self) -> Settings:
        """Settings with one prompt and one seed for each image."""
        negatives = () if self.negative is None else (self.negative,) * self.count
        prompts = (self.prompt,) * self.count
        return replace(self.shared, prompts=prompts, negative_prompts=negatives, seed=self.seeds)

    @cached_property
    def key(self) -> BatchKey:
        """Key of the batches that its images may run in."""
        return BatchKey(self.model, self.shared, self.image is not None, _digest(self.mask))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.seeds)

    @property
    def cost(self) -> float:
        """Work of all images: steps of 512 x 512 pixels without guidance."""
        return self.key.row_cost * self.count

    @property
    def bytes(self) -> int:
        """Bytes of its pictures."""
        parts = (self.image, self.mask, self.depth)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, job: str) -> tuple[Row, ...]:
        """Return the images of this request, as a job, to run in batches."""
        return tuple(
            Row(
                job=job, index=index, prompt=self.prompt, negative=self.negative, seed=seed,
                image=self.image, depth=self.depth,
            )
            for index, seed in enumerate(self.seeds)
        )  # fmt: skip


class _ByIdentity:
    """Manifest as a key, which is the object itself: its content cannot be hashed."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __hash__(self) -> int:
        return id(self.manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.manifest is self.manifest


@lru_cache(maxsize=256, typed=True)
def _shared_by_texts(key: _ByIdentity, **settings: Any) -> Settings:
    return _resolved(key.manifest, None, None, None, **settings).settings


def _resolved(
    manifest: Manifest,
    image: Pixels | None,
    mask: Pixels | None,
    depth_map: DepthInput | None,
    **settings: Any,
) -> ResolvedRequest:
    """Return a request of one image without its prompt and its seed, complete and checked."""
    complete = complete_request(manifest, "", image=image, mask=mask, seed=0, **settings)
    return ResolvedRequest.of(complete, manifest, image=image, mask=mask, depth_map=depth_map)


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
