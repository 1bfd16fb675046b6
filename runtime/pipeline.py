"""Pipeline: an engine directory that turns prompts into images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime import backends
from latentforge.runtime.conditioning.encode import ConditioningInputs
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.denoising.depth import DepthInput
from latentforge.runtime.denoising.initial_latents import ImageInput, Picture
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.example import example_depth_map, example_image
from latentforge.runtime.generation import DenoisingStep, Model, Result, generate
from latentforge.runtime.image import from_array
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profiling import PROMPT, Benchmark, Profile
from latentforge.runtime.request_completion import complete_request
from latentforge.runtime.resolved_request import ResolvedRequest, warn_of_calibration
from latentforge.runtime.settings import Request, Settings
from latentforge.runtime.validation import check_count, check_max_rows, shown

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["DenoisingStep", "Pipeline", "Result"]

Array = NDArray[np.float32]


class Pipeline:
    """Loaded engine directory; made by load(). Threads may share it.

    Use it in a ``with`` block, or call close(), to free the engines.

    Attributes:
        manifest: manifest of the directory.
        tokenizers: tokenizers by name.
        directory: the engine directory.
        example_images: True to give requests without an image the example image, if the model
            needs one.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Engines,
        tokenizers: Mapping[str, Tokenizer],
        directory: Path,
        *,
        example_images: bool = False,
        prompt_cache: int = 0,
    ) -> None:
        self.manifest = manifest
        self.tokenizers = tokenizers
        self.directory = directory
        self.example_images = example_images
        self._engines = engines
        self._model = Model(manifest, engines, tokenizers, prompt_cache)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Loaded engines by component name."""
        return self._engines

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        depth_map: DepthInput | None = None,
        **settings: Unpack[Request],
    ) -> Result:
        """Generate images of one prompt, or of several.

        Settings that are omitted come from the engines' acceleration plan and from the manifest's
        defaults. Height and width default to those of the initial image, and the seed is random.

        Args:
            prompt: text of one image, or a list of texts.
            image: initial image, one for all prompts or one for each, as PIL images, paths, or
                arrays (h, w, 3) of uint8 or of floats from 0 to 1; or latents, such as those of an
                earlier result, to continue with.
            mask: image of the same size, light where to paint and dark where to keep.
            depth_map: depth map of the image, in any unit, for a model that takes one: light is
                near, as in MiDaS. One for all prompts or one for each, as images or as an array
                (maps, height, width).
            settings: negative_prompt, images_per_prompt, sampler, steps, guidance_scale,
                guidance_rescale, height, width, seed (one, or a list with one for each image);
                for an initial image strength (default 0.8, or 1 with a mask), denoising_start and
                denoising_end; for a model that edits an image image_guidance_scale; for one that
                enlarges it noise_level; for Stable Diffusion XL original_size, crop, target_size,
                aesthetic_score and negative_aesthetic_score; for acceleration timesteps,
                guidance_interval, cached_steps or cache_interval, and variant; unaccelerated to
                ignore the engines' plan.

        Raises:
            SettingsError: a setting is out of range or unknown.
            ShapeError: the engines cannot make images of this size, or the mask has another size.
            BackendError: an engine failed, or its output holds NaN.
        """
        *_, last = self.stream(prompt, image=image, mask=mask, depth_map=depth_map, **settings)
        return last.result()

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        depth_map: DepthInput | None = None,
        max_rows: int | None = None,
        **settings: Unpack[Request],
    ) -> Iterator[DenoisingStep]:
        """Generate images and yield after each denoising step.

        The settings are checked at once. A step is computed when it is requested, so a caller who
        stops iterating stops the work.

        Args:
            prompt, image, mask, depth_map, settings: see __call__().
            max_rows: largest micro-batch of a denoiser step; None: as loaded.
        """
        check_max_rows(max_rows)
        complete = self.settings(prompt, image=image, mask=mask, **settings)
        warn_of_calibration(complete, self.manifest.components["denoiser"])
        return self.steps(complete, image=image, mask=mask, depth_map=depth_map, max_rows=max_rows)

    def run(
        self,
        settings: Settings,
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        depth_map: DepthInput | None = None,
        conditioning: ConditioningInputs | None = None,
        report: Callable[[DenoisingStep], None] | None = None,
    ) -> Result:
        """Generate the images of a complete request, such as that of an earlier result.

        Args:
            settings: complete settings.
            image, mask, depth_map: see __call__().
            conditioning: replaces the encoded prompts: see encode().
            report: called after each step.

        Raises:
            SettingsError, ShapeError, BackendError: see __call__().
        """
        steps = self.steps(
            settings, image=image, mask=mask, depth_map=depth_map, conditioning=conditioning
        )
        for step in steps:
            if report is not None:
                report(step)
        return step.result()

    def steps(
        self,
        settings: Settings,
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        depth_map: DepthInput | None = None,
        conditioning: ConditioningInputs | None = None,
        max_rows: int | None = None,
    ) -> Iterator[DenoisingStep]:
        """Run a complete request and yield after each denoising step: see run() and stream()."""
        _check_settings(settings)
        check_max_rows(max_rows)
        request = ResolvedRequest.of(
            settings,
            self.manifest,
            image=self._image(image, settings),
            mask=mask,
            depth_map=self._depth_map(depth_map, settings),
            conditioning=conditioning,
            max_rows=max_rows,
        )
        return generate(self._model, request)

    def encode(self, settings: Settings) -> ConditioningInputs:
        """Return the denoiser's conditioning inputs for a request, by input name.

        One row per image. With classifier-free guidance there are two or three times as many, those
        of the negative prompts first.
        """
        _check_settings(settings)
        return self._model.encoder.encode(settings)

    def settings(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        **settings: Unpack[Request],
    ) -> Settings:
        """Complete and check a request without running it: see __call__()."""
        return complete_request(self.manifest, prompt, image=image, mask=mask, **settings)

    def _image(self, image: ImageInput | None, settings: Settings) -> ImageInput | None:
        """Return the image of a request, or the example image where one stands in for it."""
        needed = self.example_images and self.manifest.conditioning.requires_image
        if image is not None or not needed:
            return image
        shrink = self.manifest.shrink
        return example_image(settings.height // shrink, settings.width // shrink)

    def _depth_map(self, depth_map: DepthInput | None, settings: Settings) -> DepthInput | None:
        """Return the depth map of a request, or the example where it stands in for it."""
        needed = self.example_images and "depth" in self.manifest.conditioning.channels
        if depth_map is not None or not needed:
            return depth_map
        return example_depth_map(settings.height, settings.width)

    def _with_example_images(self, engines: Engines) -> Pipeline:
        return Pipeline(
            self.manifest, engines, self.tokenizers, self.directory, example_images=True
        )

    def benchmark(
        self, *, batch_size: int = 1, repetitions: int = 5, **settings: Unpack[Request]
    ) -> Benchmark:
        """Time whole runs and each stage, after one run that is not counted.

        The result has the names of Infery's ``benchmark()``. A model that needs an image gets the
        example image.

        Raises:
            SettingsError: batch_size or repetitions is no positive integer, or see __call__().
        """
        check_count("batch_size", batch_size, 1024)
        pipeline = self._with_example_images(self._engines)
        return Benchmark.measure(
            lambda: pipeline([PROMPT] * batch_size, **settings).timings,
            batch_size=batch_size,
            repetitions=repetitions,
            versions=self.versions(),
        )

    def profile(self, prompt: str = PROMPT, **settings: Unpack[Request]) -> Profile:
        """Time every layer over one image, on a second copy of the engines that records it."""
        engines = self._engines.reload(profile=True)
        with self._with_example_images(engines) as copy:
            copy(prompt, **settings)
            return copy.layers()

    def layers(self) -> Profile:
        """Return the time of each layer, as COMPONENT/LAYER, since the load with ``profile=True``.

        This ends the recording.
        """
        return Profile.of(self._engines)

    def decode(self, latents: Array) -> list[Image.Image]:
        """Decode latents (n, channels, h, w) to images."""
        return from_array(self.decode_pixels(latents))

    def decode_pixels(self, latents: Array) -> Array:
        """Decode latents (n, channels, h, w) to pixels (n, 3, height, width), not clipped.

        Raises:
            ShapeError: they are no such array, or of sizes that the engines do not take.
        """
        floats = isinstance(latents, np.ndarray) and np.issubdtype(latents.dtype, np.floating)
        if not floats or latents.ndim != 4:
            raise ShapeError(
                "latents must be an array of floats (n, channels, h, w), not "
                f"{shown(getattr(latents, 'shape', latents))}"
            )
        return self._model.vae.decode(latents)

    def load_engine(self, name: str) -> Engine:
        """Return an engine, after loading it if no request has needed it before.

        Raises:
            SettingsError: the directory has no such component.
        """
        return self._engines.load(name if isinstance(name, str) else shown(name))

    def versions(self) -> dict[str, str]:
        """Return the libraries that run the engines, and their versions."""
        names = {engine.component.backend for engine in self._engines.values()} - {"null"}
        return {name: backends.version(name) for name in sorted(names)}

    def close(self) -> None:
        """Free the engines. Using the pipeline afterwards raises BackendError."""
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        components = {name: engine.component for name, engine in self._engines.items()}
        parts = [f"{name}={c.backend}/{c.precision}" for name, c in components.items()]
        return f"<Pipeline {self.manifest.name} ({self.manifest.family}) {' '.join(parts)}>"


def _check_settings(settings: object) -> None:
    if not isinstance(settings, Settings):
        raise SettingsError(f"settings must be a Settings record, not {shown(settings)}")
