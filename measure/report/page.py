"""The page: measurements arranged in sections and rendered by the templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from latentforge.measure import formatting
from latentforge.measure.conclusion import runs_caveat, summary_sentences
from latentforge.measure.report.bars import STAGES, BarGroup, bars
from latentforge.measure.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Chart, shortened
from latentforge.measure.report.curves import curves, failed_points
from latentforge.measure.report.images import PageImage, page_images
from latentforge.measure.report.layers import LayerProfile, layer_profile
from latentforge.measure.report.scatter import scatters
from latentforge.measure.report.tables import (
    MetricTable,
    Table,
    metric_tables,
    not_measured,
    participant_tables,
)
from latentforge.measure.results import BenchResult, Metric, Picture, Results
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import ResultsError

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["FRAME", "environment", "render"]

FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "floor": HEIGHT - BOTTOM}
_SETTINGS = {
    "sampler": "sampler",
    "steps": "steps",
    "guidance_scale": "guidance scale",
    "guidance_rescale": "guidance rescale",
    "image_guidance_scale": "image guidance scale",
    "noise_level": "noise level",
    "images_per_prompt": "images per prompt",
    "seed": "seed",
}
_DEFAULTS = {
    "guidance_rescale": 0,
    "image_guidance_scale": 1,
    "noise_level": 0,
    "images_per_prompt": 1,
}


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """One measurement, arranged for the page. Empty sequences are left out."""

    results: Results
    request: Mapping[str, str]
    summary: Sequence[str]
    tables: Sequence[Table]
    caveat: str
    not_measured: Sequence[BenchResult]
    bar_groups: Sequence[BarGroup]
    curves: Sequence[Chart]
    failed_points: Sequence[str]
    scatters: Sequence[Chart]
    metrics: Sequence[MetricTable]
    pictures: Sequence[tuple[Picture, tuple[PageImage, ...]]]
    profiles: Sequence[LayerProfile]


@checked_arguments
def render(*results: Results) -> str:
    """Return one self-contained HTML page of one or more measurements.

    Metrics of any of them are plotted against the times of all, joined by the participants' names.

    Raises:
        ResultsError: there are no results, or Jinja2 is not installed.
    """
    if not results:
        raise ResultsError("nothing to draw: name one or more --json files of bench or eval")
    metrics = [metric for one in results for metric in one.metrics]
    sections = [_section(one, metrics) for one in results]
    page = environment().get_template("page.j2")
    return page.render(sections=sections, frame=FRAME, stages=STAGES)


def _section(results: Results, metrics: Sequence[Metric]) -> ReportSection:
    return ReportSection(
        results=results,
        request=_request(results),
        summary=summary_sentences(results),
        tables=participant_tables(results),
        caveat=runs_caveat(results),
        not_measured=not_measured(results),
        bar_groups=bars(results),
        curves=curves(results),
        failed_points=failed_points(results),
        scatters=scatters(results, metrics),
        metrics=metric_tables(results.metrics),
        pictures=[(picture, tuple(page_images(picture))) for picture in results.pictures],
        profiles=[layer_profile(profile) for profile in results.profiles],
    )


def _request(results: Results) -> dict[str, str]:
    """Return the settings that describe the request, by their names on the page."""
    settings = results.settings
    shown = {}
    prompts = settings.get("prompts")
    if isinstance(prompts, list | tuple) and prompts:
        more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        shown["prompt"] = f"{prompts[0]}{more}"
    if "width" in settings and "height" in settings:
        shown["size"] = f"{settings['width']}×{settings['height']}"
    for key, name in _SETTINGS.items():
        value = settings.get(key)
        if value is not None and _DEFAULTS.get(key) != value:
            shown[name] = str(value)
    if results.threads:
        shown["threads"] = str(results.threads)
    return shown


@cache
def environment(package: str = __package__) -> "Environment":
    """Return the environment of a package's templates, which may include those of the report.

    Raises:
        ResultsError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ResultsError(
            "an HTML report needs Jinja2: pip install 'latentforge[report]'"
        ) from error
    environment = Environment(
        loader=FunctionLoader(partial(_template, package)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        name: getattr(formatting, name) for name in formatting.__all__ if name.islower()
    }
    environment.filters.update(filters, shortened=shortened)
    return environment


def _template(package: str, name: str) -> str:
    files = (resources.files(place).joinpath(name) for place in (package, __package__))
    return next(file for file in files if file.is_file()).read_text("utf-8")
