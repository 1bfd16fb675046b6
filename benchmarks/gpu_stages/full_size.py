"""Full-size models with random weights: engines beside eager and compiled diffusers.

Stable Diffusion 1.5 and DeciDiffusion are timed in one interleaved run. Their engines are built
before by processes of their own, since exporting takes minutes of one core, and so is torch's code.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_stages.context import ROOT, StageRecord
from gpu_stages.pictures import IDENTICAL, image_psnr, judge

__all__ = ["BUILDS", "build", "compile_torch", "full", "xl"]


@dataclass(frozen=True)
class FullSize:
    """Model of a benchmark.

    Attributes:
        steps: of its images.
        side: of its images, in pixels.
        tiny: its stand-in of a rehearsal, a key of tests/tiny.py.
        sampler: of its images.
        settings: further settings.
    """

    steps: int
    side: int
    tiny: str
    sampler: str = "ddim"
    settings: Mapping[str, Any] | None = None


MODELS: Mapping[str, FullSize] = {
    "sd15": FullSize(50, 512, "sd"),
    "deci1": FullSize(30, 512, "decidiffusion-1"),
    "sdxl": FullSize(30, 1024, "sdxl", "euler"),
}
TURBO = {"steps": 1, "guidance_scale": 1.0, "sampler": "euler_ancestral", "side": 512}
"""SDXL-Turbo has the architecture of SDXL: its one step is timed with the same engines."""

BUILDS = ("sd15", "deci1")
_PSNR = "PSNR to diffusers"
_PROMPT = "a photo of a cat"
_SMALL = ("--height", 128, "--width", 128)  # of the images that gates draw on the CPU
_COMPILE_SECONDS = 75.0  # torch.compile's second start, and the runs; its first takes minutes
_XL_SECONDS = 200.0  # less does not make its engines


def build(stage: StageRecord) -> None:
    """Write a checkpoint of a model, and make its engines in half precision."""
    name = stage.name.partition("-")[2]
    engines = None
    try:
        if _checkpoint(stage, name) is not None:
            engines = _engines(stage, name)
    finally:
        stage.record("engines", str(engines or ""))


def _engines(stage: StageRecord, name: str) -> Path | None:
    """Return a model's engines, without what they were made of: disks are small."""
    if stage.dry:
        return stage.optimized(name, stage.work / name, "fp32")
    engines = stage.optimized(name, stage.work / name, "fp16", *_SMALL)
    shutil.rmtree(stage.work / f"{name}-exported", ignore_errors=True)
    return engines


def compile_torch(stage: StageRecord) -> None:
    """Draw an image with torch.compile, whose code ``full`` finds in the cache then."""
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline
    from latentforge.measure.bench.placement import Placement
    from latentforge.runtime.manifest import RequestDefaults
    from latentforge.runtime.settings import resolve

    placement = Placement().parsed(stage.placement)
    eager = EagerPipeline(open_checkpoint(str(_written(stage, "sd15"))), placement=placement)
    if not stage.dry:  # it takes minutes on a CPU
        eager.compile()
    side = 32 if stage.dry else MODELS["sd15"].side
    defaults = RequestDefaults(
        sampler="ddim", steps=2, guidance_scale=7.5, guidance_rescale=0, height=side, width=side
    )
    start = time.monotonic()
    eager(resolve(defaults, _PROMPT, {"seed": 0}))
    stage.record("compiled", f"{time.monotonic() - start:.1f} s to the first image")


def _written(stage: StageRecord, name: str) -> Path:
    """Wait for a checkpoint that its build writes, and return its folder."""
    index = stage.work / name / "model_index.json"  # the last file
    while not index.exists():
        if "engines" in _made(stage, f"build-{name}").get("facts", {}):
            raise FileNotFoundError(f"the build of {name} ended without {index}")
        time.sleep(0.2)
    return index.parent


def _checkpoint(stage: StageRecord, name: str) -> Path | None:
    target = stage.work / name
    if stage.dry:
        sys.path.append(str(ROOT / "tests"))
        import checkpoints
        from tiny import TINY

        checkpoints.write(TINY[MODELS[name].tiny], target)
        return target
    write = [sys.executable, ROOT / "benchmarks" / "checkpoints.py", name, target, "--half"]
    return target if stage.command(f"{name}: checkpoint", *write) else None


def full(stage: StageRecord) -> None:
    """Stable Diffusion 1.5 and DeciDiffusion 1.0 in one run, and beside torch.compile."""
    built = {name: found for name in BUILDS if (found := _built(stage, name))}
    if not built:
        return
    participants = [p for name in built for p in _participants(stage, name, built[name])]
    stage.attempt("batch 1", lambda: _study(stage, "batch 1", participants))
    if "sd15" in built:
        stage.attempt("compile", lambda: _beside_compile(stage, built["sd15"]))
    if "deci1" in built:
        stage.attempt("PSNR of deci1", lambda: _compare(stage, "deci1", built["deci1"]))
    some = {"images_per_prompt": 4, "repeats": 3}
    stage.attempt("batch 4", lambda: _study(stage, "batch 4", participants, **some))
    for name, engines in built.items():
        stage.forge(f"{name}: ten hottest layers", "inspect", engines, "--layers", 10)


def _beside_compile(stage: StageRecord, engines: Path) -> None:
    """Time torch.compile if its code is there, or if there is time to make it."""
    made = _made(stage, "build-compile")
    for key, value in {**made.get("facts", {}), **made.get("failures", {})}.items():
        stage.record(f"torch.compile: {key}", value)
    needed = _COMPILE_SECONDS if "compiled" in made.get("facts", {}) else 2 * _COMPILE_SECONDS
    if not stage.dry and stage.seconds_left < needed:
        stage.fail("torch.compile", f"{stage.seconds_left:.0f} s are left: it takes {needed:.0f}")
        return
    rivals = _participants(stage, "sd15", engines, peer="compile")
    _study(stage, "beside torch.compile", rivals)


def xl(stage: StageRecord) -> None:
    """Stable Diffusion XL at 1024x1024 with 30 steps, and with the one step of its Turbo."""
    if not stage.dry and stage.seconds_left < _XL_SECONDS:
        left = f"{stage.seconds_left:.0f} s are left of the {_XL_SECONDS:.0f} that it takes"
        stage.record("xl", f"not run: {left}; run it alone, --stages xl --budget 400")
        return
    if _checkpoint(stage, "sdxl") is None:
        return
    engines = _engines(stage, "sdxl")
    if engines is None:
        return
    pair = _participants(stage, "sdxl", engines)
    stage.attempt("sdxl", lambda: _study(stage, "30 steps", pair, repeats=3))
    title = "one step, as SDXL-Turbo"
    stage.attempt("turbo", lambda: _study(stage, title, pair, repeats=3, **TURBO))


def _built(stage: StageRecord, name: str) -> Path | None:
    """Return the engines of a build, whose steps are recorded; None if it has not made them."""
    made = _made(stage, f"build-{name}")
    for key, value in made.get("facts", {}).items():
        stage.record(key if key != "engines" else f"{name}: engines", value)
    for key, error in made.get("failures", {}).items():
        stage.fail(key, error)
    engines = made.get("facts", {}).get("engines")
    if engines is None:
        stage.fail(f"{name}: build", "its engines were not ready in time")
    return Path(engines) if engines else None


def _made(stage: StageRecord, name: str) -> Mapping[str, Any]:
    """Return the content of a build's file; nothing if it did not get that far."""
    path = stage.work / f"{name}.json"
    content: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _participants(
    stage: StageRecord, name: str, engines: Path, *, peer: str = "eager"
) -> list[Any]:
    """Return diffusers and the engines of a model; a model's number of steps is its own."""
    from latentforge.measure.bench.protocol import Participant
    from latentforge.measure.peers import participant

    served = "eager" if stage.dry else peer  # compiling takes minutes on a CPU
    theirs = participant(f"{served}@{stage.placement}", stage.work / name)
    ours = Participant.of(engines, f"{name}-ours")
    steps = {} if name != "deci1" else {"steps": _steps(stage, "deci1")}
    foreign = name == "deci1"  # another image than the reference's
    return [
        replace(one, name=called, overrides=steps, same_trajectory=not foreign)
        for one, called in ((theirs, f"{name}-{peer}"), (ours, f"{name}-ours"))
    ]


def _steps(stage: StageRecord, name: str) -> int:
    return 2 if stage.dry else MODELS[name].steps


def _study(
    stage: StageRecord,
    title: str,
    participants: Sequence[Any],
    *,
    side: int | None = None,
    repeats: int = 6,
    **changes: Any,
) -> None:
    """Time participants of interleaved runs, the first of which is the reference."""
    from latentforge.measure.bench.study import Study, run
    from latentforge.measure.hardware import available_threads
    from latentforge.runtime.manifest import Manifest

    model = participants[0].name.partition("-")[0]
    manifest = Manifest.read(Path(participants[1].model), hashes=False)
    first, *others = participants
    models = dict.fromkeys(one.name.partition("-")[0] for one in participants)
    study = Study(
        participants=[replace(first, role="reference"), *others],
        settings=_settings(stage, model, manifest, side, changes),
        latent=manifest.latent,
        threads=available_threads(),
        repeats=1 if stage.dry else repeats,
        folder=stage.work / "peers",
        title=f"{', '.join(models)}: {title}",
    )
    results = run(study)
    stage.add(results)
    for entry in results.entries:
        _judge(stage, f"{title}: {entry.name}", entry, model, study.settings.count)


def _settings(
    stage: StageRecord, name: str, manifest: Any, side: int | None, changes: Mapping[str, Any]
) -> Any:
    from latentforge.runtime.settings import resolve

    model = MODELS[name]
    given = {"seed": 0, "sampler": model.sampler, "steps": _steps(stage, name), **changes}
    if not stage.dry:
        given |= dict.fromkeys(("height", "width"), side or model.side)
    return resolve(manifest.defaults, _PROMPT, given)


def _judge(stage: StageRecord, subject: str, entry: Any, model: str, images: int) -> None:
    """Record a participant's failure, or the distance of its image to the reference's."""
    if entry.status != "ok":
        stage.fail(subject, entry.message)
    elif entry.role != "reference" and entry.name.startswith(f"{model}-"):
        if entry.psnr is None:
            stage.fail(subject, "its image could not be compared")
        else:
            value = round(min(entry.psnr, IDENTICAL), 1)
            judge(stage, _PSNR, subject, images, value)


def _sides(stage: StageRecord, name: str) -> dict[str, int]:
    return {} if stage.dry else dict.fromkeys(("height", "width"), MODELS[name].side)


def _compare(stage: StageRecord, name: str, engines: Path) -> None:
    """Compare a model's image with its own diffusers: the reference of the run is of another."""
    import latentforge
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline
    from latentforge.measure.bench.placement import Placement

    eager = EagerPipeline(
        open_checkpoint(str(stage.work / name)), placement=Placement().parsed(stage.placement)
    )
    with latentforge.load(engines) as pipe:
        given = {"steps": _steps(stage, name), **_sides(stage, name)}
        ours = pipe(_PROMPT, seed=0, sampler="ddim", **given)
    value = image_psnr(ours.images, eager(ours.settings).images)
    judge(stage, _PSNR, f"{name}-ours", 1, value)
