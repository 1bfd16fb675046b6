"""Descriptions of engine directories and of the stages that made them, as text."""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from latentforge.measure.equivalence import required_psnr
from latentforge.measure.formatting import level
from latentforge.runtime.kernels import instruction_sets
from latentforge.runtime.kernels.compiler import INSTRUCTION_SETS
from latentforge.runtime.manifest import (
    AccelerationPlan,
    Component,
    ImageChannels,
    Manifest,
    ScheduleProof,
    Stage,
)
from latentforge.runtime.record import escaped
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.shapes import format_shapes
from latentforge.runtime.tensor import TensorSpec
from latentforge.runtime.text import duration_text, size_text

__all__ = ["STAGE_LINES", "describe", "stage_lines"]

_TASKS: Mapping[tuple[ImageChannels, ...], str] = {
    ("mask", "masked_image"): "inpainting",
    ("image",): "editing an image",
    ("depth",): "image to image with a depth map",
    ("low_resolution",): "enlarging an image",
}
"""Tasks by the channels of images that the denoiser takes."""
_SHOWN = 6  # tensors of a component, and layers kept in float
_NAME = 18  # columns of a component's name


def describe(manifest: Manifest) -> str:
    """Return a description of a manifest in lines and tables."""
    return "\n".join(_lines(escaped(manifest)))


def _lines(manifest: Manifest) -> Iterator[str]:
    yield from _model_lines(manifest)
    if manifest.acceleration is not None:
        yield from _acceleration_lines(manifest.acceleration)
    yield ""
    yield from _component_lines(manifest)
    for stage in manifest.history:
        tools = ", ".join(f"{name} {version}" for name, version in stage.tools.items())
        yield ""
        yield f"{stage.name}: {stage.seconds:.0f} s with {tools}"
        yield from stage_lines(stage)


def _model_lines(manifest: Manifest) -> Iterator[str]:
    latent, defaults, schedule = manifest.latent, manifest.defaults, manifest.schedule
    scale = defaults.image_guidance_scale
    image = "" if scale == 1 else f", image {scale:g}"
    noise = f", noise level {defaults.noise_level}" if defaults.noise_level else ""
    license = manifest.source.license or "unknown"
    encoders = " + ".join(encoder.component for encoder in manifest.conditioning.encoders)
    yield f"{manifest.name} ({manifest.family}), format {manifest.format}"
    yield f"source      {manifest.source.checkpoint}, license {license}"
    yield (
        f"latents     {latent.channels} channels, 1/{latent.downscale} of the image's side; "
        f"image sides are multiples of {latent.downscale * latent.multiple} pixels"
    )
    yield f"prompts     {encoders}"
    yield f"tasks       {_tasks(manifest)}"
    if (preview := manifest.preview) is not None:
        yield f"previews    correlate {preview.correlation:.2f} with the decoder's images"
    kind = schedule.beta_kind if isinstance(schedule, Schedule) else "EDM"
    yield f"schedule    {manifest.prediction}, {kind}, {schedule.train_steps} training steps"
    if manifest.schedule_proof is not None:
        yield from _proof_lines(manifest.schedule_proof)
    yield (
        f"defaults    {defaults.sampler}, {defaults.steps} steps, guidance "
        f"{defaults.guidance_scale:g} (rescale {defaults.guidance_rescale:g}{image}), "
        f"{defaults.width}x{defaults.height}{noise}"
    )


def _proof_lines(proof: ScheduleProof) -> Iterator[str]:
    """Describe how nearly the default sampler follows the checkpoint's scheduler."""
    named = (item for item in sorted(proof.options.items()) if item[1] is not None)
    options = ", ".join(f"{name} {value}" for name, value in named) or "no further options"
    counts = ", ".join(map(str, proof.steps))
    indent = " " * 12
    yield textwrap.fill(
        f"scheduler   {proof.scheduler}, followed: {options}", 100, subsequent_indent=indent
    )
    yield (
        f"{'':<12}{proof.sampler} differs by {proof.difference:.0e} of the range at most, at "
        f"{counts} steps"
    )


def _tasks(manifest: Manifest) -> str:
    if channels := manifest.conditioning.channels:
        return _TASKS[channels]
    if "vae_encoder" not in manifest.components:
        return "text to image"
    return "text to image, image to image, inpainting"


def _acceleration_lines(plan: AccelerationPlan) -> Iterator[str]:
    times = ", ".join(f"{timestep:g}" for timestep in plan.timesteps)
    parts = [f"{plan.sampler}, {plan.steps} steps" + (f" at {times}" if times else "")]
    if plan.guidance_interval is not None:
        parts.append("guidance for sigma from {:g} to {:g}".format(*plan.guidance_interval))
    if plan.cached_steps:
        parts.append(f"cached steps {', '.join(map(str, plan.cached_steps))}")
    if plan.variant != "denoiser":
        parts.append(f"full steps by {plan.variant}")
    yield f"plan        {'; '.join(parts)}: class B, unless unaccelerated"
    if plan.measured:
        yield f"{'':<12}{_figures(plan.measured)}"


def _component_lines(manifest: Manifest) -> Iterator[str]:
    reference = "against input" if len(manifest.history) > 1 else "against torch"
    if any(component.custom_ops for component in manifest.components.values()):
        yield from (*_kernel_lines(), "")
    yield f"{'component':<{_NAME}}{'backend':<14}{'precision':<13}{'size':>11}  {reference}"
    for name, component in manifest.components.items():
        yield _component_row(name, component, manifest.quality.get(name, {}))
    yield ""
    for name, component in manifest.components.items():
        yield from _restrictions(name, component)
        yield f"{name}: {_signature(component.inputs)} -> {_signature(component.outputs)}"
    shown = any(s.name == "export" and "image" in s.measured for s in manifest.history[-1:])
    if "image" in manifest.quality and not shown:  # the lines of the export have it
        yield f"image {reference}: {_figures(manifest.quality['image'])}"


def _kernel_lines() -> Iterator[str]:
    """Yield the instruction sets that latentforge's own operators use here, and those they lack."""
    if (sets := instruction_sets()) is None:
        yield "kernels     not compiled here, so these engines do not run: docs/kernels.md"
        return
    yield f"kernels     {sets.used or 'none'}, of {', '.join(sets.supported)} on this processor"
    lacking = [name for name in INSTRUCTION_SETS if name not in sets.compiled]
    if lacking and sets.compiled != ("portable",):
        yield (
            f"{'':<12}compiled without {', '.join(lacking)}, which the C++ compiler lacked: with "
            "a newer one, run python -m latentforge.runtime.kernels"
        )


def _component_row(name: str, component: Component, quality: Mapping[str, float]) -> str:
    size, error = component.size / 1e6, quality.get("max_relative_error")
    parity = "" if error is None else f"within {error:.0e}"
    row = f"{name:<{_NAME}}{component.backend:<14}{component.precision:<13}{size:8.1f} MB  {parity}"
    return row.rstrip()


def _restrictions(name: str, component: Component) -> Iterator[str]:
    """Yield the shapes, device and options that an engine was built for."""
    if component.shapes:
        yield f"{name}: for {format_shapes(component.shapes)}"
    if component.max_rows is not None:
        yield f"{name}: fastest with {component.max_rows} rows per run"
    for values in (component.device, component.options):
        if values:
            yield f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}"


def _signature(specs: Mapping[str, TensorSpec]) -> str:
    shown = [f"{key} {spec}" for key, spec in islice(specs.items(), _SHOWN)]
    more = len(specs) - len(shown)
    return ", ".join([*shown, f"{more} more"] if more else shown)


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.1f} dB" if "psnr" in name else f"{name} {value:.3g}"
        for name, value in figures.items()
    )


def stage_lines(stage: Stage) -> Iterator[str]:
    """Yield what a stage changed and measured, line by line."""
    stage = escaped(stage)
    yield from STAGE_LINES.get(stage.name, _graph_lines)(stage)


def _export_lines(stage: Stage) -> Iterator[str]:
    """Yield the image that the engines' image was compared with, and the difference."""
    reference = stage.options.get("reference")
    if reference is None:
        return
    owner = "the checkpoint's" if reference["own_scheduler"] else "the sampler's"
    pipeline, scheduler = reference["pipeline"], reference["scheduler"]
    yield f"image against diffusers' {pipeline}, {owner} {scheduler}"
    yield (
        f"  {reference['sampler']}, {reference['steps']} steps at "
        f"{reference['width']}x{reference['height']}: {_figures(stage.measured['image'])}"
    )


def _select_lines(stage: Stage) -> Iterator[str]:
    """Yield the candidate of each component, and the speed of the other candidates."""
    reference = stage.options["reference"]
    yield from (f"{name}: {candidate}" for name, candidate in stage.options["chosen"].items())
    for name, ratios in stage.options["ratios"].items():
        shown = ", ".join(f"{part} {ratio:.2f}x" for part, ratio in ratios.items())
        yield f"{name}, speedup over {reference}: {shown}"
    yield from (f"{name} was refused: {why}" for name, why in stage.options["refused"].items())


def _search_lines(stage: Stage) -> Iterator[str]:
    """Yield the number of plans that were tried, and the selected one."""
    count, gate = len(stage.options["plans"]), stage.options["gate"]
    plan = stage.options["plan"] or "none, the engines stay unaccelerated"
    yield f"{count} plans judged by {gate}; selected: {plan}"


def _build_lines(stage: Stage) -> Iterator[str]:
    """Yield what the whole build took, next to what was predicted."""
    estimated, peak = stage.options["estimated"], stage.measured["build"]["peak_memory"]
    predicted = stage.options.get("predicted_seconds")
    measured = "" if predicted is None else f", {duration_text(predicted)} after the export"
    yield (
        f"took {duration_text(stage.seconds)}, estimated {duration_text(estimated['seconds'])}"
        f"{measured}; memory {size_text(peak)} at its peak, estimated "
        f"{size_text(estimated['memory'])}"
    )


def _compile_lines(stage: Stage) -> Iterator[str]:
    """Yield a table of the compiled engines, and the difference from the input if measured."""
    head = f"{'component':<{_NAME}}{'backend':<26}{'size in MB':>20}{'':>8}"
    yield f"{head}{'build':>10}{'memory':>12}"
    for name, backend in stage.options["backends"].items():
        figures = stage.measured[name]
        size = _megabytes(figures["bytes_before"], figures["bytes_after"])
        seconds = f"{figures['build_seconds']:.1f} s"
        memory = f"{figures['build_memory'] / 1e6:.0f} MB"
        yield f"{name:<{_NAME}}{backend:<26}{size}{seconds:>10}{memory:>12}"
    image = stage.measured.get("image")
    if image is None:
        yield "not run on this machine"
    else:
        yield f"one step against the input: {_figures(image)}"


def _graph_lines(stage: Stage) -> Iterator[str]:
    """Yield what a stage did to graphs: passes, sizes, errors and speed."""
    if "recipe" in stage.options:
        yield f"recipe {stage.options['recipe']} for {stage.options['target']}"
    yield from _sizing_lines(stage.options.get("sizing"))
    yield from (f"  {name}: {count}" for name, count in stage.passes.items())
    parts = {name: figures for name, figures in stage.measured.items() if "bytes_before" in figures}
    if parts:
        head = f"{'component':<{_NAME}}{'nodes':>14}{'size in MB':>20}{'':>8}"
        yield f"{head}{'error':>9}{'PSNR':>11}"
    for name, figures in parts.items():
        yield _graph_row(name, figures)
    for name, figures in stage.measured.items():
        if name not in (*parts, "image"):
            yield f"{name}: {_figures(figures)}"
    if parts:
        totals = [sum(f[f"bytes_{when}"] for f in parts.values()) for when in ("before", "after")]
        yield f"{'total':<{_NAME + 14}}{_megabytes(*totals)}"
    yield from _quality_lines(stage)
    yield from _speed_lines(stage)
    for name, figures in stage.options.get("candidates", {}).items():
        yield _candidate_row(name, figures, chosen=name == stage.options["chosen"])
    yield from _float_layers(stage.options.get("layers", []))


def _sizing_lines(sizing: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what a budget reduced in gate, calibration and timing."""
    if sizing is not None and sizing["reduced"]:
        pairs = sizing["reduced"].items()
        changes = ", ".join(f"{name} {wanted} -> {chosen}" for name, (wanted, chosen) in pairs)
        yield f"reduced for a budget of {duration_text(sizing['budget'])}: {changes}"


def _graph_row(name: str, figures: Mapping[str, float]) -> str:
    nodes = f"{figures['nodes_before']:.0f} -> {figures['nodes_after']:.0f}"
    size = _megabytes(figures["bytes_before"], figures["bytes_after"])
    row = f"{name:<{_NAME}}{nodes:>14}{size}"
    if "psnr" in figures:
        row += f"{figures['max_relative_error']:>9.0e}{figures['psnr']:>8.1f} dB"
    return row


def _megabytes(before: float, after: float) -> str:
    return f"{f'{before / 1e6:.1f} -> {after / 1e6:.1f}':>20}{after / before:>8.1%}"


def _quality_lines(stage: Stage) -> Iterator[str]:
    image = stage.measured.get("image", {})
    if "psnr" in image:
        shown = {k: image[k] for k in ("psnr", "psnr_worst", "ssim", "perceptual") if k in image}
        same = image["psnr"] >= required_psnr(stage.options["settings"])
        speed_class = "class A: same images" if same else "class B: other images, within its gate"
        yield f"{image['images']:.0f} images at equal seeds: {_figures(shown)}; {speed_class}"


def _speed_lines(stage: Stage) -> Iterator[str]:
    image = stage.measured.get("image", {})
    if "speedup" in image:
        ratio = image["speedup"]
        change = (
            f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x SLOWER on this machine"
        )
        yield (
            f"images {change}{_interval(image)}, denoiser step "
            f"{image['denoiser_step_speedup']:.2f}x, memory "
            f"{image['memory_before'] / 1e6:.0f} -> {image['memory_after'] / 1e6:.0f} MB"
        )
    elif "image" in stage.measured or any("bytes_before" in m for m in stage.measured.values()):
        yield "not timed"


def _interval(image: Mapping[str, float]) -> str:
    """Return the confidence interval of a speedup with its level; empty without one."""
    if "speedup_low" not in image:
        return ""
    low, high, confidence = (image[f"speedup_{key}"] for key in ("low", "high", "level"))
    return f" ({low:.2f} to {high:.2f}, {level(confidence)} interval)"


def _candidate_row(name: str, figures: Mapping[str, Any], *, chosen: bool) -> str:
    mark = "*" if chosen else " "
    if "failures" in figures:
        return f"{mark} {name}: fails its gate: {figures['failures'][0]}"
    return f"{mark} {name}: {figures['speedup']:.2f}x, psnr {figures['psnr']:.1f} dB"


def _float_layers(layers: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the layers that stayed in float, largest error first."""
    kept = [layer for layer in layers if layer["kept_float"]]
    if layers:
        yield f"{len(layers)} layers measured one by one, {len(kept)} kept in float"
    for layer in kept[:_SHOWN]:
        yield (
            f"  {layer['name']}: error {layer['error']:.1e}, would save {layer['bytes'] / 1e3:.0f} "
            f"kB and {layer['seconds'] * 1e3:.2f} ms per step"
        )


STAGE_LINES: Mapping[str, Callable[[Stage], Iterator[str]]] = {
    "build": _build_lines,
    "compile": _compile_lines,
    "export": _export_lines,
    "select": _select_lines,
    "search": _search_lines,
}
"""Stages that do not change graphs; all others are described by _graph_lines."""
