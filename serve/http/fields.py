"""Bodies of requests and answers: the one source of validation and of the OpenAPI description.

A field that would change nothing is accepted at the values that ask for what is done anyway, and
refused by name at others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from latentforge.runtime.record import Record
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.settings import MAX_PROMPT
from latentforge.serve.pictures import ImageFormat

__all__ = [
    "MAX_IMAGES",
    "EditForm",
    "GenerationBody",
    "IgnoredPart",
    "ImageFields",
    "ImageListAnswer",
    "ImageAnswer",
    "JobAnswer",
    "JobBody",
    "JobImage",
    "JobProgress",
    "ModelAnswer",
    "ModelListAnswer",
    "OpenAIFields",
    "OutputFields",
]

MAX_IMAGES = 10
"""Most images of one request, as at OpenAI."""

MAX_SEED = (1 << 63) - 1

Text = Annotated[str, Meta(max_length=MAX_PROMPT)]
Label = Annotated[str, Meta(max_length=512)]
Base64 = Annotated[str, Meta(description="PNG, JPEG or WebP picture in base64, or a data: URI")]
Sampler = Annotated[str, Meta(extra_json_schema={"enum": list(SAMPLERS)})]
Count = Annotated[int, Meta(ge=1, le=MAX_IMAGES, description="number of images")]
Seed = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_SEED,
        description="seed of the first image; image i has seed + i. Random if absent",
    ),
]
Size = Annotated[
    str,
    Meta(
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT in pixels, or auto: that of the image, or the model's own",
    ),
]
Steps = Annotated[int, Meta(ge=1, le=1000, description="denoising steps")]
Scale = Annotated[float, Meta(ge=0, le=1000)]
Timeout = Annotated[
    float, Meta(gt=0, le=86_400, description="seconds until the request ends with 504")
]


class ImageFields(Record, frozen=True, kw_only=True):
    """Images to generate.

    Attributes:
        prompt: text of the images.
        model: name of a model that GET /v1/models lists; the first one if absent.
        unaccelerated: true to ignore the acceleration plan of the engines.
    """

    prompt: Text
    model: Label | None = None
    n: Count | None = None
    size: Size | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None
    guidance_rescale: Annotated[float, Meta(ge=0, le=1)] | None = None
    image_guidance_scale: Annotated[float, Meta(ge=1, le=1000)] | None = None
    noise_level: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    sampler: Sampler | None = None
    seed: Seed | None = None
    strength: Annotated[float, Meta(ge=0, le=1)] | None = None
    unaccelerated: bool | None = None
    timeout: Timeout | None = None


class OutputFields(ImageFields, frozen=True, kw_only=True):
    """Images to generate, and the files to send them in."""

    output_format: ImageFormat | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None


class OpenAIFields(OutputFields, frozen=True, kw_only=True):
    """Fields of OpenAI's API, with those that mean nothing here at the values that hold anyway.

    Attributes:
        quality: the model's own, which num_inference_steps changes.
        style: natural is the prompt as it stands.
        background: images are opaque.
        moderation: prompts and images are not judged.
        user, safety_identifier: not used.
    """

    response_format: Literal["url", "b64_json"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None


class GenerationBody(OpenAIFields, frozen=True, kw_only=True):
    """Body of POST /v1/images/generations."""

    style: Literal["natural"] | None = None


class EditForm(OpenAIFields, frozen=True, kw_only=True):
    """Form of POST /v1/images/edits.

    Attributes:
        image: picture to start from; without a mask, its fully transparent pixels are painted.
        mask: picture that is fully transparent where to paint, of the size of the image.
    """

    image: bytes
    mask: bytes | None = None
    input_fidelity: Literal["low"] | None = None


class JobBody(OutputFields, frozen=True, kw_only=True):
    """Body of POST /v1/jobs.

    Attributes:
        image: picture to start from.
        mask: picture of the same size, light where to paint.
        depth_map: depth of the image in any unit, light where it is near, for models that take it.
        previews: previews of each image while it runs.
    """

    image: Base64 | None = None
    mask: Base64 | None = None
    depth_map: Base64 | None = None
    previews: Annotated[int, Meta(ge=0, le=100)] | None = None


class IgnoredPart(Record, frozen=True, kw_only=True):
    """Field that had no effect in part, and why."""

    param: str
    message: str


class ImageAnswer(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Finished image: its file in base64, or the address of the file; and its seed."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageListAnswer(Record, frozen=True, kw_only=True):
    """Answer of POST /v1/images/generations and /v1/images/edits.

    Attributes:
        warnings: fields that had no effect in part, such as the end of a long prompt.
    """

    created: int
    data: tuple[ImageAnswer, ...]
    warnings: tuple[IgnoredPart, ...] = ()
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    quality: None = None
    usage: None = None


class ModelAnswer(Record, frozen=True, kw_only=True):
    """Model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelListAnswer(Record, frozen=True, kw_only=True):
    """Models of this server."""

    object: Literal["list"] = "list"
    data: tuple[ModelAnswer, ...]


class JobProgress(Record, frozen=True, kw_only=True):
    """Progress of a job that runs: steps of its images done, and the part from 0 to 1."""

    step: int
    steps: int
    fraction: float


class JobImage(Record, frozen=True, kw_only=True):
    """Finished image of a job, at an address that needs no key and expires with the job."""

    index: int
    seed: int
    url: str


class JobFailure(Record, frozen=True, kw_only=True):
    """Reason for which a job has no result."""

    code: str
    message: str


class JobAnswer(Record, frozen=True, kw_only=True):
    """Job as it stands.

    Attributes:
        queue_position: 0 is the next; None once it runs.
        warnings: fields that had no effect in part, such as the end of a long prompt; known with
            the first image.
        created, started, ended: seconds since the epoch.
    """

    id: str
    object: Literal["image.job"] = "image.job"
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    queue_position: int | None
    progress: JobProgress
    images: tuple[JobImage, ...]
    seeds: tuple[int, ...]
    size: str
    warnings: tuple[IgnoredPart, ...] = ()
    error: JobFailure | None
    created: float
    started: float | None
    ended: float | None
    poll_url: str
    events_url: str
    cancel_url: str
