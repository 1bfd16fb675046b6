"""The main job on the embedded checkpoint: build it, run it beside diffusers, time both."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.demo import prompts
from latentforge.export.eager import EagerPipeline
from latentforge.runtime.bench import Comparison, available_cores, compare, contenders
from latentforge.runtime.errors import GateError, LatentforgeError
from latentforge.runtime.image import psnr, save, sheet, to_array
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.report import Pair, render
from latentforge.runtime.staging import staged_file
from latentforge.runtime.worker import settings_to_json

__all__ = ["showcase"]

_SHEET_SEED = 7
_MIN_PSNR = 40.0  # class A: the same picture


def showcase(
    directory: Path,
    build: Callable[[Path], None],
    *,
    images: int = 12,
    repeats: int = 5,
    quiet: bool = True,
) -> Path:
    """Leave engines/, contact-sheet.png, bench.json and index.html in a directory.

    Engines of an earlier run are used again if they are sound.

    Args:
        directory: where it goes.
        build: makes engines of the embedded checkpoint, in place of those that are there.
        images: pictures of the contact sheet.
        repeats: timed pairs of images.
        quiet: show no progress.

    Returns:
        The page to open.

    Raises:
        GateError: an engine's picture is not the one that diffusers makes.
        TargetError: the directory cannot be written.
    """
    engines = directory / "engines"
    if not _sound(engines):
        build(engines)
    pairs = _pairs(engines, prompts(images, seed=_SHEET_SEED), quiet)
    rows = [[pair.reference for pair in pairs], [pair.ours for pair in pairs]]
    half = len(pairs) // 2
    arranged = [row[part] for part in (slice(half), slice(half, None)) for row in rows]
    contact = sheet(arranged, scale=2)
    save(contact, directory / "contact-sheet.png", {"prompts": [pair.prompt for pair in pairs]})
    comparison = _bench(engines, repeats, quiet)
    _write(directory / "bench.json", json.dumps(comparison.asdict(), indent=2) + "\n")
    _write(directory / "index.html", _page(engines, comparison, pairs))
    print(comparison)
    if (worst := min(pairs, key=lambda pair: pair.psnr)).psnr < _MIN_PSNR:
        raise GateError(f"{worst.prompt!r}: {worst.psnr:.1f} dB to diffusers, not {_MIN_PSNR:g}")
    return directory / "index.html"


def _sound(engines: Path) -> bool:
    try:
        manifest = Manifest.read(engines)
    except LatentforgeError:
        return False
    folders = {"text_encoder", "unet", "vae"}
    checkpoint = open_checkpoint("demo")
    return all(manifest.source.sha256.get(f) == checkpoint.sha256(f) for f in folders)


def _pairs(engines: Path, texts: Sequence[str], quiet: bool) -> list[Pair]:
    """Each prompt's picture by diffusers and by the engines, at the same seed."""
    eager = EagerPipeline(open_checkpoint("demo"))
    pairs = []
    with Pipeline.load(engines) as pipeline, Progress(len(texts), quiet=quiet) as progress:
        for seed, text in enumerate(texts):
            with progress.part("contact sheet"):
                ours = pipeline(text, seed=seed)
                reference = eager(ours.settings)
            close = psnr(to_array(reference.images), to_array(ours.images), peak=2.0)
            pairs.append(Pair(text, reference.images[0], ours.images[0], close))
    return pairs


def _bench(engines: Path, repeats: int, quiet: bool) -> Comparison:
    with Pipeline.load(engines, hashes=False) as pipeline:
        settings = pipeline.settings(prompts(1, seed=_SHEET_SEED)[0], seed=0)
    return compare(
        contenders([engines], against=["eager"], checkpoint="demo"),
        settings_to_json(settings),
        threads=available_cores(),
        repeats=repeats,
        quiet=quiet,
    )


def _page(engines: Path, comparison: Comparison, pairs: Sequence[Pair]) -> str:
    manifest = Manifest.read(engines, hashes=False)
    size = sum(entry.bytes for entry in manifest.files) / 1e6
    subtitle = (
        f"The embedded demo checkpoint, exported, optimized ({size:.0f} MB) and run without torch, "
        "beside diffusers on the same prompts, seeds and threads."
    )
    return render("latentforge demo", subtitle, comparison, pairs)


def _write(path: Path, text: str) -> None:
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
