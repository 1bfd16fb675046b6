"""What one request asks for, complete and checked."""

import reprlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict, get_args

from latentforge.runtime.acceleration import AccelerationPlan, DenoiserVariant, check_plan
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.manifest import RequestDefaults
from latentforge.runtime.sampling import samplers

__all__ = ["MAX_PROMPT", "Request", "Settings", "resolve"]

MAX_PROMPT = 16_384
"""Characters of a prompt. Text encoders see some 75 tokens: more is a mistake or an attack."""

_MAX_STEPS = 1000
_MAX_SIDE = 16_384
_MAX_TIMESTEP = 100_000

_PAIRS_AND_LISTS = (
    "original_size", "crop", "target_size", "timesteps", "guidance_interval", "cached_steps"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One request. Raises SettingsError, or ShapeError, for what no engine could fulfil.

    Attributes:
        negative_prompts: one a prompt; none at all is not the same as empty ones for models that
            were trained with zeros in their place.
        strength: share of the steps that a given picture goes through, in (0, 1].
        denoising_start: share of the schedule that another run has been through already.
        denoising_end: share of it after which to stop, for another run to go on.
        original_size, crop, target_size: (height, width) or (top, left) in pixels, which
            Stable Diffusion XL is told of; sizes are those of the image where None.
        aesthetic_score, negative_aesthetic_score: from 1 to 10, which its refiner is told of.
        timesteps: where the steps start, strictly falling, one a step; none are the sampler's own.
        guidance_interval: the least and the most sigma that has guidance; None is everywhere.
        cached_steps: evaluations of the UNet that go on from the last full one's deep feature.
        variant: what makes the full ones. For these four see manifest.FastPlan.
        unaccelerated: whether the engines' plan, if there is one, was left aside.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] = ()
    images_per_prompt: int = 1
    sampler: str
    steps: int
    guidance_scale: float
    guidance_rescale: float
    height: int
    width: int
    seed: int = field(default_factory=lambda: secrets.randbits(32))
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
        samplers.get(str(self.sampler))
        _check_prompts(self.prompts, self.negative_prompts)
        _check_count("steps", self.steps, _MAX_STEPS)
        _check_count("images_per_prompt", self.images_per_prompt, 1024)
        _check_number("guidance_scale", self.guidance_scale, 0, 1000)
        _check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"seed is a whole number of 64 bits, not {_shown(self.seed)}")
        for name, side in (("height", self.height), ("width", self.width)):
            if type(side) is not int or not 1 <= side <= _MAX_SIDE:
                raise ShapeError(f"{name} is 1 to {_MAX_SIDE} pixels, not {_shown(side)}")
        _check_number("strength", self.strength, 0, 1)
        _check_share(self.denoising_start, self.denoising_end)
        for name in ("original_size", "crop", "target_size"):
            _check_pair(name, getattr(self, name))
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            _check_number(name, getattr(self, name), 0, 10)
        _check_evaluations(self)

    @property
    def count(self) -> int:
        """How many images this makes."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether the negative prompts are looked at: as in diffusers, above scale 1."""
        return self.guidance_scale > 1

    @property
    def accelerated(self) -> bool:
        """Whether the UNet does less than the sampler asks of it: another picture, class B."""
        less = self.guidance_interval not in (None, (0, 1)) or self.variant != "denoiser"
        return less or bool(self.timesteps or self.cached_steps)

    def following(self, plan: AccelerationPlan) -> "Settings":
        """The same picture asked for by a plan."""
        return replace(self, unaccelerated=False, **plan.request)


class Request(TypedDict, total=False):
    """The settings that a caller may give; the manifest's plan and defaults fill in the rest.

    ``cache_interval`` makes every so many-th evaluation a full one, and the others ``shallow``.
    """

    negative_prompt: str | Sequence[str]
    images_per_prompt: int
    sampler: str
    steps: int
    guidance_scale: float
    guidance_rescale: float
    height: int
    width: int
    seed: int
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
    fast: AccelerationPlan | None = None,
) -> Settings:
    """Fill in what a request leaves out, or gives as None, and check it all.

    Args:
        defaults: those of the manifest.
        prompt: one, or several.
        request: what was asked for.
        fast: the manifest's plan, which a request follows unless it is to be exact.

    Raises:
        SettingsError: a setting is unknown or out of range, or the plan is for another schedule.
    """
    if unknown := request.keys() - Request.__annotations__.keys():
        known = ", ".join(Request.__annotations__)
        raise SettingsError(f"no setting {_shown(min(unknown))}; there are {known}")
    given: dict[str, Any] = {key: value for key, value in request.items() if value is not None}
    prompts = _texts(prompt, 1)
    negative = _texts(given.pop("negative_prompt", ()), len(prompts))
    for name in _PAIRS_AND_LISTS:
        if isinstance(given.get(name), list):  # as JSON has it
            given[name] = tuple(given[name])
    if isinstance(times := given.get("timesteps"), tuple) and times:
        given.setdefault("steps", len(times))
    usual = _from_defaults(defaults)
    if fast is not None and not given.get("unaccelerated"):
        usual |= _followed(fast, given)
    complete = {**usual, **given}
    if (interval := complete.pop("cache_interval", None)) is not None:
        complete["cached_steps"] = _between_full(interval, complete["steps"], given)
    return Settings(prompts=prompts, negative_prompts=negative, **complete)


def _followed(plan: AccelerationPlan, given: dict[str, Any]) -> dict[str, Any]:
    """The plan as settings, where it is for the schedule that was asked for."""
    own = plan.request
    asked = {name: given.get(name, own[name]) for name in ("sampler", "steps")}
    if asked != {name: own[name] for name in asked}:
        wanted = f"{_shown(asked['sampler'])} of {_shown(asked['steps'])}"
        raise SettingsError(
            f"these engines' plan is for {own['sampler']!r} of {own['steps']} steps, not {wanted}: "
            "ask for no sampler and steps, or leave the plan aside with unaccelerated (--unaccelerated)"
        )
    return own


def _between_full(interval: int, steps: int, given: dict[str, Any]) -> tuple[int, ...]:
    """All evaluations but every interval-th."""
    if "cached_steps" in given:
        raise SettingsError("cache_interval says which evaluations are shallow: give one of both")
    _check_count("cache_interval", interval, _MAX_STEPS)
    _check_count("steps", steps, _MAX_STEPS)
    if interval > steps:
        raise SettingsError(
            f"cache_interval {interval} is longer than the run of {steps} steps: take 2 to "
            f"{steps}, or 1 for full evaluations alone"
        )
    return tuple(index for index in range(steps) if index % interval)


def _texts(given: str | Sequence[str], count: int) -> tuple[str, ...]:
    """One text count times over, or several as they are."""
    if isinstance(given, str):
        return (given,) * count
    if not isinstance(given, Sequence):
        raise SettingsError(f"a prompt is text, or a list of texts, not {type(given).__name__}")
    return tuple(given)


def _from_defaults(defaults: RequestDefaults) -> dict[str, Any]:
    return {key: getattr(defaults, key) for key in defaults.__struct_fields__}


def _check_prompts(prompts: tuple[str, ...], negative: tuple[str, ...]) -> None:
    if not prompts:
        raise SettingsError("no prompt was given: name at least one")
    if negative and len(negative) != len(prompts):
        raise SettingsError(
            f"{len(negative)} negative prompts for {len(prompts)} prompts: give one, or as many"
        )
    for prompt in (*prompts, *negative):
        if not isinstance(prompt, str):
            raise SettingsError(f"a prompt is text, not {type(prompt).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise SettingsError(f"a prompt is not valid UTF-8: {_shown(prompt)}")
        if len(prompt) > MAX_PROMPT:
            raise SettingsError(
                f"a prompt has {len(prompt):,} characters, and {MAX_PROMPT:,} are allowed: "
                "the text encoder reads only the first few dozen words"
            )


def _check_count(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise SettingsError(f"{name} is a whole number from 1 to {most}, not {_shown(value)}")


def _check_number(name: str, value: float, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # which NaN is not
        raise SettingsError(f"{name} is a number from {least} to {most}, not {_shown(value)}")


def _check_share(start: float | None, end: float | None) -> None:
    for name, value in (("denoising_start", start), ("denoising_end", end)):
        if value is not None:
            _check_number(name, value, 0, 1)
    if start is not None and end is not None and start >= end:
        raise SettingsError(
            f"denoising_start comes before denoising_end, and {start:g} does not before {end:g}"
        )


def _check_pair(name: str, pair: tuple[int, int] | None) -> None:
    if pair is None:
        return
    whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(side) is int for side in pair)
    if not whole or not all(0 <= side <= _MAX_SIDE for side in pair):
        raise ShapeError(f"{name} is two whole numbers up to {_MAX_SIDE}, not {_shown(pair)}")


def _check_evaluations(settings: Settings) -> None:
    """Which evaluations are made, and how, is well-formed and fits the number of steps."""
    interval = settings.guidance_interval
    timestep = partial(_check_number, least=0, most=_MAX_TIMESTEP)
    _check_each("timesteps", settings.timesteps, timestep)
    _check_each("cached_steps", settings.cached_steps, partial(_check_count, most=_MAX_STEPS))
    if interval is not None:
        _check_each("guidance_interval", interval, partial(_check_number, least=0, most=1))
        if len(interval) != 2:
            raise SettingsError(f"guidance_interval is two numbers, not {_shown(interval)}")
    if settings.variant not in get_args(DenoiserVariant):
        names = " or ".join(get_args(DenoiserVariant))
        raise SettingsError(f"variant is {names}, not {_shown(settings.variant)}")
    if type(settings.unaccelerated) is not bool:
        raise SettingsError(f"unaccelerated is True or False, not {_shown(settings.unaccelerated)}")
    check_plan(settings.steps, settings.timesteps, interval, settings.cached_steps)


def _check_each(name: str, values: object, check: Callable[[str, Any], None]) -> None:
    if not isinstance(values, tuple):
        raise SettingsError(f"{name} is a tuple of numbers, not {_shown(values)}")
    for value in values:
        check(f"each of {name}", value)


def _shown(value: object) -> str:
    """A value for a message: its repr, cut to one line, also of a number of 10,000 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "that"
