"""Full-size models with random weights: engines beside eager and compiled diffusers.

Stable Diffusion 1.5 and DeciDiffusion are timed in one interleaved run. Their engines are built
meanwhile by processes of their own, since exporting takes minutes of one core.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_stages.context import ROOT, StageRecord
from gpu_stages.pictures import image_psnr

__all__ = ["BUILDS", "build", "full", "xl"]


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
_COMPILE_SECONDS = 60.0  # less is not worth a start of max-autotune


def build(stage: StageRecord) -> None:
    """Write a checkpoint of a model, and make its engines in half precision."""
    name = stage.name.partition("-")[2]
    engines = None
    try:
        if _checkpoint(stage, name) is not None:
            engines = stage.engines(name, stage.work / name, "fp32" if stage.dry else "fp16")
    finally:
        stage.record("engines", str(engines or ""))  # which ``full`` waits for


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
    """Stable Diffusion 1.5 and DeciDiffusion 1.0 in one run, then beside torch.compile."""
    built = {name: found for name in BUILDS if (found := _built(stage, name))}
    if not built:
        return
    participants = [p for name in built for p in _participants(stage, name, built[name])]
    stage.attempt("batch 1", lambda: _study(stage, "batch 1", participants, layers=True))
    stage.attempt("batch 4", lambda: _study(stage, "batch 4", participants, images_per_prompt=4))
    if "deci1" in built:
        stage.attempt("PSNR of deci1", lambda: _compare(stage, "deci1", built["deci1"]))
    if "sd15" in built and (stage.dry or stage.seconds_left > _COMPILE_SECONDS):
        rivals = _participants(stage, "sd15", built["sd15"], peer="compile")
        stage.attempt("compile", lambda: _study(stage, "beside torch.compile", rivals))


def xl(stage: StageRecord) -> None:
    """Stable Diffusion XL at 1024x1024 with 30 steps, and with the one step of its Turbo."""
    if _checkpoint(stage, "sdxl") is None:
        return
    engines = stage.engines("sdxl", stage.work / "sdxl", "fp32" if stage.dry else "fp16")
    if engines is None:
        return
    pair = _participants(stage, "sdxl", engines)
    stage.attempt("sdxl", lambda: _study(stage, "30 steps", pair))
    stage.attempt("turbo", lambda: _study(stage, "one step, as SDXL-Turbo", pair, **TURBO))


def _built(stage: StageRecord, name: str) -> Path | None:
    """Wait for a build; record its steps, and that it is missing if it takes too long."""
    path = stage.work / f"build-{name}.json"
    while True:
        made = json.loads(path.read_text()) if path.exists() else {}
        if "engines" in made.get("facts", {}):
            break
        if stage.seconds_left < _COMPILE_SECONDS:
            stage.fail(f"{name}: build", "its engines were not ready in time")
            break
        time.sleep(0.2)
    for key, value in made.get("facts", {}).items():
        stage.record(key if key != "engines" else f"{name}: engines", value)
    for key, error in made.get("failures", {}).items():
        stage.fail(key, error)
    engines = made.get("facts", {}).get("engines")
    return Path(engines) if engines else None


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
    layers: bool = False,
    side: int | None = None,
    **changes: Any,
) -> None:
    """Time participants of interleaved runs, the first of which is the reference."""
    from latentforge.measure.bench.study import Study, run
    from latentforge.measure.hardware import available_threads
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.settings import resolve

    name = participants[0].name.partition("-")[0]
    model, manifest = MODELS[name], Manifest.read(Path(participants[1].model), hashes=False)
    given = {"seed": 0, "sampler": model.sampler, "steps": _steps(stage, name), **changes}
    if not stage.dry:
        given |= dict.fromkeys(("height", "width"), side or model.side)
    first, *others = participants
    models = dict.fromkeys(one.name.partition("-")[0] for one in participants)
    study = Study(
        participants=[replace(first, role="reference"), *others],
        settings=resolve(manifest.defaults, "a photo of a cat", given),
        latent=manifest.latent,
        threads=available_threads(),
        repeats=1 if stage.dry else 6,
        layers=layers,
        folder=stage.work / "peers",
        title=f"{', '.join(models)}: {title}",
    )
    results = run(study)
    stage.add(results)
    for entry in results.entries:
        if entry.status != "ok":
            stage.fail(f"{title}: {entry.name}", entry.message)
        if entry.role == "engines" and entry.psnr is not None and entry.speed_class == "A":
            stage.measure("PSNR to diffusers", f"{entry.name}, {title}", 1, entry.psnr, "dB")
    for profile in results.profiles:
        top = [f"{x.seconds * 1e3:.2f} ms  {x.operator}  {x.layer}" for x in profile.layers[:10]]
        stage.record(f"{profile.name}: ten hottest layers", "\n".join(top))


def _compare(stage: StageRecord, name: str, engines: Path) -> None:
    """Compare a model's image with its own diffusers: the reference of the run is of another."""
    import latentforge
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline
    from latentforge.measure.bench.placement import Placement

    sides = {} if stage.dry else dict.fromkeys(("height", "width"), MODELS[name].side)
    eager = EagerPipeline(
        open_checkpoint(str(stage.work / name)), placement=Placement().parsed(stage.placement)
    )
    with latentforge.load(engines) as pipe:
        ours = pipe("a photo of a cat", seed=0, sampler="ddim", steps=_steps(stage, name), **sides)
    value = image_psnr(ours.images, eager(ours.settings).images)
    stage.measure("PSNR to diffusers", f"{name}-ours", 1, value, "dB")
