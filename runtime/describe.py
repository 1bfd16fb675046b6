"""What is in an engine directory, for people."""

from collections.abc import Iterator

from latentforge.runtime.manifest import Component, Manifest

__all__ = ["describe"]


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
    elif "vae_encoder" in manifest.needed:
        tasks = "inpainting"
    yield f"prompts     {encoders}"
    yield f"tasks       {tasks}"
    yield f"schedule    {manifest.prediction}, {schedule.beta_kind}, {schedule.train_steps} steps"
    yield (
        f"defaults    {defaults.sampler}, {defaults.steps} steps, guidance "
        f"{defaults.guidance_scale:g} (rescale {defaults.guidance_rescale:g}), "
        f"{defaults.width}x{defaults.height}"
    )
    yield ""
    yield f"{'component':<16}{'backend':<14}{'precision':<11}{'size':>11}  {'against torch':<14}"
    for name, component in manifest.components.items():
        yield _row(name, component, manifest)
    yield ""
    for name, component in manifest.components.items():
        signature = [f"{key} {spec}" for key, spec in component.inputs.items()]
        results = [f"{key} {spec}" for key, spec in component.outputs.items()]
        yield f"{name}: {', '.join(signature)} -> {', '.join(results)}"
    if "image" in manifest.quality:
        figures = ", ".join(f"{k} {v:.1f} dB" for k, v in manifest.quality["image"].items())
        yield f"image against torch: {figures}"
    for stage in manifest.history:
        tools = ", ".join(f"{name} {version}" for name, version in stage.tools.items())
        yield f"{stage.name}: {stage.seconds:.0f} s with {tools}"
        yield from (f"  {name}: {count} rewrites" for name, count in stage.passes.items())


def _row(name: str, component: Component, manifest: Manifest) -> str:
    size = sum(entry.bytes for entry in component.files) / 1e6
    error = manifest.quality.get(name, {}).get("max_relative_error")
    parity = "" if error is None else f"within {error:.0e}"
    row = f"{name:<16}{component.backend:<14}{component.precision:<11}{size:8.1f} MB  {parity}"
    return row.rstrip()
