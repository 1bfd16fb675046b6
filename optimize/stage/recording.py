"""Denoising runs of an engine directory, and what went into and came out of each engine."""

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

__all__ = ["Call", "CallRecording", "record", "spread"]

T = TypeVar("T")

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Call:
    """One run of an engine."""

    feeds: Feeds
    outputs: Outputs


@dataclass(frozen=True, kw_only=True)
class CallRecording:
    """The pictures of a few prompts, and every call of every engine, by its name."""

    results: tuple[Result, ...]
    calls: Mapping[str, tuple[Call, ...]]

    def feeds(self, name: str) -> list[Feeds]:
        """What went into a component, in order."""
        return [call.feeds for call in self.calls.get(name, ())]


class _Recorder:
    """A session that keeps what it saw."""

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
    request: Mapping[str, Any],
    progress: Progress,
    what: str,
) -> CallRecording:
    """Make a picture of each prompt, seeded by its number, and keep every call.

    Args:
        directory: the engines.
        prompts: one a picture.
        request: settings of the runs, such as steps and sampler; the manifest's where not given.
        progress: counts one part a prompt.
        what: is being done, for the progress.
    """
    recorders: dict[str, _Recorder] = {}

    def wrap(name: str, session: Session) -> Session:
        recorders[name] = _Recorder(session)
        return recorders[name]

    with load(directory, hashes=False, wrap_session=wrap) as pipeline:
        results = []
        for seed, prompt in enumerate(prompts):
            with progress.part(f"{what}: {prompt[:32]}"):
                results.append(pipeline(prompt, **{"seed": seed, **request}))
        calls = {name: tuple(recorder.calls) for name, recorder in recorders.items()}
        if "vae_encoder" in pipeline.manifest.components and not calls.get("vae_encoder"):
            calls["vae_encoder"] = (_encoded(pipeline, results[0]),)
    return CallRecording(results=tuple(results), calls=calls)


def _encoded(pipeline: Pipeline, result: Result) -> Call:
    """What the VAE encoder makes of a finished picture: text to image never calls it."""
    feeds = {"sample": to_array(result.images)}
    return Call(feeds, pipeline.load_engine("vae_encoder").run(feeds))


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items at most, evenly over all of them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round()
    return [items[int(place)] for place in places]
