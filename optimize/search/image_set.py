"""Set of requests with reference images, and the figures of a plan's images relative to them."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import numpy as np

from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality.inputs import MetricInputs
from latentforge.measure.quality.metrics import compare_pairs, decibels
from latentforge.optimize.search.plan_gate import unaccelerated_name
from latentforge.runtime.image import psnr
from latentforge.runtime.manifest import AccelerationPlan, RequestDefaults
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.settings import Settings, resolve

__all__ = ["ImageSet", "Report", "single_image_requests"]

Report = Callable[[int, int], None]
"""Called after each image with the number of images done and their total."""


class ImageSet:
    """Requests with the unaccelerated engines' results, which a plan's images are compared with.

    Attributes:
        requests: one image each.
        reference: results of the unaccelerated engines; empty until generate_reference().
    """

    def __init__(self, requests: Sequence[Settings], metrics: MetricInputs) -> None:
        self.requests = requests
        self.reference: list[Result] = []
        self._metrics = metrics

    def generate_reference(self, pipeline: Pipeline, report: Report) -> None:
        """Generate the reference images with the unaccelerated engines."""
        self.reference = _generate(pipeline, self.requests, report)

    def figures(
        self, pipeline: Pipeline, plan: AccelerationPlan, report: Report
    ) -> dict[str, float]:
        """Return the figures of a plan's images relative to the reference at equal seeds.

        Returns:
            ``psnr``, ``psnr_worst`` and ``latents_psnr`` in dB, averages of the other paired
            metrics, and for each accuracy its value and that of the reference, 0 to 1.
        """
        results = _generate(pipeline, [r.with_plan(plan) for r in self.requests], report)
        reference, images = (
            [result.images[0] for result in group] for group in (self.reference, results)
        )
        rows = compare_pairs(reference, images, self._metrics.distances)
        errors = rows.pop("error")
        latents = [
            np.stack([result.latents for result in group]) for group in (self.reference, results)
        ]
        figures = {
            "psnr": float(decibels(errors.mean())),
            "psnr_worst": float(decibels(errors).min()),
            "latents_psnr": psnr(*latents),
            **{name: float(values.mean()) for name, values in rows.items()},
        }
        prompts = [request.prompts[0] for request in self.requests]
        for name, accuracy in self._metrics.accuracies.items():
            figures[name] = accuracy(images, prompts) / len(prompts)
            figures[unaccelerated_name(name)] = accuracy(reference, prompts) / len(prompts)
        return figures


def single_image_requests(
    defaults: RequestDefaults, prompts: Sequence[str], count: int
) -> list[Settings]:
    """Return ``count`` unaccelerated single-image requests with seeds 0 to count - 1.

    Args:
        defaults: of the manifest.
        prompts: repeated as needed; those that come with the package if empty.
        count: number of requests.
    """
    texts = islice(cycle(prompts or read_prompts()), count)
    return [
        resolve(defaults, text, {"seed": seed, "unaccelerated": True})
        for seed, text in enumerate(texts)
    ]


def _generate(pipeline: Pipeline, requests: Sequence[Settings], report: Report) -> list[Result]:
    results = []
    for request in requests:
        results.append(pipeline.run(request))
        report(len(results), len(requests))
    return results
