"""The export stage: a checkpoint in, an engine directory out."""

import importlib.metadata
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

import latentforge
from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ComponentPlan, Family, Plan, family_of
from latentforge.export.onnx import OPSET, Dimensions, component_entry, export_onnx
from latentforge.export.parity import LazyModules, TorchSession, check_parity
from latentforge.export.scheduler import default_sampler, prediction_of, schedule_of
from latentforge.export.tokenizers import write_tokenizer
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import (
    CheckpointError,
    SettingsError,
    ShapeError,
    TargetError,
)
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.manifest import (
    Component,
    Defaults,
    Manifest,
    Source,
    Stage,
)
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress
from latentforge.runtime.staging import check_target, staged_directory
from latentforge.runtime.tokenizer import Tokenizer

__all__ = ["export"]

_PROMPTS = ("a photo of a cat",)
_STEPS = 2  # a guided run of two steps sees high and low noise; more only costs time
_PIXELS = 256
_SPACE = 1.1  # engines are as large as the float32 weights, and graphs are small beside them


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one export works on."""

    checkpoint: Checkpoint
    family: Family
    plan: Plan
    components: tuple[ComponentPlan, ...]
    dimensions: Dimensions

    @property
    def sizes(self) -> dict[str, int]:
        return self.dimensions.sizes(self.plan.latent.downscale)


def export(
    source: str,
    target: Path,
    *,
    components: Sequence[str] = (),
    dimensions: Dimensions | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Manifest:
    """Export a checkpoint to an engine directory in float32, and check it against torch.

    A denoising run in torch gives each component's real inputs; the exported component has
    to give torch's outputs for them.

    Args:
        source: a diffusers directory, a hub id, or ``demo``.
        target: the engine directory to write, whole or not at all.
        components: names of those to export; all of the family's if empty.
        dimensions: sizes to fix; the others stay free.
        overwrite: replace an engine directory that is there already.
        quiet: show no progress.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a kind we refuse.
        SettingsError: no such component, or a size that the model cannot have.
        GateError: an engine does not compute what torch computes.
        TargetError: the directory cannot be written.
    """
    start = time.perf_counter()
    check_target(target, overwrite=overwrite)
    job = _job(source, components, dimensions or Dimensions())
    with (
        staged_directory(target, overwrite=overwrite) as directory,
        Progress(2 * len(job.components) + 2, quiet=quiet) as progress,
    ):
        _check_space(job, directory)
        manifest = _draft(job, directory)
        with progress.part("recording a run in torch"):
            sessions, reference = _record(job, manifest, directory)
        manifest = _export_components(job, manifest, directory, sessions, progress)
        with progress.part("comparing images"):
            manifest = _check_image(job, manifest, directory, reference)
        manifest = msgspec.structs.replace(manifest, history=(_history(job, start),))
        manifest.write(directory)
    return manifest


def _job(source: str, names: Sequence[str], dimensions: Dimensions) -> _Job:
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint)
    plan = family.plan(checkpoint)
    known = [component.name for component in plan.components]
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"no component {unknown[0]!r}; {family.name} has {', '.join(known)}")
    unit = plan.latent.downscale * plan.latent.multiple
    for side in (dimensions.height, dimensions.width):
        if side is not None and side % unit:
            raise ShapeError(f"height and width are multiples of {unit} here, not {side}")
    chosen = tuple(c for c in plan.components if not names or c.name in names)
    for component in plan.components:
        checkpoint.weights(component.folder)  # refuse pickles and damage before any work
    return _Job(
        checkpoint=checkpoint, family=family, plan=plan, components=chosen, dimensions=dimensions
    )


def _check_space(job: _Job, directory: Path) -> None:
    """Refuse to begin what the disk has no room for."""
    folders = {component.folder for component in job.components}
    needed = int(sum(job.checkpoint.parameters(folder) for folder in folders) * 4 * _SPACE)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TargetError(
            f"{directory.parent} has {_size(free)} free and the engines take about "
            f"{_size(needed)}: make room, or name another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _draft(job: _Job, directory: Path) -> Manifest:
    """The manifest before there are engines, with the tokenizers written."""
    checkpoint, plan = job.checkpoint, job.plan
    scheduler = job.family.scheduler(checkpoint.config("scheduler", "scheduler_config.json"))
    folders = sorted({component.folder for component in job.components})
    return Manifest(
        name=checkpoint.sidecar.get("name") or Path(checkpoint.name).name,
        family=job.family.name,
        source=Source(
            checkpoint=checkpoint.name,
            license=checkpoint.license,
            sha256={folder: checkpoint.sha256(folder) for folder in folders},
        ),
        prediction=prediction_of(scheduler),
        latent=plan.latent,
        conditioning=plan.conditioning,
        schedule=schedule_of(scheduler),
        defaults=_defaults(job, scheduler),
        tokenizers={name: write_tokenizer(checkpoint, name, directory) for name in plan.tokenizers},
        components={},
    )


def _defaults(job: _Job, scheduler: Mapping[str, Any]) -> Defaults:
    usual = job.plan.defaults
    defaults = {
        "sampler": usual.sampler or default_sampler(scheduler),
        "steps": usual.steps,
        "guidance_scale": usual.guidance_scale,
        "guidance_rescale": usual.guidance_rescale,
        "height": job.dimensions.height or job.plan.sample_size,
        "width": job.dimensions.width or job.plan.sample_size,
    }
    given = job.checkpoint.sidecar.get("defaults", {})
    try:
        return msgspec.convert({**defaults, **given}, Defaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{job.checkpoint.name}: defaults: {error}") from error


def _record(
    job: _Job, manifest: Manifest, directory: Path
) -> tuple[dict[str, TorchSession], Result]:
    """Run the checkpoint in torch, by our own loop, and keep what each component saw."""
    modules = LazyModules(job.checkpoint)
    sessions = {plan.name: TorchSession(plan, modules) for plan in job.plan.components}
    engines = {name: _torch_engine(session) for name, session in sessions.items()}
    tokenizers = {
        name: Tokenizer(directory / entry.file, entry)
        for name, entry in manifest.tokenizers.items()
    }
    pipeline = Pipeline(manifest, engines, tokenizers, directory)
    result = _short_run(job, pipeline)
    encoder = sessions["vae_encoder"]
    if encoder.plan in job.components and not encoder.recording.runs:
        engines["vae_encoder"].run({"sample": to_array(result.images)})
    modules.free()
    return sessions, result


def _torch_engine(session: TorchSession) -> Engine:
    plan = session.plan
    component = Component(
        file=f"{plan.name}.onnx",
        sha256="0" * 64,
        bytes=0,
        backend="torch",
        precision="fp32",
        inputs=plan.inputs,
        outputs=plan.outputs,
    )
    return Engine(plan.name, component, session)


def _short_run(job: _Job, pipeline: Pipeline) -> Result:
    """An image that sees all of the graph: small, since a large one only takes longer."""
    latent, sizes = job.plan.latent, job.dimensions
    unit = latent.downscale * latent.multiple
    side = min(job.plan.sample_size, max(_PIXELS, unit)) // unit * unit
    return pipeline(
        _PROMPTS,
        sampler="euler",
        steps=_STEPS,
        seed=0,
        height=sizes.height or side,
        width=sizes.width or side,
    )


def _export_components(
    job: _Job,
    manifest: Manifest,
    directory: Path,
    sessions: Mapping[str, TorchSession],
    progress: Progress,
) -> Manifest:
    """Export each component and compare it with its recording."""
    modules = LazyModules(job.checkpoint)
    components: dict[str, Component] = {}
    quality: dict[str, Mapping[str, float]] = {}
    for plan in job.components:
        path = directory / f"{plan.name}.onnx"
        recording = sessions[plan.name].recording
        with progress.part(f"{plan.name}: export"):
            feeds = recording.runs[0][0]
            export_onnx(modules.get(plan), plan, feeds, path, job.sizes)
        modules.free()
        with progress.part(f"{plan.name}: compare with torch"):
            components[plan.name] = component_entry(plan, path, job.sizes)
            quality[plan.name] = check_parity(
                plan.name, components[plan.name], directory, recording
            )
        error = quality[plan.name]["max_relative_error"]
        progress.note(f"{plan.name}: within {error:.1e} of torch")
    return msgspec.structs.replace(manifest, components=components, quality=quality)


def _check_image(job: _Job, manifest: Manifest, directory: Path, reference: Result) -> Manifest:
    """Make the recorded image again on the engines: PSNR of latents and of pixels, in dB."""
    if any(name not in manifest.components for name in manifest.needed):
        return manifest
    manifest.write(directory)
    with Pipeline.load(directory, hashes=False, at_once=1, prepack=False) as pipeline:
        result = _short_run(job, pipeline)
    pixels = psnr(to_array(reference.images), to_array(result.images), peak=2.0)
    measured = {"latents_psnr": psnr(reference.latents, result.latents), "psnr": pixels}
    return msgspec.structs.replace(manifest, quality={**manifest.quality, "image": measured})


def _history(job: _Job, start: float) -> Stage:
    names = ("torch", "diffusers", "transformers", "onnxscript", "onnxruntime")
    tools = {name: importlib.metadata.version(name) for name in names}
    fixed = {key: size for key, size in asdict(job.dimensions).items() if size is not None}
    return Stage(
        name="export",
        options={"opset": OPSET, "components": [c.name for c in job.components], **fixed},
        tools={"latentforge": latentforge.__version__, **tools},
        seconds=round(time.perf_counter() - start, 1),
    )
