"""Teacher of a search: a checkpoint whose UNet has sites, and its network in torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ComponentPlan, family_of
from latentforge.export.families.parts import UNet, unet_config
from latentforge.export.models.searched_structure import (
    Importance,
    Site,
    list_sites,
)
from latentforge.export.optimum import is_exported
from latentforge.runtime.errors import CheckpointError
from latentforge.train.search.states import States
from latentforge.train.search.student_errors import run_state
from latentforge.train.student.importance import measured_importance

__all__ = ["Teacher"]

_CLASS = "UNet2DConditionModel"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Checkpoint to search a student of.

    Attributes:
        checkpoint: in diffusers' layout.
        plan: of its denoiser.
        sites: of its UNet.
    """

    checkpoint: Checkpoint
    plan: ComponentPlan
    sites: tuple[Site, ...]

    @classmethod
    def open(cls, name: str) -> Teacher:
        """Open a checkpoint.

        Raises:
            CheckpointError: it is missing or damaged, or its UNet has no space to search.
        """
        checkpoint = open_checkpoint(name)
        plan = family_of(checkpoint).plan(checkpoint)
        denoiser = next(part for part in plan.components if part.name == "denoiser")
        if is_exported(checkpoint) or denoiser.folder != "unet":
            raise CheckpointError(
                f"{name} is a {checkpoint.pipeline_class} without a {_CLASS} to search in: name "
                "a diffusers checkpoint of Stable Diffusion 1, 2 or XL, or of a model like them"
            )
        kind = checkpoint.config("unet").get("_class_name")
        if kind not in (None, _CLASS):
            raise CheckpointError(
                f"the unet of {name} is a {kind}, which was searched already: search in its teacher"
            )
        return cls(checkpoint=checkpoint, plan=denoiser, sites=list_sites(unet_config(checkpoint)))

    @cached_property
    def network(self) -> UNet:
        """The denoiser in torch, loaded when first used."""
        network = self.plan.load(self.checkpoint)
        assert isinstance(network, UNet)
        return network

    def importance(self, states: States) -> Importance:
        """Return the parts of halved sites to keep, by what they carry in the states."""

        def run() -> None:
            for state in states.states:
                run_state(self.network, self.plan, state)

        return measured_importance(self.network.model, run)
