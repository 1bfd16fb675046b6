"""Stable Diffusion 2 with a depth map: image to image that keeps the geometry.

The UNet takes the depth map as a fifth channel: https://huggingface.co/stabilityai/stable-diffusion-2-depth.
The depth estimator of the checkpoint, a DPT, is not exported: requests bring the depth map.
"""

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import stable_diffusion
from latentforge.export.families.types import ExportPlan, Family, Reference

__all__ = ["DEPTH_TO_IMAGE"]


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    return stable_diffusion.plan(checkpoint, images=("depth",))


DEPTH_TO_IMAGE = Family(
    name="depth_to_image",
    pipelines=("StableDiffusionDepth2ImgPipeline",),
    plan=_plan,
    reference=Reference(image="StableDiffusionDepth2ImgPipeline"),
)
