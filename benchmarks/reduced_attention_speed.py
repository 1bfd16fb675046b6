"""Speedup and error of a denoiser step with fewer keys and values, by image size.

    python benchmarks/reduced_attention_speed.py ENGINES --sides 512 768 1024

The engines have to be optimized for ONNX Runtime. The inputs of the denoiser are recorded in the
middle of a short run. The unchanged graph and graphs with reduced attention then run on one row of
them, interleaved. The first reduced graph has fewer keys and values on the finest grid with
self-attention, the next one on the two finest, and so on.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.conclusion import interval_text
from latentforge.measure.results import ConfidenceInterval
from latentforge.measure.statistics import median_interval
from latentforge.optimize.graph import open_session
from latentforge.optimize.graph_io import DENOISER
from latentforge.optimize.search.reduced_attention import REDUCED, grid_tokens, reduce_attention
from latentforge.optimize.search.variants import load_denoiser
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.loader import load
from latentforge.runtime.tensor import Feeds

__all__ = ["SpeedRow", "main", "measure"]

_PROMPT = "a red apple on a blue background"


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """Measurement of one reduced graph at one image size.

    Attributes:
        side: of the image, in pixels.
        min_tokens: number of tokens from which keys and values are reduced.
        seconds: of the unchanged step, the median.
        speedup: of the reduced step, the median over pairs with its interval.
        error: root mean square of the change of the output, relative to the unchanged output.
    """

    side: int
    min_tokens: int
    seconds: float
    speedup: ConfidenceInterval
    error: float

    def __str__(self) -> str:
        bounds = interval_text(self.speedup)
        interval = f" ({bounds})" if bounds else ""
        return (
            f"| {self.side} | {self.min_tokens} | {self.seconds:.3f} "
            f"| {self.speedup.value:.3f}{interval} | {self.error:.4f} |"
        )


class _InputRecorder:
    """Session that records its inputs."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.feeds: list[Feeds] = []

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        self.feeds.append(dict(feeds))
        return self._session.run(feeds)

    def layers(self) -> list[LayerTime]:
        return self._session.layers()

    def close(self) -> None:
        self._session.close()


def measure(
    engines: Path, side: int, *, grids: int, steps: int, repeats: int
) -> Iterator[SpeedRow]:
    """Yield a row for each of the finest grids.

    Args:
        engines: their directory.
        side: of the image, in pixels.
        grids: number of the finest grids to reduce, at most.
        steps: of the run in the middle of which the inputs are recorded.
        repeats: pairs of runs of each graph.
    """
    manifest, part = load_denoiser(engines, REDUCED)
    feeds = _record(engines, side, steps)
    unchanged = open_session(part.model)
    for min_tokens in grid_tokens(part, manifest.components[DENOISER].sizes(feeds))[:grids]:
        model = part.model.clone()
        reduce_attention(model, min_tokens=min_tokens)
        pairs = list(_pairs(unchanged, open_session(model), feeds, repeats))
        yield SpeedRow(
            side=side,
            min_tokens=min_tokens,
            seconds=float(np.median([pair[0] for pair in pairs])),
            speedup=median_interval([pair[0] / pair[1] for pair in pairs]),
            error=pairs[0][2],
        )


def _record(engines: Path, side: int, steps: int) -> Feeds:
    """Return the denoiser's inputs in the middle of a run, one row."""
    recorders: list[_InputRecorder] = []

    def wrap(name: str, session: Session) -> Session:
        if name != DENOISER:
            return session
        recorders.append(_InputRecorder(session))
        return recorders[-1]

    with load(engines, hashes=False, low_memory=True, wrap_session=wrap) as pipeline:
        stream = pipeline.stream(
            _PROMPT, height=side, width=side, steps=steps, seed=0, guidance_scale=1.0
        )
        for _ in zip(range(steps // 2 + 1), stream, strict=False):
            pass
    return recorders[-1].feeds[-1]


def _pairs(
    unchanged: Any, reduced: Any, feeds: Feeds, repeats: int
) -> Iterator[tuple[float, float, float]]:
    """Yield the seconds of both and their relative difference, after one warm-up pair."""
    for index in range(repeats + 1):
        (expected, before), (output, after) = (_timed(each, feeds) for each in (unchanged, reduced))
        if index:
            error = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
            yield before, after, error


def _timed(session: Any, feeds: Feeds) -> tuple[NDArray[np.float32], float]:
    start = time.perf_counter()
    (output,) = session.run(["out_sample"], feeds)
    return output, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engines", type=Path, help="optimized engines, such as build writes")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[512, 768, 1024], help="image sides in pixels"
    )
    parser.add_argument("--grids", type=int, default=2, help="finest grids to reduce, at most")
    parser.add_argument("--steps", type=int, default=2, help="steps of the recorded run")
    parser.add_argument("--repeats", type=int, default=6, help="pairs of runs")
    options = parser.parse_args(arguments)
    print("| pixels | reduced from tokens | unchanged step, s | speedup | relative error |")
    print("|---|---|---|---|---|")
    for side in options.sides:
        rows = measure(
            options.engines,
            side,
            grids=options.grids,
            steps=options.steps,
            repeats=options.repeats,
        )
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
