"""Settings of one request, complete and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from secrets import randbits
from typing import Any, TypedDict, get_args

from latentforge.runtime import sampling
from latentforge.runtime.acceleration import (
    MAX_STEPS,
    AccelerationPlan,
    DenoiserVariant,
    check_plan,
    resolve_acceleration,
)
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.manifest import MAX_SIDE, RequestDefaults
from latentforge.runtime.validation import (
    check_count,
    check_flag,
    check_items,
    check_number,
    plain,
    shown,
)

__all__ = [
    "MAX_PROMPT",
    "Request",
    "Settings",
    "check_incomplete",
    "check_prompts",
    "check_seeds",
    "resolve",
]

MAX_PROMPT = 16_384
"""Longest prompt in characters. Text encoders read some 75 tokens: more is a mistake or attack."""

_MAX_TIMESTEP = 100_000

_TEXTS = ("prompts", "negative_prompts")

_ANY_DEFAULTS = RequestDefaults(
    sampler="euler",
    steps=MAX_STEPS,
    guidance_scale=7.5,
    guidance_rescale=0.0,
    height=512,
    width=512,
)
"""Defaults that complete every request which some engines could fulfil."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Complete settings of one request.

    Raises SettingsError, or ShapeError for sizes, if no engines could fulfil it.

    Attributes:
        prompts: one per image, or per images_per_prompt images.
        seed: of the noise of all images together, or one for each image, which is then the image
            of this seed alone.
        negative_prompts: one per prompt. None is different from empty ones for models that were
            trained with zeros in place of the unconditional embedding.
        guidance_scale: classifier-free guidance scale; 1 or less turns guidance off.
        guidance_rescale: phi of Lin et al. (2023), arXiv 2305.08891, equation 16.
        image_guidance_scale: scale of guidance by the image to edit, from 1, which has no effect;
            without classifier-free guidance it has none either.
        noise_level: amount of noise on the image to enlarge, a timestep of its own schedule.
        strength: fraction of the steps that an initial image goes through, in (0, 1].
        denoising_start: fraction of the schedule that another run has completed.
        denoising_end: fraction of the schedule after which to stop, for another run to continue.
        original_size, crop, target_size: size conditioning of Stable Diffusion XL in pixels, as
            (height, width) or (top, left); a size of None is the image's own.
        aesthetic_score, negative_aesthetic_score: conditioning of its refiner, from 1 to 10.
        timesteps: timestep at the start of each step, strictly decreasing; the sampler's own if
            empty.
        guidance_interval: lowest and highest sigma with guidance; None for all.
        cached_steps: denoiser evaluations that reuse the cached feature of the last full one.
        variant: component that makes the full evaluations. For these four see AccelerationPlan.
        unaccelerated: True if the engines' acceleration plan, if any, is ignored.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] = ()
    images_per_prompt: int = 1
    sampler: str
    steps: int
    guidance_scale: float
    guidance_rescale: float
    image_guidance_scale: float = 1.0
    noise_level: int = 0
    height: int
    width: int
    seed: int | tuple[int, ...] = field(default_factory=lambda: randbits(32))
    strength: float = 1.0
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    timesteps: tuple[float, ...] = ()
    guidance_interval: tuple[float, float] | None = None
    cached_steps: tuple[int, ...] = ()
    variant: DenoiserVariant = "denoiser"
    unaccelerated: bool = False

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self) if item.name not in _TEXTS):
            object.__setattr__(self, name, plain(getattr(self, name)))
        sampling.get(self.sampler if isinstance(self.sampler, str) else shown(self.sampler))
        check_prompts(self.prompts, self.negative_prompts)
        check_count("steps", self.steps, MAX_STEPS)
        check_count("images_per_prompt", self.images_per_prompt, 1024)
        check_number("guidance_scale", self.guidance_scale, 0, 1000)
        check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        check_number("image_guidance_scale", self.image_guidance_scale, 1, 1000)
        _check_level(self.noise_level)
        check_seeds(self.seed, self.count)
        if self.seed == self.seeds[:1]:
            object.__setattr__(self, "seed", self.seeds[0])
        for name, side in (("height", self.height), ("width", self.width)):
            if type(side) is not int or not 1 <= side <= MAX_SIDE:
                raise ShapeError(f"{name} must be 1 to {MAX_SIDE} pixels, not {shown(side)}")
        check_number("strength", self.strength, 0, 1)
        _check_fractions(self.denoising_start, self.denoising_end)
        for name in ("original_size", "crop", "target_size"):
            _check_pair(name, getattr(self, name))
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            check_number(name, getattr(self, name), 0, 10)
        _check_acceleration(self)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each image, or the one of all images together."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    @property
    def uses_guidance(self) -> bool:
        """True if the negative prompts take effect: above scale 1, as in diffusers."""
        return self.guidance_scale > 1

    @property
    def guidance_rows(self) -> int:
        """Rows per image that guidance takes: see Guidance."""
        if not self.uses_guidance:
            return 1
        return 2 if self.image_guidance_scale == 1 else 3

    @property
    def accelerated(self) -> bool:
        """True if the denoiser does less than the sampler's own schedule (class B)."""
        less = self.guidance_interval not in (None, (0, 1)) or self.variant != "denoiser"
        return less or bool(self.timesteps or self.cached_steps)

    def with_plan(self, plan: AccelerationPlan) -> "Settings":
        """Return these settings, accelerated by a plan."""
        return replace(self, unaccelerated=False, **plan.request)


class Request(TypedDict, total=False):
    """Settings that a caller may pass in; the manifest's plan and defaults supply the rest.

    With ``cache_interval`` N every Nth evaluation is full and the others are ``cached_steps``.
    """

    negative_prompt: str | Sequence[str]
    images_per_prompt: int
    sampler: str
    steps: int
    guidance_scale: float
    guidance_rescale: float
    image_guidance_scale: float
    noise_level: int
    height: int
    width: int
    seed: int | Sequence[int]
    strength: float
    denoising_start: float
    denoising_end: float
    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float
    negative_aesthetic_score: float
    timesteps: tuple[float, ...]
    guidance_interval: tuple[float, float]
    cached_steps: tuple[int, ...]
    cache_interval: int
    variant: DenoiserVariant
    unaccelerated: bool


def resolve(
    defaults: RequestDefaults,
    prompt: str | Sequence[str],
    request: Request,
    plan: AccelerationPlan | None = None,
) -> Settings:
    """Complete a request and check it.

    Args:
        defaults: defaults of the manifest.
        prompt: one prompt, or several.
        request: settings that the caller passed in; None values count as omitted.
        plan: acceleration plan of the manifest.

    Raises:
        SettingsError: a setting is unknown or out of range, or the plan is for another schedule.
        ShapeError: a size is out of range.
    """
    if unknown := request.keys() - Request.__annotations__.keys():
        names = ", ".join(Request.__annotations__)
        raise SettingsError(f"no setting {shown(min(unknown))}: choose from {names}")
    passed = _normalized({key: value for key, value in request.items() if value is not None})
    prompts = _texts(prompt, 1)
    negative = _texts(passed.pop("negative_prompt", ()), len(prompts))
    fields = {key: getattr(defaults, key) for key in defaults.__struct_fields__}
    complete = resolve_acceleration(fields, passed, plan)
    return Settings(prompts=prompts, negative_prompts=negative, **complete)


def check_incomplete(request: Request, prompts: tuple[str, ...] = ()) -> None:
    """Check settings and prompts before there are engines whose defaults complete them.

    Raises:
        SettingsError, ShapeError: a setting or a prompt is wrong for all engines.
    """
    resolve(_ANY_DEFAULTS, "a prompt", request)
    if prompts:
        check_prompts(prompts, ())


def _normalized(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert numpy's numbers and the lists of a JSON request, and count the timesteps."""
    passed = {k: value if k == "negative_prompt" else plain(value) for k, value in request.items()}
    if isinstance(times := passed.get("timesteps"), tuple) and times:
        passed.setdefault("steps", len(times))
    return passed


def _texts(value: str | Sequence[str], count: int) -> tuple[str, ...]:
    """Return a single text `count` times, or several texts as they are."""
    if isinstance(value, str):
        return (value,) * count
    if not isinstance(value, Sequence):
        raise SettingsError(
            f"a prompt must be a string, or a list of strings, not {type(value).__name__}"
        )
    return tuple(value)


def check_prompts(prompts: tuple[str, ...], negative: tuple[str, ...]) -> None:
    """Check prompts, and negative prompts, of which there are none or one for each.

    Raises:
        SettingsError: there is no prompt, or one is too long or no text.
    """
    if not prompts:
        raise SettingsError("no prompt: give at least one")
    if negative and len(negative) != len(prompts):
        raise SettingsError(
            f"{len(negative)} negative prompts for {len(prompts)} prompts: give one for all, or "
            "one for each"
        )
    for prompt in (*prompts, *negative):
        if not isinstance(prompt, str):
            raise SettingsError(f"a prompt must be a string, not {type(prompt).__name__}")
        _check_unicode(prompt)
        if len(prompt) > MAX_PROMPT:
            raise SettingsError(
                f"a prompt has {len(prompt):,} characters, and {MAX_PROMPT:,} are allowed: "
                "the text encoder reads only the first few dozen words"
            )


def _check_unicode(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(f"a prompt is not valid UTF-8: {shown(prompt)}") from error


def check_seeds(seed: int | tuple[int, ...], images: int) -> None:
    """Check the seed of a number of images, or the seed of each.

    Raises:
        SettingsError: one is no integer of 64 bits, or their number is wrong.
    """
    seeds = seed if isinstance(seed, tuple) else (seed,)
    for each in seeds:
        if type(each) is not int or not -(2**63) <= each < 2**64:
            raise SettingsError(f"seed must be a 64-bit integer, not {shown(each)}")
    if isinstance(seed, tuple) and len(seeds) != images:
        raise SettingsError(
            f"{len(seeds)} seeds for {images} images: give one for all, or one for each image"
        )


def _check_level(level: int) -> None:
    if type(level) is not int or not 0 <= level <= _MAX_TIMESTEP:
        raise SettingsError(f"noise_level must be an integer of at least 0, not {shown(level)}")


def _check_fractions(start: float | None, end: float | None) -> None:
    for name, value in (("denoising_start", start), ("denoising_end", end)):
        if value is not None:
            check_number(name, value, 0, 1)
    if start is not None and end is not None and start >= end:
        raise SettingsError(
            f"denoising_start must be below denoising_end, and {start:g} is not below {end:g}"
        )


def _check_pair(name: str, pair: tuple[int, int] | None) -> None:
    if pair is None:
        return
    whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(side) is int for side in pair)
    if not whole or not all(0 <= side <= MAX_SIDE for side in pair):
        raise ShapeError(f"{name} must be two integers up to {MAX_SIDE}, not {shown(pair)}")


def _check_acceleration(settings: Settings) -> None:
    interval = settings.guidance_interval
    timestep = partial(check_number, min=0, max=_MAX_TIMESTEP)
    check_items("timesteps", settings.timesteps, timestep)
    check_items("cached_steps", settings.cached_steps, partial(check_count, max=MAX_STEPS))
    if interval is not None:
        check_items("guidance_interval", interval, partial(check_number, min=0, max=1))
        if len(interval) != 2:
            raise SettingsError(f"guidance_interval must be two numbers, not {shown(interval)}")
    if settings.variant not in get_args(DenoiserVariant):
        names = " or ".join(get_args(DenoiserVariant))
        raise SettingsError(f"variant must be {names}, not {shown(settings.variant)}")
    check_flag("unaccelerated", settings.unaccelerated)
    check_plan(settings.steps, settings.timesteps, interval, settings.cached_steps)
