"""Image generation: a resolved request goes once through the model, from prompts to pixels.

ResolvedRequest -> conditioning -> initial latents -> sampler and denoiser -> VAE -> images
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime import sampling
from latentforge.runtime.conditioning.embedding_cache import EmbeddingCache
from latentforge.runtime.conditioning.encode import ConditioningEncoder
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.denoising.denoiser import EngineDenoiser
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.denoising.initial_latents import InitialState, LatentInitializer
from latentforge.runtime.denoising.step_engines import StepEngines
from latentforge.runtime.engine import Engines
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import from_array
from latentforge.runtime.latent_colors import quick_images
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.resolved_request import ResolvedRequest
from latentforge.runtime.rng import NoiseSource
from latentforge.runtime.sampling.sampler import SamplerStep
from latentforge.runtime.settings import Settings
from latentforge.runtime.timings import Stopwatch, Timings
from latentforge.runtime.vae import Posterior, Vae

__all__ = ["DenoisingStep", "Model", "Result", "generate"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Images of one request.

    Attributes:
        images: one per prompt, or images_per_prompt consecutive ones for each.
        latents: the latents that they were decoded from, (images, channels, h, w).
        timings: seconds by stage.
        settings: the complete request; running it again gives the same images.
    """

    images: list[Image.Image]
    latents: Array
    timings: Timings
    settings: Settings

    @property
    def seed(self) -> int | tuple[int, ...]:
        """Seed of the images, or one per image, also if the request had none."""
        return self.settings.seed


@dataclass(frozen=True)
class Model:
    """Loaded model: manifest of an engine directory, its engines, and its tokenizers by name.

    ``prompt_cache`` is the number of prompts whose embeddings are kept: see load().
    """

    manifest: Manifest
    engines: Engines
    tokenizers: Mapping[str, Tokenizer]
    prompt_cache: int = 0

    @cached_property
    def encoder(self) -> ConditioningEncoder:
        """Encoder of the prompts and of the other conditioning."""
        encoders = len(self.manifest.conditioning.encoders)
        cache = EmbeddingCache(self.prompt_cache, encoders) if self.prompt_cache else None
        return ConditioningEncoder(
            conditioning=self.manifest.conditioning,
            inputs=StepEngines.of(self.engines).inputs,
            engines=self.engines,
            tokenizers=self.tokenizers,
            cache=cache,
        )

    @cached_property
    def vae(self) -> Vae:
        """VAE of the model."""
        return Vae(latent=self.manifest.latent, engines=self.engines)


class DenoisingStep:
    """One completed step of the denoising loop.

    Attributes:
        index: 0 for the first of ``count`` steps.
        sigma: share of noise in the latents at the start of the step, in 0..1.
        latents: noisy latents after the step, (images, channels, h, w).
        denoised: the denoiser's estimate of the clean latents.
        settings: the complete request.
    """

    def __init__(
        self,
        step: SamplerStep,
        settings: Settings,
        model: Model,
        watch: Stopwatch,
    ) -> None:
        self.index = step.index
        self.count = step.count
        self.sigma = step.level.sigma
        self.latents = step.latents
        self.denoised = step.denoised
        self.settings = settings
        self._model = model
        self._watch = watch

    def preview(self) -> list[Image.Image]:
        """Decode the estimate of the clean latents. Costs one run of the VAE decoder."""
        return from_array(self._model.vae.decode(self.denoised))

    def quick_preview(self) -> list[Image.Image]:
        """Map the estimate of the clean latents to colours, one pixel for each of their cells.

        It takes about a millisecond, by a map that was fitted to the model's VAE.

        Raises:
            ManifestError: the manifest has no such map.
        """
        return quick_images(self.denoised, self._model.manifest.preview)

    def result(self) -> Result:
        """Decode the latents as they are: after the last step, the finished images."""
        with self._watch.running(), self._watch.stage("vae_decoder"):
            images = from_array(self._model.vae.decode(self.latents))
        return Result(
            images=images,
            latents=self.latents,
            timings=self._watch.timings(),
            settings=self.settings,
        )


def generate(model: Model, request: ResolvedRequest) -> Iterator[DenoisingStep]:
    """Run the denoising loop and yield after each step.

    Engines are loaded first, and neither that nor a pause of the caller between two steps counts
    in the timings.
    """
    for name in request.step_components:
        model.engines.load(name)
    watch = Stopwatch()
    with watch.running():
        steps = _sample(model, request, watch)
    while True:
        with watch.running():
            step = _next(steps, request.settings)
        if step is None:
            return
        yield DenoisingStep(step, request.settings, model, watch)


def _next(steps: Iterator[SamplerStep], settings: Settings) -> SamplerStep | None:
    """Return the next step, None after the last; SettingsError if the sampler cannot make it."""
    try:
        return next(steps, None)
    except (ArithmeticError, ValueError) as error:
        raise SettingsError(
            f"{settings.sampler} cannot make {settings.steps} steps along this noise schedule "
            f"({error}): choose another sampler or number of steps"
        ) from error


def _sample(model: Model, request: ResolvedRequest, watch: Stopwatch) -> Iterator[SamplerStep]:
    """Encode the prompts and the initial image, draw the noise, and start the sampler."""
    settings, noise = request.settings, NoiseSource(request.settings.seeds)
    conditioning = request.conditioning
    if conditioning is None:
        with watch.stage("text_encoder"):
            conditioning = model.encoder.encode(settings)
    engines = StepEngines.of(model.engines, settings.variant, cached=bool(settings.cached_steps))
    network = engines.condition(conditioning, request.plan.timesteps, watch, request.max_rows)
    shape = _latent_shape(model.manifest, settings)
    initial = _initial_state(model, request, shape, noise, watch)
    guidance = Guidance(
        rows=max(len(array) for array in conditioning.values()) // settings.count,
        scale=settings.guidance_scale,
        image_scale=settings.image_guidance_scale,
        rescale=settings.guidance_rescale,
    )
    denoiser = EngineDenoiser(
        network=network,
        prediction=model.manifest.prediction,
        guidance=guidance,
        policy=request.policy,
        extra_channels=guidance.repeat(initial.extra_channels),
    )
    return sampling.get(settings.sampler).run(
        denoiser,
        request.plan,
        lambda: noise.randn(shape),
        prediction=model.manifest.prediction,
        latents=initial.latents,
        mask_blend=initial.mask_blend,
    )


def _latent_shape(manifest: Manifest, settings: Settings) -> tuple[int, int, int, int]:
    latent = manifest.latent
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    return settings.count, latent.channels, height, width


def _initial_state(
    model: Model,
    request: ResolvedRequest,
    shape: tuple[int, int, int, int],
    noise: NoiseSource,
    watch: Stopwatch,
) -> InitialState:
    def encode(pixels: Array) -> Posterior:
        with watch.stage("vae_encoder"):
            return model.vae.encode(pixels)

    initializer = LatentInitializer(
        settings=request.settings,
        plan=request.plan,
        shape=shape,
        conditioning=model.manifest.conditioning,
        noise=noise,
        encode=encode,
    )
    return initializer.prepare(request.init)
