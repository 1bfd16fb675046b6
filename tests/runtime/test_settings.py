"""A request is complete and possible, or rejected with a message that names the mistake."""

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.manifest import AccelerationPlan, RequestDefaults
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.settings import MAX_PROMPT, Settings, resolve

DEFAULTS = RequestDefaults(
    sampler="ddim", steps=20, guidance_scale=7.5, guidance_rescale=0.0, height=512, width=768
)


def request(prompt: Any = "a fox", **settings: Any) -> Settings:
    return resolve(DEFAULTS, prompt, settings)  # type: ignore[arg-type]


def test_defaults_complete_a_request() -> None:
    settings = request()
    assert settings.prompts == ("a fox",) and settings.negative_prompts == ()
    assert (settings.sampler, settings.steps, settings.guidance_scale) == ("ddim", 20, 7.5)
    assert (settings.height, settings.width, settings.images_per_prompt) == (512, 768, 1)
    assert request(steps=None, height=None, seed=None).steps == 20


def test_the_request_overrides_the_defaults() -> None:
    expected = {
        "images_per_prompt": 2,
        "sampler": "euler",
        "steps": 1,
        "guidance_scale": 0,
        "guidance_rescale": 1.0,
        "height": 64,
        "width": 72,
        "seed": 0,
    }
    settings = request(**expected)
    assert {key: getattr(settings, key) for key in expected} == expected


def test_prompts() -> None:
    settings = request(["a", "b"], images_per_prompt=3, negative_prompt="c")
    assert settings.prompts == ("a", "b") and settings.negative_prompts == ("c", "c")
    assert settings.count == 6
    assert request(["a", "b"], negative_prompt=["c", "d"]).negative_prompts == ("c", "d")
    assert request("").prompts == ("",)


def test_guidance_is_on_above_one() -> None:
    assert [request(guidance_scale=scale).uses_guidance for scale in (0, 1, 1.01)] == [
        False,
        False,
        True,
    ]


def test_seeds_differ_and_are_kept() -> None:
    seeds = {request().seed for _ in range(8)}
    assert len(seeds) > 1 and all(request(seed=seed).seed == seed for seed in seeds)
    for edge in (-(2**63), 2**64 - 1):
        assert request(seed=edge).seed == edge


def test_a_seed_for_each_image() -> None:
    for seeds in ([1, 2], (1, 2), range(1, 3), np.array([1, 2])):
        settings = request(seed=seeds, images_per_prompt=2)
        assert settings.seed == settings.seeds == (1, 2)
        assert all(type(seed) is int for seed in settings.seeds)
    assert request(["a", "b"], seed=[5, 5]).seeds == (5, 5)
    assert request(seed=[5]).seed == 5 and request(seed=5, images_per_prompt=2).seeds == (5,)
    for seeds, images in (([1, 2], 1), ([1], 2), ([], 1), ([1, 2, 3], 2)):
        with pytest.raises(SettingsError, match=f"^{len(seeds)} seeds for {images} images: give"):
            request(seed=seeds, images_per_prompt=images)
    with pytest.raises(SettingsError, match="^2 seeds for 1 images"):
        replace(request(), seed=(1, 2))


NUMPY: dict[str, Any] = {
    "seed": np.uint64(2**64 - 1),
    "steps": np.int64(4),
    "images_per_prompt": np.int8(2),
    "height": np.int32(64),
    "width": np.array(72),
    "guidance_scale": np.float32(7.5),
    "guidance_rescale": np.float16(0.5),
    "strength": np.float32(0.75),
    "aesthetic_score": np.int64(5),
    "denoising_end": np.float64(0.5),
    "original_size": np.array([64, 72]),
    "crop": [np.int64(0), 8],
    "timesteps": np.array([900, 600, 300, 0.5], np.float32),
    "guidance_interval": np.array([0.25, 0.5]),
    "cached_steps": np.array([1, 3]),
    "unaccelerated": np.True_,
}


def test_numbers_of_numpy_are_numbers() -> None:
    """They become Python's own, which JSON and other records take."""
    settings = request(**NUMPY)
    python = {
        name: tuple(value.tolist()) if np.ndim(value) else value.item()
        for name, value in ((name, np.array(value)) for name, value in NUMPY.items())
    }
    assert settings == request(**python) == replace(settings, **NUMPY)
    assert json.loads(json.dumps(asdict(settings)))["crop"] == [0, 8]
    assert request(cache_interval=np.int64(2), steps=np.int64(4)).cached_steps == (1, 3)


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), np.True_, np.complex64(1)])
def test_other_values_of_numpy_are_refused(value: Any) -> None:
    for name in ("steps", "guidance_scale", "seed", "strength", "guidance_rescale"):
        with pytest.raises(SettingsError, match=f"^{name} must be a"):
            request(**{name: value})


HUGE = 10**5000  # which Python refuses to print

BAD = [
    ("steps", (0, -1, 1.5, True, math.nan, "20", 1001, HUGE, [1])),
    ("images_per_prompt", (0, -1, 1.0, True, 1025, HUGE)),
    ("guidance_scale", (math.nan, math.inf, -math.inf, -0.1, 1001, HUGE, -HUGE, True, "7", 1j)),
    ("guidance_rescale", (math.nan, -0.1, 1.1, HUGE, False, "0")),
    ("seed", (-(2**63) - 1, 2**64, 1.0, True, "0", HUGE, np.True_, np.nan, {1}, [1.0], [True])),
]


@pytest.mark.parametrize(("name", "values"), BAD, ids=[name for name, _ in BAD])
def test_refuses(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=f"^{name} must be a") as caught:
            request(**{name: value})
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


ACCELERATION = [
    ("timesteps", ((), (999.5, 3, 0)), ("9", [9, "9"], (math.nan,), (True,), (-1,), (HUGE,), 3)),
    ("timesteps", ((5, 4, 3),), ((3, 3, 3), (3, 4, 5), (5, 4), (5, 4, 3, 2))),
    (
        "cached_steps",
        ((), (1,), (1, 2)),
        ((0,), (3,), (2, 1), (1, 1), (1.0,), (True,), "1", (HUGE,), 1),
    ),
    ("guidance_interval", ((0, 1), (0.5, 0.5)), ((1, 0), (0, 1, 1), (0,), (), (-0.1, 1), (0, 2))),
    ("guidance_interval", (), ((math.nan, 1), (0, HUGE), ("0", 1), "01", 0.5, True, {0: 1})),
    ("cache_interval", (1, 2, 3), (0, -1, 4, 1.5, True, "2", HUGE)),
    (
        "variant",
        ("denoiser", "denoiser_reduced"),
        ("denoiser_cached", "vae_decoder", "", 3, ["denoiser"]),
    ),
    ("unaccelerated", (True, False), (1, 0, "yes")),
]


@pytest.mark.parametrize(("name", "good", "bad"), ACCELERATION)
def test_acceleration_settings(name: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        request(steps=3, **{name: value})
    for value in bad:
        with pytest.raises(SettingsError) as caught:
            request(steps=3, **{name: value})
        message = str(caught.value)
        assert re.split("[_ ]", name)[0] in message
        assert len(message) < 200 and "\n" not in message


def test_lists_of_json_are_taken() -> None:
    settings = request(timesteps=[9, 3], cached_steps=[1], guidance_interval=[0.2, 0.5])
    assert settings.steps == 2 and settings.timesteps == (9, 3)
    assert settings.cached_steps == (1,) and settings.guidance_interval == (0.2, 0.5)


def test_accelerated_requests() -> None:
    same: tuple[dict[str, Any], ...] = ({}, {"guidance_interval": (0, 1)}, {"cache_interval": 1})
    less = ({"timesteps": (9, 3)}, {"guidance_interval": (0.2, 1)}, {"cache_interval": 2})
    assert not any(request(**settings).accelerated for settings in same)
    assert all(
        request(**settings).accelerated for settings in (*less, {"variant": "denoiser_reduced"})
    )


PLAN = AccelerationPlan(sampler="unipc", steps=8, guidance_interval=(0.2, 0.9), cached_steps=(1, 3))


@pytest.mark.parametrize("request_", [{}, {"steps": 8}, {"sampler": "unipc", "guidance_scale": 3}])
def test_a_plan_applies_to_a_request(request_: dict[str, Any]) -> None:
    settings = resolve(DEFAULTS, "a", request_, PLAN)  # type: ignore[arg-type]
    assert {name: getattr(settings, name) for name in PLAN.request} == PLAN.request
    assert settings.guidance_scale == request_.get("guidance_scale", DEFAULTS.guidance_scale)
    exact = resolve(DEFAULTS, "a", {"unaccelerated": True, "seed": settings.seed}, PLAN)
    assert (exact.sampler, exact.steps, exact.cached_steps) == ("ddim", 20, ())


@pytest.mark.parametrize("request_", [{"steps": 9}, {"sampler": "ddim"}, {"steps": HUGE}])
def test_a_plan_is_for_one_schedule(request_: dict[str, Any]) -> None:
    with pytest.raises(
        SettingsError, match="plan is for 'unipc' with 8 steps, not .*--unaccelerated"
    ) as e:
        resolve(DEFAULTS, "a", request_, PLAN)  # type: ignore[arg-type]
    assert len(str(e.value)) < 250 and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["height", "width"])
def test_refuses_a_size(name: str) -> None:
    for value in (0, -64, 64.0, True, math.nan, "64", 2**40, HUGE):
        with pytest.raises(ShapeError, match=f"^{name} must be 1 to 16384 pixels, not "):
            request(**{name: value})


@pytest.mark.parametrize("name", ["plms", "", "DDIM", "__class__", ["ddim"], 3, True])
def test_an_unknown_sampler_lists_them_all(name: object) -> None:
    with pytest.raises(SettingsError, match="no sampler") as caught:
        request(sampler=name)
    assert all(known in str(caught.value) for known in SAMPLERS)


def test_an_unknown_setting_lists_them_all() -> None:
    with pytest.raises(
        SettingsError, match="no setting 'stepz': choose from negative_prompt, "
    ) as e:
        request(stepz=20)
    assert all(f" {known}" in str(e.value) for known in ("steps", "seed", "height", "sampler"))


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        ([], "", "no prompt: give at least one"),
        ((), [], "no prompt: give at least one"),
        (["a", "b"], ["c"], "1 negative prompts for 2 prompts"),
        ("a", ["b", "c"], "2 negative prompts for 1 prompts"),
        (None, "", "a prompt must be a string, or a list of strings, not NoneType"),
        (3, "", "a prompt must be a string, or a list of strings, not int"),
        ("a", 3, "a prompt must be a string, or a list of strings, not int"),
        ({"a": 1}, "", "a prompt must be a string, or a list of strings, not dict"),
        ([None], "", "a prompt must be a string, not NoneType"),
        (b"abc", "", "a prompt must be a string, not int"),
        ([["a"]], "", "a prompt must be a string, not list"),
        ("a", [3], "a prompt must be a string, not int"),
        ("\udcff", "", "not valid UTF-8"),
        ("a", "\ud83d", "not valid UTF-8"),
    ],
)
def test_refuses_prompts(prompt: object, negative: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        request(prompt, negative_prompt=negative)


@pytest.mark.parametrize("which", ["prompt", "negative_prompt"])
def test_refuses_a_prompt_of_a_hundred_kilobytes(which: str) -> None:
    with pytest.raises(SettingsError, match="has 102,400 characters, and 16,384 are allowed") as e:
        request(**{which: "x" * 102_400})
    assert len(str(e.value)) < 200
    assert request("x" * MAX_PROMPT).count == 1
