"""Consistency and guidance distillation, on networks whose trajectories are known."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.pipelines import LatentConsistencyModelPipeline
from tiny import TINY
from torch import Tensor, nn

from latentforge.export.families.parts import defaults
from latentforge.export.families.types import FamilyDefaults
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.train.distill.batch import Comparison, TrainingBatch
from latentforge.train.distill.clean_latents import CleanLatents, DrawnLatents, ShuffledEpochs
from latentforge.train.distill.fewer_steps import (
    ConsistencyPlan,
    FewerSteps,
    GuidedBatch,
    add_guidance_input,
    huber_loss,
    lcm_config,
)
from latentforge.train.distill.training_noise import TrainingNoise

CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
NOISE = TrainingNoise.of(CONFIG)
FIXED = ConsistencyPlan(steps=50, scales=(2.0, 2.0), width=0)


def source(count: int = 12) -> DrawnLatents:
    """Return latents, with the mean of each as its prompt."""
    latents = torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    prompts = latents.mean((1, 2, 3)).reshape(-1, 1, 1)
    condition, free = ({"encoder_hidden_states": rows} for rows in (prompts, 0 * prompts))
    return DrawnLatents(CleanLatents(latents=latents, condition=condition, free=free))


def gaussian(sample: Tensor, timestep: Tensor, **feeds: Tensor) -> Tensor:
    """Predict v as of latents that are normal around the prompt with a deviation of 0.5."""
    alpha, sigma = NOISE.levels(timestep, sample)
    mean = feeds["encoder_hidden_states"][..., None]
    share = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
    clean = mean + share * (sample - alpha * mean)
    return (alpha * sample - clean) / sigma


def batch(plan: ConsistencyPlan, rows: int = 12) -> GuidedBatch:
    """Return a batch of a source of its own."""
    steps = FewerSteps(source(), NOISE, plan)
    return steps.draw(rows, torch.Generator().manual_seed(1))


def test_the_teacher_steps_as_diffusers_does() -> None:
    drawn, seen = batch(FIXED), []

    def student(sample: Tensor, timestep: Tensor, **feeds: Tensor) -> Tensor:
        seen.append((sample, timestep))
        return gaussian(sample, timestep, **feeds)

    FewerSteps(source(), NOISE, FIXED).consistency(drawn, student, gaussian)
    scheduler: Any = DDIMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(50)
    reached, ends = seen[0]
    for row, (start, end) in enumerate(zip(drawn.start.tolist(), ends.tolist(), strict=True)):
        feeds = [{k: v[row : row + 1] for k, v in x.items()} for x in (drawn.free, drawn.condition)]
        sample, time = drawn.noisy[row : row + 1], torch.tensor([start])
        free, prompt = (gaussian(sample, time, **f) for f in feeds)
        step = scheduler.step(free + 2 * (prompt - free), start, sample)
        torch.testing.assert_close(reached[row : row + 1], step.prev_sample, atol=1e-4, rtol=1e-4)
        assert start in scheduler.timesteps.tolist() and end == max(start - 20, 0)


def test_the_boundary_is_that_of_the_lcm_scheduler() -> None:
    """The first step of LCMScheduler from a point ends where the student sees it end."""
    scheduler: Any = LCMScheduler.from_config(lcm_config(CONFIG, FIXED))
    steps, drawn = FewerSteps(source(), NOISE, FIXED), batch(FIXED)
    ends = steps.consistency(drawn, gaussian, gaussian).student
    scheduler.set_timesteps(50)
    output = gaussian(**drawn.feeds)
    for row, start in enumerate(drawn.start.tolist()):
        scheduler._step_index = None
        one = slice(row, row + 1)
        denoised = scheduler.step(output[one], start, drawn.noisy[one]).denoised
        torch.testing.assert_close(ends[one], denoised, atol=1e-5, rtol=1e-5)


def test_a_student_of_the_true_ends_has_nearly_no_loss() -> None:
    """Without guidance the ends of gaussian()'s trajectories have a closed form."""
    plan = ConsistencyPlan(steps=200, scales=(1.0, 1.0), width=0)

    def ends(sample: Tensor, timestep: Tensor, **feeds: Tensor) -> Tensor:
        alpha, sigma = NOISE.levels(timestep, sample)
        mean = feeds["encoder_hidden_states"][..., None]
        clean = mean + 0.5 / (0.25 * alpha**2 + sigma**2).sqrt() * (sample - alpha * mean)
        return (alpha * sample - clean) / sigma

    steps, drawn = FewerSteps(source(), NOISE, plan), batch(plan)
    true = huber_loss(steps.consistency(drawn, ends, gaussian))
    other = huber_loss(steps.consistency(drawn, gaussian, gaussian))
    assert true < 0.2 * other


def test_training_lowers_the_distance_to_the_ends() -> None:
    plan = ConsistencyPlan(steps=20, scales=(1.0, 3.0), width=8)
    steps, network = FewerSteps(source(), NOISE, plan), _Student()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for update in range(80):
        drawn = steps.draw(12, torch.Generator().manual_seed(update))
        loss = huber_loss(steps.guidance(drawn, network, gaussian))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


class _Student(nn.Module):
    """Linear prediction from latents, prompt, level and guidance scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, sample: Tensor, timestep: Tensor, **feeds: Tensor) -> Tensor:
        alpha, sigma = NOISE.levels(timestep, sample)
        rows = [sample, feeds["encoder_hidden_states"][..., None], alpha, sigma]
        numbers = feeds["timestep_cond"].reshape(len(sample), -1, 1, 1).unbind(1)
        inputs = torch.stack(
            [r.expand_as(sample) for r in (*rows, *(n[:, None] for n in numbers))], -1
        )
        output: Tensor = self.layers(inputs)[..., 0]
        return output


def test_the_input_of_the_scale_is_diffusers_own() -> None:
    drawn = batch(ConsistencyPlan(width=32))
    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, drawn.scale - 1, embedding_dim=32)
    torch.testing.assert_close(drawn.feeds["timestep_cond"], expected, atol=2e-3, rtol=1e-3)


def test_an_added_input_changes_nothing_before_it_is_trained() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY["sd"].unet).eval()
    feeds = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 24, 32)
    before = unet(*feeds).sample
    add_guidance_input(unet, 16)
    add_guidance_input(unet, 16)  # there already
    assert torch.equal(unet(*feeds, timestep_cond=torch.randn(2, 16)).sample, before)
    public = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    again = UNet2DConditionModel.from_config(public)
    again.load_state_dict(unet.state_dict())
    with pytest.raises(CheckpointError, match="of width 16, not 32"):
        add_guidance_input(unet, 32)


def test_export_knows_the_student_as_a_latent_consistency_model() -> None:
    class Files:
        def config(self, folder: str, file: str = "config.json") -> dict[str, Any]:
            return lcm_config(CONFIG, FIXED) if folder == "scheduler" else {}

    files: Any = Files()
    assert defaults(files, FamilyDefaults()).steps == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "learns one scale"),
        ({"scales": (0.5, 2.0)}, "rise from 1 on"),
        ({"scales": (4.0, 2.0)}, "rise from 1 on"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ConsistencyPlan(**options)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(SettingsError, match="from 1 to 1000, not 1001"):
        FewerSteps(source(), NOISE, ConsistencyPlan(steps=1001))


def test_huber_is_square_for_small_and_absolute_for_large_errors() -> None:
    def loss(error: float) -> float:
        pair = torch.full((1, 1), error), torch.zeros(1, 1)
        comparison = Comparison(
            batch=TrainingBatch(feeds={}), student=pair[0], teacher=pair[1], weight=torch.ones(1)
        )
        return huber_loss(comparison, width=0.1).item()

    assert loss(1e-3) == pytest.approx(1e-6 / 0.2, rel=1e-2)
    assert loss(100.0) == pytest.approx(99.9, rel=1e-3)


def test_positions_of_shuffled_epochs() -> None:
    order = ShuffledEpochs(count=5, seed=3)
    whole = order.take(0, 20)
    assert all(sorted(whole[i : i + 5].tolist()) == [*range(5)] for i in range(0, 20, 5))
    assert torch.equal(order.take(7, 9), whole[7:16])
