"""manifest.json: what an engine directory holds and how its parts fit together.

Every stage reads one engine directory and writes another, so this file is the only thing
that export, optimize and runtime share. docs/format.md is its specification.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from latentforge.runtime.errors import LatentforgeError, ManifestError, SettingsError, ShapeError
from latentforge.runtime.record import Record
from latentforge.runtime.sampling.schedule import Prediction, Schedule
from latentforge.runtime.shapes import ANY, Range, Shapes, nearest
from latentforge.runtime.tensor import Feeds, TensorSpec, bind

__all__ = [
    "CACHED_FEATURE",
    "FILENAME",
    "FORMAT",
    "MAX_TOKENS",
    "CalibratedFor",
    "Component",
    "Conditioning",
    "RequestDefaults",
    "TextEncoding",
    "AccelerationPlan",
    "FileEntry",
    "Latent",
    "Manifest",
    "Prediction",
    "WeightSource",
    "Stage",
    "DenoiserVariant",
    "TokenizerEntry",
    "DENOISER_PARTS",
    "check_plan",
    "hash_file",
]

FILENAME = "manifest.json"
FORMAT = 2

MAX_TOKENS = 8192

_MAX_BYTES = 4 << 20
_MAX_TRAIN_STEPS = 100_000

CACHED_FEATURE = "cached_feature"
"""What a full step gives beside its output, and a shallow one takes."""

_Ranks = Mapping[str, tuple[int, ...]]

_TENSORS: Mapping[str, tuple[_Ranks, _Ranks]] = {
    "denoiser": ({"sample": (4,)}, {"out_sample": (4,)}),
    "denoiser_time": ({"timestep": (1,)}, {}),
    "denoiser_cached": ({"sample": (4,), CACHED_FEATURE: (4,)}, {"out_sample": (4,)}),
    "vae_decoder": ({"latent_sample": (4,)}, {"sample": (4,)}),
    "vae_encoder": ({"sample": (4,)}, {"latent_parameters": (4,)}),
}
"""The inputs and outputs that components of these names have at least, by number of dimensions."""

DENOISER_PARTS = ("denoiser_prompt", "denoiser_time", "denoiser")
"""Components that a UNet may be cut into, in the order in which they run."""

_UNET_TOLD: _Ranks = {"timestep": (0, 1), "encoder_hidden_states": (3,)}
_UNET_INPUTS = {"sample", *_UNET_TOLD, "text_embeds", "time_ids", "timestep_cond"}
_UNET_LATER = {
    "denoiser_prompt": {"sample", "timestep"},
    "denoiser_time": {"sample"},
    "denoiser": set[str](),
}
"""Inputs that are not known yet when a part runs."""

_HASH_BLOCK = 1 << 20

Positive = Annotated[int, msgspec.Meta(ge=1)]
Small = Annotated[int, msgspec.Meta(ge=1, le=1024)]
DenoiserVariant = Literal["denoiser", "denoiser_reduced"]
"""Components that can make a whole step: exactly, or with fewer keys and values."""
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileEntry(Record, frozen=True, kw_only=True):
    """A file inside the engine directory, by its POSIX path relative to it."""

    file: str
    sha256: Digest
    bytes: int

    @classmethod
    def of(cls, path: Path, directory: Path) -> "FileEntry":
        """Describe a file anywhere in directory as it is now."""
        file = path.relative_to(directory).as_posix()
        return FileEntry(file=file, sha256=hash_file(path), bytes=path.stat().st_size)


class CalibratedFor(Record, frozen=True, kw_only=True):
    """The schedule of the denoising runs that the ranges of 8-bit activations were taken from."""

    sampler: str
    steps: Positive
    guidance_scale: float


class Component(FileEntry, frozen=True, kw_only=True):
    """One graph of the model: its files, the backend that runs it, and its signature.

    Attributes:
        data: the further files that the engine reads, such as external weights.
        overflows: marks a graph whose values leave the range of half precision.
        calibration: that of quantized activations, which hold for one schedule.
        shapes: what it was built for; none allow any size.
        options: of the backend, as the engine was compiled with; loading takes them too.
        device: what a native engine was built for, such as a GPU and a library's version.
        custom_ops: marks a graph with the operators of runtime/kernels.
        max_rows: the most rows of one run where this was fastest when it was measured.
    """

    backend: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    data: tuple[FileEntry, ...] = ()
    overflows: bool = False
    calibration: CalibratedFor | None = None
    shapes: tuple[Mapping[str, Range], ...] = ()
    options: Mapping[str, bool | int | float | str] = {}
    device: Mapping[str, str] = {}
    custom_ops: bool = False
    max_rows: Positive | None = None

    @property
    def free(self) -> tuple[str, ...]:
        """The names of its free dimensions, in order."""
        sizes = (size for spec in self.inputs.values() for size in spec.shape)
        return tuple(dict.fromkeys(s for s in sizes if isinstance(s, str) and s.isidentifier()))

    def sizes(self, feeds: Feeds) -> dict[str, int]:
        """The free dimensions that some feeds settle, unchecked."""
        given = ((spec, feeds[name].shape) for name, spec in self.inputs.items() if name in feeds)
        return {
            name: size
            for spec, shape in given
            for name, size in zip(spec.shape, shape, strict=False)
            if isinstance(name, str) and name.isidentifier()
        }

    def fit(self, feeds: Feeds) -> tuple[dict[str, int], int | None]:
        """Check feeds, and return the size of each free dimension and the shapes they fit.

        Raises:
            ShapeError: they do not fit the inputs, or none of the shapes.
        """
        sizes = bind(self.inputs, feeds)
        return sizes, nearest(self.shapes, sizes)

    def specialize(self, shapes: tuple[Shapes, ...]) -> "Component":
        """The component of these shapes alone: a size that all agree on becomes a number.

        Raises:
            ShapeError: one of the dimensions is not free in this graph.
        """
        for name in {name for each in shapes for name in each}:
            if name not in self.free:
                raise ShapeError(f"{self.file}: its {name} is not free: export it again")
        sizes = {
            name: allowed.min
            for name, allowed in (shapes[0] if shapes else {}).items()
            if allowed.fixed and all(each[name] == allowed for each in shapes)
        }
        left = [{n: r for n, r in each.items() if n not in sizes} for each in shapes]
        return msgspec.structs.replace(
            self,
            inputs={name: spec.specialize(sizes) for name, spec in self.inputs.items()},
            outputs={name: spec.specialize(sizes) for name, spec in self.outputs.items()},
            shapes=tuple(each for each in left if each),
        )

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the component, the engine itself first."""
        return (FileEntry(file=self.file, sha256=self.sha256, bytes=self.bytes), *self.data)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.bytes for entry in self.files)


class TokenizerEntry(FileEntry, frozen=True, kw_only=True):
    """A tokenizer in the tokenizers library's format; ids are padded or cut to max_length."""

    max_length: Annotated[int, msgspec.Meta(ge=3, le=MAX_TOKENS)]


class WeightSource(Record, frozen=True, kw_only=True):
    """Where the weights come from: ``sha256`` is that of each component's weight files."""

    checkpoint: str
    sha256: Mapping[str, Digest]
    license: str | None = None


class TextEncoding(Record, frozen=True, kw_only=True):
    """A text encoder: its component and tokenizer, and which outputs of it are used.

    ``context`` is (batch, tokens, width); ``pooled``, where there is one, (batch, width).
    """

    component: str
    tokenizer: str
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


class Conditioning(Record, frozen=True, kw_only=True):
    """What the UNet is told beside latents and timestep.

    Attributes:
        encoders: their contexts, joined along the width, are ``encoder_hidden_states``, and
            the last pooled output is ``text_embeds``.
        zero_negative: without a negative prompt its embeddings are zeros, and not those of "".
        time_ids: the numbers that make up the UNet's input of that name, in order.
    """

    encoders: tuple[TextEncoding, ...]
    zero_negative: bool = False
    time_ids: tuple[TimeId, ...] = ()


class Latent(Record, frozen=True, kw_only=True):
    """The latent space: an image of H x W pixels is (channels, H/downscale, W/downscale).

    Latent sides are multiples of ``multiple``, because the UNet halves them that often.
    """

    channels: Small
    scaling_factor: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
    downscale: Small
    multiple: Small

    def takes_extra_channels(self, unet: Component) -> bool:
        """Whether a UNet takes more than latents: the mask and what it leaves of a picture."""
        return unet.inputs["sample"].shape[1] != self.channels

    def sides(self, unet: Component) -> list[tuple[Range, Range]]:
        """The heights and widths, in pixels, that a UNet was built for; none allow any."""
        free = unet.inputs["sample"].shape[2:]
        pairs = []
        for shapes in unet.shapes or ({},):
            sides = [shapes.get(s, ANY) if isinstance(s, str) else Range.of(s) for s in free]
            height, width = (s if s == ANY else s.scaled(up=self.downscale) for s in sides)
            if (height, width) not in pairs:
                pairs.append((height, width))
        return [] if (ANY, ANY) in pairs else pairs


class RequestDefaults(Record, frozen=True, kw_only=True):
    """What a request gets that does not say otherwise."""

    sampler: str
    steps: Positive
    guidance_scale: float
    guidance_rescale: float
    height: Positive
    width: Positive


class AccelerationPlan(Record, frozen=True, kw_only=True):
    """Cheaper evaluations of the UNet, judged for one schedule: requests follow it unless exact.

    Attributes:
        sampler, steps: the schedule that it was judged for.
        timesteps: the model's, strictly falling, one a step; none are the sampler's own.
        guidance_interval: the least and the most sigma of a noise level (its share of noise, 0 to 1) that
            has guidance: Kynkaanniemi et al. (2024), arXiv 2404.07724. Elsewhere the UNet sees
            the prompts alone, a row an image. None is guidance everywhere.
        cached_steps: evaluations, counted from 0, that take the deep feature of the last full one:
            DeepCache, Ma et al. (2023), arXiv 2312.00858. Never the first.
        variant: the component that makes the full ones.
        measured: figures such as speedup, psnr and retrieval, against the engines without it.
    """

    sampler: str
    steps: Positive
    timesteps: tuple[float, ...] = ()
    guidance_interval: tuple[float, float] | None = None
    cached_steps: tuple[int, ...] = ()
    variant: DenoiserVariant = "denoiser"
    measured: Mapping[str, float] = {}

    def __post_init__(self) -> None:
        try:
            check_plan(self.steps, self.timesteps, self.guidance_interval, self.cached_steps)
        except SettingsError as error:
            raise ManifestError(f"acceleration: {error}") from error

    @property
    def request(self) -> dict[str, Any]:
        """The settings of a request that follows it."""
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "timesteps": self.timesteps,
            "guidance_interval": self.guidance_interval,
            "cached_steps": self.cached_steps,
            "variant": self.variant,
        }


def check_plan(
    steps: int,
    timesteps: Sequence[float],
    guidance_interval: tuple[float, float] | None,
    cached_steps: Sequence[int],
) -> None:
    """Refuse cheaper evaluations that fit no schedule of so many steps: see AccelerationPlan.

    Raises:
        SettingsError: they contradict each other, or are out of order or range.
    """
    if timesteps and len(timesteps) != steps:
        raise SettingsError(f"{len(timesteps)} timesteps for {steps} steps: give one a step")
    if not all(later < earlier for earlier, later in pairwise(timesteps)):
        raise SettingsError("timesteps fall strictly, from noise to picture")
    if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise SettingsError(
            f"guidance lies between two sigmas of 0 to 1, the lower first, not {guidance_interval[0]:g} "
            f"and {guidance_interval[1]:g}"
        )
    if not all(earlier < later for earlier, later in pairwise((0, *cached_steps, steps))):
        raise SettingsError(
            f"shallow evaluations are counted from 0 and rise strictly, and the first of {steps} "
            f"is none: take some of 1 to {steps - 1}"
        )


class Stage(Record, frozen=True, kw_only=True):
    """One entry of the history: a stage that this directory went through.

    ``measured`` holds figures of what went in and what came out, by component, or ``image``.
    """

    name: str
    options: Mapping[str, Any]
    tools: Mapping[str, str]
    seconds: float
    passes: Mapping[str, int] = {}
    measured: Mapping[str, Mapping[str, float]] = {}


class Manifest(Record, frozen=True, kw_only=True):
    """The parsed manifest of one engine directory."""

    format: int = FORMAT
    name: str
    family: str
    source: WeightSource
    prediction: Prediction
    latent: Latent
    conditioning: Conditioning
    schedule: Schedule
    defaults: RequestDefaults
    tokenizers: Mapping[str, TokenizerEntry]
    components: Mapping[str, Component]
    quality: Mapping[str, Mapping[str, float]] = {}
    acceleration: AccelerationPlan | None = None
    history: tuple[Stage, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The components that text to image runs on, in the order in which it does."""
        encoders = [encoder.component for encoder in self.conditioning.encoders]
        unet = self.components.get("denoiser")
        if unet is not None and self.latent.takes_extra_channels(unet):
            encoders.append("vae_encoder")
        parts = [name for name in DENOISER_PARTS if name in self.components or name == "denoiser"]
        return (*encoders, *parts, "vae_decoder")

    @property
    def size(self) -> int:
        """Bytes of all components' files, of which several may share one."""
        parts = self.components.values()
        return sum(entry.bytes for entry in {entry for part in parts for entry in part.files})

    @property
    def files(self) -> Iterator[FileEntry]:
        """Every file of the directory but the manifest itself, once."""
        yield from self.tokenizers.values()
        parts = self.components.values()
        yield from dict.fromkeys(entry for part in parts for entry in part.files)

    def write(self, directory: Path) -> None:
        """Write manifest.json into directory.

        Raises:
            ManifestError: it holds a value that no reader would accept, such as NaN.
        """
        text = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        _decode(directory / FILENAME, text)
        (directory / FILENAME).write_bytes(text)

    @classmethod
    def read(cls, directory: Path, *, hashes: bool = True) -> "Manifest":
        """Read and check directory/manifest.json and every file that it names.

        Args:
            directory: the engine directory.
            hashes: compare each file's sha256, not only its size.

        Raises:
            ManifestError: the manifest is missing, malformed, of another format, or names a
                file that is missing, lies outside the directory, or has changed.
        """
        path = directory / FILENAME
        manifest = _decode(path, _read_bytes(path))
        entries = list(manifest.files)
        for entry in entries:
            _check_file(directory, entry)
        if hashes:
            _check_hashes(directory, entries)
        return manifest


class _Header(msgspec.Struct):
    format: int


def _read_bytes(path: Path) -> bytes:
    hint = "is this a directory that latentforge build or export wrote?"
    try:
        if not path.is_file():  # nor a pipe, on which reading would wait for ever
            raise ManifestError(f"{path.parent} holds no {FILENAME}: {hint}")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}; {hint}") from error
    if len(content) > _MAX_BYTES:
        raise ManifestError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: not a manifest")
    return content


def _decode(path: Path, content: bytes) -> Manifest:
    """Parse strictly, but look at the format first: a newer one may have any keys."""
    try:
        json.loads(content, object_pairs_hook=_refuse_duplicates)
        found = msgspec.json.decode(content, type=_Header).format
        if found == FORMAT:
            manifest = msgspec.json.decode(content, type=Manifest)
            _check_parts(manifest)
            return manifest
    except (msgspec.DecodeError, LatentforgeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}; export again") from error
    raise ManifestError(
        f"{path} is of format {found} and this release reads {FORMAT}: "
        "export again, or install the latentforge that wrote it"
    )


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Of a key that is there twice, one reader would take the first and another the last."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {key!r} is there {count} times")


def _check_parts(manifest: Manifest) -> None:
    """Refuse parts that are each well-formed and do not fit together."""
    if (steps := manifest.schedule.train_steps) > _MAX_TRAIN_STEPS:
        raise ManifestError(f"schedule: train_steps is at most {_MAX_TRAIN_STEPS}, not {steps}")
    for encoder in manifest.conditioning.encoders:
        _check_encoder(manifest, encoder)
    for name, component in manifest.components.items():
        inputs, outputs = _TENSORS.get(name, ({}, {}))
        for each in component.shapes:
            if not each or (unknown := each.keys() - set(component.free)):
                found = min(unknown) if each else "nothing"
                raise ManifestError(f"{name}: shapes of {found}, which is no free dimension of it")
        _check_tensors(f"{name}: input", component.inputs, inputs)
        _check_tensors(f"{name}: output", component.outputs, outputs)
    _check_channels(manifest)
    _check_conditioning(manifest)
    _check_cheaper(manifest)
    if manifest.acceleration is not None:
        _check_fast(manifest, manifest.acceleration)


def _check_encoder(manifest: Manifest, encoder: TextEncoding) -> None:
    component = manifest.components.get(encoder.component)
    if component is None:  # a directory of some components alone
        return
    if encoder.tokenizer not in manifest.tokenizers:
        raise ManifestError(f"there is a {encoder.component} and no {encoder.tokenizer}")
    pooled = {} if encoder.pooled is None else {encoder.pooled: (2,)}
    _check_tensors(f"{encoder.component}: input", component.inputs, {"input_ids": (2,)})
    _check_tensors(
        f"{encoder.component}: output", component.outputs, {encoder.context: (3,), **pooled}
    )


def _check_channels(manifest: Manifest) -> None:
    channels = manifest.latent.channels
    allowed = {
        "denoiser": ("sample", (channels, 2 * channels + 1)),
        "vae_decoder": ("latent_sample", (channels,)),
    }
    for name, (key, sizes) in allowed.items():
        if name in manifest.components:
            found = manifest.components[name].inputs[key].shape[1]
            if found not in sizes:
                raise ManifestError(f"{name}: {key} has {found} channels, and latents {channels}")


def _check_conditioning(manifest: Manifest) -> None:
    """The UNet's further inputs are those that the runtime knows how to fill."""
    conditioning = manifest.conditioning
    if not conditioning.encoders:
        raise ManifestError("conditioning: there is no text encoder")
    if "denoiser" not in manifest.components:
        return
    inputs = _check_unet(manifest)
    _check_tensors("unet: input", inputs, _UNET_TOLD)
    if "text_embeds" in inputs and not any(e.pooled for e in conditioning.encoders):
        raise ManifestError("unet: it takes text_embeds, and no text encoder has a pooled output")
    ids = inputs.get("time_ids")
    if ids is not None and ids.shape[1:] != (len(conditioning.time_ids),):
        raise ManifestError(
            f"unet: time_ids has shape {ids}, and conditioning {len(conditioning.time_ids)} of them"
        )


def _check_unet(manifest: Manifest) -> dict[str, TensorSpec]:
    """What a UNet takes, all its parts together, once it is clear that these fit together."""
    inputs: dict[str, TensorSpec] = {}
    givers: dict[str, str] = {}
    parts = {n: manifest.components[n] for n in DENOISER_PARTS if n in manifest.components}
    for name, part in parts.items():
        for key, spec in part.inputs.items():
            if key in givers:
                _check_handed(parts, givers[key], name, key)
            elif key in _UNET_INPUTS - _UNET_LATER[name]:
                inputs[key] = spec
            else:
                raise ManifestError(f"{name}: nothing is known to give it as {key!r}")
        for key in part.outputs if name != "denoiser" else ():
            if key in givers or key in _UNET_INPUTS:
                giver = givers.get(key, "the runtime")
                raise ManifestError(f"{name}: it gives {key!r}, which {giver} gives too")
            givers[key] = name
    taken = {key for part in parts.values() for key in part.inputs}
    if unused := givers.keys() - taken:
        raise ManifestError(f"{givers[min(unused)]}: no part of the UNet takes {min(unused)!r}")
    return inputs


def _check_handed(parts: Mapping[str, Component], giver: str, taker: str, key: str) -> None:
    """What one part gives is what another takes, with the rows that it has there."""
    given, taken = parts[giver].outputs[key], parts[taker].inputs[key]
    own = parts[taker].inputs["timestep" if taker == "denoiser_time" else "sample"].shape[:1]
    rows = [own]
    if giver == "denoiser_time":  # which has one row for all where it knows of no others
        rows = [(1,)] if parts[giver].inputs.keys() == {"timestep"} else [own, (1,)]
    alike = given.dtype == taken.dtype and given.shape[1:] == taken.shape[1:]
    if not alike or taken.shape[:1] not in rows:
        raise ManifestError(f"{taker}: it takes {key} as {taken}, and {giver} gives {given}")


def _check_cheaper(manifest: Manifest) -> None:
    """The UNets of cheaper evaluations take and give what the exact one does."""
    parts = manifest.components
    unet, cached, reduced = (
        parts.get(n) for n in ("denoiser", "denoiser_cached", "denoiser_reduced")
    )
    if unet is not None and cached is not None:
        known = {**unet.inputs, **unet.outputs}
        for key, spec in {**cached.inputs, **cached.outputs}.items():
            if known.get(key) != spec:
                theirs = known.get(key, "nothing of that name")
                raise ManifestError(f"denoiser_cached: {key} is {spec}, and denoiser has {theirs}")
    if unet is not None and reduced is not None:
        if (reduced.inputs, reduced.outputs) != (unet.inputs, unet.outputs):
            raise ManifestError(
                "denoiser_reduced: its inputs and outputs are not those of denoiser"
            )


def _check_fast(manifest: Manifest, plan: AccelerationPlan) -> None:
    wanted = [plan.variant, *(["denoiser_cached"] if plan.cached_steps else [])]
    for name in wanted:
        if name not in manifest.components:
            raise ManifestError(f"acceleration: it takes {name}, and there is no such component")
    manifest.schedule.check(plan.timesteps)


def _check_tensors(what: str, found: Mapping[str, TensorSpec], needed: _Ranks) -> None:
    for name, ranks in needed.items():
        if name not in found or len(found[name].shape) not in ranks:
            raise ManifestError(f"{what} {name!r} with {ranks[-1]} dimensions is missing")


def _check_file(directory: Path, entry: FileEntry) -> None:
    pure = PurePosixPath(entry.file)
    if not entry.file.isprintable() or pure.is_absolute() or ".." in pure.parts:
        raise ManifestError(f"{directory}: {entry.file!r} is no path inside the engine directory")
    path = directory / entry.file
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        size = path.stat().st_size if inside and path.is_file() else None
    except (OSError, RuntimeError):  # a name too long, links in a circle
        inside, size = True, None
    if not inside:
        raise ManifestError(f"{directory}: {entry.file!r} lies outside the engine directory")
    if size is None:
        raise ManifestError(f"{directory}: no file {entry.file!r}; export again")
    if size != entry.bytes:
        raise ManifestError(
            f"{path} has {size} bytes and the manifest says {entry.bytes}: "
            "the file was cut short or replaced; export again"
        )


def _check_hashes(directory: Path, entries: list[FileEntry]) -> None:
    # hashlib lets go of the interpreter lock, so threads really run side by side
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_hash, [directory / entry.file for entry in entries])
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                raise ManifestError(
                    f"{directory / entry.file} has another sha256 than the manifest says: "
                    "the file was damaged or replaced; export again"
                )


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from error


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
