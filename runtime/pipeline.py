"""Engine directory and prompt in, pictures out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime import backends
from latentforge.runtime.conditioning.encode import ConditioningInputs, encode_conditioning
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.denoising.denoiser import EngineDenoiser
from latentforge.runtime.denoising.initial_latents import (
    InitImage,
    LatentInitializer,
    Picture,
    sample_posterior,
    size_of,
)
from latentforge.runtime.denoising.step_engines import ConditionedDenoiser, StepEngines
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import (
    ManifestError,
    SettingsError,
    ShapeError,
)
from latentforge.runtime.image import from_array
from latentforge.runtime.machine import resident_memory
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profiling import Benchmark, Profile, Stopwatch, Timings
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling import samplers
from latentforge.runtime.sampling.schedule import NoiseLevel, NoisePlan
from latentforge.runtime.settings import Request, Settings, resolve

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Pipeline", "Result", "DenoisingStep"]

Array = NDArray[np.float32]

_log = logging.getLogger("latentforge")

_STRENGTH = 0.8  # of a picture that is given without a mask, as in diffusers


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one request gave.

    Attributes:
        images: one picture a prompt, or images_per_prompt of them in a row for each.
        latents: what they were decoded from, (count, channels, height, width).
        timings: seconds by stage.
        settings: the request with every default filled in; running it again gives the same.
    """

    images: list[Image.Image]
    latents: Array
    timings: Timings
    settings: Settings

    @property
    def seed(self) -> int:
        """The seed used, also where none was given."""
        return self.settings.seed


class Pipeline:
    """A loaded engine directory. Threads may share it; leaving a ``with`` block frees it.

    Attributes:
        manifest: what the directory says about itself.
        tokenizers: the loaded tokenizers by name.
        directory: where it was loaded from.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Engines,
        tokenizers: Mapping[str, Tokenizer],
        directory: Path,
    ) -> None:
        self.manifest = manifest
        self.tokenizers = tokenizers
        self.directory = directory
        self._engines = engines

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Loaded engines by component name."""
        return self._engines

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Picture | None = None,
        mask: Image.Image | None = None,
        **settings: Unpack[Request],
    ) -> Result:
        """Make pictures of a prompt, or of several.

        Args:
            prompt: what to paint.
            image: a picture to start from, or one for each prompt; or latents, such as an earlier
                result's, to go on with.
            mask: a picture of the same size, light where to paint and dark what to keep.
            settings: negative_prompt, images_per_prompt, sampler, steps, guidance_scale,
                guidance_rescale, height, width, seed, strength (0.8 of a picture without a mask),
                denoising_start, denoising_end, and for Stable Diffusion XL original_size, crop,
                target_size, aesthetic_score, negative_aesthetic_score; of cheaper evaluations
                timesteps, guidance_interval, cached_steps or cache_interval, and variant; exact to leave
                the engines' plan aside. What is left out comes from that plan and the manifest's
                defaults, height and width from the picture if there is one, and the seed from
                the system.

        Raises:
            SettingsError: a setting is out of range or unknown.
            ShapeError: the engines cannot make pictures of this size, or the mask is of another.
            BackendError: an engine failed, or gave NaN.
        """
        *_, last = self.stream(prompt, image=image, mask=mask, **settings)
        return last.result()

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        image: Picture | None = None,
        mask: Image.Image | None = None,
        max_rows: int | None = None,
        **settings: Unpack[Request],
    ) -> Iterator[DenoisingStep]:
        """Yield after each denoising step. Nothing is computed ahead of the caller.

        The settings are checked at once; the first step starts when it is requested.

        Args:
            prompt, image, mask, settings: see __call__().
            max_rows: largest micro-batch of a denoiser step; None: as loaded.
        """
        complete = self.settings(prompt, image=image, mask=mask, **settings)
        self._check_schedule(complete)
        self._check_engines(complete)
        source, plan = self._source(complete, image, mask), self._plan(complete)
        return self._steps(complete, source, plan, max_rows=max_rows)

    def run(
        self,
        settings: Settings,
        *,
        image: Picture | None = None,
        mask: Image.Image | None = None,
        rows: ConditioningInputs | None = None,
    ) -> Result:
        """Make the pictures of a request that is complete, such as an earlier result's.

        With ``rows``, as encode() gives them, the UNet is told these in place of the prompts.
        """
        self._check_size(settings)
        self._check_engines(settings)
        source, plan = self._source(settings, image, mask), self._plan(settings)
        *_, last = self._steps(settings, source, plan, rows)
        return last.result()

    def encode(self, settings: Settings) -> ConditioningInputs:
        """What the UNet is told of a request: its inputs by name, with a row an image.

        Where there is guidance, the rows of the negative prompts come first: twice the images.
        """
        unet = StepEngines.of(self.engines)
        rows, negative = encode_conditioning(
            settings, self.manifest.conditioning, unet.inputs, self.engines, self.tokenizers
        )
        if negative is None:
            return rows
        return {name: np.concatenate([negative[name], rows[name]]) for name in rows}

    def settings(
        self,
        prompt: str | Sequence[str],
        *,
        image: Picture | None = None,
        mask: Image.Image | None = None,
        **settings: Unpack[Request],
    ) -> Settings:
        """Fill in the manifest's defaults and check the request, without running it."""
        request: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
        if image is not None:
            height, width = size_of(image, self.manifest.latent)
            strength = _STRENGTH if mask is None else 1.0
            request = {"height": height, "width": width, "strength": strength, **request}
        elif "strength" in request:
            raise SettingsError("strength is that of a picture to start from: give image too")
        resolved = resolve(
            self.manifest.defaults, prompt, cast("Request", request), self.manifest.acceleration
        )
        self._check_size(resolved)
        return resolved

    def benchmark(
        self, *, batch_size: int = 1, repetitions: int = 5, **settings: Unpack[Request]
    ) -> Benchmark:
        """Time whole images and each stage, as Infery's ``benchmark()`` did for one network.

        One run more is made first and not counted.
        """
        prompts = ["a photo of a cat"] * batch_size
        before = resident_memory()
        runs = [self(prompts, **settings).timings for _ in range(repetitions + 1)]
        return Benchmark.of(self.versions(), batch_size, runs, memory_before=before)

    def profile(self, prompt: str = "a photo of a cat", **settings: Unpack[Request]) -> Profile:
        """Time every layer over one image, on a second copy of the engines that records it."""
        engines = self._engines.reload(profile=True)
        with Pipeline(self.manifest, engines, self.tokenizers, self.directory) as recording:
            recording(prompt, **settings)
            return recording.layers()

    def layers(self) -> Profile:
        """What each layer took since the engines were loaded with ``profile=True``.

        Names are COMPONENT/LAYER. It ends the recording.
        """
        return Profile.of(
            layer._replace(name=f"{name}/{layer.name}")
            for name, engine in self.engines.items()
            for layer in engine.session.layers()
        )

    def decode(self, latents: Array) -> list[Image.Image]:
        """Pictures of latents (batch, channels, h, w)."""
        scaled = latents / np.float32(self.manifest.latent.scaling_factor)
        decoder = self.engines["vae_decoder"]
        return from_array(decoder.run({"latent_sample": scaled})["sample"])

    def versions(self) -> dict[str, str]:
        """The libraries that run the engines, and their versions."""
        names = {engine.component.backend for engine in self.engines.values()} - {"null"}
        return {name: backends.version(name) for name in sorted(names)}

    def close(self) -> None:
        """Free the engines. Using the pipeline afterwards raises BackendError."""
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [f"{n}={e.component.backend}/{e.component.precision}" for n, e in self._sorted()]
        return f"<Pipeline {self.manifest.name} ({self.manifest.family}) {' '.join(parts)}>"

    def _sorted(self) -> list[tuple[str, Engine]]:
        return sorted(self.engines.items())

    def _check_size(self, settings: Settings) -> None:
        """Refuse a size before any work is done for it."""
        latent = self.manifest.latent
        unit = latent.downscale * latent.multiple
        asked = (settings.height, settings.width)
        for name, side in zip(("height", "width"), asked, strict=True):
            if side % unit:
                raise ShapeError(f"{name} is a multiple of {unit} for this model, not {side}")
        built = latent.image_sizes(self.engines["denoiser"].component)
        if built and not any(asked[0] in height and asked[1] in width for height, width in built):
            fits = ", ".join(f"{height}x{width}" for height, width in built)
            raise ShapeError(
                f"these engines make images of {fits} pixels (height x width), not "
                f"{asked[0]}x{asked[1]}: ask for one of these, or build engines for that"
            )

    def _check_schedule(self, settings: Settings) -> None:
        """Ask for new ranges of 8-bit activations where the schedule is not the one of theirs."""
        known, asked = self.manifest.components["denoiser"].calibration, settings
        if known and (known.sampler, known.steps) != (asked.sampler, asked.steps):
            _log.warning(
                "the 8-bit engines were calibrated for %s of %d steps, and this is %s of %d: for "
                "the best pictures optimize the exported ones again, with --sampler and --steps",
                known.sampler, known.steps, asked.sampler, asked.steps,
            )  # fmt: skip

    def _source(
        self, settings: Settings, image: Picture | None, mask: Image.Image | None
    ) -> InitImage:
        """Check what a run is to start from before any work is done for it."""
        source = InitImage.of(image, mask, settings, self.manifest.latent)
        encoder = "vae_encoder" in self.manifest.components
        if source.pixels is not None and not (encoder or "vae_encoder" in self.engines):
            raise ManifestError("these engines have no vae_encoder, which pictures need: export it")
        return source

    def _steps(
        self,
        settings: Settings,
        source: InitImage,
        plan: NoisePlan,
        rows: ConditioningInputs | None = None,
        max_rows: int | None = None,
    ) -> Iterator[DenoisingStep]:
        """The denoising loop. Pauses between steps are the caller's and not counted."""
        for name in _engines_of(settings):
            self.load_engine(name)
        watch = Stopwatch()
        with watch.running():
            steps = self._sampling(settings, source, plan, watch, rows, max_rows)
        while True:
            with watch.running():
                step = next(steps, None)
            if step is None:
                return
            yield DenoisingStep(step, self, settings, watch)

    def _plan(self, settings: Settings) -> NoisePlan:
        """The steps of a request: all of its schedule, or a part of them."""
        plan, schedule = self._whole(settings), self.manifest.schedule
        if settings.denoising_start is None and settings.denoising_end is None:
            return plan.of_strength(settings.strength)
        start = 0.0 if settings.denoising_start is None else settings.denoising_start
        end = 1.0 if settings.denoising_end is None else settings.denoising_end
        return plan.between(schedule, start=start, end=end)

    def _whole(self, settings: Settings) -> NoisePlan:
        sampler, schedule = samplers.get(settings.sampler), self.manifest.schedule
        if settings.timesteps:
            return sampler.plan_from_timesteps(schedule, settings.timesteps)
        return sampler.plan(schedule, settings.steps)

    def _check_engines(self, settings: Settings) -> None:
        """Refuse steps that no engine here can make."""
        for name in _engines_of(settings):
            if name not in self.manifest.components and name not in self.engines:
                raise SettingsError(
                    f"these engines have no {name}: leave it out, or build some with --fast"
                )

    def _sampling(
        self,
        settings: Settings,
        source: InitImage,
        plan: NoisePlan,
        watch: Stopwatch,
        rows: ConditioningInputs | None,
        max_rows: int | None,
    ) -> Iterator[samplers.SamplerStep]:
        """Encode prompts and picture, draw the noise and start the sampler."""
        generator = Generator(settings.seed)
        unet, guided = self._told(settings, plan, watch, rows, max_rows)
        studio = self._studio(settings, plan, generator, watch)
        canvas = studio.prepare(source)
        denoiser = EngineDenoiser(
            unet=unet,
            guided=guided,
            prediction=self.manifest.prediction,
            scale=settings.guidance_scale,
            rescale=settings.guidance_rescale,
            around=canvas.around,
            interval=settings.guidance_interval or (0.0, 1.0),
            cached_steps=self._shallow(settings),
        )
        return samplers.get(settings.sampler).run(
            denoiser,
            plan,
            lambda: generator.randn(studio.shape),
            prediction=self.manifest.prediction,
            latents=canvas.latents,
            keep=canvas.keep,
        )

    def _told(
        self,
        settings: Settings,
        plan: NoisePlan,
        watch: Stopwatch,
        rows: ConditioningInputs | None,
        max_rows: int | None,
    ) -> tuple[ConditionedDenoiser, bool]:
        """The UNet, told of the prompts and of the plan, and whether there is guidance."""
        if rows is None:
            with watch.stage("text_encoder"):
                rows = self.encode(settings)
        timesteps = [interval.start.timestep for interval in plan.intervals]
        guided = any(len(array) > settings.count for array in rows.values())
        unet = StepEngines.of(self.engines, settings.variant, shallow=bool(settings.cached_steps))
        return unet.conditioned(rows, timesteps, watch, max_rows), guided

    def _shallow(self, settings: Settings) -> frozenset[NoiseLevel]:
        """The levels of shallow evaluations, which are counted over the whole schedule.

        So a run that starts late or ends early makes the same ones, but that its first is full.
        """
        intervals = self._whole(settings).intervals
        return frozenset(intervals[i].start for i in settings.cached_steps if i < len(intervals))

    def _studio(
        self, settings: Settings, plan: NoisePlan, generator: Generator, watch: Stopwatch
    ) -> LatentInitializer:
        latent = self.manifest.latent
        height, width = settings.height // latent.downscale, settings.width // latent.downscale

        def encode(pixels: Array) -> Array:
            with watch.stage("vae_encoder"):
                parameters = self.load_engine("vae_encoder").run({"sample": pixels})
            return sample_posterior(parameters["latent_parameters"], latent, generator.randn)

        return LatentInitializer(
            settings=settings,
            plan=plan,
            shape=(settings.count, latent.channels, height, width),
            inpainting_channels=latent.has_inpainting_channels(self.engines["denoiser"].component),
            draw=generator.randn,
            encode=encode,
        )

    def load_engine(self, name: str) -> Engine:
        """Return an engine, after loading it if no request has needed it before."""
        return self._engines.load(name)


def _engines_of(settings: Settings) -> tuple[str, ...]:
    """The components that make the steps of a request."""
    return (settings.variant, "denoiser_cached") if settings.cached_steps else (settings.variant,)


class DenoisingStep:
    """One step of the denoising loop, done.

    Attributes:
        index: 0 for the first of ``count`` steps.
        sigma: the share of noise left in the latents after it, in 0..1.
        latents: the noisy latents after it, (images, channels, h, w).
        denoised: the clean latents as the model saw them.
        settings: the request with every default filled in.
    """

    def __init__(
        self, step: samplers.SamplerStep, pipeline: Pipeline, settings: Settings, watch: Stopwatch
    ) -> None:
        self.index = step.index
        self.count = step.count
        self.sigma = step.level.sigma
        self.latents = step.latents
        self.denoised = step.denoised
        self._pipeline = pipeline
        self.settings = settings
        self._watch = watch

    def preview(self) -> list[Image.Image]:
        """Pictures of what the model sees so far. Costs a run of the VAE decoder."""
        return self._pipeline.decode(self.denoised)

    def result(self) -> Result:
        """Decode the latents as they stand: after the last step, the finished pictures."""
        with self._watch.running(), self._watch.stage("vae_decoder"):
            images = self._pipeline.decode(self.latents)
        return Result(
            images=images,
            latents=self.latents,
            timings=self._watch.timings(),
            settings=self.settings,
        )
