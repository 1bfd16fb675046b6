"""Export stage: from a checkpoint to a directory of ONNX engines."""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.export import optimum
from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ComponentPlan, ExportPlan, Family, family_of
from latentforge.export.image_parity import (
    ImageParity,
    ImageReference,
    check_image,
)
from latentforge.export.onnx import (
    OPSET,
    Dimensions,
    component_entry,
    export_onnx,
    unchanged,
)
from latentforge.export.optimum import Layout, OptimumGraph
from latentforge.export.parity import LazyModules, TorchSession, check_parity
from latentforge.export.preview import fit_preview
from latentforge.export.reference.devices import require_device
from latentforge.export.schedule_proof import prove_schedule
from latentforge.export.schedulers import CheckpointScheduler, follows, with_class
from latentforge.export.tokenizers import write_tokenizer
from latentforge.runtime.annotations import check_fields, checked_arguments
from latentforge.runtime.backends import return_memory
from latentforge.runtime.compile.verify import trial
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.disk import check_space
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import (
    CheckpointError,
    LatentforgeError,
    SettingsError,
    ShapeError,
)
from latentforge.runtime.files import check_target, staged_directory
from latentforge.runtime.image import to_array
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
from latentforge.runtime.sampling import get as get_sampler

__all__ = ["ExportRequest", "export"]

_STEPS = 2  # a guided run of two steps covers high and low noise; more only costs time
_SPACE = 1.1  # engines are as large as the float32 weights; the graphs add little


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Options of an export.

    Attributes:
        components: names of the components to export; all of the family's if empty.
        dimensions: sizes to fix in the graphs; the others stay free.
        layout: arrangement of the engine directory; optimum's pipelines load ``optimum`` too.
        sampler: default sampler of the engines, in place of the one that corresponds to the
            checkpoint's scheduler.
        device: where torch runs the modules and diffusers, ``cpu`` or ``cuda``; graphs are traced,
            and engines run, on the CPU.
        overwrite: replace an existing engine directory.
        quiet: show no progress.
    """

    components: tuple[str, ...] = ()
    dimensions: Dimensions = Dimensions()
    layout: Layout = "plain"
    sampler: str | None = None
    device: str = "cpu"
    overwrite: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


_DEFAULT = ExportRequest()


@dataclass(frozen=True, kw_only=True)
class _ExportJob:
    """Resolved inputs of one export.

    Attributes:
        checkpoint: the checkpoint to export.
        family: its model family.
        plan: the family's plan for it, adapted to the layout.
        components: the components to export, of the plan's.
        scheduler: the checkpoint's scheduler, with the default sampler.
        dimensions: sizes that the graphs are fixed to.
        layout: arrangement of the engine directory.
        device: where torch runs.
        graphs: graphs of a checkpoint that optimum exported, by component name.
    """

    checkpoint: Checkpoint
    family: Family
    plan: ExportPlan
    components: tuple[ComponentPlan, ...]
    scheduler: CheckpointScheduler
    dimensions: Dimensions
    layout: Layout
    device: str
    graphs: Mapping[str, OptimumGraph] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Fixed sizes by the names that tensor specs use."""
        return self.dimensions.sizes(self.plan.latent.downscale)

    @property
    def progress_parts(self) -> int:
        """Number of parts of the progress bar."""
        count = len(self.components)
        return count + 2 if self.graphs else 2 * count + 3


@checked_arguments
def export(source: str, target: Path, request: ExportRequest = _DEFAULT) -> Manifest:
    """Export a checkpoint to an engine directory in float32, and compare the engines with torch.

    A denoising run in torch records each component's inputs and outputs; the exported component
    must reproduce the outputs. An image of a few steps with the default sampler must be that of
    diffusers' own pipeline, with the checkpoint's own scheduler. Graphs of a directory that optimum
    exported are copied unchanged, and must produce an image.

    Args:
        source: a diffusers directory, one that optimum-onnx exported, a hub id, or ``demo``.
        target: the engine directory to write; a failed export leaves none.
        request: components, sizes and layout.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of an unsupported kind.
        SettingsError: unknown component or layout.
        ShapeError: a size that the model cannot have.
        DeviceError: torch finds no GPU, and the request names one.
        GateError: the outputs of an engine differ from torch's, or the image from that of
            diffusers.
        TargetError: the directory cannot be written.
    """
    start = time.perf_counter()
    check_target(target, overwrite=request.overwrite)
    require_device(request.device)
    try:
        return _write(_job(source, request), target, request, start)
    finally:  # modules hold reference cycles, and a build goes on in this process
        gc.collect()
        return_memory()


def _write(job: _ExportJob, target: Path, request: ExportRequest, start: float) -> Manifest:
    with (
        staged_directory(target, overwrite=request.overwrite) as directory,
        Progress(job.progress_parts, quiet=request.quiet) as progress,
    ):
        _check_space(job, directory)
        manifest = _draft(job, directory)
        write_components = _copy_graphs if job.graphs else _export_modules
        manifest, parity = write_components(job, manifest, directory, progress)
        if job.layout == "optimum":
            names = list(manifest.components)
            optimum.write_companions(job.checkpoint, job.plan, names, directory)
        with progress.part("fitting the map for previews"):
            preview = fit_preview(manifest, directory)
        history = (_history(job, start, parity),)
        manifest = msgspec.structs.replace(manifest, preview=preview, history=history)
        manifest.write(directory)
    return manifest


def _job(source: str, request: ExportRequest) -> _ExportJob:
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint)
    plan = _plan(checkpoint, family, request.layout)
    _check_sides(plan, request.dimensions)
    job = _ExportJob(
        checkpoint=checkpoint,
        family=family,
        plan=plan,
        components=_selected(family, plan, request.components),
        scheduler=_scheduler(checkpoint, family, plan, request.sampler),
        dimensions=request.dimensions,
        layout=request.layout,
        device=request.device,
    )
    if optimum.is_exported(checkpoint):
        return _with_graphs(job)
    for component in plan.components:
        checkpoint.weights(component.folder)  # refuse pickles and damage before any work
    return job


def _scheduler(
    checkpoint: Checkpoint, family: Family, plan: ExportPlan, sampler: str | None
) -> CheckpointScheduler:
    """Return the checkpoint's scheduler, with the sampler to take by default."""
    own = checkpoint.config("scheduler", "scheduler_config.json")
    config = family.scheduler(with_class(own, checkpoint.index))
    default = checkpoint.sidecar.get("defaults", {}).get("sampler", plan.defaults.sampler)
    if (chosen := sampler or default) is not None:
        get_sampler(chosen)
    return CheckpointScheduler.of(config, chosen)


def _selected(family: Family, plan: ExportPlan, names: Sequence[str]) -> tuple[ComponentPlan, ...]:
    """Return the named components in the plan's order, or all of them for no names."""
    available = [component.name for component in plan.components]
    if unknown := [name for name in names if name not in available]:
        raise SettingsError(
            f"no component {unknown[0]!r}; {family.name} has {', '.join(available)}"
        )
    return tuple(c for c in plan.components if not names or c.name in names)


def _check_sides(plan: ExportPlan, dimensions: Dimensions) -> None:
    unit = plan.latent.downscale * plan.latent.multiple
    for side in (dimensions.height, dimensions.width):
        if side is not None and side % unit:
            raise ShapeError(f"height and width must be multiples of {unit}, not {side}")


def _plan(checkpoint: Checkpoint, family: Family, layout: Layout) -> ExportPlan:
    """Return the family's plan of a checkpoint, adapted to the layout and to existing graphs."""
    plan = family.plan(checkpoint)
    optimum.check_layout(layout, family.name, plan)
    if optimum.is_exported(checkpoint):
        return optimum.available_plan(checkpoint, plan)
    return optimum.with_outputs(plan) if layout == "optimum" else plan


def _with_graphs(job: _ExportJob) -> _ExportJob:
    """Return the job with the checkpoint's graphs, and the sizes that these are fixed to."""
    if job.dimensions != Dimensions():
        raise SettingsError(
            f"the sizes of the graphs of {job.checkpoint.name} are fixed already: to set height, "
            "width or batch, export the original checkpoint"
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


def _check_space(job: _ExportJob, directory: Path) -> None:
    """Fail early if the disk has no room for the engines."""
    if job.graphs:
        needed = sum(graph.bytes for graph in job.graphs.values())
    else:
        folders = {component.folder for component in job.components}
        needed = int(sum(job.checkpoint.parameters(folder) for folder in folders) * 4 * _SPACE)
    check_space(directory, needed)


def _draft(job: _ExportJob, directory: Path) -> Manifest:
    """Write the tokenizers, and return a manifest without components."""
    checkpoint, plan, scheduler = job.checkpoint, job.plan, job.scheduler
    defaults = _defaults(job)
    folders = [] if job.graphs else sorted({component.folder for component in job.components})
    return Manifest(
        name=checkpoint.sidecar.get("name") or Path(checkpoint.name).name,
        family=job.family.name,
        source=WeightSource(
            checkpoint=checkpoint.name,
            license=checkpoint.license,
            sha256={folder: checkpoint.sha256(folder) for folder in folders},
        ),
        prediction=scheduler.prediction,
        latent=plan.latent,
        conditioning=plan.conditioning,
        schedule=scheduler.schedule,
        schedule_proof=prove_schedule(scheduler, defaults.steps),
        defaults=defaults,
        tokenizers={name: write_tokenizer(checkpoint, name, directory) for name in plan.tokenizers},
        components={},
    )


def _defaults(job: _ExportJob) -> RequestDefaults:
    """Return the request defaults: the checkpoint's own where its sidecar has any."""
    family = job.plan.defaults
    defaults = {
        "steps": family.steps,
        "guidance_scale": family.guidance_scale,
        "guidance_rescale": family.guidance_rescale,
        "image_guidance_scale": family.image_guidance_scale,
        "noise_level": family.noise_level,
        "height": job.dimensions.height or job.plan.sample_size[0],
        "width": job.dimensions.width or job.plan.sample_size[1],
    }
    sidecar = job.checkpoint.sidecar.get("defaults", {})
    sampler = {"sampler": job.scheduler.sampler}
    try:
        return msgspec.convert({**defaults, **sidecar, **sampler}, RequestDefaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{job.checkpoint.name}: defaults: {error}") from error


def _copy_graphs(
    job: _ExportJob, manifest: Manifest, directory: Path, progress: Progress
) -> tuple[Manifest, None]:
    """Copy the graphs that the checkpoint consists of, and check that they run."""
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
            _check_graphs_run(job, manifest, directory, progress)
        except LatentforgeError as error:
            raise CheckpointError(f"{job.checkpoint.name}: {error}") from error
    return manifest, None


def _check_graphs_run(
    job: _ExportJob, manifest: Manifest, directory: Path, progress: Progress
) -> None:
    """Load every engine, and make an image if all components are there.

    There is no torch module to compare these graphs with.
    """
    manifest.write(directory)
    required = manifest.required_components
    others = set(manifest.components)
    pixels: NDArray[np.float32] | None = None
    if all(name in manifest.components for name in required):
        with load(directory, hashes=False, low_memory=True, example_images=True) as pipeline:
            pixels = to_array(_short_run(job, pipeline, progress).images)
        others -= set(required)
    for name in sorted(others):
        engine = Engine.load(name, manifest.components[name], directory, {}, low_memory=True)
        if pixels is not None and name == "vae_encoder":
            engine.run({"sample": pixels})
        engine.session.close()


def _export_modules(
    job: _ExportJob, manifest: Manifest, directory: Path, progress: Progress
) -> tuple[Manifest, ImageParity | None]:
    """Export the components from torch, and compare them with it, and their image with diffusers.

    Returns:
        The manifest with components, and the comparison of images, if all components are there.
    """
    with progress.part("recording a run in torch"):
        sessions = _record(job, manifest, directory, progress)
    manifest = _export_components(job, manifest, directory, sessions, progress)
    with progress.part("comparing images with diffusers"):
        if any(name not in manifest.components for name in manifest.required_components):
            return manifest, None
        parity = _check_image(job, manifest, directory, progress)
    quality = {**manifest.quality, "image": parity.figures}
    return msgspec.structs.replace(manifest, quality=quality), parity


def _record(
    job: _ExportJob, manifest: Manifest, directory: Path, progress: Progress
) -> dict[str, TorchSession]:
    """Run the checkpoint in torch with the runtime's loop, recording each component."""
    sessions = _torch_sessions(job)
    pipeline = _torch_pipeline(sessions, manifest, directory)
    result = _short_run(job, pipeline, progress)
    encoder = sessions.get("vae_encoder")
    if encoder and encoder.plan in job.components and not encoder.recording.runs:
        pipeline.engines["vae_encoder"].run({"sample": to_array(result.images)})
    pipeline.close()
    return sessions


def _torch_sessions(job: _ExportJob) -> dict[str, TorchSession]:
    modules = LazyModules(job.checkpoint, job.device)
    return {plan.name: TorchSession(plan, modules) for plan in job.plan.components}


def _torch_pipeline(
    sessions: Mapping[str, TorchSession], manifest: Manifest, directory: Path
) -> Pipeline:
    """Return the runtime's pipeline over torch modules in place of engines."""
    engines = Engines(lambda name, _: _torch_engine(sessions[name]), sessions)
    components = {name: engine.component for name, engine in engines.items()}
    manifest = msgspec.structs.replace(manifest, components=components)
    tokenizers = {
        name: Tokenizer(directory / entry.file, entry)
        for name, entry in manifest.tokenizers.items()
    }
    return Pipeline(manifest, engines, tokenizers, directory, example_images=True)


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


def _short_run(job: _ExportJob, pipeline: Pipeline, progress: Progress) -> Result:
    sides = {"height": job.dimensions.height or 0, "width": job.dimensions.width or 0}
    return trial(pipeline, steps=_STEPS, report=progress.step, **sides)


def _export_components(
    job: _ExportJob,
    manifest: Manifest,
    directory: Path,
    sessions: Mapping[str, TorchSession],
    progress: Progress,
) -> Manifest:
    """Export each component and compare it with its recording."""
    modules = LazyModules(job.checkpoint)
    format_size = optimum.spaced if job.layout == "optimum" else unchanged
    components: dict[str, Component] = {}
    quality: dict[str, Mapping[str, float]] = {}
    for plan in job.components:
        path = directory / optimum.graph_file(plan.name, job.layout)
        path.parent.mkdir(exist_ok=True)
        recording = sessions[plan.name].recording
        with progress.part(f"{plan.name}: export"):
            feeds = recording.runs[0][0]
            export_onnx(modules.get(plan), plan, feeds, path, job.sizes, format_size=format_size)
        modules.free()
        with progress.part(f"{plan.name}: compare with torch"):
            components[plan.name] = component_entry(plan, path, directory, job.sizes)
            quality[plan.name] = check_parity(
                plan.name, components[plan.name], directory, recording
            )
        error = quality[plan.name]["max_relative_error"]
        progress.note(f"{plan.name}: within {error:.1e} of torch")
    return msgspec.structs.replace(manifest, components=components, quality=quality)


def _check_image(
    job: _ExportJob, manifest: Manifest, directory: Path, progress: Progress
) -> ImageParity:
    """Compare an image by the engines with that of diffusers."""
    manifest.write(directory)
    reference = ImageReference(
        checkpoint=job.checkpoint,
        own_scheduler=follows(manifest.defaults.sampler, job.scheduler.config),
        height=job.dimensions.height or 0,
        width=job.dimensions.width or 0,
        device=job.device,
    )
    in_torch = _torch_pipeline(_torch_sessions(job), manifest, directory)
    parity = check_image(
        directory, reference, lambda settings, image: in_torch.run(settings, image=image), progress
    )
    progress.note(parity.summary)
    return parity


def _history(job: _ExportJob, start: float, parity: ImageParity | None) -> Stage:
    traced = () if job.graphs else ("torch", "onnxscript")
    names = (*traced, "diffusers", "transformers", "onnxruntime")
    chosen = {"components": [component.name for component in job.components]}
    kind = {} if job.graphs else {"opset": OPSET}
    layout = {} if job.layout == "plain" else {"layout": job.layout}
    device = {} if job.device == "cpu" else {"device": job.device}
    fixed = {key: size for key, size in asdict(job.dimensions).items() if size is not None}
    compared = {} if parity is None else {"reference": parity.reference}
    return Stage.ended(
        "import" if job.graphs else "export",
        start,
        {**kind, **chosen, **layout, **device, **fixed, **compared},
        packages=names,
        measured={} if parity is None else {"image": parity.figures},
    )
