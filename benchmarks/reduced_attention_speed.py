"""What fewer keys and values gain in a step of the UNet, and what they change, by image size.

    python benchmarks/reduced_attention_speed.py ENGINES --sides 512 768 1024

The engines are those of a UNet that was optimized for ONNX Runtime. A run of a few steps gives what
the UNet is asked halfway; that is answered by its own graph and by reduced ones in turns, for one
row. The first reduced graph has fewer keys and values on the finest grid with self-attention alone,
the next one on the two finest, and so on.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """One graph at one size.

    Attributes:
        side: of the picture, in pixels.
        least: tokens from which on keys and values were fewer.
        seconds: of the exact step, the median.
        speedup: of the reduced one, the median over pairs with its interval.
        error: of its output, root mean square, relative to that of the exact one.
    """

    side: int
    least: int
    seconds: float
    speedup: ConfidenceInterval
    error: float

    def __str__(self) -> str:
        gain = self.speedup
        return (
            f"| {self.side} | {self.least} | {self.seconds:.3f} | {gain.value:.3f} "
            f"({gain.low:.3f} to {gain.high:.3f}) | {self.error:.4f} |"
        )


class _Heard:
    """A session that keeps what it is asked."""

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


def measure(engines: Path, side: int, *, most: int, steps: int, repeats: int) -> Iterator[SpeedRow]:
    """A row for each of the finest grids.

    Args:
        engines: their directory.
        side: of the picture, in pixels.
        most: of the grids.
        steps: of the run, in the middle of which the UNet is asked.
        repeats: pairs of runs of each graph.
    """
    manifest, part = load_denoiser(engines, REDUCED)
    feeds = _asked(engines, side, steps)
    exact = open_session(part.model)
    for least in grid_tokens(part, manifest.components[DENOISER].sizes(feeds))[:most]:
        model = part.model.clone()
        reduce_attention(model, min_tokens=least)
        pairs = list(_pairs(exact, open_session(model), feeds, repeats))
        yield SpeedRow(
            side=side,
            min_tokens=least,
            seconds=float(np.median([pair[0] for pair in pairs])),
            speedup=median_interval([pair[0] / pair[1] for pair in pairs]),
            error=pairs[0][2],
        )


def _asked(engines: Path, side: int, steps: int) -> Feeds:
    """One row of what the UNet is given in the middle of a run."""
    heard: list[_Heard] = []

    def wrap(name: str, session: Session) -> Session:
        if name != DENOISER:
            return session
        heard.append(_Heard(session))
        return heard[-1]

    with load(engines, hashes=False, low_memory=True, wrap_session=wrap) as pipeline:
        stream = pipeline.stream(
            _PROMPT, height=side, width=side, steps=steps, seed=0, guidance_scale=1.0
        )
        for _ in zip(range(steps // 2 + 1), stream, strict=False):
            pass
    return heard[-1].feeds[-1]


def _pairs(
    exact: Any, reduced: Any, feeds: Feeds, repeats: int
) -> Iterator[tuple[float, float, float]]:
    """Seconds of both and their difference, in turns, after one run that is not counted."""
    for turn in range(repeats + 1):
        (wanted, before), (found, after) = (_timed(each, feeds) for each in (exact, reduced))
        if turn:
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            yield before, after, error


def _timed(session: Any, feeds: Feeds) -> tuple[NDArray[np.float32], float]:
    start = time.perf_counter()
    (output,) = session.run(["out_sample"], feeds)
    return output, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engines", type=Path, help="optimized, such as `latentforge build` writes")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 768, 1024], help="in pixels")
    parser.add_argument("--grids", type=int, default=2, help="how many of the finest to try")
    parser.add_argument("--steps", type=int, default=2, help="of the run that is listened to")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    options = parser.parse_args(arguments)
    print("| pixels | fewer keys from tokens | exact step, s | speedup | relative error |")
    print("|---|---|---|---|---|")
    for side in options.sides:
        rows = measure(
            options.engines,
            side,
            most=options.grids,
            steps=options.steps,
            repeats=options.repeats,
        )
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
