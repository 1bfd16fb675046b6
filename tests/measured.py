"""Synthetic measurements with known values, for tests of everything that reads result files."""

import numpy as np

from latentforge.measure.results import (
    BenchResult,
    LayerTiming,
    Metric,
    Picture,
    Point,
    ProfileTable,
    Results,
    TimedRun,
)
from latentforge.measure.statistics import medians, paired_speedups

__all__ = ["BENCH", "EVAL", "HEAD", "entry", "metric", "runs"]

HEAD = {
    "command": "latentforge bench engines --against eager",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "Some CPU", "cores": "2"},
    "settings": {
        "prompts": ["an owl"], "sampler": "ddim", "steps": 20, "guidance_scale": 7.5,
        "height": 512, "width": 512, "seed": 0,
    },
    "threads": 2,
    "method": "Interleaved runs.",
}  # fmt: skip

_DRIFT = (1.0, 1.02, 0.99, 1.05, 0.98)


def runs(seconds: float, *, jitter: float = 0.0) -> tuple[TimedRun, ...]:
    """Return five runs on a drifting machine, with independent noise on top; stages are 90 %."""
    noise = 1 + jitter * np.random.default_rng(5).uniform(-1, 1, len(_DRIFT))
    totals = [seconds * drift * float(n) for drift, n in zip(_DRIFT, noise, strict=True)]
    return tuple(
        TimedRun(
            seconds={
                "text_encoder": 0.1 * t, "denoiser": 0.6 * t, "denoiser step": 0.03 * t,
                "vae_decoder": 0.2 * t, "total": t,
            }
        )
        for t in totals
    )  # fmt: skip


REFERENCE = runs(4.0)


def entry(name: str, seconds: float, *, jitter: float = 0.01, **more: object) -> BenchResult:
    """Return engines of class A, unless given otherwise, beside a reference of 4 seconds."""
    timed = runs(seconds, jitter=jitter)
    fields: dict[str, object] = {"role": "engines", "speed_class": "A", "psnr": 60.0} | more
    figures = {"runs": timed, "median": medians(timed), "ratio": paired_speedups(REFERENCE, timed)}
    return BenchResult(name=name, **{**figures, **fields})  # type: ignore[arg-type]


def metric(subject: str, value: float, **more: object) -> Metric:
    """Return a PSNR to eager of 64 images; with a level of 95 % if it gets bounds."""
    fields: dict[str, object] = {"name": "psnr", "reference": "eager", "better": "higher"} | more
    if "low" in fields:
        fields["level"] = 0.95
    return Metric(subject=subject, value=value, images=64, **fields)  # type: ignore[arg-type]


_PIXELS = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)

BENCH = Results(
    title="A benchmark",
    entries=(
        entry("eager", 4.0, jitter=0, role="reference", psnr=None, peak_memory=3_000_000_000),
        entry("peer-a", 2.5, role="peer", prepare_seconds=61.0, versions={"lib": "1.2.3"}),
        entry("engines-a", 2.0, peak_memory=1_500_000_000, file_bytes=700_000_000,
              ready_seconds=(0.5, 0.6, 0.7), first=TimedRun(seconds={"total": 2.75})),
        entry("engines-b", 1.0, speed_class="B", psnr=25.0, gate="psnr of 20 dB", precision="int8"),
        entry("peer-b", 5.0, role="peer", speed_class="B", psnr=12.0),
        BenchResult(name="broken", role="peer", status="failed", message="out of memory: use less"),
        BenchResult(name="absent", role="peer", status="missing", message="pip install absent==1"),
    ),
    scaling=tuple(
        Point(name=name, batch=batch, height=side, width=side, total=seconds * batch * side / 512,
              peak_memory=batch * side * 1_000_000)
        for name, seconds in (("eager", 4.0), ("engines-a", 2.0))
        for batch, side in ((1, 256), (1, 512), (1, 768), (2, 512), (4, 512))
    ) + (Point(name="eager", batch=8, height=512, width=512, message="too little memory"),),
    profiles=(
        ProfileTable(
            name="engines-a",
            total=2.0,
            layers=(
                LayerTiming(component="denoiser", layer="conv_7", operator="Conv", seconds=0.75),
                LayerTiming(component="denoiser", layer="conv_8", operator="Conv", seconds=0.25),
                LayerTiming(component="denoiser", layer="attend", operator="MatMul", seconds=0.5),
            ),
        ),
    ),
    **HEAD,  # type: ignore[arg-type]
)  # fmt: skip

EVAL = Results(
    title="An evaluation",
    metrics=(
        metric("engines-a", 61.25, low=60.5, high=62.0, unit="dB"),
        metric("engines-b", 25.5, low=24.0, high=27.0, unit="dB"),
        metric("engines-a", 3.75, name="fid", better="lower", network="Inception",
               note="64 images: not comparable"),
    ),
    pictures=(
        Picture.of("an owl", 3, {"eager": _PIXELS, "engines-a": _PIXELS * 0.9}),
    ),
    **{**HEAD, "command": "latentforge eval engines"},  # type: ignore[arg-type]
)  # fmt: skip
