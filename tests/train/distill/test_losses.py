"""Loss terms, their scales, the weights of timesteps, and guided predictions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.batch import Comparison, TrainingBatch
from latentforge.train.distill.losses import (
    TERMS,
    chosen_weights,
    mixed,
    relative_scales,
)

SHAPE = (2, 3, 4, 4)


def comparison(scale: float = 1.0) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *SHAPE, generator=generator)
    values = {
        "mid_block": (scale * student, scale * teacher),
        "mid_block.attentions.0.transformer_blocks.0.attn1": (teacher, teacher),
    }
    weight = torch.tensor([1.0, 3.0])
    batch = TrainingBatch(feeds={})
    return Comparison(batch=batch, student=student, teacher=teacher, weight=weight, features=values)


def test_prediction_is_weighed_by_row() -> None:
    given = comparison()
    squares = (given.student - given.teacher).square()
    expected = (squares[0].mean() + 3 * squares[1].mean()) / 2
    torch.testing.assert_close(TERMS["prediction"][1](given), expected)


def test_features_have_no_units() -> None:
    small, large = (TERMS["features"][1](comparison(scale)) for scale in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    given = comparison()
    expected = (given.student - given.teacher).square().sum() / given.teacher.square().sum()
    torch.testing.assert_close(small, expected)
    assert TERMS["attention"][1](given).item() == 0


def test_terms_without_modules_are_zero() -> None:
    given = comparison()
    bare = Comparison(
        batch=given.batch, student=given.student, teacher=given.teacher, weight=given.weight
    )
    assert TERMS["features"][1](bare).item() == TERMS["attention"][1](bare).item() == 0


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (Guidance(rows=2, scale=5.0), 2),
        (Guidance(rows=2, scale=5.0, rescale=0.7), 2),
        (Guidance(rows=3, scale=5.0, image_scale=1.5), 3),
    ],
)
def test_guided_outputs_are_those_of_the_runtime(guidance: Guidance, rows: int) -> None:
    output: NDArray[np.float32] = np.random.default_rng(0).standard_normal(
        (2 * rows, 3, 4, 4), np.float32
    )
    ours = mixed(guidance, torch.from_numpy(output))
    np.testing.assert_allclose(ours.numpy(), guidance.mix(output), rtol=1e-4, atol=1e-5)


def test_scales_make_first_values_equal() -> None:
    first = {"prediction": 2.0, "features": 50.0, "attention": 0.0}
    scales = relative_scales(first, {"prediction": 1.0, "features": 0.5, "attention": 0.5})
    assert scales["prediction"] * 2 == 2 and scales["features"] * 50 == 1
    assert scales["attention"] == 0.5


def test_unknown_and_absent_terms_are_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean 'features'"):
        chosen_weights({"feature": 1.0}, TERMS)
    with pytest.raises(SettingsError, match="weight 0"):
        chosen_weights(dict.fromkeys(TERMS, 0.0), TERMS)
    assert set(chosen_weights({"attention": 0.0}, TERMS)) == {"prediction", "features"}
