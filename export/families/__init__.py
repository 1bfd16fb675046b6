"""Table of model families."""

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.decidiffusion import DECIDIFFUSION
from latentforge.export.families.depth_to_image import DEPTH_TO_IMAGE
from latentforge.export.families.instruct_pix2pix import INSTRUCT_PIX2PIX, INSTRUCT_PIX2PIX_XL
from latentforge.export.families.stable_diffusion import STABLE_DIFFUSION
from latentforge.export.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from latentforge.export.families.types import ComponentPlan, ExportPlan, Family
from latentforge.export.families.upscaler import UPSCALER
from latentforge.runtime.errors import CheckpointError

__all__ = ["FAMILIES", "ComponentPlan", "Family", "ExportPlan", "family_of"]

FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    INSTRUCT_PIX2PIX,
    INSTRUCT_PIX2PIX_XL,
    DEPTH_TO_IMAGE,
    UPSCALER,
    DECIDIFFUSION,
)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of a checkpoint, by the pipeline class that its model_index.json names.

    Raises:
        CheckpointError: no family has that pipeline class.
    """
    for family in FAMILIES:
        if checkpoint.pipeline_class in family.pipelines:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise CheckpointError(
        f"{checkpoint.name} is a {checkpoint.pipeline_class}, which cannot be exported; "
        f"supported pipelines: {supported}"
    )
