"""InstructPix2Pix: Stable Diffusion and Stable Diffusion XL that edit an image as a prompt says.

The UNet takes the latents of the image as further channels, and guidance has two scales, for the
prompt and for the image: Brooks et al. (2023), arXiv 2211.09800.
"""

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import stable_diffusion, stable_diffusion_xl
from latentforge.export.families.types import ExportPlan, Family, FamilyDefaults, Reference
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.manifest import ImageChannels

__all__ = ["INSTRUCT_PIX2PIX", "INSTRUCT_PIX2PIX_XL"]

_CHANNELS: tuple[ImageChannels, ...] = ("image",)
_SD = FamilyDefaults(steps=100, image_guidance_scale=1.5)
_XL = FamilyDefaults(steps=100, guidance_scale=5.0, image_guidance_scale=1.5)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    return stable_diffusion.plan(checkpoint, images=_CHANNELS, family=_SD)


def _plan_xl(checkpoint: Checkpoint) -> ExportPlan:
    if checkpoint.index.get("is_cosxl_edit"):
        raise CheckpointError(
            f"{checkpoint.name} is a CosXL model, whose noise schedule is continuous: only models "
            "with a discrete schedule can be exported"
        )
    return stable_diffusion_xl.plan(checkpoint, images=_CHANNELS, family=_XL)


INSTRUCT_PIX2PIX = Family(
    name="instruct_pix2pix",
    pipelines=("StableDiffusionInstructPix2PixPipeline",),
    plan=_plan,
    reference=Reference(image="StableDiffusionInstructPix2PixPipeline"),
)
INSTRUCT_PIX2PIX_XL = Family(
    name="instruct_pix2pix_xl",
    pipelines=("StableDiffusionXLInstructPix2PixPipeline",),
    plan=_plan_xl,
    reference=Reference(image="StableDiffusionXLInstructPix2PixPipeline"),
)
