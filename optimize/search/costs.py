"""Measured seconds of denoiser evaluations, from which the time of every plan is estimated."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from latentforge.optimize.search.engines import SearchEngines
from latentforge.optimize.search.space import Costs, EvaluationKind, Variant
from latentforge.runtime import sampling
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.settings import Settings

__all__ = ["measure_costs"]

_STEPS, _RUNS = 4, 3
_STAGES = (("denoiser", False), ("denoiser_cached", True))  # of a run, and if it is a cached step


def measure_costs(
    engines: SearchEngines, results: Sequence[Result], skipped: Callable[[str], None]
) -> tuple[Costs, list[Variant]]:
    """Time one evaluation of each variant.

    Args:
        engines: variants that cannot be made of them are skipped.
        results: images of the unaccelerated engines, for the time of everything else.
        skipped: called with a message about each variant that cannot be made.

    Returns:
        The costs, and the variants that can be made.
    """
    request = results[0].settings
    seconds: dict[tuple[Variant, EvaluationKind], float] = {}
    variants = []
    for variant in engines.variants:
        try:
            pipeline = engines.pipeline(variant)
        except (ManifestError, SettingsError) as error:
            skipped(f"  without {variant}: {error}")
            continue
        for evaluation, value in _evaluation_seconds(pipeline, variant, request).items():
            seconds[variant, evaluation] = value
        variants.append(variant)
    fixed = median(r.timings.total - sum(r.timings.stages["denoiser"]) for r in results)
    return Costs(fixed=fixed, evaluations=seconds), variants


def _evaluation_seconds(
    pipeline: Pipeline, variant: Variant, request: Settings
) -> dict[EvaluationKind, float]:
    """Return the shortest time of each kind of evaluation: other load only adds time."""
    steps = replace(
        request,
        sampler=sampling.plain(pipeline.manifest.schedule),
        steps=_STEPS,
        cached_steps=() if variant.level is None else tuple(range(1, _STEPS)),
        variant="denoiser_reduced" if variant.reduced else "denoiser",
    )
    seconds = {}
    for guided in (True, False) if request.uses_guidance else (True,):
        settings = replace(steps, guidance_interval=None if guided else (0.0, 0.0))
        runs = [pipeline.run(settings).timings.stages for _ in range(_RUNS)]
        for stage, cached in _STAGES:
            if stage in runs[0]:
                shortest = min(min(run[stage]) for run in runs)
                seconds[EvaluationKind(guided=guided, cached=cached)] = shortest
    return seconds
