"""Engines' pictures, judged: what ``latentforge eval`` does, as a function."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality import mlperf
from latentforge.measure.quality.catalogue import METRICS
from latentforge.measure.quality.judges import (
    Evaluation,
    distance_of,
    load_metric_inputs,
    metrics_of,
    path_metric,
)
from latentforge.measure.quality.path_length import path_lengths
from latentforge.measure.quality.scores import MetricInputs, scores
from latentforge.measure.results import Metric, Picture, Results
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import MANIFEST_FILE, hash_file
from latentforge.runtime.image import open_picture, save, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.machine import available_cores, described
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.sampling import samplers
from latentforge.runtime.settings import Request, Settings, resolve

__all__ = ["Evaluation", "evaluate", "judge", "summary"]

_IMAGES = 64
_SHOWN = 6
_EAGER = "eager"

Draw = Callable[[Settings], Image.Image]


def evaluate(
    engines: Sequence[Path], evaluation: Evaluation, *, command: str = "", quiet: bool = True
) -> Results:
    """Draw the same requests by all, and judge the pictures.

    Args:
        engines: directories; the first one's defaults fill in the request.
        evaluation: what to judge by.
        command: what repeats it, for the record.
        quiet: show no progress.

    Raises:
        SettingsError: a metric lacks what it needs, or the preset's terms are not met.
        ShapeError: the engines cannot make such pictures.
        CheckpointError: there is no such checkpoint.
    """
    manifest = Manifest.read(engines[0])
    texts = _texts(evaluation, manifest)
    requests = _requests(evaluation, manifest, texts)
    judges = load_metric_inputs(evaluation, manifest, requests)
    able = judges.can(reference=evaluation.against is not None)
    if evaluation.preset:
        mlperf.check(
            captions=len(texts),
            images=len(requests),
            family=manifest.family,
            latents=evaluation.latents is not None,
            metrics=evaluation.metrics or able,
        )
    metrics = metrics_of(evaluation, judges, able, len(requests))
    study = _Study(evaluation, requests, judges, metrics, _painters(engines, evaluation))
    with study.progress(quiet) as progress, _folder(evaluation.folder) as folder:
        galleries, lengths = study.draw(folder, progress)
        found = study.score(galleries, lengths, progress)
        pictures = tuple(_pictures(requests, galleries))
    return Results(
        title=f"{manifest.name}: quality",
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=described(),
        settings={**asdict(requests[0]), "prompts": list(requests[0].prompts)},
        threads=evaluation.threads or available_cores(),
        method=_method(evaluation, len(requests)),
        metrics=tuple(found),
        pictures=pictures,
    )


def judge(results: Results, evaluation: Evaluation) -> None:
    """Hold the figures against the preset's band, if there is a preset.

    Raises:
        GateError: a figure lies outside.
    """
    if evaluation.preset == "mlperf":
        mlperf.judge(results.metrics)


def summary(results: Results) -> str:
    """The figures as a table for a terminal."""
    heads = ("metric", "of", "value", "95 % interval", "images", "against", "note")
    rows = [heads, *(_row(metric) for metric in results.metrics)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    )


def _row(metric: Metric) -> tuple[str, ...]:
    bounds = "" if metric.low is None else f"{metric.low:.4g} to {metric.high:.4g}"
    value = f"{metric.value:.4g} {metric.unit}".strip()
    note = "; ".join(
        part for part in (metric.network and f"by {metric.network}", metric.note) if part
    )
    name = metric.name
    return name, metric.subject, value, bounds, str(metric.images), metric.reference, note


def _method(evaluation: Evaluation, count: int) -> str:
    noise = "one noise for all" if evaluation.latents else "the same seed for all"
    return (
        f"{count} requests of one image each, {noise} participants; intervals of 95 % by resampling "
        "the images, of shares by Wilson's score."
    )


# what is drawn


def _texts(evaluation: Evaluation, manifest: Manifest) -> list[str]:
    """The prompts, each once."""
    if evaluation.prompts is not None:
        return mlperf.read_captions(evaluation.prompts)
    if manifest.source.checkpoint == "demo":
        from latentforge.export.demo import prompts

        return prompts(evaluation.images or _IMAGES, evaluation.seed)
    return read_prompts()


def _requests(evaluation: Evaluation, manifest: Manifest, texts: Sequence[str]) -> list[Settings]:
    """One image each; prompts start again where there are more images."""
    default = len(texts) if evaluation.prompts else _IMAGES
    asked: Request = {**(mlperf.REQUEST if evaluation.preset else {}), **(evaluation.request or {})}
    fixed: Request = {"images_per_prompt": 1, "seed": evaluation.seed}
    complete = resolve(manifest.defaults, texts[0], {**asked, **fixed})
    some = itertools.islice(itertools.cycle(texts), evaluation.images or default)
    return [
        replace(complete, prompts=(text,), seed=evaluation.seed + index)
        for index, text in enumerate(some)
    ]


class _Gallery(Sequence[Image.Image]):
    """Pictures on the disk, read when they are looked at: thousands do not fit in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return [open_picture(path) for path in self._paths[index]]
        return open_picture(self._paths[index])


@dataclass(frozen=True, kw_only=True)
class _ImageSource:
    """Somebody who draws.

    Attributes:
        name: among the subjects.
        mark: tells its pictures from those of an earlier build.
        load: gives a context with the Pipeline, or diffusers' EagerPipeline.
    """

    name: str
    mark: str
    load: Callable[[], Any]


def _painters(engines: Sequence[Path], evaluation: Evaluation) -> list[_ImageSource]:
    """The reference first, if there is one."""
    directories = list(engines)
    against = evaluation.against
    if against is not None and (Path(against) / MANIFEST_FILE).is_file():
        directories = [
            Path(against),
            *(e for e in engines if e.resolve() != Path(against).resolve()),
        ]
    names = [_EAGER, *(path.resolve().name for path in directories)]
    ours = [
        _ImageSource(
            name=name if names.count(name) == 1 else str(path.resolve())[1:].replace("/", "-"),
            mark=hash_file(path / MANIFEST_FILE),
            load=partial(load, path, threads=evaluation.threads),
        )
        for path, name in zip(directories, names[1:], strict=True)
    ]
    if against is None or directories[0] == Path(against):
        return ours
    return [_eager(against, evaluation.threads), *ours]


def _eager(name: str, threads: int) -> _ImageSource:
    from latentforge.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(name)

    def load() -> Any:
        import torch

        from latentforge.export.reference.eager import EagerPipeline

        if threads:
            torch.set_num_threads(threads)
        return nullcontext(EagerPipeline(checkpoint))

    stats = [(str(path), path.stat()) for path in sorted(checkpoint.path.rglob("*.safetensors"))]
    mark = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return _ImageSource(name=_EAGER, mark=mark, load=load)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="latentforge-eval-") as name:
        yield Path(name)


@dataclass(frozen=True)
class _Study:
    """Who draws what, and what is said of it."""

    evaluation: Evaluation
    requests: Sequence[Settings]
    judges: MetricInputs
    metrics: Sequence[str]
    painters: Sequence[_ImageSource]

    @property
    def reference(self) -> str:
        return "" if self.evaluation.against is None else self.painters[0].name

    def progress(self, quiet: bool) -> Progress:
        return Progress(self._parts, quiet=quiet)

    @property
    def _parts(self) -> int:
        """Pictures of everybody, and path lengths, which diffusers has none of."""
        engines = sum(painter.name != _EAGER for painter in self.painters)
        return len(self.requests) * (len(self.painters) + engines * ("ppl" in self.metrics))

    def draw(
        self, folder: Path, progress: Progress
    ) -> tuple[dict[str, _Gallery], dict[str, NDArray[np.float64]]]:
        """Everybody's pictures, one after another so that one is in memory; and path lengths."""
        noise = mlperf.read_latents(self.evaluation.latents) if self.evaluation.latents else None
        galleries, lengths = {}, {}
        for painter in self.painters:
            place = folder / painter.name
            place.mkdir(exist_ok=True)
            paths = [place / f"{index:05}.png" for index in range(len(self.requests))]
            with painter.load() as loaded:
                self._draw(painter, loaded, paths, noise, progress)
                if "ppl" in self.metrics and isinstance(loaded, Pipeline):
                    distance = distance_of(self.judges)
                    lengths[painter.name] = path_lengths(loaded, self.requests, distance, progress)
            galleries[painter.name] = _Gallery(paths)
        return galleries, lengths

    def _draw(
        self,
        painter: _ImageSource,
        loaded: Any,
        paths: Sequence[Path],
        noise: NDArray[np.float32] | None,
        progress: Progress,
    ) -> None:
        paint = _painting(loaded, noise)
        for request, path in zip(self.requests, paths, strict=True):
            told = {"by": painter.mark, "latents": noise is not None, **asdict(request)}
            if not _is_drawn(path, told):
                save(paint(request), path, told)
            progress.advance(f"pictures: {painter.name}", self._parts)

    def score(
        self,
        galleries: Mapping[str, _Gallery],
        lengths: Mapping[str, NDArray[np.float64]],
        progress: Progress,
    ) -> list[Metric]:
        """All figures, in the order of METRICS."""
        progress.note("looking at the pictures")
        texts = [request.prompts[0] for request in self.requests]
        others = [name for name in self.metrics if name != "ppl"]
        found = list(
            scores(
                galleries,
                texts,
                self.judges,
                metrics=others,
                reference=self.reference,
                seed=self.evaluation.seed,
            )
        )
        found += [path_metric(name, some, self.judges) for name, some in lengths.items()]
        return sorted(found, key=lambda metric: list(METRICS).index(metric.name))


def _painting(loaded: Any, noise: NDArray[np.float32] | None) -> Draw:
    """How a pipeline, ours or diffusers', makes one picture of a request."""
    if not isinstance(loaded, Pipeline):
        if noise is not None:
            raise SettingsError("--latents are for engines: compare with an engine directory")
        return lambda request: loaded(request).images[0]
    fast = loaded.manifest.acceleration

    def own(request: Settings) -> Settings:
        return request if fast is None or request.unaccelerated else request.following(fast)

    if noise is None:
        return lambda request: loaded.run(own(request)).images[0]
    schedule = loaded.manifest.schedule

    def paint(asked: Settings) -> Image.Image:
        request = own(asked)
        scale = samplers.get(request.sampler).plan(schedule, request.steps).scale
        # Going on at the very start of the schedule takes latents as the noise that is there.
        start = replace(request, denoising_start=0.0)
        return loaded.run(start, image=noise * np.float32(scale)).images[0]

    return paint


def _is_drawn(path: Path, told: Mapping[str, Any]) -> bool:
    """Whether the picture is there, of this very request by this very painter."""
    try:
        with Image.open(path) as image:
            image.load()
            text: Mapping[str, str] = getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError):
        return False
    return text.get("latentforge") == json.dumps(told, ensure_ascii=False)


def _pictures(requests: Sequence[Settings], galleries: Mapping[str, _Gallery]) -> Iterator[Picture]:
    for index, request in enumerate(requests[:_SHOWN]):
        shown = {name: to_array([gallery[index]])[0] for name, gallery in galleries.items()}
        yield Picture.of(request.prompts[0], request.seed, shown)
