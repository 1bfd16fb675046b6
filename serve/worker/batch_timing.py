"""Measurement of batches: images per second by the number that run together.

It is made once per engine directory, machine and size of image, and kept in the user's cache:
whether batches help depends on the processor, the engines and the pixels, not on a rule.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentforge.runtime import sampling
from latentforge.runtime.cache import cache_folder
from latentforge.runtime.denoising.depth import depth_channel
from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.example import example_depth_map, example_image
from latentforge.runtime.files import staged_file
from latentforge.runtime.machine import cpu_name
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profiling import PROMPT
from latentforge.runtime.request_completion import complete_request
from latentforge.runtime.version import __version__
from latentforge.serve.worker.messages import BatchDone, RawArray, RunBatch
from latentforge.serve.worker.replica import Replica

__all__ = ["measured_rates"]

_WORTH = 1.1  # gain over half as many images, below which larger batches are not tried
_STEPS = 3  # the fastest counts
_REPEATS = 5

Rates = dict[int, float]
"""Images per second by the number of images that run together."""


async def measured_rates(
    replica: Replica,
    manifest: Manifest,
    *,
    max_batch: int,
    seconds: float,
    options: Mapping[str, Any] | None = None,
) -> Rates:
    """Return the images per second of batches of 1, 2, 4 and so on, of the default size.

    Earlier measurements are found in the cache. Larger batches are left out if they are not worth
    it, fail, or would take too long to measure.

    Args:
        replica: a model that is ready and runs nothing else.
        manifest: of the model.
        max_batch: most images to try.
        seconds: time that measuring may take.
        options: arguments of load() in the replica.

    Raises:
        ReplicaLostError: the process ended.
    """
    versions = {} if replica.loaded is None else replica.loaded.versions
    kept = _file(manifest, [versions, dict(options or {}), max_batch])
    if kept is not None and (rates := _recalled(kept)):
        return rates
    rates = await _measured(replica, manifest, max_batch, seconds)
    if kept is not None:
        _keep(kept, rates)
    return rates


async def _measured(replica: Replica, manifest: Manifest, max_batch: int, seconds: float) -> Rates:
    rates, count, start = Rates(), 1, time.monotonic()
    await _rate(replica, manifest, 1)  # allocates what this size needs
    while count <= max_batch:
        begun = time.monotonic()
        rate = await _best_rate(replica, manifest, count, seconds / 10)
        if rate is None:
            break
        rates[count] = rate
        now = time.monotonic()
        worth = count == 1 or rate >= _WORTH * rates[count // 2]
        if not worth or now - start + 2 * (now - begun) > seconds:
            break
        count *= 2
    return rates


async def _best_rate(
    replica: Replica, manifest: Manifest, count: int, seconds: float
) -> float | None:
    """Return the best of some rates: what else the machine does can only make one worse."""
    best, start = 0.0, time.monotonic()
    for _ in range(_REPEATS):
        if (rate := await _rate(replica, manifest, count)) is None:
            return None
        best = max(best, rate)
        if time.monotonic() - start > seconds:
            break
    return best


async def _rate(replica: Replica, manifest: Manifest, count: int) -> float | None:
    """Return the images per second of a batch of this many; None if it does not run."""
    try:
        order = _order(manifest, count)
    except LatentforgeError:  # a model that needs more than an image
        return None
    end = await replica.run(order, lambda _: None)
    if not isinstance(end, BatchDone):
        return None
    calls = dict(end.stages)
    steps = calls.pop("denoiser")
    once = sum(map(sum, calls.values()))
    return count / (once + min(steps) * manifest.defaults.steps)


def _order(manifest: Manifest, count: int) -> RunBatch:
    defaults = manifest.defaults
    height, width = defaults.height // manifest.shrink, defaults.width // manifest.shrink
    picture = example_image(height, width) if manifest.conditioning.requires_image else None
    settings = complete_request(
        manifest,
        [PROMPT] * count,
        image=None if picture is None else [picture] * count,
        sampler=sampling.plain(manifest.schedule),
        steps=_STEPS,
        seed=range(count),
        unaccelerated=True,
    )
    images = () if picture is None else (RawArray.of(np.asarray(picture)),) * count
    return RunBatch(batch=-count, settings=settings, images=images, depth=_depth(manifest, count))


def _depth(manifest: Manifest, count: int) -> RawArray | None:
    """Return depth maps for a model that takes them."""
    if "depth" not in manifest.conditioning.channels:
        return None
    scale, defaults = manifest.latent.downscale, manifest.defaults
    height, width = defaults.height // scale, defaults.width // scale
    depth = depth_channel(example_depth_map(height, width), height=height, width=width)
    return RawArray.of(depth[0].repeat(count, axis=0))


def _file(manifest: Manifest, others: list[Any]) -> Path | None:
    """Return the file in the cache that everything a measurement depends on leads to."""
    if (cache := cache_folder()) is None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = msgspec.structs.replace(manifest, history=(), quality={})
    parts = [__version__, cpu_name(), cores, model, *others]
    digest = hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()
    return cache / "batches" / f"{digest}.json"


def _recalled(kept: Path) -> Rates:
    """Return the rates in a file; none if there is no file, or a damaged one."""
    with suppress(OSError, msgspec.DecodeError):
        rates = msgspec.json.decode(kept.read_bytes(), type=Rates)
        if all(0 < rate < float("inf") and count > 0 for count, rate in rates.items()):
            return rates
    return {}


def _keep(kept: Path, rates: Rates) -> None:
    """Write the rates; a cache that cannot be written is none."""
    with suppress(OSError, LatentforgeError):
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with staged_file(kept) as partial:
            partial.write_bytes(msgspec.json.encode(rates))
