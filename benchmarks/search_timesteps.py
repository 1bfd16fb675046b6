"""Distance of searched timesteps to many steps, on prompts and seeds that the search did not use.

    latentforge build demo demo-engines
    python benchmarks/search_timesteps.py demo-engines --steps 8,10,12

For each number of steps this prints the sampler and the timesteps that
optimize/search/timesteps.py finds with a few prompts of the demo. The distances are measured with
other prompts and noise: the mean squared distance of final latents to 60 steps of
DPM-Solver++(2M). They are those of the searched timesteps, of each sampler's own spacing, and of
the engines' default schedule.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentforge.export.demo import prompts
from latentforge.optimize.search.timesteps import Distance, search_timesteps, spacings
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Pipeline

__all__ = ["main"]

_REFERENCE_SAMPLER, _REFERENCE_STEPS = "dpmpp_2m", 60

Array = NDArray[np.float32]


def _latents(pipeline: Pipeline, texts: Sequence[str], seed: int) -> Callable[..., Array]:
    """Return a function from a schedule to the final latents of some prompts."""

    def latents(**schedule: object) -> Array:
        *_, last = pipeline.stream(texts, seed=seed, unaccelerated=True, **schedule)  # type: ignore[misc, arg-type]
        return last.latents

    return latents


def _distance(latents: Callable[..., Array]) -> tuple[Distance, float]:
    """Return the distance of timesteps to many steps, and that of the default schedule."""
    reference = latents(sampler=_REFERENCE_SAMPLER, steps=_REFERENCE_STEPS)

    def distance(sampler: str, timesteps: tuple[float, ...]) -> float:
        result = latents(sampler=sampler, timesteps=timesteps)
        return float(np.square(result - reference).mean())

    return distance, float(np.square(latents() - reference).mean())


def main() -> None:
    """Search, and print the distances."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", type=Path, metavar="ENGINES")
    parser.add_argument("--steps", default="8,10,12", metavar="N,...", help="numbers of steps")
    parser.add_argument("--moves", type=int, default=72, help="timesteps tried in each search")
    parser.add_argument("--images", type=int, default=4, help="images of the search")
    options = parser.parse_args()
    with load(options.engines, hashes=False) as pipeline:
        schedule, defaults = pipeline.manifest.schedule, pipeline.manifest.defaults
        searched, _ = _distance(_latents(pipeline, prompts(options.images, 1), 11))
        held_out, default = _distance(_latents(pipeline, prompts(64, 2), 22))
        print(f"{defaults.sampler} of {defaults.steps} steps, the default: {default:.6f}")
        for steps in map(int, options.steps.split(",")):
            result = search_timesteps(schedule, steps, searched, moves=options.moves)
            distance = held_out(result.sampler, result.timesteps)
            times = ", ".join(f"{timestep:g}" for timestep in result.timesteps)
            print(f"{steps} steps: {result.sampler} at {times}: {distance:.6f}")
            for sampler in result.own:
                own = held_out(sampler, spacings(schedule, sampler, steps)["own"])
                print(f"  {sampler} by its own spacing: {own:.6f}, {own / distance:.1f} times that")


if __name__ == "__main__":
    main()
