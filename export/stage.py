"""The export stage: a checkpoint in, an engine directory out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.export import optimum
from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ComponentPlan, ExportPlan, Family, family_of
from latentforge.export.onnx import (
    OPSET,
    Dimensions,
    as_it_is,
    component_entry,
    export_onnx,
)
from latentforge.export.optimum import Layout, OptimumGraph
from latentforge.export.parity import LazyModules, TorchSession, check_parity
from latentforge.export.schedulers import default_sampler, prediction_of, schedule_of
from latentforge.export.tokenizers import write_tokenizer
from latentforge.runtime.compile.verify import trial
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import (
    CheckpointError,
    LatentforgeError,
    SettingsError,
    ShapeError,
)
from latentforge.runtime.files import check_space, check_target, staged_directory
from latentforge.runtime.history import package_versions, stage_record
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import (
    Component,
    Manifest,
    RequestDefaults,
    Stage,
    WeightSource,
)
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress

__all__ = ["export"]

_STEPS = 2  # a guided run of two steps sees high and low noise; more only costs time
_SPACE = 1.1  # engines are as large as the float32 weights, and graphs are small beside them


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one export works on; ``graphs`` are those of a checkpoint that optimum exported."""

    checkpoint: Checkpoint
    family: Family
    plan: ExportPlan
    components: tuple[ComponentPlan, ...]
    dimensions: Dimensions
    layout: Layout
    graphs: Mapping[str, OptimumGraph] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return self.dimensions.sizes(self.plan.latent.downscale)

    @property
    def parts(self) -> int:
        """How many there are to show progress of."""
        count = len(self.components)
        return count + 1 if self.graphs else 2 * count + 2


def export(
    source: str,
    target: Path,
    *,
    components: Sequence[str] = (),
    dimensions: Dimensions | None = None,
    layout: Layout = "plain",
    overwrite: bool = False,
    quiet: bool = True,
) -> Manifest:
    """Export a checkpoint to an engine directory in float32, and check it against torch.

    A denoising run in torch gives each component's real inputs; the exported component has
    to give torch's outputs for them. The graphs of a directory that optimum exported are taken as
    they are, and have to make an image.

    Args:
        source: a diffusers directory, one that optimum-onnx exported, a hub id, or ``demo``.
        target: the engine directory to write, whole or not at all.
        components: names of those to export; all of the family's if empty.
        dimensions: sizes to fix; the others stay free.
        layout: ``optimum`` arranges the directory so that optimum's pipelines load it too.
        overwrite: replace an engine directory that is there already.
        quiet: show no progress.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a kind we refuse.
        SettingsError: no such component or layout, or a size that the model cannot have.
        GateError: an engine does not compute what torch computes.
        TargetError: the directory cannot be written.
    """
    start = time.perf_counter()
    check_target(target, overwrite=overwrite)
    job = _job(source, components, dimensions or Dimensions(), layout)
    with (
        staged_directory(target, overwrite=overwrite) as directory,
        Progress(job.parts, quiet=quiet) as progress,
    ):
        _check_space(job, directory)
        manifest = _draft(job, directory)
        make = _adopt if job.graphs else _convert
        manifest = make(job, manifest, directory, progress)
        if layout == "optimum":
            names = list(manifest.components)
            optimum.write_companions(job.checkpoint, job.plan, names, directory)
        manifest = msgspec.structs.replace(manifest, history=(_history(job, start),))
        manifest.write(directory)
    return manifest


def _job(source: str, names: Sequence[str], dimensions: Dimensions, layout: Layout) -> _Job:
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint)
    plan = _plan(checkpoint, family, layout)
    known = [component.name for component in plan.components]
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"no component {unknown[0]!r}; {family.name} has {', '.join(known)}")
    unit = plan.latent.downscale * plan.latent.multiple
    for side in (dimensions.height, dimensions.width):
        if side is not None and side % unit:
            raise ShapeError(f"height and width are multiples of {unit} here, not {side}")
    chosen = tuple(c for c in plan.components if not names or c.name in names)
    job = _Job(
        checkpoint=checkpoint,
        family=family,
        plan=plan,
        components=chosen,
        dimensions=dimensions,
        layout=layout,
    )
    if optimum.is_exported(checkpoint):
        return _with_graphs(job)
    for component in plan.components:
        checkpoint.weights(component.folder)  # refuse pickles and damage before any work
    return job


def _plan(checkpoint: Checkpoint, family: Family, layout: Layout) -> ExportPlan:
    """The family's plan of a checkpoint, as its kind and the layout would have it."""
    plan = family.plan(checkpoint)
    optimum.check_layout(layout, family.name, plan)
    if optimum.is_exported(checkpoint):
        return optimum.present(checkpoint, plan)
    return optimum.with_outputs(plan) if layout == "optimum" else plan


def _with_graphs(job: _Job) -> _Job:
    """The job with the graphs that are there, and the size that they are fixed to."""
    if job.dimensions != Dimensions():
        raise SettingsError(
            f"the graphs of {job.checkpoint.name} are fixed already: to give height, width or "
            "batch, export from the original checkpoint"
        )
    graphs = {plan.name: optimum.read_graph(job.checkpoint, plan) for plan in job.components}
    sizes = graphs["denoiser"].sizes if "denoiser" in graphs else {}
    scale = job.plan.latent.downscale
    sides = {
        side: sizes[f"latent_{side}"] * scale
        for side in ("height", "width")
        if f"latent_{side}" in sizes
    }
    fixed = Dimensions(batch=sizes.get("batch"), **sides)
    return replace(job, graphs=graphs, dimensions=fixed)


def _check_space(job: _Job, directory: Path) -> None:
    """Refuse to begin what the disk has no room for."""
    if job.graphs:
        needed = sum(graph.bytes for graph in job.graphs.values())
    else:
        folders = {component.folder for component in job.components}
        needed = int(sum(job.checkpoint.parameters(folder) for folder in folders) * 4 * _SPACE)
    check_space(directory, needed)


def _draft(job: _Job, directory: Path) -> Manifest:
    """The manifest before there are engines, with the tokenizers written."""
    checkpoint, plan = job.checkpoint, job.plan
    scheduler = job.family.scheduler(checkpoint.config("scheduler", "scheduler_config.json"))
    folders = [] if job.graphs else sorted({component.folder for component in job.components})
    return Manifest(
        name=checkpoint.sidecar.get("name") or Path(checkpoint.name).name,
        family=job.family.name,
        source=WeightSource(
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


def _defaults(job: _Job, scheduler: Mapping[str, Any]) -> RequestDefaults:
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
        return msgspec.convert({**defaults, **given}, RequestDefaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{job.checkpoint.name}: defaults: {error}") from error


def _adopt(job: _Job, manifest: Manifest, directory: Path, progress: Progress) -> Manifest:
    """Copy the graphs that the checkpoint is made of, and see that they run."""
    components = {}
    for name, graph in job.graphs.items():
        with progress.part(f"{name}: copy"):
            components[name] = graph.copy(directory)
    manifest = msgspec.structs.replace(manifest, components=components)
    hashes = optimum.source_hashes(manifest)
    source = msgspec.structs.replace(manifest.source, sha256=hashes)
    manifest = msgspec.structs.replace(manifest, source=source)
    with progress.part("running the graphs"):
        try:
            _try(job, manifest, directory)
        except LatentforgeError as error:
            raise CheckpointError(f"{job.checkpoint.name}: {error}") from error
    return manifest


def _try(job: _Job, manifest: Manifest, directory: Path) -> None:
    """Load every engine and make an image if all are there: nothing else is known of theirs."""
    manifest.write(directory)
    whole = all(name in manifest.components for name in manifest.required_components)
    left = set(manifest.components)
    pictures: NDArray[np.float32] | None = None
    if whole:
        with load(directory, hashes=False, low_memory=True) as pipeline:
            pictures = to_array(_short_run(job, pipeline).images)
        left -= set(manifest.required_components)
    for name in sorted(left):
        engine = Engine.load(name, manifest.components[name], directory, {}, low_memory=True)
        if pictures is not None and name == "vae_encoder":
            engine.run({"sample": pictures})
        engine.session.close()


def _convert(job: _Job, manifest: Manifest, directory: Path, progress: Progress) -> Manifest:
    """Export the components from torch, and compare them and their image with it."""
    with progress.part("recording a run in torch"):
        sessions, reference = _record(job, manifest, directory)
    manifest = _export_components(job, manifest, directory, sessions, progress)
    with progress.part("comparing images"):
        return _check_image(job, manifest, directory, reference)


def _record(
    job: _Job, manifest: Manifest, directory: Path
) -> tuple[dict[str, TorchSession], Result]:
    """Run the checkpoint in torch, by our own loop, and keep what each component saw."""
    modules = LazyModules(job.checkpoint)
    sessions = {plan.name: TorchSession(plan, modules) for plan in job.plan.components}
    engines = Engines(lambda name, _: _torch_engine(sessions[name]), sessions)
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
    sides = {"height": job.dimensions.height or 0, "width": job.dimensions.width or 0}
    return trial(pipeline, steps=_STEPS, **sides)


def _export_components(
    job: _Job,
    manifest: Manifest,
    directory: Path,
    sessions: Mapping[str, TorchSession],
    progress: Progress,
) -> Manifest:
    """Export each component and compare it with its recording."""
    modules = LazyModules(job.checkpoint)
    spelled = optimum.spaced if job.layout == "optimum" else as_it_is
    components: dict[str, Component] = {}
    quality: dict[str, Mapping[str, float]] = {}
    for plan in job.components:
        path = directory / optimum.graph_file(plan.name, job.layout)
        path.parent.mkdir(exist_ok=True)
        recording = sessions[plan.name].recording
        with progress.part(f"{plan.name}: export"):
            feeds = recording.runs[0][0]
            export_onnx(modules.get(plan), plan, feeds, path, job.sizes, spelled=spelled)
        modules.free()
        with progress.part(f"{plan.name}: compare with torch"):
            components[plan.name] = component_entry(plan, path, directory, job.sizes)
            quality[plan.name] = check_parity(
                plan.name, components[plan.name], directory, recording
            )
        error = quality[plan.name]["max_relative_error"]
        progress.note(f"{plan.name}: within {error:.1e} of torch")
    return msgspec.structs.replace(manifest, components=components, quality=quality)


def _check_image(job: _Job, manifest: Manifest, directory: Path, reference: Result) -> Manifest:
    """Make the recorded image again on the engines: PSNR of latents and of pixels, in dB."""
    if any(name not in manifest.components for name in manifest.required_components):
        return manifest
    manifest.write(directory)
    with load(directory, hashes=False, low_memory=True) as pipeline:
        result = _short_run(job, pipeline)
    pixels = psnr(to_array(reference.images), to_array(result.images), peak=2.0)
    measured = {"latents_psnr": psnr(reference.latents, result.latents), "psnr": pixels}
    return msgspec.structs.replace(manifest, quality={**manifest.quality, "image": measured})


def _history(job: _Job, start: float) -> Stage:
    traced = () if job.graphs else ("torch", "onnxscript")
    names = (*traced, "diffusers", "transformers", "onnxruntime")
    chosen = {"components": [component.name for component in job.components]}
    kind = {} if job.graphs else {"opset": OPSET}
    layout = {} if job.layout == "plain" else {"layout": job.layout}
    fixed = {key: size for key, size in asdict(job.dimensions).items() if size is not None}
    return stage_record(
        "import" if job.graphs else "export",
        start,
        {**kind, **chosen, **layout, **fixed},
        tools=package_versions(*names),
    )
