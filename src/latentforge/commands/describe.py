"""What is in an engine directory, for people."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from latentforge.measure.formatting import level
from latentforge.runtime.equivalence import required_psnr
from latentforge.runtime.manifest import AccelerationPlan, Component, Manifest, Stage
from latentforge.runtime.shapes import format_shapes
from latentforge.runtime.tensor import TensorSpec

__all__ = ["changes", "describe"]

_SHOWN = 6  # tensors of a component, and layers kept in float


def describe(manifest: Manifest) -> str:
    """The manifest in words and tables."""
    return "\n".join(_lines(manifest))


def _lines(manifest: Manifest) -> Iterator[str]:
    latent, defaults, schedule = manifest.latent, manifest.defaults, manifest.schedule
    license = manifest.source.license or "unknown"
    yield f"{manifest.name} ({manifest.family}), format {manifest.format}"
    yield f"source      {manifest.source.checkpoint}, licence {license}"
    yield (
        f"latents     {latent.channels} channels, 1/{latent.downscale} of the image's side; "
        f"sides are multiples of {latent.downscale * latent.multiple} pixels"
    )
    encoders = " + ".join(encoder.component for encoder in manifest.conditioning.encoders)
    tasks = "text to image, image to image, inpainting"
    if "vae_encoder" not in manifest.components:
        tasks = "text to image"
    elif "vae_encoder" in manifest.required_components:
        tasks = "inpainting"
    yield f"prompts     {encoders}"
    yield f"tasks       {tasks}"
    yield f"schedule    {manifest.prediction}, {schedule.beta_kind}, {schedule.train_steps} steps"
    yield (
        f"defaults    {defaults.sampler}, {defaults.steps} steps, guidance "
        f"{defaults.guidance_scale:g} (rescale {defaults.guidance_rescale:g}), "
        f"{defaults.width}x{defaults.height}"
    )
    if manifest.acceleration is not None:
        yield from _plan(manifest.acceleration)
    yield ""
    against = "against input" if len(manifest.history) > 1 else "against torch"
    yield f"{'component':<16}{'backend':<14}{'precision':<13}{'size':>11}  {against}"
    for name, component in manifest.components.items():
        yield _row(name, component, manifest)
    yield ""
    for name, component in manifest.components.items():
        yield from _bound(name, component)
        yield f"{name}: {_signature(component.inputs)} -> {_signature(component.outputs)}"
    if "image" in manifest.quality:
        yield f"image {against}: {_figures(manifest.quality['image'])}"
    for stage in manifest.history:
        tools = ", ".join(f"{name} {version}" for name, version in stage.tools.items())
        yield ""
        yield f"{stage.name}: {stage.seconds:.0f} s with {tools}"
        yield from changes(stage)


def _plan(plan: AccelerationPlan) -> Iterator[str]:
    """What a request does less of unless it is exact, and what that was measured to be."""
    times = ", ".join(f"{timestep:g}" for timestep in plan.timesteps)
    parts = [f"{plan.sampler}, {plan.steps} steps" + (f" at {times}" if times else "")]
    if plan.guidance_interval is not None:
        parts.append("guidance for sigma from {:g} to {:g}".format(*plan.guidance_interval))
    if plan.cached_steps:
        parts.append(f"shallow evaluations {', '.join(map(str, plan.cached_steps))}")
    if plan.variant != "denoiser":
        parts.append(f"others by {plan.variant}")
    yield f"plan        {'; '.join(parts)}: class B, unless exact"
    if plan.measured:
        yield f"{'':<12}{_figures(plan.measured)}"


def _bound(name: str, component: Component) -> Iterator[str]:
    """What an engine was built for."""
    if component.shapes:
        yield f"{name}: for {format_shapes(component.shapes)}"
    if component.max_rows is not None:
        yield f"{name}: fastest with {component.max_rows} rows at once"
    for what in (component.device, component.options):
        if what:
            yield f"{name}: {', '.join(f'{key} {value}' for key, value in what.items())}"


def _signature(specs: Mapping[str, TensorSpec]) -> str:
    shown = [f"{key} {spec}" for key, spec in islice(specs.items(), _SHOWN)]
    more = len(specs) - len(shown)
    return ", ".join([*shown, f"{more} more"] if more else shown)


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.1f} dB" if "psnr" in name else f"{name} {value:.3g}"
        for name, value in figures.items()
    )


def changes(stage: Stage) -> Iterator[str]:
    """What a stage did to its input, and what was measured of both, line by line."""
    if "chosen" in stage.options and "ratios" in stage.options:
        yield from _choice(stage)
        return
    if "backends" in stage.options:
        yield from _compiled(stage)
        return
    if "plans" in stage.options:
        yield from _searched(stage)
        return
    if "recipe" in stage.options:
        yield f"recipe {stage.options['recipe']} for {stage.options['target']}"
    yield from (f"  {name}: {count}" for name, count in stage.passes.items())
    parts = {n: m for n, m in stage.measured.items() if "bytes_before" in m}
    if parts:
        yield f"{'component':<16}{'nodes':>14}{'size in MB':>20}{'':>8}{'error':>9}{'PSNR':>11}"
    for name, measured in parts.items():
        yield _change(name, measured)
    added = {n: m for n, m in stage.measured.items() if n not in (*parts, "image")}
    yield from (f"{name}: {_figures(measured)}" for name, measured in added.items())
    totals = [sum(m[f"bytes_{when}"] for m in parts.values()) for when in ("before", "after")]
    if parts:
        yield f"{'together':<30}{_megabytes(*totals)}"
    yield from _verdict(stage)


def _choice(stage: Stage) -> Iterator[str]:
    """Which candidate each component is of, and how fast the others were."""
    reference = stage.options["reference"]
    yield from (f"{name}: {taken}" for name, taken in stage.options["chosen"].items())
    for name, ratios in stage.options["ratios"].items():
        shown = ", ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items())
        yield f"{name}, times faster than {reference}: {shown}"
    yield from (f"{name} was refused: {why}" for name, why in stage.options["refused"].items())


def _searched(stage: Stage) -> Iterator[str]:
    """How many plans were judged, and which was taken."""
    count, gate = len(stage.options["plans"]), stage.options["gate"]
    taken = stage.options["plan"] or "none, the engines stay exact"
    yield f"{count} plans judged by {gate}; taken: {taken}"


def _compiled(stage: Stage) -> Iterator[str]:
    """What was built, of what size, and how long that took."""
    yield f"{'component':<16}{'backend':<26}{'size in MB':>20}{'':>8}{'build':>10}{'memory':>12}"
    for name, backend in stage.options["backends"].items():
        made = stage.measured[name]
        size = _megabytes(made["bytes_before"], made["bytes_after"])
        took = f"{made['build_seconds']:.1f} s"
        memory = f"{made['build_memory'] / 1e6:.0f} MB"
        yield f"{name:<16}{backend:<26}{size}{took:>10}{memory:>12}"
    image = stage.measured.get("image")
    if image is None:
        yield "not run on this machine"
    else:
        yield f"one step against the input: {_figures(image)}"


def _change(name: str, measured: Mapping[str, float]) -> str:
    nodes = f"{measured['nodes_before']:.0f} -> {measured['nodes_after']:.0f}"
    row = f"{name:<16}{nodes:>14}{_megabytes(measured['bytes_before'], measured['bytes_after'])}"
    if "psnr" in measured:
        row += f"{measured['max_relative_error']:>9.0e}{measured['psnr']:>8.1f} dB"
    return row


def _megabytes(before: float, after: float) -> str:
    return f"{f'{before / 1e6:.1f} -> {after / 1e6:.1f}':>20}{after / before:>8.1%}"


def _verdict(stage: Stage) -> Iterator[str]:
    """How the pictures came out, and what they took."""
    image = stage.measured.get("image", {})
    if "psnr" in image:
        shown = {k: image[k] for k in ("psnr", "psnr_worst", "ssim", "perceptual") if k in image}
        yield f"{image['images']:.0f} images at equal seeds: {_figures(shown)}; {_class(stage)}"
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
    for name, figures in stage.options.get("candidates", {}).items():
        yield _candidate(name, figures, chosen=name == stage.options["chosen"])
    yield from _kept(stage.options.get("layers", []))


def _interval(image: Mapping[str, float]) -> str:
    """Return the confidence interval of a speedup with its level; empty without one."""
    if "speedup_low" not in image:
        return ""
    low, high, confidence = (image[f"speedup_{key}"] for key in ("low", "high", "level"))
    return f" ({low:.2f} to {high:.2f}, {level(confidence)} interval)"


def _class(stage: Stage) -> str:
    """Class A: the same picture. Class B: another one, of the same thing if the gate is right."""
    wanted = required_psnr(stage.options["settings"])
    same = stage.measured["image"]["psnr"] >= wanted
    return "class A: the same pictures" if same else "class B: judged by its gate"


def _candidate(name: str, figures: Mapping[str, Any], *, chosen: bool) -> str:
    mark = "*" if chosen else " "
    if "failures" in figures:
        return f"{mark} {name}: not good enough: {figures['failures'][0]}"
    return f"{mark} {name}: {figures['speedup']:.2f}x, psnr {figures['psnr']:.1f} dB"


def _kept(layers: list[Mapping[str, Any]]) -> Iterator[str]:
    """The layers that stayed in float, the worst first."""
    kept = [layer for layer in layers if layer["kept_float"]]
    if layers:
        yield f"{len(layers)} layers measured one by one, {len(kept)} kept in float"
    for layer in kept[:_SHOWN]:
        yield (
            f"  {layer['name']}: error {layer['error']:.1e}, would save {layer['bytes'] / 1e3:.0f} "
            f"kB and {layer['seconds'] * 1e3:.2f} ms a step"
        )


def _row(name: str, component: Component, manifest: Manifest) -> str:
    size = component.size / 1e6
    error = manifest.quality.get(name, {}).get("max_relative_error")
    parity = "" if error is None else f"within {error:.0e}"
    row = f"{name:<16}{component.backend:<14}{component.precision:<13}{size:8.1f} MB  {parity}"
    return row.rstrip()
