"""Requests for trainings: what is refused, and what makes two of them the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.request import DistillRequest


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "one length"),
        ({"updates": 3, "minutes": 1.0}, "one length"),
        ({"updates": 0}, "updates"),
        ({"minutes": float("nan")}, "minutes"),
        ({"updates": 3, "guided": 1.5}, "guided"),
        ({"updates": 3, "batch": 0}, "batch"),
        ({"updates": 3, "rate": float("inf")}, "rate"),
        ({"updates": 3, "precision": "fp8"}, "precision"),
        ({"updates": 3, "weights": {"prediction": -1.0}}, "weight of prediction"),
        ({"updates": 3, "lora_rank": 5000}, "lora_rank"),
        ({"updates": 3, "to_steps": 0}, "to_steps"),
        ({"updates": 3, "to_steps": 51}, "to_steps"),
        ({"updates": 3, "scales": (2.0, 8.0)}, "add to_steps"),
        ({"updates": 3, "to_steps": 4, "scales": (2.0,)}, "lowest and the highest"),
        ({"updates": 3, "to_steps": 4, "scales": (0.5, 8.0)}, "scales"),
        ({"updates": 3, "settings": {"step": 5}}, "step"),
    ],
)
def test_what_no_training_can_follow_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        DistillRequest(**fields)


def test_content_is_what_the_result_depends_on() -> None:
    request = DistillRequest(updates=5)
    same = replace(request, quiet=False, work=Path("there"), save_every=1)
    assert same.content == request.content
    assert replace(request, seed=1).content != request.content
    assert replace(request, updates=6).content != request.content
    minutes = DistillRequest(minutes=1.0)
    assert replace(minutes, minutes=2.0).content == minutes.content
