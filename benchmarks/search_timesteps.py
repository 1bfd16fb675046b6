"""How much nearer searched timesteps come to many steps, on prompts and seeds not searched on.

    latentforge build demo demo-engines
    python benchmarks/search_timesteps.py demo-engines --steps 8,10,12

For each number of steps it prints the sampler and the timesteps that optimize/search/timesteps.py finds on
a few prompts of the demo, and, on others and from other noise, the mean squared distance of final
latents to 60 steps of DPM-Solver++(2M): theirs, that of each sampler's own spacing with how many
times as far that is, and that of the engines' default schedule.
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

_SURE, _MANY = "dpmpp_2m", 60

Array = NDArray[np.float32]


def _latents(pipeline: Pipeline, texts: Sequence[str], seed: int) -> Callable[..., Array]:
    """The final ones of some prompts by any schedule."""

    def latents(**schedule: object) -> Array:
        *_, last = pipeline.stream(texts, seed=seed, unaccelerated=True, **schedule)  # type: ignore[misc, arg-type]
        return last.latents

    return latents


def _distance(latents: Callable[..., Array]) -> tuple[Distance, float]:
    """From many steps: that of any timesteps, and that of the default schedule."""
    limit = latents(sampler=_SURE, steps=_MANY)

    def distance(sampler: str, timesteps: tuple[float, ...]) -> float:
        found = latents(sampler=sampler, timesteps=timesteps)
        return float(np.square(found - limit).mean())

    return distance, float(np.square(latents() - limit).mean())


def main() -> None:
    """Search, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", type=Path, metavar="ENGINES")
    parser.add_argument("--steps", default="8,10,12", metavar="N,...")
    parser.add_argument("--moves", type=int, default=72, help="timesteps that are tried")
    parser.add_argument("--images", type=int, default=4, help="that they are made for")
    options = parser.parse_args()
    with load(options.engines, hashes=False) as pipeline:
        schedule, usual = pipeline.manifest.schedule, pipeline.manifest.defaults
        made_for, _ = _distance(_latents(pipeline, prompts(options.images, 1), 11))
        held_out, default = _distance(_latents(pipeline, prompts(64, 2), 22))
        print(f"{usual.sampler} of {usual.steps} steps, the default: {default:.6f}")
        for steps in map(int, options.steps.split(",")):
            found = search_timesteps(schedule, steps, made_for, moves=options.moves)
            theirs = held_out(found.sampler, found.timesteps)
            times = ", ".join(f"{timestep:g}" for timestep in found.timesteps)
            print(f"{steps} steps: {found.sampler} at {times}: {theirs:.6f}")
            for sampler in found.own:
                own = held_out(sampler, spacings(schedule, sampler, steps)["own"])
                print(f"  {sampler} by its own spacing: {own:.6f}, {own / theirs:.1f} times as far")


if __name__ == "__main__":
    main()
