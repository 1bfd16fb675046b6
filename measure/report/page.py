"""The page itself: what was measured, part by part, put into the templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from latentforge.measure.report import words
from latentforge.measure.report.bars import STAGES, Group, bars
from latentforge.measure.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Chart, shortened
from latentforge.measure.report.conclusion import in_short
from latentforge.measure.report.curves import curves, without_points
from latentforge.measure.report.layers import Hot, layers
from latentforge.measure.report.pictures import Shown, shown
from latentforge.measure.report.scatter import scatters
from latentforge.measure.report.tables import (
    MetricTable,
    Table,
    metric_tables,
    participant_tables,
    without_figures,
)
from latentforge.measure.results import BenchResult, Metric, Picture, Results
from latentforge.runtime.errors import ResultsError

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]

_FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "floor": HEIGHT - BOTTOM}
_SETTINGS = {
    "sampler": "sampler",
    "steps": "steps",
    "guidance_scale": "guidance",
    "guidance_rescale": "rescale",
    "images_per_prompt": "images a prompt",
    "seed": "seed",
}
_USUAL = {"guidance_rescale": 0, "images_per_prompt": 1}


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """One measurement, arranged. Every sequence may be empty, and its section is then left out."""

    results: Results
    request: Mapping[str, str]
    short: Sequence[str]
    tables: Sequence[Table]
    absent: Sequence[BenchResult]
    groups: Sequence[Group]
    curves: Sequence[Chart]
    without_points: Sequence[str]
    scatters: Sequence[Chart]
    metrics: Sequence[MetricTable]
    pictures: Sequence[tuple[Picture, tuple[Shown, ...]]]
    profiles: Sequence[Hot]


def render(*results: Results) -> str:
    """One HTML page of one measurement or several. It loads nothing from anywhere.

    Metrics of any of them are drawn against the times of all, by the participants' names.

    Raises:
        ResultsError: there is nothing to draw, or Jinja2 isn't installed.
    """
    if not results:
        raise ResultsError("nothing to draw: name one file or more that bench or eval wrote")
    metrics = [metric for one in results for metric in one.metrics]
    page = _environment().get_template("page.j2")
    return page.render(parts=[_part(one, metrics) for one in results], frame=_FRAME, stages=STAGES)


def _part(results: Results, metrics: Sequence[Metric]) -> ReportSection:
    return ReportSection(
        results=results,
        request=_request(results),
        short=in_short(results),
        tables=participant_tables(results),
        absent=without_figures(results),
        groups=bars(results),
        curves=curves(results),
        without_points=without_points(results),
        scatters=scatters(results, metrics),
        metrics=metric_tables(results.metrics),
        pictures=[(picture, tuple(shown(picture))) for picture in results.pictures],
        profiles=[layers(profile) for profile in results.profiles],
    )


def _request(results: Results) -> dict[str, str]:
    """The settings that tell what was asked for, in words."""
    settings = results.settings
    said = {}
    prompts = settings.get("prompts")
    if isinstance(prompts, list | tuple) and prompts:
        said["prompt"] = str(prompts[0]) + (f" and {len(prompts) - 1} more" * (len(prompts) > 1))
    if "width" in settings and "height" in settings:
        said["size"] = f"{settings['width']}×{settings['height']}"
    told = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    said |= {_SETTINGS[key]: str(v) for key, v in told.items() if _USUAL.get(key) != v}
    if results.threads:
        said["threads"] = str(results.threads)
    return said


@cache
def _environment() -> "Environment":
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ResultsError(
            "a page needs Jinja2, which isn't installed: pip install 'latentforge[report]'"
        ) from error
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        name: getattr(words, name) for name in words.__all__ if name.islower()
    }
    environment.filters.update(filters, shortened=shortened)
    return environment


def _template(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
