"""Subset of the web UI's API (``/sdapi/v1``) that its clients need.

Fields of features that are off are accepted at every value, as the web UI ignores them then;
features that would change the image and do not exist here are refused by name.
"""

from __future__ import annotations

import base64
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.types import ASGIApp

from latentforge.runtime.record import Record
from latentforge.runtime.sampling import SAMPLERS
from latentforge.serve.errors import BadRequestError, UnknownJobError
from latentforge.serve.http.body import decode, read_json, read_query
from latentforge.serve.http.context import (
    Context,
    Output,
    Pictures,
    complete,
    completed,
    owner_of,
)
from latentforge.serve.http.endpoint import Endpoint, TextRequest
from latentforge.serve.http.envelope import Json
from latentforge.serve.http.fields import MAX_IMAGES, MAX_SEED, Base64, Label, Steps, Text
from latentforge.serve.http.jobs import decoded_pictures
from latentforge.serve.http.openai import REFUSALS, finished, makes_previews, warnings_of
from latentforge.serve.http.sse import answered
from latentforge.serve.job import Cancelled, Job
from latentforge.serve.pictures import encode_preview
from latentforge.serve.request import ImageRequest

__all__ = ["WebUIEndpoints"]

_GROUP = "Web UI"
_NAMES: Mapping[str, str] = {
    "steps": "steps",
    "height": "height",
    "width": "width",
    "pixels": "width",
    "sampler": "sampler_name",
    "samplers": "sampler_name",
    "guidance_scale": "cfg_scale",
    "image_guidance_scale": "image_cfg_scale",
    "strength": "denoising_strength",
    "negative": "negative_prompt",
    "image": "init_images",
}

_SAMPLERS: Mapping[str, str] = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
}
"""Samplers by their names in the web UI."""

_KARRAS: Mapping[str, str] = {
    "dpmpp_2m": "dpmpp_2m_karras",
    "dpmpp_2m_sde": "dpmpp_2m_sde_karras",
}

_NOISY = frozenset({"euler_ancestral", "kdpm2_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras"})
"""Samplers whose eta is 1."""

_MAX_TASKS = 10_000
_PREVIEWS = 10
_PICTURES = ("init_images", "mask")

Off = Annotated[bool, Meta(extra_json_schema={"enum": [False]})]
On = Annotated[bool, Meta(extra_json_schema={"enum": [True]})]
Zero = Annotated[float, Meta(ge=0, le=0)]
One = Annotated[float, Meta(ge=1, le=1)]
Side = Annotated[int, Meta(ge=1, le=16_384)]
Nothing = Annotated[tuple[Any, ...], Meta(max_length=0)]
NoObject = Annotated[dict[str, Any], Meta(max_length=0)]
Empty = Annotated[str, Meta(max_length=0)]
Many = Annotated[int, Meta(ge=1, le=MAX_IMAGES)]
WebSeed = Annotated[int, Meta(ge=-1, le=MAX_SEED, description="-1 is random")]


class Overrides(Record, frozen=True, kw_only=True):
    """Options for one request."""

    sd_model_checkpoint: Label | None = None


class WebFields(Record, frozen=True, kw_only=True):
    """Fields of both requests for images.

    Attributes:
        sampler_name: a name of the web UI's, or of this server's; the model's own if absent.
        scheduler: Karras selects the Karras noise levels of a sampler that has them.
        sampler_index: older name of sampler_name.
        force_task_id: id for /sdapi/v1/progress and /sdapi/v1/interrupt.
    """

    prompt: Text | None = None
    negative_prompt: Text | None = None
    width: Side | None = None
    height: Side | None = None
    steps: Steps | None = None
    cfg_scale: Annotated[float, Meta(ge=0, le=1000)] | None = None
    seed: WebSeed | None = None
    batch_size: Many | None = None
    n_iter: Many | None = None
    sampler_name: Label | None = None
    sampler_index: Label | None = None
    scheduler: Label | None = None
    eta: float | None = None
    override_settings: Overrides | None = None
    override_settings_restore_afterwards: On | None = None
    force_task_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    styles: Nothing | None = None
    subseed: int | None = None
    subseed_strength: Zero | None = None
    seed_resize_from_h: Annotated[int, Meta(ge=-1, le=0)] | None = None
    seed_resize_from_w: Annotated[int, Meta(ge=-1, le=0)] | None = None
    restore_faces: Off | None = None
    tiling: Off | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    s_churn: Zero | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: One | None = None
    script_name: Empty | None = None
    script_args: Nothing | None = None
    alwayson_scripts: NoObject | None = None
    send_images: On | None = None
    save_images: Off | None = None


class TextBody(WebFields, frozen=True, kw_only=True):
    """Body of POST /sdapi/v1/txt2img; the fields from denoising_strength on belong to enable_hr."""

    enable_hr: Off | None = None
    denoising_strength: float | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: Label | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: Label | None = None
    hr_sampler_name: Label | None = None
    hr_scheduler: Label | None = None
    hr_prompt: Text | None = None
    hr_negative_prompt: Text | None = None


class ImageBody(WebFields, frozen=True, kw_only=True):
    """Body of POST /sdapi/v1/img2img.

    Attributes:
        mask: light where to paint; the fields from mask_blur to inpainting_mask_invert belong to
            it.
        inpainting_fill: 1 starts from the image under the mask.
        image_cfg_scale: for models that edit an image.
    """

    init_images: Annotated[tuple[Base64, ...], Meta(min_length=1, max_length=1)]
    denoising_strength: Annotated[float, Meta(ge=0, le=1)] | None = None
    resize_mode: Annotated[int, Meta(ge=0, le=0)] | None = None
    mask: Base64 | None = None
    mask_blur: int | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: int | None = None
    initial_noise_multiplier: One | None = None
    image_cfg_scale: Annotated[float, Meta(ge=0, le=1000)] | None = None
    include_init_images: Off | None = None


class WebImages(Record, frozen=True, kw_only=True):
    """Answer of both: PNG files in base64, the request, and JSON about the images."""

    images: tuple[str, ...]
    parameters: dict[str, Any]
    info: str


class ProgressQuery(Record, frozen=True, kw_only=True):
    """Query of GET /sdapi/v1/progress."""

    id_task: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    skip_current_image: bool | None = None


class ProgressState(Record, frozen=True, kw_only=True):
    """Counters of a task."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressAnswer(Record, frozen=True, kw_only=True):
    """Progress of a task from 0 to 1, seconds left, and a preview."""

    progress: float = 0.0
    eta_relative: float = 0.0
    state: ProgressState = ProgressState()
    current_image: str | None = None
    textinfo: str | None = None


class InterruptBody(Record, frozen=True, kw_only=True):
    """Body of POST /sdapi/v1/interrupt: the force_task_id of the request to end."""

    id_task: Annotated[str, Meta(min_length=1, max_length=128)]


class SamplerItem(Record, frozen=True, kw_only=True):
    """Sampler."""

    name: str
    aliases: tuple[str, ...]
    options: dict[str, str] = {}


class SchedulerItem(Record, frozen=True, kw_only=True):
    """Noise schedule."""

    name: str
    label: str
    aliases: tuple[str, ...] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class ModelItem(Record, frozen=True, kw_only=True):
    """Model."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str = ""
    config: str | None = None


class OptionsAnswer(Record, frozen=True, kw_only=True):
    """Options of the server."""

    sd_model_checkpoint: str
    samples_format: Literal["png"] = "png"


class ScriptsAnswer(Record, frozen=True, kw_only=True):
    """Scripts: there are none."""

    txt2img: tuple[str, ...] = ()
    img2img: tuple[str, ...] = ()


class EmptyAnswer(Record, frozen=True, kw_only=True):
    """Answer without content."""


@dataclass(frozen=True)
class WebUIEndpoints:
    """Endpoints of the web UI's API.

    Attributes:
        context: of the server.
        tasks: ids of jobs by owner and force_task_id; the oldest are dropped.
    """

    context: Context
    tasks: OrderedDict[tuple[str, str], str] = field(default_factory=OrderedDict, repr=False)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoints."""
        return (*self._image_endpoints(), *self._lists())

    def _image_endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                method="POST", path="/sdapi/v1/txt2img", handler=self.from_text, group=_GROUP,
                summary="Generate images of a text.", parse=self._parse,
                body=TextBody, answer=WebImages, errors=REFUSALS, idempotent=True,
            ),
            Endpoint(
                method="POST", path="/sdapi/v1/img2img", handler=self.from_image, group=_GROUP,
                summary="Generate images from an image.",
                body=ImageBody, answer=WebImages, errors=REFUSALS, idempotent=True,
            ),
            Endpoint(
                method="GET", path="/sdapi/v1/progress", handler=self.progress, group=_GROUP,
                summary="Return the progress of a request by its force_task_id.",
                query=ProgressQuery, answer=ProgressAnswer, errors=(400,),
            ),
            Endpoint(
                method="POST", path="/sdapi/v1/interrupt", handler=self.interrupt, group=_GROUP,
                summary="End a request by its force_task_id, and no other.",
                body=InterruptBody, answer=EmptyAnswer, errors=(400, 404, 408, 410, 413, 415),
            ),
        )  # fmt: skip

    def _lists(self) -> tuple[Endpoint, ...]:
        rows = {
            "samplers": (self.samplers, "List the samplers.", tuple[SamplerItem, ...]),
            "schedulers": (self.schedulers, "List noise schedules.", tuple[SchedulerItem, ...]),
            "sd-models": (self.models, "List the models.", tuple[ModelItem, ...]),
            "options": (self.options, "Return the options.", OptionsAnswer),
            "scripts": (self.scripts, "List scripts, of which there are none.", ScriptsAnswer),
        }
        return tuple(
            Endpoint(
                method="GET", path=f"/sdapi/v1/{name}", handler=handler, group=_GROUP,
                summary=summary, answer=answer,
            )
            for name, (handler, summary, answer) in rows.items()
        )  # fmt: skip

    async def from_text(self, request: Request) -> ASGIApp:
        """Answer POST /sdapi/v1/txt2img."""
        body = await read_json(request, TextBody, self.context.options.body)
        return await self._images(request, body)

    async def from_image(self, request: Request) -> ASGIApp:
        """Answer POST /sdapi/v1/img2img."""
        body = await read_json(request, ImageBody, self.context.options.body)
        _check_mask(body)
        return await self._images(request, body)

    async def _images(self, request: Request, body: TextBody | ImageBody) -> ASGIApp:
        work = partial(self._completed, body)
        images = await completed(work, pictures=isinstance(body, ImageBody))
        job = await self.context.submit(request, images, body, None)
        if body.force_task_id is not None:
            self._remember(owner_of(request), body.force_task_id, job.id)
        kept = "idempotency-key" in request.headers
        abandoned = (lambda: None) if kept else (lambda: self.context.service.cancel(job.id))
        return await answered(request, self._answer(body, job.id), abandoned)

    def _parse(self, content: bytes) -> TextRequest:
        return TextRequest(images=self._completed(decode(TextBody, content)))

    def _completed(self, body: TextBody | ImageBody) -> ImageRequest:
        overrides = body.override_settings or Overrides()
        name, model = self.context.model(overrides.sd_model_checkpoint)
        pictures, settings = Pictures(), _settings(body)
        if isinstance(body, ImageBody):
            limits = self.context.options.pictures
            pictures = decoded_pictures(body.init_images[0], body.mask, limits)
            settings["strength"] = body.denoising_strength
            if "image" in model.manifest.conditioning.channels:
                settings["image_guidance_scale"] = body.image_cfg_scale
        return complete(
            name,
            model,
            body.prompt or "",
            pictures=pictures,
            count=_count(body),
            previews=_PREVIEWS if body.force_task_id and makes_previews(model) else 0,
            names=_NAMES,
            **settings,
        )

    async def _answer(self, body: TextBody | ImageBody, id: str) -> ASGIApp:
        job = await finished(self.context, id)
        files = [
            await self.context.base64(job.request, index, pixels, Output())
            for index, pixels in sorted(job.images.items())
        ]
        sent = {k: v for k, v in msgspec.to_builtins(body).items() if k not in _PICTURES}
        info = json.dumps(image_information(job))
        return Json(WebImages(images=tuple(files), parameters=sent, info=info))

    def _remember(self, owner: str, task: str, id: str) -> None:
        self.tasks[owner, task] = id
        self.tasks.move_to_end((owner, task))
        if len(self.tasks) > _MAX_TASKS:
            self.tasks.popitem(last=False)

    async def progress(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/progress."""
        query = read_query(request, ProgressQuery)
        if query.id_task is None:
            return Json(ProgressAnswer(textinfo="give id_task, the force_task_id of a request"))
        id = self.tasks.get((owner_of(request), query.id_task))
        if id is None:
            return Json(ProgressAnswer(textinfo="no request of this force_task_id"))
        job = self.context.service.get(id)
        return Json(_progress(job, with_image=not query.skip_current_image))

    async def interrupt(self, request: Request) -> ASGIApp:
        """Answer POST /sdapi/v1/interrupt."""
        body = await read_json(request, InterruptBody, self.context.options.body)
        id = self.tasks.get((owner_of(request), body.id_task))
        if id is None:
            raise UnknownJobError("no request of this force_task_id", param="id_task")
        self.context.service.cancel(id)
        return Json(EmptyAnswer())

    async def samplers(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/samplers."""
        titles = {ours: title for title, ours in _SAMPLERS.items()}
        names = {name: titles.get(name, name) for name in SAMPLERS}
        return Json([SamplerItem(name=title, aliases=(name,)) for name, title in names.items()])

    async def schedulers(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/schedulers."""
        rows = {"automatic": "Automatic", "karras": "Karras"}
        return Json([SchedulerItem(name=name, label=label) for name, label in rows.items()])

    async def models(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/sd-models."""
        names = self.context.service.models
        return Json([ModelItem(title=name, model_name=name) for name in names])

    async def options(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/options."""
        return Json(OptionsAnswer(sd_model_checkpoint=self.context.model(None)[0]))

    async def scripts(self, request: Request) -> ASGIApp:
        """Answer GET /sdapi/v1/scripts."""
        return Json(ScriptsAnswer())


def _check_mask(body: ImageBody) -> None:
    """Check the fields of a mask, which have no effect without one.

    Raises:
        BadRequestError: one asks for what does not exist here.
    """
    if body.mask is None:
        return
    only = {
        "mask_blur": (0, "the mask's edge is sharp"),
        "inpainting_fill": (1, "masked parts start from the image"),
        "inpaint_full_res": (False, "the whole image is generated"),
        "inpainting_mask_invert": (0, "light parts are painted"),
    }
    for name, (value, reason) in only.items():
        if getattr(body, name) not in (None, value):
            shown = json.dumps(value)
            raise BadRequestError(f"{name} must be {shown}: {reason}", param=name)


def _count(body: WebFields) -> int:
    count = (body.batch_size or 1) * (body.n_iter or 1)
    if count > MAX_IMAGES:
        raise BadRequestError(
            f"batch_size times n_iter is {count}, and {MAX_IMAGES} images are allowed",
            param="n_iter",
        )
    return count


def _settings(body: WebFields) -> dict[str, Any]:
    """Return the runtime's settings for the fields of a request."""
    return {
        "negative_prompt": body.negative_prompt,
        "height": body.height,
        "width": body.width,
        "steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "seed": None if body.seed == -1 else body.seed,
        "sampler": _sampler(body),
    }


def _sampler(body: WebFields) -> str | None:
    """Return the sampler that a request names.

    Raises:
        BadRequestError: there is none of this name, or not with this schedule or eta.
    """
    name = body.sampler_name or body.sampler_index
    if name is None:
        return None
    karras = (body.scheduler or "").lower() == "karras" or name.lower().endswith(" karras")
    plain = name[:-7] if name.lower().endswith(" karras") else name
    titles = {title.lower(): ours for title, ours in _SAMPLERS.items()}
    sampler = titles.get(plain.lower(), plain)
    if sampler not in SAMPLERS:
        listed = ", ".join([*_SAMPLERS, *SAMPLERS])
        raise BadRequestError(f"no sampler {name!r}: choose from {listed}", param="sampler_name")
    if (body.scheduler or "automatic").lower() not in ("automatic", "uniform", "karras"):
        raise BadRequestError(
            f"no scheduler {body.scheduler!r}: choose from automatic, karras", param="scheduler"
        )
    if karras and sampler not in _KARRAS:
        raise BadRequestError(
            f"{name} has no Karras noise levels here; these have: {', '.join(_KARRAS)}",
            param="scheduler",
        )
    sampler = _KARRAS[sampler] if karras else sampler
    _check_eta(sampler, body.eta)
    return sampler


def _check_eta(sampler: str, eta: float | None) -> None:
    fixed = 1.0 if sampler in _NOISY else 0.0 if sampler == "ddim" else None
    if fixed is not None and eta not in (None, fixed):
        raise BadRequestError(f"eta of {sampler} is {fixed:g}: send that, or omit it", param="eta")


def image_information(job: Job) -> dict[str, Any]:
    """Return the description of a job's images that clients of the web UI read."""
    settings = job.request.settings
    negative = settings.negative_prompts[0] if settings.negative_prompts else ""
    common = {
        "prompt": settings.prompts[0],
        "negative_prompt": negative,
        "seed": settings.seeds[0],
        "width": settings.width,
        "height": settings.height,
        "sampler_name": settings.sampler,
        "cfg_scale": settings.guidance_scale,
        "steps": settings.steps,
        "denoising_strength": settings.strength,
        "sd_model_name": job.request.model,
    }
    texts = [_infotext(job, index) for index in range(settings.count)]
    return {
        **common,
        "all_prompts": settings.prompts,
        "all_negative_prompts": [negative] * settings.count,
        "all_seeds": settings.seeds,
        "batch_size": settings.count,
        "index_of_first_image": 0,
        "infotexts": texts,
        "warnings": [f"{part.param}: {part.message}" for part in warnings_of(job)],
        "styles": [],
    }


def _infotext(job: Job, index: int) -> str:
    settings = job.request.settings
    negative = settings.negative_prompts[index : index + 1]
    values = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seeds[index],
        "Size": f"{settings.width}x{settings.height}",
        "Model": job.request.model,
    }
    last = ", ".join(f"{name}: {value}" for name, value in values.items())
    return "\n".join([settings.prompts[index], *(f"Negative prompt: {n}" for n in negative), last])


def _progress(job: Job, *, with_image: bool) -> ProgressAnswer:
    """Return the progress of a job, with its latest preview."""
    ended = job.end is not None
    step = job.step
    shown = step.previews if step is not None and with_image else {}
    picture = encode_preview(shown[min(shown)]) if shown else None
    elapsed = 0.0 if job.started is None else time.time() - job.started
    done = job.progress
    return ProgressAnswer(
        progress=done,
        eta_relative=elapsed * (1 - done) / done if done and not ended else 0.0,
        state=ProgressState(
            interrupted=isinstance(job.end, Cancelled),
            job=job.id,
            job_count=0 if ended else 1,
            sampling_step=step.step if step else 0,
            sampling_steps=step.count if step else job.request.settings.steps,
        ),
        current_image=None if picture is None else base64.b64encode(picture).decode(),
    )
