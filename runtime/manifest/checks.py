"""Checks that the parts of a manifest, each well-formed by itself, fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from latentforge.runtime import sampling
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.manifest.history import check_stage
from latentforge.runtime.shapes import ANY

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.acceleration import AccelerationPlan
    from latentforge.runtime.manifest import (
        Component,
        Conditioning,
        Manifest,
        PreviewMap,
        TextEncoding,
    )
    from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "CACHED_FEATURE",
    "DENOISER_INPUTS",
    "DENOISER_PARTS",
    "REQUIRED_TENSORS",
    "check_parts",
]

_Ranks = Mapping[str, tuple[int, ...]]
"""Allowed numbers of dimensions by tensor name."""

CACHED_FEATURE = "cached_feature"
"""Extra output of a full step, and input of a cached step (DeepCache)."""

REQUIRED_TENSORS: Mapping[str, tuple[_Ranks, _Ranks]] = {
    "denoiser": ({"sample": (4,)}, {"out_sample": (4,)}),
    "denoiser_time": ({"timestep": (1,)}, {}),
    "denoiser_cached": ({"sample": (4,), CACHED_FEATURE: (4,)}, {"out_sample": (4,)}),
    "vae_decoder": ({"latent_sample": (4,)}, {"sample": (4,)}),
    "vae_encoder": ({"sample": (4,)}, {"latent_parameters": (4,)}),
}
"""Inputs and outputs that components of these names have at least."""

DENOISER_PARTS = ("denoiser_prompt", "denoiser_time", "denoiser")
"""Components that a denoiser may be partitioned into, in the order in which they run."""

_REQUIRED_INPUTS: _Ranks = {"timestep": (0, 1), "encoder_hidden_states": (3,)}
"""Inputs besides ``sample`` that the parts of a denoiser together have at least."""

DENOISER_INPUTS = {
    "sample",
    *_REQUIRED_INPUTS,
    "text_embeds",
    "time_ids",
    "timestep_cond",
    "noise_level",
}
"""Inputs that the runtime can fill."""

IMAGE_CHANNELS = ((), ("mask", "masked_image"), ("image",), ("depth",), ("low_resolution",))
"""Combinations of channels that a denoiser's sample may have after the latents."""

MAX_ROWS, MAX_TIME_ROWS, MAX_MINIMUM = 256, 1 << 16, 1 << 16
"""Largest numbers of rows that an engine may be fixed to, and smallest size of a range."""

_LATER_INPUTS = {
    "denoiser_prompt": {"sample", "timestep"},
    "denoiser_time": {"sample"},
    "denoiser": set[str](),
}
"""Inputs that are not available yet when a part runs."""


def check_parts(manifest: Manifest) -> None:
    """Check that components, conditioning, schedule and acceleration plan fit together.

    Raises:
        ManifestError: they do not; the message names the key.
        SettingsError: a timestep of the acceleration plan is not in the schedule.
    """
    for stage in manifest.history:
        check_stage(stage)
    for encoder in manifest.conditioning.encoders:
        _check_encoder(manifest, encoder)
    for name, component in manifest.components.items():
        _check_shapes(name, component)
        _check_rows(name, component)
        inputs, outputs = REQUIRED_TENSORS.get(name, ({}, {}))
        _check_tensors(f"{name}: input", component.inputs, inputs)
        _check_tensors(f"{name}: output", component.outputs, outputs)
    _check_channels(manifest)
    _check_conditioning(manifest)
    _check_variants(manifest.components)
    _check_defaults(manifest)
    if manifest.preview is not None:
        _check_preview(manifest.preview, manifest.latent.channels)
    if manifest.acceleration is not None:
        _check_acceleration(manifest, manifest.acceleration)


def _check_shapes(name: str, component: Component) -> None:
    free = component.free_dimensions
    for shapes in component.shapes:
        if not shapes or (unknown := shapes.keys() - set(free)):
            key = min(unknown) if shapes else "nothing"
            raise ManifestError(
                f"{name}: shapes of {key}, which is not a free dimension of its inputs"
            )


def _check_rows(name: str, component: Component) -> None:
    """Check the rows that an engine needs at least, to which the runtime fills up a batch."""
    largest = MAX_TIME_ROWS if name == "denoiser_time" else MAX_ROWS
    ranges = [allowed for shapes in component.shapes for allowed in shapes.values()]
    if any(allowed.min > MAX_MINIMUM or allowed.max > ANY.max for allowed in ranges):
        raise ManifestError(
            f"{name}: shapes of sizes above {ANY.max}, or that begin above {MAX_MINIMUM}"
        )
    for key, spec in component.inputs.items():
        rows = spec.shape[0] if spec.shape else 1
        if isinstance(rows, str):
            rows = min((s[rows].min for s in component.shapes if rows in s), default=1)
        if rows > largest:
            raise ManifestError(f"{name}: input {key} has {rows} rows, more than {largest}")


def _check_defaults(manifest: Manifest) -> None:
    """Check that the default sampler can step along the noise schedule."""
    defaults = manifest.defaults
    try:
        sampling.noise_plan(defaults.sampler, manifest.schedule, defaults.steps)
    except SettingsError as error:
        raise ManifestError(f"defaults: {error}") from error


def _check_preview(preview: PreviewMap, channels: int) -> None:
    """Check that a map has coefficients for all channels of the latents."""
    pairs = channels * (channels + 1) // 2
    linear, squares = map(len, preview.weights), [len(each) for each in preview.products]
    if set(linear) != {channels} or squares not in ([0] * 3, [pairs] * 3):
        raise ManifestError(
            f"preview: latents of {channels} channels need {channels} weights for each colour, and "
            f"{pairs} products or none"
        )


def _check_encoder(manifest: Manifest, encoder: TextEncoding) -> None:
    component = manifest.components.get(encoder.component)
    if component is None:  # a directory may hold only some of the components
        return
    if encoder.tokenizer not in manifest.tokenizers:
        raise ManifestError(f"{encoder.component} has no tokenizer: {encoder.tokenizer} is missing")
    pooled = {} if encoder.pooled is None else {encoder.pooled: (2,)}
    _check_tensors(f"{encoder.component}: input", component.inputs, {"input_ids": (2,)})
    _check_tensors(
        f"{encoder.component}: output", component.outputs, {encoder.context: (3,), **pooled}
    )


def _check_channels(manifest: Manifest) -> None:
    latent, images = manifest.latent, manifest.conditioning.channels
    if images not in IMAGE_CHANNELS:
        raise ManifestError(f"conditioning: no denoiser takes the channels {', '.join(images)}")
    expected = {
        "denoiser": ("sample", latent.sample_channels(images)),
        "vae_decoder": ("latent_sample", latent.channels),
    }
    for name, (key, channels) in expected.items():
        if name in manifest.components:
            count = manifest.components[name].inputs[key].shape[1]
            if count != channels:
                parts = " + ".join(("latents", *images)) if name == "denoiser" else "latents"
                raise ManifestError(
                    f"{name}: {key} has {count} channels, but {parts} have {channels}"
                )


def _check_conditioning(manifest: Manifest) -> None:
    """Check that the runtime can fill every conditioning input of the denoiser."""
    conditioning = manifest.conditioning
    if not conditioning.encoders:
        raise ManifestError("conditioning: encoders is empty; at least one text encoder is needed")
    if "denoiser" not in manifest.components:
        return
    inputs = _denoiser_inputs(manifest.components)
    _check_tensors("denoiser: input", inputs, _REQUIRED_INPUTS)
    if "text_embeds" in inputs and not any(e.pooled for e in conditioning.encoders):
        raise ManifestError("denoiser: input text_embeds, but no text encoder has a pooled output")
    _check_noise_augmentation(conditioning, inputs)
    ids = inputs.get("time_ids")
    if ids is not None and ids.shape[1:] != (len(conditioning.time_ids),):
        raise ManifestError(
            f"denoiser: input time_ids is {ids}, but conditioning lists "
            f"{len(conditioning.time_ids)} time_ids"
        )


def _check_noise_augmentation(conditioning: Conditioning, inputs: Mapping[str, TensorSpec]) -> None:
    augmentation = conditioning.noise_augmentation
    noised = "low_resolution" in conditioning.channels
    if (augmentation is not None) != noised or ("noise_level" in inputs) != noised:
        raise ManifestError(
            "conditioning: the channels low_resolution, the input noise_level and "
            "noise_augmentation come together"
        )
    if augmentation is not None and augmentation.max_level >= augmentation.schedule.train_steps:
        raise ManifestError("noise_augmentation: max_level lies beyond its schedule")


def _denoiser_inputs(components: Mapping[str, Component]) -> dict[str, TensorSpec]:
    """Return the inputs that the runtime fills of all parts of a denoiser, and check the rest.

    The other inputs of a part are outputs of an earlier one:

        encoder_hidden_states --> denoiser_prompt --.
        timestep ---------------> denoiser_time ----+--> denoiser --> out_sample
        sample ----------------------------------- -'
    """
    inputs: dict[str, TensorSpec] = {}
    producers: dict[str, str] = {}
    parts = {name: components[name] for name in DENOISER_PARTS if name in components}
    for name, part in parts.items():
        for key, spec in part.inputs.items():
            if key in producers:
                _check_handover(parts, producers[key], name, key)
            elif key in DENOISER_INPUTS - _LATER_INPUTS[name]:
                inputs[key] = spec
            else:
                raise ManifestError(
                    f"{name}: unexpected input {key!r}: no component output and no request field "
                    "provides it"
                )
        if name != "denoiser":
            _add_outputs(producers, name, part)
    consumed = {key for part in parts.values() for key in part.inputs}
    if unused := producers.keys() - consumed:
        key = min(unused)
        raise ManifestError(f"{producers[key]}: output {key!r} is not an input of a later part")
    return inputs


def _add_outputs(producers: dict[str, str], name: str, part: Component) -> None:
    for key in part.outputs:
        if key in producers or key in DENOISER_INPUTS:
            other = producers.get(key, "the runtime")
            raise ManifestError(f"{name}: output {key!r} is already provided by {other}")
        producers[key] = name


def _check_handover(parts: Mapping[str, Component], producer: str, consumer: str, key: str) -> None:
    """Check that a tensor is the same where one part returns it and where another takes it."""
    output, taken = parts[producer].outputs[key], parts[consumer].inputs[key]
    counted = "timestep" if consumer == "denoiser_time" else "sample"
    batch = parts[consumer].inputs[counted].shape[:1]
    rows = [batch]
    if producer == "denoiser_time":  # one row per timestep if it depends on nothing else
        rows = [(1,)] if parts[producer].inputs.keys() == {"timestep"} else [batch, (1,)]
    equal = output.dtype == taken.dtype and output.shape[1:] == taken.shape[1:]
    if not equal or taken.shape[:1] not in rows:
        raise ManifestError(f"{consumer}: input {key} is {taken}, but {producer} returns {output}")


def _check_variants(components: Mapping[str, Component]) -> None:
    """Check that the tensors of a cached or a reduced denoiser are those of denoiser."""
    full = components.get("denoiser")
    cached, reduced = components.get("denoiser_cached"), components.get("denoiser_reduced")
    if full is None:
        return
    tensors = {**full.inputs, **full.outputs}
    for key, spec in {**cached.inputs, **cached.outputs}.items() if cached else ():
        if tensors.get(key) != spec:
            expected = tensors.get(key, "no tensor of that name")
            raise ManifestError(f"denoiser_cached: {key} is {spec}, but denoiser has {expected}")
    if reduced and (reduced.inputs, reduced.outputs) != (full.inputs, full.outputs):
        raise ManifestError(
            "denoiser_reduced: its inputs and outputs differ from those of denoiser"
        )


def _check_acceleration(manifest: Manifest, plan: AccelerationPlan) -> None:
    for name in [plan.variant, *(["denoiser_cached"] if plan.cached_steps else [])]:
        if name not in manifest.components:
            raise ManifestError(f"acceleration: the plan uses {name}, which is not a component")
    manifest.schedule.check(plan.timesteps)
    sampling.noise_plan(plan.sampler, manifest.schedule, plan.steps, plan.timesteps)


def _check_tensors(place: str, specs: Mapping[str, TensorSpec], required: _Ranks) -> None:
    for name, ranks in required.items():
        if name not in specs or len(specs[name].shape) not in ranks:
            raise ManifestError(f"{place} {name!r} with {ranks[-1]} dimensions is missing")
