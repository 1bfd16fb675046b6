"""Sample images of a student in training: the teacher's engines, with its denoiser in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentforge.export.families.parts import UNet
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.loader import load
from latentforge.runtime.tensor import Feeds
from latentforge.train.distill.batch import SampleSettings

__all__ = ["draw_samples"]


class _StudentSession:
    """Session of a denoiser in torch."""

    def __init__(
        self, network: UNet, inputs: Sequence[str], more: Mapping[str, torch.Tensor]
    ) -> None:
        self._network, self._inputs, self._more = network, inputs, more

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        device = next(self._network.parameters()).device
        tensors = {
            name: torch.from_numpy(np.require(feeds[name], requirements="W")).to(device)
            for name in self._inputs
        }
        rows = len(tensors["sample"])
        more = {name: value.to(device).repeat(rows, 1) for name, value in self._more.items()}
        with torch.no_grad():
            output: Any = self._network(**tensors, **more)
        return {"out_sample": output.float().cpu().numpy()}

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        pass


def draw_samples(
    engines: Path,
    network: UNet,
    inputs: Sequence[str],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    sampled: SampleSettings,
) -> NDArray[np.uint8]:
    """Draw an image of each prompt, with its index as the seed.

    Args:
        engines: the teacher's, of whom all but the denoiser runs.
        network: the student's denoiser.
        inputs: names of its inputs that are its teacher's, too.
        prompts: of the images.
        settings: of the teacher's schedule.
        sampled: where the student differs from its teacher.

    Returns:
        Images (count, h, w, 3).
    """

    def wrap(name: str, session: Session) -> Session:
        return _StudentSession(network, inputs, sampled.feeds) if name == "denoiser" else session

    with load(engines, hashes=False, wrap_session=wrap, example_images=True) as pipeline:
        options: dict[str, Any] = {"seed": list(range(len(prompts))), "unaccelerated": True}
        options |= {**settings, **sampled.settings}
        result = pipeline.run(pipeline.settings(list(prompts), **options))
    return np.stack([np.asarray(image.convert("RGB"), np.uint8) for image in result.images])
