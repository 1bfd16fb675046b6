"""Recorded runs of an engine directory: results, and inputs and outputs of every engine call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.image import to_array
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress
from latentforge.runtime.tensor import Feeds

__all__ = ["Call", "CallRecording", "record", "sample_evenly"]

T = TypeVar("T")

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Call:
    """Inputs and outputs of one engine call."""

    feeds: Feeds
    outputs: Outputs


@dataclass(frozen=True, kw_only=True)
class CallRecording:
    """Results of a few prompts, and every call of every engine.

    Attributes:
        results: one per prompt.
        calls: in order, by component.
    """

    results: tuple[Result, ...]
    calls: Mapping[str, tuple[Call, ...]]

    def feeds(self, name: str) -> list[Feeds]:
        """Return the inputs of a component, in order."""
        return [call.feeds for call in self.calls.get(name, ())]


class _Recorder:
    """Session that records its calls."""

    def __init__(self, session: Session) -> None:
        self.calls: list[Call] = []
        self._session = session

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        outputs = self._session.run(feeds)
        self.calls.append(Call(dict(feeds), outputs))
        return outputs

    def layers(self) -> list[LayerTime]:
        return self._session.layers()

    def close(self) -> None:
        self._session.close()


def record(
    directory: Path,
    prompts: Sequence[str],
    *,
    settings: Mapping[str, Any],
    progress: Progress,
    activity: str,
) -> CallRecording:
    """Generate one image per prompt, with its index as the seed, and record every engine call.

    Args:
        directory: the engines.
        prompts: one per image.
        settings: of the runs, such as steps and sampler, where they differ from the defaults.
        progress: counts one part per prompt.
        activity: name of the runs, for the progress.
    """
    recorders: dict[str, _Recorder] = {}

    def wrap(name: str, session: Session) -> Session:
        recorders[name] = _Recorder(session)
        return recorders[name]

    with load(directory, hashes=False, wrap_session=wrap, example_images=True) as pipeline:
        results = []
        for seed, prompt in enumerate(prompts):
            with progress.part(f"{activity}: {prompt[:32]}"):
                results.append(pipeline(prompt, **{"seed": seed, **settings}))
        calls = {name: tuple(recorder.calls) for name, recorder in recorders.items()}
        if "vae_encoder" in pipeline.manifest.components and not calls.get("vae_encoder"):
            calls["vae_encoder"] = (_encoded(pipeline, results[0]),)
    return CallRecording(results=tuple(results), calls=calls)


def _encoded(pipeline: Pipeline, result: Result) -> Call:
    """Encode a generated image: text to image never calls the VAE encoder."""
    feeds = {"sample": to_array(result.images)}
    return Call(feeds, pipeline.load_engine("vae_encoder").run(feeds))


def sample_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, evenly spaced over all of them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round()
    return [items[int(place)] for place in places]
