"""What is fastest here, by measuring: of several engine directories each component, and rows."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import msgspec

from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import BenchResult
from latentforge.runtime.compile.verify import trial_settings
from latentforge.runtime.errors import BackendError
from latentforge.runtime.files import copy_files
from latentforge.runtime.history import stage_record
from latentforge.runtime.loader import load
from latentforge.runtime.machine import available_cores, fit_together
from latentforge.runtime.manifest import DENOISER_PARTS, Component, Manifest, Stage

__all__ = ["STAGE", "select_backends", "tune_rows"]

STAGE = "select"
"""Its name in a manifest's history."""

_MARGIN = 1.03  # a later candidate has to be this much faster: less is noise
_STEPS = 4
_HERE = ("onnxruntime", "openvino")
_VAE = ("vae_encoder", "vae_decoder")


def select_backends(
    candidates: Mapping[str, Path],
    directory: Path,
    *,
    refused: Mapping[str, str] | None = None,
    repeats: int = 3,
    quiet: bool = True,
) -> Manifest:
    """Let candidates take turns on whole images, and move the fastest of each component here.

    The parts of a UNet hand tensors to each other and are taken together; the VAE encoder, which
    text to image does not run, is that of the decoder's candidate. What comes first is taken where
    another is not faster by more than noise.

    Args:
        candidates: engine directories of the same model, by the name that they are recorded under.
        directory: staged, and holding none of these files.
        refused: candidates that are none, and why, for the record.
        repeats: counted images of each.
        quiet: show no progress.

    Raises:
        BackendError: a candidate does not run here.
    """
    start = time.perf_counter()
    manifests = {name: Manifest.read(path, hashes=False) for name, path in candidates.items()}
    together = fit_together([manifest.size for manifest in manifests.values()])
    if together is None:
        raise BackendError(
            "there is too little memory to measure these engines: name a target in place of auto"
        )
    entries = _measured(candidates, repeats, together=together, quiet=quiet)
    first = next(iter(manifests.values()))
    chosen: dict[str, str] = {}
    for group, timed in _groups(first).items():
        taken = _fastest(entries, timed)
        names = [name for name in manifests[taken].components if name in group]
        chosen |= dict.fromkeys(names, taken)
    components = {
        name: _moved(manifests[taken].components[name], candidates[taken], directory)
        for name, taken in chosen.items()
    }
    tokenizers = (entry.file for entry in first.tokenizers.values())
    copy_files(tokenizers, next(iter(candidates.values())), directory)
    stage = _stage(chosen, components, entries, refused or {}, start)
    manifest = msgspec.structs.replace(
        first, components=components, history=(*first.history, stage)
    )
    manifest.write(directory)
    return manifest


def tune_rows(directory: Path, *, repeats: int = 3) -> Manifest:
    """Note it in the manifest where guidance is faster in two runs of one row than in one of two.

    Engines that are fixed to a number of rows, run elsewhere, or have no guidance by default are
    left as they are.

    Args:
        directory: complete engines, such as staged ones.
        repeats: counted pairs of steps, at the default size.
    """
    manifest = Manifest.read(directory, hashes=False)
    unet = manifest.components["denoiser"]
    free = isinstance(unet.inputs["sample"].shape[0], str) and not unet.shapes
    able = free and unet.backend in _HERE and manifest.defaults.guidance_scale > 1
    if not able or _rows_ratio(directory, repeats) < _MARGIN:
        return manifest
    unet = msgspec.structs.replace(unet, max_rows=1)
    manifest = msgspec.structs.replace(
        manifest, components={**manifest.components, "denoiser": unet}
    )
    manifest.write(directory)
    return manifest


def _rows_ratio(directory: Path, repeats: int) -> float:
    """How many times faster single rows are; the first pair warms up."""
    seconds: dict[int, list[float]] = {2: [], 1: []}
    with load(directory, hashes=False) as pipeline:
        for _ in range(repeats + 1):
            for rows, taken in seconds.items():
                start = time.perf_counter()
                for _step in pipeline.stream(
                    "a cat", max_rows=rows, sampler="euler", steps=1, seed=0, unaccelerated=True
                ):
                    pass
                taken.append(time.perf_counter() - start)
    pairs = zip(seconds[2][1:], seconds[1][1:], strict=True)
    return median(both / one for both, one in pairs)


def _measured(
    candidates: Mapping[str, Path], repeats: int, *, together: bool, quiet: bool
) -> tuple[BenchResult, ...]:
    with load(next(iter(candidates.values())), hashes=False, low_memory=True) as pipeline:
        latent, usual = pipeline.manifest.latent, pipeline.manifest.defaults
        built = latent.image_sizes(pipeline.engines["denoiser"].component)
        size = {} if built else {"height": usual.height, "width": usual.width}
        settings = trial_settings(pipeline, steps=_STEPS, **size)
    measured = measure(
        [Participant.of(path, name) for name, path in candidates.items()],
        settings,
        threads=available_cores(),
        repeats=repeats,
        together=together,
        quiet=quiet,
    )
    return require_all_ok(measured).entries


def _groups(manifest: Manifest) -> dict[tuple[str, ...], str]:
    """Components that are taken together, and the stage of a run that tells how fast they are."""
    encoders = tuple(encoder.component for encoder in manifest.conditioning.encoders)
    return {encoders: "text_encoder", DENOISER_PARTS: "denoiser step", _VAE: "vae_decoder"}


def _fastest(entries: tuple[BenchResult, ...], stage: str) -> str:
    best, ratio = entries[0].name, 1.0
    for entry in entries[1:]:
        faster = entry.ratio[stage].value
        if faster > _MARGIN * ratio:
            best, ratio = entry.name, faster
    return best


def _moved(component: Component, source: Path, directory: Path) -> Component:
    for entry in component.files:
        (directory / entry.file).parent.mkdir(parents=True, exist_ok=True)
        (source / entry.file).rename(directory / entry.file)
    return component


def _stage(
    chosen: Mapping[str, str],
    components: Mapping[str, Component],
    entries: tuple[BenchResult, ...],
    refused: Mapping[str, str],
    start: float,
) -> Stage:
    """What was measured: paired ratios to the first candidate, by candidate and stage."""
    ratios = {
        entry.name: {stage: round(ratio.value, 3) for stage, ratio in entry.ratio.items()}
        for entry in entries[1:]
    }
    return stage_record(
        STAGE,
        start,
        {
            "target": "auto",
            "backends": {name: component.backend for name, component in components.items()},
            "options": {},
            "chosen": dict(chosen),
            "reference": entries[0].name,
            "ratios": ratios,
            "refused": dict(refused),
        },
    )
