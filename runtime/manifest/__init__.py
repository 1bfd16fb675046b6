"""Manifest of an engine directory: the components in it and how they fit together.

Every stage reads one engine directory and writes another, so manifest.json is the only thing
that export, optimize and runtime share. docs/format.md is its specification. This module has its
records, and reads and writes it.
"""

import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from latentforge.runtime.acceleration import MAX_STEPS, AccelerationPlan, DenoiserVariant
from latentforge.runtime.errors import LatentforgeError, ManifestError, ShapeError
from latentforge.runtime.files import MANIFEST_FILE, hash_file
from latentforge.runtime.manifest.checks import CACHED_FEATURE, DENOISER_PARTS, check_parts
from latentforge.runtime.manifest.external import check_graph
from latentforge.runtime.manifest.formats import FORMAT, check_format
from latentforge.runtime.manifest.integrity import check_file, check_hashes, read_content
from latentforge.runtime.record import Record
from latentforge.runtime.sampling.prediction import Prediction
from latentforge.runtime.sampling.schedule import MAX_TRAIN_STEPS, EDMSchedule, Schedule
from latentforge.runtime.shapes import ANY, Range, Shapes, bounding_range, nearest
from latentforge.runtime.tensor import Tensors, TensorSpec, bind
from latentforge.runtime.validation import check_flag, checked_path
from latentforge.runtime.version import __version__

__all__ = [
    "CACHED_FEATURE",
    "DENOISER_PARTS",
    "FORMAT",
    "MAX_COEFFICIENT",
    "MAX_SIDE",
    "MAX_TOKENS",
    "AccelerationPlan",
    "CalibrationSchedule",
    "Component",
    "Conditioning",
    "DenoiserVariant",
    "FileEntry",
    "ImageChannels",
    "Latent",
    "Manifest",
    "NoiseAugmentation",
    "PreviewMap",
    "RequestDefaults",
    "ScheduleProof",
    "Stage",
    "TextEncoding",
    "TimeId",
    "TokenizerEntry",
    "WeightSource",
]

MAX_TOKENS = 8192
"""Longest prompt that a tokenizer entry may declare."""

MAX_SIDE = 16_384
"""Longest side of an image in pixels."""

MAX_COEFFICIENT = 1e4
"""Largest coefficient of a map for previews."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
Steps = Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)]
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
_DEVICES = "con|prn|aux|nul|com[0-9]|lpt[0-9]"  # no file can have these names on Windows
Name = Annotated[str, msgspec.Meta(pattern=rf"^(?!({_DEVICES})\Z)[a-z][a-z0-9_]{{0,63}}\Z")]
Small = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Coefficient = Annotated[float, msgspec.Meta(ge=-MAX_COEFFICIENT, le=MAX_COEFFICIENT)]
Coefficients = Annotated[tuple[Coefficient, ...], msgspec.Meta(max_length=1024)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileEntry(Record, frozen=True, kw_only=True):
    """File inside the engine directory, by its POSIX path relative to it."""

    file: str
    sha256: Digest
    bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]

    @classmethod
    def of(cls, path: Path, directory: Path) -> "FileEntry":
        """Describe a file inside directory as it is now."""
        file = path.relative_to(directory).as_posix()
        return FileEntry(file=file, sha256=hash_file(path), bytes=path.stat().st_size)


class CalibrationSchedule(Record, frozen=True, kw_only=True):
    """Schedule of the denoising runs that the ranges of 8-bit activations were recorded on."""

    sampler: str
    steps: Steps
    guidance_scale: float


class Component(FileEntry, frozen=True, kw_only=True):
    """One graph of the model: its files, the backend that runs it, and its signature.

    Attributes:
        data: further files that the engine opens, such as external weights.
        overflows_fp16: True for a graph whose values exceed the range of half precision
            (``force_upcast`` in a VAE's configuration).
        calibration: schedule that quantized activations were calibrated for.
        shapes: ranges of the free dimensions that the engine was built for; any if empty.
        options: backend options that the engine was compiled with and is loaded with.
        device: what a native engine was built for, such as a GPU and a library's version.
        custom_ops: True for a graph with operators from runtime/kernels.
        max_rows: rows per run at which this component was fastest when it was measured.
    """

    backend: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    data: tuple[FileEntry, ...] = ()
    overflows_fp16: bool = False
    calibration: CalibrationSchedule | None = None
    shapes: tuple[Mapping[str, Range], ...] = ()
    options: Mapping[str, bool | int | float | str] = {}
    device: Mapping[str, str] = {}
    custom_ops: bool = False
    max_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] | None = None

    @property
    def free_dimensions(self) -> tuple[str, ...]:
        """Names of the free dimensions of its inputs, in order."""
        sizes = (size for spec in self.inputs.values() for size in spec.shape)
        return tuple(dict.fromkeys(s for s in sizes if isinstance(s, str) and s.isidentifier()))

    def sizes(self, feeds: Tensors) -> dict[str, int]:
        """Return the free dimensions that a subset of the inputs determines, unchecked."""
        present = ((spec, feeds[name].shape) for name, spec in self.inputs.items() if name in feeds)
        return {
            name: size
            for spec, shape in present
            for name, size in zip(spec.shape, shape, strict=False)
            if isinstance(name, str) and name.isidentifier()
        }

    def fit(self, feeds: Tensors) -> tuple[dict[str, int], int | None]:
        """Return the size of each free dimension, and the index of the nearest shapes, if any.

        Raises:
            ShapeError: the feeds do not fit the inputs, or none of the shapes.
        """
        sizes = bind(self.inputs, feeds)
        return sizes, nearest(self.shapes, sizes)

    def specialize(self, shapes: tuple[Shapes, ...]) -> "Component":
        """Return the component for these shapes; a dimension of one size in all becomes a number.

        Raises:
            ShapeError: one of the dimensions is not free in this graph.
        """
        for name in {name for ranges in shapes for name in ranges}:
            if name not in self.free_dimensions:
                raise ShapeError(f"{self.file}: dimension {name} is not free: export it again")
        sizes = {name: r.min for name, r in bounding_range(shapes).items() if r.fixed}
        free = [{n: r for n, r in ranges.items() if n not in sizes} for ranges in shapes]
        return msgspec.structs.replace(
            self,
            inputs={name: spec.specialize(sizes) for name, spec in self.inputs.items()},
            outputs={name: spec.specialize(sizes) for name, spec in self.outputs.items()},
            shapes=tuple(ranges for ranges in free if ranges),
        )

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Files of the component, the engine itself first."""
        return (FileEntry(file=self.file, sha256=self.sha256, bytes=self.bytes), *self.data)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.bytes for entry in self.files)


class TokenizerEntry(FileEntry, frozen=True, kw_only=True):
    """Tokenizer in the tokenizers library's format; ids are padded or truncated to max_length."""

    max_length: Annotated[int, msgspec.Meta(ge=3, le=MAX_TOKENS)]


class WeightSource(Record, frozen=True, kw_only=True):
    """Checkpoint that the weights come from, with the sha256 of each component's weight files."""

    checkpoint: str
    sha256: Mapping[str, Digest]
    license: str | None = None


class TextEncoding(Record, frozen=True, kw_only=True):
    """Text encoder: its component and tokenizer, and the outputs that condition the denoiser.

    ``context`` is (batch, tokens, width); ``pooled``, if there is one, (batch, width).
    """

    component: Name
    tokenizer: Name
    context: str = "last_hidden_state"
    pooled: str | None = None


TimeId = Literal[
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "target_height",
    "target_width",
    "aesthetic_score",
]


ImageChannels = Literal["mask", "masked_image", "image", "depth", "low_resolution"]
"""Channels of the denoiser's sample that come from the images of a request:

mask: 1 where to paint, one channel.
masked_image: latents of the image outside of the mask, sampled and scaled as initial latents are.
image: latents of the image to edit, the mean of the VAE's distribution and not scaled.
depth: depth map of the image, from -1 to 1, one channel.
low_resolution: pixels of the image to enlarge, from -1 to 1, with noise; three channels, of the
    size of the latents.
"""


class NoiseAugmentation(Record, frozen=True, kw_only=True):
    """Noise on the image to enlarge: Ho et al. (2022), arXiv 2106.15282, section 4.

    Attributes:
        schedule: gives the noise at each level, as at a training timestep.
        max_level: the largest that the denoiser was trained for.
    """

    schedule: Schedule
    max_level: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TRAIN_STEPS)]


class Conditioning(Record, frozen=True, kw_only=True):
    """Inputs of the denoiser besides latents and timestep.

    Attributes:
        encoders: text encoders; their contexts, joined along the width, are
            ``encoder_hidden_states``, and the last pooled output is ``text_embeds``.
        zero_negative: without a negative prompt, its embeddings are zeros instead of those of the
            empty prompt (``force_zeros_for_empty_prompt`` in diffusers).
        time_ids: numbers in the denoiser's ``time_ids`` input, in order.
        channels: channels of the denoiser's ``sample`` after those of the latents, in order.
        noise_augmentation: noise on the channels ``low_resolution``; its level is the denoiser's
            ``noise_level`` input.
    """

    encoders: Annotated[tuple[TextEncoding, ...], msgspec.Meta(max_length=8)]
    zero_negative: bool = False
    time_ids: tuple[TimeId, ...] = ()
    channels: tuple[ImageChannels, ...] = ()
    noise_augmentation: NoiseAugmentation | None = None

    @property
    def starts_from_image(self) -> bool:
        """True if sampling may start from the noised image, which is not itself conditioning."""
        return {"image", "low_resolution"}.isdisjoint(self.channels)

    @property
    def requires_image(self) -> bool:
        """True if there is nothing to generate without an image."""
        return not {"image", "depth", "low_resolution"}.isdisjoint(self.channels)

    @property
    def encodes_images(self) -> bool:
        """True if images go through the VAE encoder."""
        return "low_resolution" not in self.channels


class Latent(Record, frozen=True, kw_only=True):
    """Latent space: an image of H x W pixels is (channels, H/downscale, W/downscale).

    Latent sides are multiples of ``multiple``, because the denoiser downsamples by that factor.
    ``masked_decoder`` marks a VAE whose decoder would also take image and mask in inpainting.
    """

    channels: Small
    scaling_factor: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
    downscale: Small
    multiple: Small
    masked_decoder: bool = False

    def sample_channels(self, images: Sequence[ImageChannels]) -> int:
        """Return the channels of the sample of a denoiser that takes these channels of images."""
        latents = self.channels
        widths = {
            "mask": 1,
            "masked_image": latents,
            "image": latents,
            "depth": 1,
            "low_resolution": 3,
        }
        return self.channels + sum(widths[name] for name in images)

    def image_sizes(self, denoiser: Component) -> list[tuple[Range, Range]]:
        """Return a denoiser's (height, width) ranges in pixels; none where any size fits."""
        free = denoiser.inputs["sample"].shape[2:]
        pairs = []
        for shapes in denoiser.shapes or ({},):
            sides = [shapes.get(s, ANY) if isinstance(s, str) else Range.of(s) for s in free]
            height, width = (s if s == ANY else s.scaled(up=self.downscale) for s in sides)
            if (height, width) not in pairs:
                pairs.append((height, width))
        return [] if (ANY, ANY) in pairs else pairs


class PreviewMap(Record, frozen=True, kw_only=True):
    """Map from a clean latent to the colour of its part of the image, for previews.

    Fitted to the model's own VAE: see export/preview.py. Each of red, green and blue is a sum, in
    which -1 is black and 1 is white.

    Attributes:
        offset: constants.
        weights: of the channels of the latent, as the denoiser has it.
        products: of the products of each two channels: the first with itself and all others, the
            second with itself and those after it, and so on. Empty for a linear map.
        correlation: with the decoder's images, averaged over the same parts, on latents that the
            fit has not seen.
    """

    offset: tuple[Coefficient, Coefficient, Coefficient]
    weights: tuple[Coefficients, Coefficients, Coefficients]
    products: tuple[Coefficients, Coefficients, Coefficients] = ((), (), ())
    correlation: Annotated[float, msgspec.Meta(ge=-1, le=1)]


class RequestDefaults(Record, frozen=True, kw_only=True):
    """Settings of a request that does not set them."""

    sampler: str
    steps: Steps
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=1000)]
    guidance_rescale: Annotated[float, msgspec.Meta(ge=0, le=1)]
    image_guidance_scale: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 1.0
    noise_level: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TRAIN_STEPS)] = 0
    height: Side
    width: Side


class ScheduleProof(Record, frozen=True, kw_only=True):
    """Comparison of the default sampler with the checkpoint's own scheduler, made at export.

    Attributes:
        scheduler: diffusers class that the checkpoint names.
        sampler: the sampler.
        options: options of the sampling method that the checkpoint names and the sampler follows.
        steps: numbers of steps that were compared.
        difference: largest difference of the latents, relative to their range.
    """

    scheduler: str
    sampler: str
    options: Mapping[str, bool | int | float | str | tuple[int, ...] | None] = {}
    steps: tuple[int, ...]
    difference: float


class Stage(Record, frozen=True, kw_only=True):
    """Entry of the history: one stage that this directory went through.

    Attributes:
        name: the stage, such as ``export`` or ``optimize``.
        options: what was requested, and what the stage decided.
        tools: versions of the libraries that did the work.
        seconds: wall-clock time.
        passes: rewrites by optimizer pass.
        measured: figures before and after the stage, by component or ``image``.
    """

    name: str
    options: Mapping[str, Any]
    tools: Mapping[str, str]
    seconds: float
    passes: Mapping[str, int] = {}
    measured: Mapping[str, Mapping[str, float]] = {}

    @classmethod
    def ended(
        cls,
        name: str,
        start: float,
        options: Mapping[str, Any],
        packages: Iterable[str] = (),
        **fields: Mapping[str, Any],
    ) -> "Stage":
        """Return the entry of a stage that ends now, and began when time.perf_counter() was start.

        Args:
            name, options: see Stage; in values that JSON can hold.
            packages: Python packages whose versions to add to the tools.
            fields: further tools, and passes and measured.

        Raises:
            importlib.metadata.PackageNotFoundError: a package is not installed.
        """
        versions = {package: _version(package) for package in packages}
        tools = {"latentforge": __version__, **versions, **fields.pop("tools", {})}
        seconds = round(time.perf_counter() - start, 1)
        return cls(name=name, options=options, tools=tools, seconds=seconds, **fields)


def _version(package: str) -> str:
    """Return the version of a package, or the module's own if several packages bring it."""
    if package == "onnxruntime" and package in sys.modules:  # it may be of onnxruntime-gpu
        return str(sys.modules[package].__version__)
    return importlib.metadata.version(package)


class Manifest(Record, frozen=True, kw_only=True):
    """Parsed manifest of one engine directory."""

    format: int = FORMAT
    name: str
    family: str
    source: WeightSource
    prediction: Prediction
    latent: Latent
    conditioning: Conditioning
    schedule: Schedule | EDMSchedule
    schedule_proof: ScheduleProof | None = None
    defaults: RequestDefaults
    tokenizers: Annotated[Mapping[Name, TokenizerEntry], msgspec.Meta(max_length=16)]
    components: Annotated[Mapping[Name, Component], msgspec.Meta(max_length=64)]
    preview: PreviewMap | None = None
    quality: Mapping[str, Mapping[str, float]] = {}
    acceleration: AccelerationPlan | None = None
    history: tuple[Stage, ...] = ()

    @property
    def shrink(self) -> int:
        """Factor by which an image of a request is smaller than the result."""
        return 1 if self.conditioning.encodes_images else self.latent.downscale

    @property
    def required_components(self) -> tuple[str, ...]:
        """Components that text to image needs, in the order in which they run."""
        encoders = [encoder.component for encoder in self.conditioning.encoders]
        if self.conditioning.channels and self.conditioning.encodes_images:
            encoders.append("vae_encoder")
        parts = [name for name in DENOISER_PARTS if name in self.components or name == "denoiser"]
        return (*encoders, *parts, "vae_decoder")

    @property
    def required_backends(self) -> set[str]:
        """Backends of the components that text to image needs."""
        return {self.components[name].backend for name in self.required_components}

    def check_complete(self, directory: Path) -> None:
        """Check that the directory has every component that text to image needs.

        Raises:
            ManifestError: one is missing, as after an export with --components.
        """
        missing = [name for name in self.required_components if name not in self.components]
        if missing:
            raise ManifestError(f"{directory} has no {missing[0]}: export it without --components")

    @property
    def size(self) -> int:
        """Bytes of all components' files; a file that several of them share counts once."""
        parts = self.components.values()
        return sum(entry.bytes for entry in {entry for part in parts for entry in part.files})

    @property
    def files(self) -> Iterator[FileEntry]:
        """Every file of the directory except the manifest itself, once."""
        yield from self.tokenizers.values()
        parts = self.components.values()
        yield from dict.fromkeys(entry for part in parts for entry in part.files)

    def write(self, directory: Path) -> None:
        """Write manifest.json into directory.

        Raises:
            ManifestError: it holds a value that a reader would refuse, such as NaN.
        """
        try:
            text = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        except (ValueError, RecursionError) as error:  # a lone surrogate, for example
            raise ManifestError(f"{directory / MANIFEST_FILE}: {error}") from error
        _decode(directory / MANIFEST_FILE, text)
        (directory / MANIFEST_FILE).write_bytes(text)

    @classmethod
    def read(cls, directory: Path, *, hashes: bool = True) -> "Manifest":
        """Read and check directory/manifest.json and every file that it names.

        With ``hashes``, each file's sha256 is compared, not only its size. Files that an ONNX graph
        names must be those of its component.

        Raises:
            ManifestError: the manifest is missing, malformed, of another format, or names a
                file that is missing, lies outside the directory, or has changed.
        """
        check_flag("hashes", hashes)
        directory = checked_path("the engine directory", directory)
        path = directory / MANIFEST_FILE
        manifest = _decode(path, read_content(path))
        entries = list(manifest.files)
        for entry in entries:
            check_file(directory, entry)
        if hashes:
            check_hashes(directory, entries)
        for component in manifest.components.values():
            check_graph(directory, component)
        return manifest


class _Header(msgspec.Struct):
    format: int


def _decode(path: Path, content: bytes) -> Manifest:
    """Return the manifest in a JSON text, strictly, once its format is known to be this one."""
    try:
        json.loads(content, object_pairs_hook=_refuse_duplicates)
        number = msgspec.json.decode(content, type=_Header).format
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}; export again") from error
    check_format(path, content, number)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
        check_parts(manifest)
    except (msgspec.DecodeError, LatentforgeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}; export again") from error
    return manifest


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Refuse a key that an object has twice: readers differ in which of the two values counts."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {key!r} occurs {count} times")
