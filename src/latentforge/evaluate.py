"""Engines' pictures, judged: what ``latentforge eval`` does, as a function."""

from __future__ import annotations

import importlib
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

from latentforge.optimize.quality import mlperf
from latentforge.optimize.quality.catalogue import METRICS
from latentforge.optimize.quality.features import Network, OnnxNetwork, Seen
from latentforge.optimize.quality.metrics import Distance, Lpips, Perceptual
from latentforge.optimize.quality.path_length import path_length, path_lengths
from latentforge.optimize.quality.scores import DISTRIBUTION, Judges, scores
from latentforge.optimize.recording import read_prompts
from latentforge.runtime import samplers
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import open_picture, save, to_array
from latentforge.runtime.machine import available_cores, described
from latentforge.runtime.manifest import FILENAME, Manifest, hash_file
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.results import Metric, Picture, Results
from latentforge.runtime.settings import Request, Settings, resolve

__all__ = ["Evaluation", "evaluate", "judge", "summary"]

_IMAGES = 64
_SHOWN = 6
_MOST = 100_000
_EAGER = "eager"

Draw = Callable[[Settings], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to judge by, and on what.

    Attributes:
        against: a checkpoint, whose pictures diffusers draws, or an engine directory; None for
            metrics that need no reference.
        prompts: a text file, one a line, or MLPerf's .tsv; the demo's own or those that come with
            the package if None.
        metrics: names of METRICS; all that can be had if empty, but ppl.
        images: how many of each; as many as the file has prompts, or 64, if None.
        seed: of the first image; every further one has the next.
        request: further settings of every image; the first engines' defaults fill in the rest.
        network: efficientnet-lite0, or an ONNX file: see optimize.quality.features.OnnxNetwork.
        inception: the standard Inception's weights: FID, KID and IS use it in place of network.
        clip: a directory or hub id of a CLIP.
        lpips: an ONNX file: see optimize.quality.metrics.Lpips.
        retrieval: the unpacked package of the demo's training pictures.
        statistics: an .npz of mu and sigma that FID compares with, in place of the reference.
        latents: an .npy of the noise that every image starts from.
        preset: ``mlperf``, or empty.
        folder: keep pictures there; those that are there already are not drawn again.
        threads: 0 for every core.
    """

    against: str | None = None
    prompts: Path | None = None
    metrics: tuple[str, ...] = ()
    images: int | None = None
    seed: int = 0
    request: Request | None = None
    network: str | None = None
    inception: Path | None = None
    clip: str | None = None
    lpips: Path | None = None
    retrieval: Path | None = None
    statistics: Path | None = None
    latents: Path | None = None
    preset: str = ""
    folder: Path | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise SettingsError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if self.images is not None and not 1 <= self.images <= _MOST:
            raise SettingsError(f"images is a whole number from 1 to {_MOST:,}, not {self.images}")
        if self.preset not in ("", "mlperf"):
            raise SettingsError(f"no preset {self.preset!r}: there is mlperf")
        if self.preset and self.request:
            raise SettingsError(f"--preset mlperf sets {', '.join(self.request)} itself: drop it")


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
    judges = _judges(evaluation, manifest, requests)
    able = judges.can(reference=evaluation.against is not None)
    if evaluation.preset:
        mlperf.check(
            captions=len(texts),
            images=len(requests),
            family=manifest.family,
            latents=evaluation.latents is not None,
            metrics=evaluation.metrics or able,
        )
    metrics = _metrics(evaluation, judges, able, len(requests))
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
        f"{count} requests of one image each, {noise} contenders; intervals of 95 % by resampling "
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
class _Painter:
    """Somebody who draws.

    Attributes:
        name: among the subjects.
        mark: tells its pictures from those of an earlier build.
        load: gives a context with the Pipeline, or diffusers' EagerPipeline.
    """

    name: str
    mark: str
    load: Callable[[], Any]


def _painters(engines: Sequence[Path], evaluation: Evaluation) -> list[_Painter]:
    """The reference first, if there is one."""
    directories = list(engines)
    against = evaluation.against
    if against is not None and (Path(against) / FILENAME).is_file():
        directories = [
            Path(against),
            *(e for e in engines if e.resolve() != Path(against).resolve()),
        ]
    names = [_EAGER, *(path.resolve().name for path in directories)]
    ours = [
        _Painter(
            name=name if names.count(name) == 1 else str(path.resolve())[1:].replace("/", "-"),
            mark=hash_file(path / FILENAME),
            load=partial(Pipeline.load, path, threads=evaluation.threads),
        )
        for path, name in zip(directories, names[1:], strict=True)
    ]
    if against is None or directories[0] == Path(against):
        return ours
    return [_eager(against, evaluation.threads), *ours]


def _eager(name: str, threads: int) -> _Painter:
    from latentforge.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(name)

    def load() -> Any:
        import torch

        from latentforge.export.eager import EagerPipeline

        if threads:
            torch.set_num_threads(threads)
        return nullcontext(EagerPipeline(checkpoint))

    stats = [(str(path), path.stat()) for path in sorted(checkpoint.path.rglob("*.safetensors"))]
    mark = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return _Painter(name=_EAGER, mark=mark, load=load)


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
    judges: Judges
    metrics: Sequence[str]
    painters: Sequence[_Painter]

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
                    distance = _distance(self.judges)
                    lengths[painter.name] = path_lengths(loaded, self.requests, distance, progress)
            galleries[painter.name] = _Gallery(paths)
        return galleries, lengths

    def _draw(
        self,
        painter: _Painter,
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
        found += [_path(name, some, self.judges) for name, some in lengths.items()]
        return sorted(found, key=lambda metric: list(METRICS).index(metric.name))


def _painting(loaded: Any, noise: NDArray[np.float32] | None) -> Draw:
    """How a pipeline, ours or diffusers', makes one picture of a request."""
    if not isinstance(loaded, Pipeline):
        if noise is not None:
            raise SettingsError("--latents are for engines: compare with an engine directory")
        return lambda request: loaded(request).images[0]
    if noise is None:
        return lambda request: loaded.run(request).images[0]
    schedule = loaded.manifest.schedule

    def paint(request: Settings) -> Image.Image:
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


# what it is judged by


def _judges(evaluation: Evaluation, manifest: Manifest, requests: Sequence[Settings]) -> Judges:
    """Load every network, and show it a blank picture: what it lacks is better known now."""
    network = _network(evaluation.network) if evaluation.network else None
    blank = np.zeros((1, 3, requests[0].height, requests[0].width), np.float32)
    distances: dict[str, Distance] = {}
    names: dict[str, str] = {}
    if network is not None and network(blank).maps:
        distances["perceptual"], names["perceptual"] = Perceptual(network).each, network.name
    if evaluation.lpips:
        lpips = Lpips(evaluation.lpips)
        lpips.each(blank, blank)
        distances["lpips"], names["lpips"] = lpips.each, lpips.name
    features = _inception(evaluation.inception) if evaluation.inception else network
    return Judges(
        distances=distances,
        features=features,
        gives=Seen() if features is None else features(blank),
        clip=_clip(evaluation.clip) if evaluation.clip else None,
        statistics=_statistics(evaluation.statistics) if evaluation.statistics else None,
        shares=_shares(evaluation, manifest, requests),
        names=names,
    )


def _network(name: str) -> Network:
    from latentforge.networks import LITE0, EfficientNetLite0

    return EfficientNetLite0() if name == LITE0 else OnnxNetwork(Path(name))


def _inception(weights: Path) -> Network:
    from latentforge.networks import Inception

    return Inception(weights)


def _clip(source: str) -> Any:
    from latentforge.networks import Clip

    return Clip(source)


def _statistics(path: Path) -> Any:
    from latentforge.optimize.quality.distribution import Statistics

    return Statistics.read(path)


def _shares(
    evaluation: Evaluation, manifest: Manifest, requests: Sequence[Settings]
) -> dict[str, Any]:
    """What can be told of the demo checkpoint's pictures, where its prompts are the demo's."""
    if manifest.source.checkpoint != "demo":
        return {}
    from latentforge.export.demo import score

    try:
        for request in requests:
            score.parse(request.prompts[0])
    except ValueError:
        return {}
    shares: dict[str, Any] = {
        "colour": lambda gallery, texts: sum(
            score.border(picture) == score.parse(text)[1]
            for picture, text in zip(gallery, texts, strict=True)
        )
    }
    if evaluation.retrieval is not None:
        originals = _originals(evaluation.retrieval)
        shares["retrieval"] = lambda gallery, texts: score.score(gallery, texts, originals).names
    return shares


def _originals(package: Path) -> NDArray[np.uint8]:
    from latentforge.export.demo.data import pictures

    try:
        return pictures(package)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f"{package} does not hold the demo's training pictures: {error}; unpack "
            "emoji-datasource-google 16.0.0 and name its folder package"
        ) from error


def _metrics(evaluation: Evaluation, judges: Judges, able: Sequence[str], images: int) -> list[str]:
    """Those asked for, or all that can be had; in the order of METRICS."""
    enough = [name for name in able if images > 1 or name not in _OF_SEVERAL]
    asked = evaluation.metrics or enough
    possible = {*enough, *(["ppl"] if judges.distances and images > 1 else [])}
    if lacking := [name for name in asked if name not in possible]:
        few = images < 2 and lacking[0] in _OF_SEVERAL
        needs = "needs two images or more: give --images" if few else _NEEDS[lacking[0]]
        raise SettingsError(f"{lacking[0]} {needs}")
    if not asked:
        raise SettingsError("nothing to judge by: give --against a checkpoint, or a --network")
    if by_torch := [name for name in asked if name in (*DISTRIBUTION, "is", "clip")]:
        _check_library(by_torch[0])
    return [name for name in METRICS if name in asked]


def _check_library(metric: str) -> None:
    """Find out before anything is drawn."""
    try:
        importlib.import_module("latentforge.optimize.quality.distribution")
    except ImportError as error:
        raise SettingsError(
            f"{metric} needs torchmetrics ({error}): pip install 'latentforge[eval]'"
        ) from error


_OF_SEVERAL = ("fid", "kid", "is", "cmmd", "ppl")
_AGAINST = "needs --against: pictures to compare with"
_NEEDS = {
    "psnr": _AGAINST,
    "ssim": _AGAINST,
    "lpips": "needs --against, and --lpips: its network as an ONNX file",
    "perceptual": "needs --against, and a --network that gives feature maps",
    "fid": "needs a --network that gives features, or --inception; and --against or --statistics",
    "kid": "needs a --network that gives features, or --inception; and --against",
    "is": "needs a --network that gives logits, or --inception",
    "clip": "needs --clip: the directory or hub id of a CLIP",
    "cmmd": "needs --against, and --clip: the directory or hub id of a CLIP",
    "ppl": "needs a --network that gives feature maps, or --lpips: a distance between pictures",
    "colour": "is for the demo checkpoint, with prompts such as: owl on a pink background",
    "retrieval": "is for the demo checkpoint and its prompts, and needs --retrieval: its pictures",
}


def _distance(judges: Judges) -> Distance:
    return judges.distances.get("lpips") or judges.distances["perceptual"]


def _path(name: str, lengths: NDArray[np.float64], judges: Judges) -> Metric:
    found = path_length(lengths)
    by = "lpips" if "lpips" in judges.distances else "perceptual"
    return Metric(
        name="ppl",
        subject=name,
        value=found.value,
        low=found.low,
        high=found.high,
        images=2 * len(lengths),
        better="lower",
        network=judges.names[by],
        note=f"median {np.median(lengths):.4g}; by {by} distance",
    )
