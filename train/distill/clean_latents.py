"""Clean latents to add noise to: of pictures, or drawn by the teacher; and batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import to_array
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.settings import Settings
from latentforge.runtime.vae import Posterior
from latentforge.train.distill.batch import TrainingBatch
from latentforge.train.distill.captioned_pictures import CaptionedPicture, CaptionedPictures
from latentforge.train.distill.training_noise import TrainingNoise

__all__ = [
    "CleanLatents",
    "CleanSource",
    "DrawnLatents",
    "NoisySource",
    "PictureLatents",
    "Positions",
    "ShuffledEpochs",
    "spread_times",
]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CleanLatents:
    """Clean latents and what conditions the denoiser on them.

    Attributes:
        latents: (rows, channels, h, w), scaled for the denoiser.
        condition: inputs of the denoiser by name, (rows, ...).
        free: the same inputs for the empty prompt, (rows, ...).
    """

    latents: Tensor
    condition: Mapping[str, Tensor]
    free: Mapping[str, Tensor]

    def rows(self, chosen: Tensor) -> CleanLatents:
        """Return rows by their numbers (rows,)."""
        return CleanLatents(
            latents=self.latents[chosen],
            condition={name: value[chosen] for name, value in self.condition.items()},
            free={name: value[chosen] for name, value in self.free.items()},
        )


class CleanSource(Protocol):
    """Source of clean latents; see BatchSource for what it promises."""

    def draw(self, rows: int, generator: torch.Generator) -> CleanLatents:
        """Return so many latents."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that state() returned."""
        ...


class Positions:
    """Positions that a process takes of those that all of them share, in turn."""

    def __init__(self, process: int = 0, processes: int = 1) -> None:
        """Start at the first position."""
        self._process, self._processes, self._next = process, processes, 0

    def take(self, rows: int) -> int:
        """Return the first of the next positions of this process, of which there are so many."""
        start = self._next + self._process * rows
        self._next += self._processes * rows
        return start

    def state(self) -> dict[str, Any]:
        """Return where all processes are, as JSON values."""
        return {"position": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where state() was."""
        self._next = int(state["position"])


class PictureLatents:
    """Latents of pictures with captions, encoded by the teacher's engines.

    Pictures are scaled to cover the size and cropped around their middle.
    """

    def __init__(
        self, pictures: CaptionedPictures, pipeline: Pipeline, positions: Positions | None = None
    ) -> None:
        """Start at the first picture.

        Args:
            pictures: to encode.
            pipeline: the teacher's engines, as exported.
            positions: of this process; None: there is no other.

        Raises:
            SettingsError: the denoiser takes an image beside the prompt, or has no classifier-free
                guidance.
        """
        self._pictures, self._pipeline = pictures, pipeline
        self._positions = positions or Positions()
        if pipeline.manifest.conditioning.requires_image:
            raise SettingsError(
                "the teacher takes an image beside the prompt: train its student without pictures"
            )
        settings = self._settings([""])
        self._size = settings.height, settings.width
        if "timestep_cond" in pipeline.encode(settings):
            raise SettingsError(
                "guidance is folded into the teacher already, so it predicts nothing without: "
                "train its student without pictures"
            )

    def draw(self, rows: int, generator: torch.Generator) -> CleanLatents:
        """Return the latents of the next pictures, sampled from the encoder's distribution.

        Raises:
            SettingsError: a picture is damaged, or its caption empty.
        """
        pictures = self._pictures.take(self._positions.take(rows), rows)
        latents = self._encode(pictures, generator)
        free, condition = self._conditions([picture.caption() for picture in pictures])
        return CleanLatents(latents=latents, condition=condition, free=free)

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {**self._positions.state(), "pictures": len(self._pictures)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position.

        Raises:
            SettingsError: there are more or fewer pictures than there were.
        """
        before, now = int(state["pictures"]), len(self._pictures)
        if before != now:
            raise SettingsError(
                f"there are {now} pictures, and {before} when the training began: give it those, "
                "or name another --work folder"
            )
        self._positions.restore(state)

    def _encode(self, pictures: Sequence[CaptionedPicture], generator: torch.Generator) -> Tensor:
        pixels = np.concatenate([covering(row.image(), self._size) for row in pictures])
        outputs = self._pipeline.load_engine("vae_encoder").run({"sample": pixels})
        posterior = Posterior(
            parameters=outputs["latent_parameters"], latent=self._pipeline.manifest.latent
        )
        return torch.from_numpy(
            posterior.sample(lambda shape: torch.randn(shape, generator=generator).numpy())
        )

    def _conditions(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return the conditioning inputs of the empty prompt and of the prompts, as guided."""
        encoded = self._pipeline.encode(self._settings(prompts))
        rows = {name: torch.from_numpy(array).chunk(2) for name, array in encoded.items()}
        return [{name: halves[part] for name, halves in rows.items()} for part in (0, 1)]

    def _settings(self, prompts: Sequence[str]) -> Settings:
        return self._pipeline.settings(list(prompts), guidance_scale=2.0, unaccelerated=True)


@dataclass(frozen=True, kw_only=True)
class ShuffledEpochs:
    """Numbers below ``count`` in epochs, each in another order.

    Attributes:
        count: of the numbers.
        seed: of the orders.
    """

    count: int
    seed: int = 0

    def take(self, start: int, rows: int) -> Tensor:
        """Return the numbers at so many positions from ``start`` on, (rows,)."""
        epochs = range(start // self.count, (start + rows - 1) // self.count + 1)
        orders = [self._order(epoch) for epoch in epochs]
        first = start % self.count
        return torch.cat(orders)[first : first + rows]

    def _order(self, epoch: int) -> Tensor:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return torch.from_numpy(order)


class DrawnLatents:
    """Latents that are drawn already, in shuffled epochs."""

    def __init__(
        self, latents: CleanLatents, seed: int = 0, positions: Positions | None = None
    ) -> None:
        """Start at the first position.

        Args:
            latents: all of them.
            seed: of the order.
            positions: of this process; None: there is no other.
        """
        self._latents, self._positions = latents, positions or Positions()
        self._order = ShuffledEpochs(count=len(latents.latents), seed=seed)

    def draw(self, rows: int, generator: torch.Generator) -> CleanLatents:
        """Return the next latents."""
        return self._latents.rows(self._order.take(self._positions.take(rows), rows))

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return self._positions.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._positions.restore(state)


def covering(image: Image.Image, size: tuple[int, int]) -> Array:
    """Return an image as pixels (1, 3, height, width) in -1..1, cropped around its middle."""
    height, width = size
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return to_array([fitted])


def spread_times(steps: int, rows: int, generator: torch.Generator) -> Tensor:
    """Return random timesteps (rows,), one in each of as many equal parts of 0 to ``steps`` - 1.

    Losses vary less than with independent timesteps (Kingma et al. 2021, arXiv 2107.00630, appendix
    I.1).
    """
    parts = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    return (parts * (steps / rows)).long().clamp(max=steps - 1)


class NoisySource:
    """Batches of noisy latents with the target of the task loss."""

    def __init__(
        self,
        source: CleanSource,
        noise: TrainingNoise,
        *,
        free: float = 0.1,
        times: Callable[[int, int, torch.Generator], Tensor] = spread_times,
    ) -> None:
        """Add noise to the latents of a source.

        Args:
            source: of clean latents.
            noise: of the student.
            free: share of rows with the empty prompt, without which there is no classifier-free
                guidance (Ho & Salimans 2022).
            times: (steps, rows, generator) -> timesteps (rows,).
        """
        self._source, self._noise, self._free, self._times = source, noise, free, times

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        """Return a batch with its target, by a generator for it alone."""
        drawn = self._source.draw(rows, generator)
        times = self._times(self._noise.steps, rows, generator)
        added = torch.randn(drawn.latents.shape, generator=generator)
        free = torch.rand(rows, generator=generator) < self._free
        condition = {
            name: torch.where(free.reshape(-1, *(1,) * (value.dim() - 1)), drawn.free[name], value)
            for name, value in drawn.condition.items()
        }
        noisy = self._noise.noisy(drawn.latents, added, times)
        target = self._noise.target(drawn.latents, added, times)
        return TrainingBatch(feeds={"sample": noisy, "timestep": times, **condition}, target=target)

    def state(self) -> dict[str, Any]:
        """Return the position of the source."""
        return self._source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position of the source."""
        self._source.restore(state)
