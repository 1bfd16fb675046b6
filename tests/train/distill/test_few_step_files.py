"""Files of a student of fewer steps: export reads them as those of a latent consistency model."""

import json
from pathlib import Path

import pytest

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.demo import CHECKPOINT
from latentforge.export.families import family_of
from latentforge.export.schedule_proof import prove_schedule
from latentforge.export.schedulers import CheckpointScheduler
from latentforge.runtime.files import link_files
from latentforge.train.distill.few_step_files import few_step_files
from latentforge.train.distill.fewer_steps import ConsistencyPlan

FIXED = ConsistencyPlan(scales=(1.5, 1.5), width=0)
ANY_SCALE = ConsistencyPlan(scales=(2.0, 8.0), width=64)


def student(folder: Path, plan: ConsistencyPlan) -> Checkpoint:
    """Return the demo checkpoint with the files of a student."""
    files = [path.relative_to(CHECKPOINT).as_posix() for path in CHECKPOINT.rglob("*.*")]
    link_files(files, CHECKPOINT, folder)
    for name, content in few_step_files(open_checkpoint("demo"), plan, steps=4).items():
        (folder / name).unlink()  # a link
        (folder / name).write_text(json.dumps(content))
    return open_checkpoint(str(folder))


def test_the_schedule_is_that_of_diffusers_lcm_scheduler(tmp_path: Path) -> None:
    checkpoint = student(tmp_path, FIXED)
    config = checkpoint.config("scheduler", "scheduler_config.json")
    scheduler = CheckpointScheduler.of(config)
    assert (scheduler.sampler, scheduler.prediction) == ("lcm", "v_prediction")
    prove_schedule(scheduler, 4)  # raises where the sampler departs from diffusers
    assert scheduler.schedule.options.original_inference_steps == 50
    assert checkpoint.index["scheduler"] == ["diffusers", "LCMScheduler"]


@pytest.mark.parametrize(("plan", "scale"), [(FIXED, 1.0), (ANY_SCALE, 2.0)])
def test_requests_take_few_steps(plan: ConsistencyPlan, scale: float, tmp_path: Path) -> None:
    sidecar = student(tmp_path, plan).sidecar
    assert sidecar["name"] == "demo" and sidecar["license"] == "Apache-2.0"
    assert sidecar["defaults"] == {
        "sampler": "lcm",
        "steps": 4,
        "guidance_scale": scale,
        "guidance_rescale": 0.0,
    }


@pytest.mark.parametrize("plan", [FIXED, ANY_SCALE])
def test_export_takes_the_scale_as_an_input_if_it_was_learned(
    plan: ConsistencyPlan, tmp_path: Path
) -> None:
    config = student(tmp_path, plan).config("unet")
    assert config.get("time_cond_proj_dim") == (plan.width or None)
    if not plan.width:  # weights of the other lack the input before it is trained
        known = open_checkpoint(str(tmp_path))
        assert family_of(known).plan(known).defaults.steps == 4
