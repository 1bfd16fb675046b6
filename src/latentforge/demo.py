"""The main job on the embedded checkpoint: build it, run it beside diffusers, time both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from PIL import Image

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.demo import prompts
from latentforge.export.reference.eager import EagerPipeline
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.bench.study import Study, run
from latentforge.measure.bench.summary import summary
from latentforge.measure.peers import participant
from latentforge.measure.report import render
from latentforge.measure.results import Picture, Results
from latentforge.runtime.errors import GateError, LatentforgeError
from latentforge.runtime.files import staged_file
from latentforge.runtime.image import save, sheet, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.machine import available_cores
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import resolve

__all__ = ["showcase"]

_SHEET_SEED = 7
_OURS = "engines"
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
    compared = _compared(engines, prompts(images, seed=_SHEET_SEED), quiet)
    _contact_sheet(directory / "contact-sheet.png", compared)
    pictures = tuple(pair.picture for pair in compared)
    results = msgspec.structs.replace(_bench(engines, repeats, quiet), pictures=pictures)
    results.write(directory / "bench.json")
    with staged_file(directory / "index.html") as partial:
        partial.write_text(render(results), encoding="utf-8")
    print(summary(results))
    for picture in pictures:
        if (close := picture.psnr[_OURS]) < _MIN_PSNR:
            raise GateError(f"{picture.prompt!r}: {close:.1f} dB to diffusers, not {_MIN_PSNR:g}")
    return directory / "index.html"


@dataclass(frozen=True)
class _Pair:
    """One prompt's picture by diffusers, and by the engines."""

    prompt: str
    seed: int
    reference: Image.Image
    ours: Image.Image

    @property
    def picture(self) -> Picture:
        theirs, ours = to_array([self.reference, self.ours])
        return Picture.of(self.prompt, self.seed, {"eager": theirs, _OURS: ours})


def _contact_sheet(path: Path, pairs: Sequence[_Pair]) -> None:
    rows = [[pair.reference for pair in pairs], [pair.ours for pair in pairs]]
    half = len(pairs) // 2
    arranged = [row[part] for part in (slice(half), slice(half, None)) for row in rows]
    save(sheet(arranged, scale=2), path, {"prompts": [pair.prompt for pair in pairs]})


def _sound(engines: Path) -> bool:
    try:
        manifest = Manifest.read(engines)
    except LatentforgeError:
        return False
    folders = {"text_encoder", "unet", "vae"}
    checkpoint = open_checkpoint("demo")
    return all(manifest.source.sha256.get(f) == checkpoint.sha256(f) for f in folders)


def _compared(engines: Path, texts: Sequence[str], quiet: bool) -> list[_Pair]:
    """Each prompt's picture by diffusers and by the engines, at the same seed."""
    eager = EagerPipeline(open_checkpoint("demo"))
    compared = []
    with load(engines) as pipeline, Progress(len(texts), quiet=quiet) as progress:
        for seed, text in enumerate(texts):
            with progress.part("contact sheet"):
                ours = pipeline(text, seed=seed)
                theirs = eager(ours.settings)
            compared.append(_Pair(text, seed, theirs.images[0], ours.images[0]))
    return compared


def _bench(engines: Path, repeats: int, quiet: bool) -> Results:
    manifest = Manifest.read(engines, hashes=False)
    prompt = prompts(1, seed=_SHEET_SEED)[0]
    settings = resolve(manifest.defaults, prompt, {"seed": 0})
    eager = participant("eager", open_checkpoint("demo").path)
    size = sum(entry.bytes for entry in manifest.files) / 1e6
    study = Study(
        participants=[replace(eager, role="reference"), Participant.of(engines)],
        settings=settings,
        latent=manifest.latent,
        threads=available_cores(),
        repeats=repeats,
        title=f"latentforge demo: the embedded checkpoint, {size:.0f} MB, without torch",
        command="latentforge demo",
    )
    return run(study, quiet=quiet)
