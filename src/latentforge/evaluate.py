"""Quality metrics of engines at equal seeds: ``latentforge eval`` as a function."""

from __future__ import annotations

import itertools
import json
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

from latentforge.accuracies import demo_accuracies
from latentforge.measure.hardware import available_threads, describe_machine
from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality import mlperf
from latentforge.measure.quality.catalogue import METRICS
from latentforge.measure.quality.inputs import MetricInputs, load_metric_inputs
from latentforge.measure.quality.path_length import path_lengths, path_metric
from latentforge.measure.quality.request import EvalRequest, select_metrics
from latentforge.measure.quality.scores import scores
from latentforge.measure.results import Metric, Picture, Results
from latentforge.runtime import sampling
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.cleanups import temporary_folder
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import MANIFEST_FILE, hash_file
from latentforge.runtime.image import open_image, save_image, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Request, Settings, resolve
from latentforge.runtime.validation import checked_path

__all__ = ["EvalRequest", "check_preset", "evaluate", "summary"]

_IMAGES = 64
_SHOWN = 6
_EAGER = "eager"

Generate = Callable[[Settings], Image.Image]


@checked_arguments
def evaluate(
    engines: Sequence[Path], request: EvalRequest, *, command: str = "", quiet: bool = True
) -> Results:
    """Generate the same images by every participant, and compute their metrics.

    Args:
        engines: directories; the first one's defaults complete the request.
        request: images, metrics and networks.
        command: command line that repeats it, for the record.
        quiet: show no progress.

    Raises:
        SettingsError: a metric lacks an input, or the preset's terms are not met.
        ShapeError: the engines cannot generate images of this size.
        CheckpointError: the reference checkpoint is missing or unsupported.
    """
    if not engines:
        raise SettingsError("no engines: name at least one engine directory")
    manifest = Manifest.read(engines[0])
    prompts = _prompts(request, manifest)
    settings = _settings(request, manifest, prompts)
    inputs = _inputs(request, manifest, settings)
    _check_protocol(request, manifest, inputs, len(prompts), len(settings))
    metrics = select_metrics(replace(request, images=len(settings)), inputs)
    evaluation = _Evaluation(request, settings, inputs, metrics, _sources(engines, request))
    with evaluation.progress(quiet) as progress, _folder(request.folder) as folder:
        galleries, lengths = evaluation.generate(folder, progress)
        rows = evaluation.score(galleries, lengths, progress)
        pictures = tuple(_pictures(settings, galleries))
    return Results(
        title=f"{manifest.name}: quality",
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=describe_machine(),
        settings={**asdict(settings[0]), "prompts": list(settings[0].prompts)},
        threads=request.threads or available_threads(),
        method=_method(request, len(settings)),
        metrics=tuple(rows),
        pictures=pictures,
    )


def check_preset(results: Results, request: EvalRequest) -> None:
    """Check the metrics against the preset's band, if the request has a preset.

    Raises:
        GateError: a value lies outside the band.
    """
    if request.preset == "mlperf":
        mlperf.check_bands(results.metrics)


def summary(results: Results) -> str:
    """Return the metrics as a table for a terminal."""
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


def _method(request: EvalRequest, count: int) -> str:
    noise = "one initial noise" if request.latents else "equal seeds"
    return (
        f"{count} requests of one image each, {noise} for all participants; 95 % intervals by "
        "resampling images, of accuracies by Wilson's score."
    )


def _prompts(request: EvalRequest, manifest: Manifest) -> list[str]:
    """Return the prompts, each once."""
    if request.prompts is not None:
        return mlperf.read_captions(request.prompts)
    from latentforge.export.checkpoint import DEMO

    if manifest.source.checkpoint == DEMO:
        from latentforge.export.demo import prompts  # an optional package

        return prompts(request.images or _IMAGES, request.seed)
    return read_prompts()


def _settings(request: EvalRequest, manifest: Manifest, prompts: Sequence[str]) -> list[Settings]:
    """Return one request per image; prompts repeat where there are more images."""
    default = len(prompts) if request.prompts else _IMAGES
    preset: Request = mlperf.REQUEST if request.preset else {}
    fixed: Request = {"images_per_prompt": 1, "seed": request.seed}
    complete = resolve(
        manifest.defaults, prompts[0], {**preset, **(request.request or {}), **fixed}
    )
    repeated = itertools.islice(itertools.cycle(prompts), request.images or default)
    return [
        replace(complete, prompts=(text,), seed=request.seed + index)
        for index, text in enumerate(repeated)
    ]


def _inputs(request: EvalRequest, manifest: Manifest, settings: Sequence[Settings]) -> MetricInputs:
    prompts = [each.prompts[0] for each in settings]
    accuracies = demo_accuracies(manifest.source.checkpoint, prompts, request.retrieval)
    return load_metric_inputs(request, (settings[0].height, settings[0].width), accuracies)


def _check_protocol(
    request: EvalRequest, manifest: Manifest, inputs: MetricInputs, captions: int, images: int
) -> None:
    if request.preset:
        mlperf.check(
            captions=captions,
            images=images,
            family=manifest.family,
            latents=request.latents is not None,
            metrics=request.metrics or inputs.available(reference=request.against is not None),
        )


class _Gallery(Sequence[Image.Image]):
    """Images on disk, read when they are accessed: thousands do not fit in memory."""

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
            return [open_image(path) for path in self._paths[index]]
        return open_image(self._paths[index])


@dataclass(frozen=True, kw_only=True)
class _ImageSource:
    """Source of images: an engine directory or the diffusers pipeline.

    Attributes:
        name: among the subjects.
        fingerprint: distinguishes its images from those of an earlier build.
        load: returns a context manager with the Pipeline, or diffusers' EagerPipeline.
    """

    name: str
    fingerprint: str
    load: Callable[[], Any]


def _sources(engines: Sequence[Path], request: EvalRequest) -> list[_ImageSource]:
    """Return the participants, the reference first if there is one."""
    directories, against = list(engines), request.against
    reference = Path() if against is None else checked_path("against", against)
    if against is not None and (reference / MANIFEST_FILE).is_file():
        directories = [reference, *(e for e in engines if e.resolve() != reference.resolve())]
    for path in directories:
        Manifest.read(path, hashes=False)  # before the first of them generates images
    names = [_EAGER, *(path.resolve().name for path in directories)]
    sources = [
        _ImageSource(
            name=name if names.count(name) == 1 else str(path.resolve())[1:].replace("/", "-"),
            fingerprint=hash_file(path / MANIFEST_FILE),
            load=partial(load, path, threads=request.threads, example_images=True),
        )
        for path, name in zip(directories, names[1:], strict=True)
    ]
    if against is None or directories[0] == Path(against):
        return sources
    return [_eager(against, request.threads), *sources]


def _eager(name: str, threads: int) -> _ImageSource:
    from latentforge.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(name)

    def open_pipeline() -> Any:
        import torch

        from latentforge.export.reference.eager import EagerPipeline

        if threads:
            torch.set_num_threads(threads)
        return nullcontext(EagerPipeline(checkpoint))

    stats = [(str(path), path.stat()) for path in sorted(checkpoint.path.rglob("*.safetensors"))]
    fingerprint = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return _ImageSource(name=_EAGER, fingerprint=fingerprint, load=open_pipeline)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with temporary_folder("latentforge-eval-") as folder:
        yield folder


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation: participants, their requests, and the metrics to compute."""

    request: EvalRequest
    settings: Sequence[Settings]
    inputs: MetricInputs
    metrics: Sequence[str]
    sources: Sequence[_ImageSource]

    @property
    def reference(self) -> str:
        """Name of the reference; empty without one."""
        return "" if self.request.against is None else self.sources[0].name

    def progress(self, quiet: bool) -> Progress:
        return Progress(self._parts, quiet=quiet)

    @property
    def _parts(self) -> int:
        """Number of images and of path lengths, which diffusers has none of."""
        engines = sum(source.name != _EAGER for source in self.sources)
        return len(self.settings) * (len(self.sources) + engines * ("ppl" in self.metrics))

    def generate(
        self, folder: Path, progress: Progress
    ) -> tuple[dict[str, _Gallery], dict[str, NDArray[np.float64]]]:
        """Return each participant's images and path lengths, with one participant in memory."""
        noise = mlperf.read_latents(self.request.latents) if self.request.latents else None
        galleries, lengths = {}, {}
        for source in self.sources:
            place = folder / source.name
            place.mkdir(exist_ok=True)
            paths = [place / f"{index:05}.png" for index in range(len(self.settings))]
            with source.load() as loaded:
                self._generate(source, _generator(loaded, noise), paths, noise, progress)
                if "ppl" in self.metrics and isinstance(loaded, Pipeline):
                    lengths[source.name] = path_lengths(
                        loaded, self.settings, self.inputs.distance, progress
                    )
            galleries[source.name] = _Gallery(paths)
        return galleries, lengths

    def _generate(
        self,
        source: _ImageSource,
        generate: Generate,
        paths: Sequence[Path],
        noise: NDArray[np.float32] | None,
        progress: Progress,
    ) -> None:
        for settings, path in zip(self.settings, paths, strict=True):
            origin = {"by": source.fingerprint, "latents": noise is not None, **asdict(settings)}
            if not _exists(path, origin):
                save_image(generate(settings), path, origin)
            progress.advance(f"images: {source.name}", self._parts)

    def score(
        self,
        galleries: Mapping[str, _Gallery],
        lengths: Mapping[str, NDArray[np.float64]],
        progress: Progress,
    ) -> list[Metric]:
        """Return all metrics, in the order of METRICS."""
        progress.note("computing metrics")
        rows = list(
            scores(
                galleries,
                [settings.prompts[0] for settings in self.settings],
                self.inputs,
                metrics=[name for name in self.metrics if name != "ppl"],
                reference=self.reference,
                seed=self.request.seed,
            )
        )
        rows += [path_metric(name, values, self.inputs) for name, values in lengths.items()]
        return sorted(rows, key=lambda metric: list(METRICS).index(metric.name))


def _generator(loaded: Any, noise: NDArray[np.float32] | None) -> Generate:
    """Return the function that generates one image, by our pipeline or by diffusers'."""
    if not isinstance(loaded, Pipeline):
        if noise is not None:
            raise SettingsError("--latents are for engines: compare with an engine directory")
        return lambda settings: loaded(settings).images[0]
    plan = loaded.manifest.acceleration

    def accelerated(settings: Settings) -> Settings:
        return settings if plan is None or settings.unaccelerated else settings.with_plan(plan)

    if noise is None:
        return lambda settings: loaded.run(accelerated(settings)).images[0]
    schedule = loaded.manifest.schedule

    def from_noise(settings: Settings) -> Image.Image:
        own = accelerated(settings)
        scale = sampling.noise_plan(own.sampler, schedule, own.steps).scale
        # denoising_start 0 takes latents as the initial noise.
        start = replace(own, denoising_start=0.0)
        return loaded.run(start, image=noise * np.float32(scale)).images[0]

    return from_noise


def _exists(path: Path, origin: Mapping[str, Any]) -> bool:
    """Return True if the image exists and was made for this request by this source."""
    try:
        with Image.open(path) as image:
            image.load()
            text: Mapping[str, str] = getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError):
        return False
    return text.get("latentforge") == json.dumps(origin, ensure_ascii=False)


def _pictures(settings: Sequence[Settings], galleries: Mapping[str, _Gallery]) -> Iterator[Picture]:
    for index, each in enumerate(settings[:_SHOWN]):
        shown = {name: to_array([gallery[index]])[0] for name, gallery in galleries.items()}
        yield Picture.of(each.prompts[0], each.seeds[0], shown)
