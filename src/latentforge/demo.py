"""Demo: build the demo checkpoint, compare its images with those of diffusers, and time both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from PIL import Image

from latentforge.build import BuildRequest, build
from latentforge.export.checkpoint import DEMO, open_checkpoint
from latentforge.export.demo import prompts
from latentforge.export.reference.eager import EagerPipeline
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.bench.study import Study, run
from latentforge.measure.bench.summary import summary
from latentforge.measure.hardware import available_threads
from latentforge.measure.peers import participant
from latentforge.measure.pictures import contact_sheet
from latentforge.measure.report import render
from latentforge.measure.results import Picture, Results
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import GateError, LatentforgeError
from latentforge.runtime.files import staged_file
from latentforge.runtime.image import SAME_IMAGE_PSNR, save_image, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import resolve

__all__ = ["run_demo"]

_PROMPT_SEED = 7
_ENGINES = "engines"
_REFERENCE = "eager"
_MIN_PSNR = SAME_IMAGE_PSNR["fp32"]


@checked_arguments
def run_demo(directory: Path, *, images: int = 12, repeats: int = 5, quiet: bool = True) -> Path:
    """Write engines/, contact-sheet.png, bench.json and index.html to a directory.

    Engines of an earlier run are used again if they are intact and of the same weights.

    Args:
        directory: the directory to write to.
        images: number of images of the contact sheet.
        repeats: number of timed runs per participant.
        quiet: show no progress.

    Returns:
        The path of index.html.

    Raises:
        CheckpointError: the package latentforge-demo is not installed.
        GateError: an image of the engines differs from diffusers' image.
        TargetError: the directory cannot be written.
    """
    engines = directory / _ENGINES
    if not _are_current(engines):
        options = OptimizeRequest(overwrite=engines.exists(), quiet=quiet, repeats=0)
        build(DEMO, engines, BuildRequest(optimization=options))
    pairs = _image_pairs(engines, prompts(images, seed=_PROMPT_SEED), quiet)
    _write_contact_sheet(directory / "contact-sheet.png", pairs)
    pictures = tuple(pair.picture for pair in pairs)
    results = msgspec.structs.replace(_bench(engines, repeats, quiet), pictures=pictures)
    results.write(directory / "bench.json")
    with staged_file(directory / "index.html") as partial:
        partial.write_text(render(results), encoding="utf-8")
    print(summary(results))
    _check_images(pictures)
    return directory / "index.html"


@dataclass(frozen=True)
class _ImagePair:
    """Images of one prompt and seed by diffusers and by the engines."""

    prompt: str
    seed: int
    reference: Image.Image
    engines: Image.Image

    @property
    def picture(self) -> Picture:
        """The pair as an entry of the results."""
        reference, engines = to_array([self.reference, self.engines])
        return Picture.of(self.prompt, self.seed, {_REFERENCE: reference, _ENGINES: engines})


def _are_current(engines: Path) -> bool:
    """Return True if an engine directory is intact and was built from the demo's weights."""
    checkpoint = open_checkpoint(DEMO)
    try:
        manifest = Manifest.read(engines)
    except LatentforgeError:
        return False
    folders = ("text_encoder", "unet", "vae")
    return all(manifest.source.sha256.get(f) == checkpoint.sha256(f) for f in folders)


def _image_pairs(engines: Path, texts: Sequence[str], quiet: bool) -> list[_ImagePair]:
    eager = EagerPipeline(open_checkpoint(DEMO))
    pairs = []
    with load(engines) as pipeline, Progress(len(texts), quiet=quiet) as progress:
        for seed, text in enumerate(texts):
            with progress.part("contact sheet"):
                result = pipeline(text, seed=seed)
                reference = eager(result.settings)
            pairs.append(_ImagePair(text, seed, reference.images[0], result.images[0]))
    return pairs


def _write_contact_sheet(path: Path, pairs: Sequence[_ImagePair]) -> None:
    """Write both halves of the pairs as two rows each: diffusers above, engines below."""
    rows = [[pair.reference for pair in pairs], [pair.engines for pair in pairs]]
    half = len(pairs) // 2
    arranged = [row[part] for part in (slice(half), slice(half, None)) for row in rows]
    save_image(contact_sheet(arranged, scale=2), path, {"prompts": [pair.prompt for pair in pairs]})


def _bench(engines: Path, repeats: int, quiet: bool) -> Results:
    manifest = Manifest.read(engines, hashes=False)
    prompt = prompts(1, seed=_PROMPT_SEED)[0]
    settings = resolve(manifest.defaults, prompt, {"seed": 0})
    reference = participant(_REFERENCE, open_checkpoint(DEMO).path)
    size = sum(entry.bytes for entry in manifest.files) / 1e6
    study = Study(
        participants=[replace(reference, role="reference"), Participant.of(engines)],
        settings=settings,
        latent=manifest.latent,
        threads=available_threads(),
        repeats=repeats,
        title=f"latentforge demo: the demo checkpoint, {size:.0f} MB, without torch",
        command="latentforge demo",
    )
    return run(study, quiet=quiet)


def _check_images(pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        if (value := picture.psnr[_ENGINES]) < _MIN_PSNR:
            raise GateError(
                f"{picture.prompt!r}: the image of the engines has {value:.1f} dB PSNR to that of "
                f"diffusers, but needs {_MIN_PSNR:g}"
            )
