"""Files of a student that guidance is folded into, which differ from those it had."""

from __future__ import annotations

from typing import Any

from latentforge.export.checkpoint import SIDECAR, Checkpoint
from latentforge.export.schedulers import with_class
from latentforge.train.distill.fewer_steps import ConsistencyPlan, lcm_config

__all__ = ["few_step_files", "folded_files", "learned_scale"]


def few_step_files(
    checkpoint: Checkpoint, plan: ConsistencyPlan, steps: int
) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a student by consistency distillation, by path.

    Its scheduler makes it a latent consistency model for diffusers and for export. Requests take
    so many steps by default, and no guidance if the student has learned one scale.

    Args:
        checkpoint: of the student before the training.
        plan: of the distillation.
        steps: that it will be run with.

    Raises:
        CheckpointError: its files are malformed, or its schedule has no betas.
    """
    config = checkpoint.config("scheduler", "scheduler_config.json")
    files = folded_files(checkpoint, plan)
    files[SIDECAR]["defaults"] |= {"sampler": "lcm", "steps": steps}
    if plan.width:
        unet = {**checkpoint.config("unet"), "time_cond_proj_dim": plan.width}
        files["unet/config.json"] = unet
    return files | {
        "scheduler/scheduler_config.json": lcm_config(with_class(config, checkpoint.index), plan),
        "model_index.json": {**checkpoint.index, "scheduler": ["diffusers", "LCMScheduler"]},
    }


def folded_files(checkpoint: Checkpoint, plan: ConsistencyPlan) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a student by guidance distillation, by path.

    Args:
        checkpoint: of the student before the training.
        plan: of the distillation.

    Raises:
        CheckpointError: its files are malformed.
    """
    own = checkpoint.sidecar.get("defaults", {})
    changed = {"guidance_scale": learned_scale(checkpoint, plan), "guidance_rescale": 0.0}
    return {SIDECAR: {**checkpoint.sidecar, "defaults": {**own, **changed}}}


def learned_scale(checkpoint: Checkpoint, plan: ConsistencyPlan) -> float:
    """Return the default guidance scale of requests; 1 where the student has learned one scale."""
    low, high = plan.scales
    scale = checkpoint.sidecar.get("defaults", {}).get("guidance_scale", (low + high) / 2)
    return min(max(float(scale), low), high) if plan.width else 1.0
