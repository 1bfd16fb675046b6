"""Every model family, and how its checkpoints are cut into components."""

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.decidiffusion import DECIDIFFUSION
from latentforge.export.families.stable_diffusion import STABLE_DIFFUSION
from latentforge.export.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from latentforge.export.families.types import ComponentPlan, ExportPlan, Family
from latentforge.runtime.errors import CheckpointError

__all__ = ["FAMILIES", "ComponentPlan", "Family", "ExportPlan", "family_of"]

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, DECIDIFFUSION)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint belongs to, by its pipeline's class name.

    Raises:
        CheckpointError: we know no such family.
    """
    for family in FAMILIES:
        if checkpoint.pipeline_class in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise CheckpointError(
        f"{checkpoint.name} is a {checkpoint.pipeline_class}, which we cannot export; "
        f"we know {known}"
    )
