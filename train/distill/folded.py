"""Objectives of students that guidance is folded into, with fewer steps or as many as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from latentforge.export.checkpoint import Checkpoint
from latentforge.train.distill.batch import (
    Comparison,
    Network,
    SampleSettings,
    Term,
    TrainingBatch,
)
from latentforge.train.distill.few_step_files import few_step_files, folded_files
from latentforge.train.distill.fewer_steps import (
    FewerSteps,
    GuidedBatch,
    embedded_scales,
    huber_loss,
)
from latentforge.train.distill.losses import prediction_error

__all__ = ["CONSISTENCY_TERMS", "GUIDANCE_TERMS", "ConsistencyObjective", "GuidanceObjective"]

Terms = Mapping[str, tuple[float, Term]]

CONSISTENCY_TERMS: Terms = {"consistency": (1.0, huber_loss)}
"""Terms of a training for fewer steps."""

GUIDANCE_TERMS: Terms = {"prediction": (1.0, prediction_error)}
"""Terms of a training that folds guidance in."""


class GuidanceObjective:
    """Objective of the teacher's guided predictions, in one row for each image."""

    terms: ClassVar[Terms] = GUIDANCE_TERMS
    frozen: ClassVar[tuple[str, ...]] = ()
    compared: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: FewerSteps) -> None:
        self.source = source

    def compare(self, batch: TrainingBatch, student: Network, teacher: Network) -> Comparison:
        """Return the outputs for a batch: see FewerSteps.guidance()."""
        assert isinstance(batch, GuidedBatch)
        return self.source.guidance(batch, student, teacher)

    def files(self, student: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return the files of a student that needs no guidance."""
        return folded_files(student, self.source.plan)

    def samples(self) -> SampleSettings:
        """Return the middle of the scales as an input, and no guidance by the loop."""
        plan, middle = self.source.plan, sum(self.source.plan.scales) / 2
        feeds = {"timestep_cond": embedded_scales([middle], plan.width)} if plan.width else {}
        return SampleSettings(settings={"guidance_scale": 1.0}, feeds=feeds)


class ConsistencyObjective(GuidanceObjective):
    """Objective of the ends of guided trajectories, which few steps reach."""

    terms: ClassVar[Terms] = CONSISTENCY_TERMS

    def __init__(self, source: FewerSteps, steps: int) -> None:
        super().__init__(source)
        self._steps = steps

    def compare(self, batch: TrainingBatch, student: Network, teacher: Network) -> Comparison:
        """Return the outputs for a batch: see FewerSteps.consistency()."""
        assert isinstance(batch, GuidedBatch)
        return self.source.consistency(batch, student, teacher)

    def files(self, student: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return the files of a latent consistency model."""
        return few_step_files(student, self.source.plan, self._steps)

    def samples(self) -> SampleSettings:
        """Return the settings of a latent consistency model."""
        whole = super().samples()
        few = {**whole.settings, "sampler": "lcm", "steps": self._steps}
        return SampleSettings(settings=few, feeds=whole.feeds)
