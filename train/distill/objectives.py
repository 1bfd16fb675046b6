"""Choice of a training's objective, by its request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentforge.export.families.parts import UNet
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Pipeline
from latentforge.train.distill.batch import Objective, Term
from latentforge.train.distill.captioned_pictures import CaptionedPictures
from latentforge.train.distill.clean_latents import (
    CleanSource,
    DrawnLatents,
    NoisySource,
    PictureLatents,
    Positions,
)
from latentforge.train.distill.drawn_latents import drawn_latents
from latentforge.train.distill.fewer_steps import ConsistencyPlan, FewerSteps, add_guidance_input
from latentforge.train.distill.folded import (
    CONSISTENCY_TERMS,
    GUIDANCE_TERMS,
    ConsistencyObjective,
    GuidanceObjective,
)
from latentforge.train.distill.imitation import Imitation
from latentforge.train.distill.losses import TERMS
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.task import PICTURE_TERMS
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.distill.trajectories import TrajectorySource
from latentforge.train.search.states import States

__all__ = ["ObjectiveInputs", "made_objective", "terms_of"]

_SCALE_WIDTH = 256  # of the input of the guidance scale, as diffusers' LCM training has it


@dataclass(frozen=True, kw_only=True)
class ObjectiveInputs:
    """Inputs that an objective is made of.

    Attributes:
        request: of the training.
        noise: of teacher and student.
        networks: teacher and student.
        engines: the teacher's, as exported.
        states: returns those of the teacher's runs; called where they are needed.
        pictures: with captions, of a training that has some.
        positions: in pictures or drawn latents, of this process.
    """

    request: DistillRequest
    noise: TrainingNoise
    networks: tuple[UNet, UNet]
    engines: Path
    states: Callable[[], States]
    pictures: CaptionedPictures | None
    positions: Positions


def terms_of(request: DistillRequest) -> Mapping[str, tuple[float, Term]]:
    """Return the loss terms that a training can have, with their default weights."""
    if request.to_steps is not None:
        return CONSISTENCY_TERMS
    if request.fold_guidance:
        return GUIDANCE_TERMS
    return TERMS if request.data is None else PICTURE_TERMS


@contextmanager
def made_objective(given: ObjectiveInputs) -> Iterator[Objective]:
    """Make the objective of a training, whose engines are open inside of the block.

    Raises:
        SettingsError: the teacher has no classifier-free guidance that could be folded in, or takes
            an image.
    """
    if given.pictures is None:
        yield _without_pictures(given, given.states())
        return
    with load(given.engines, hashes=False) as pipeline:
        latents = PictureLatents(given.pictures, pipeline, given.positions)
        if given.request.folds:
            yield _folded(given, latents, _guidance(pipeline, given.request))
        else:
            yield _imitation(given, NoisySource(latents, given.noise))


def _without_pictures(given: ObjectiveInputs, states: States) -> Objective:
    if not given.request.folds:
        return _imitation(given, TrajectorySource(states, given.request.guided))
    latents = drawn_latents(states, given.noise)
    source = DrawnLatents(latents, given.request.seed, given.positions)
    return _folded(given, source, states.guidance)


def _imitation(given: ObjectiveInputs, source: TrajectorySource | NoisySource) -> Imitation:
    request = given.request
    return Imitation(source, terms_of(request), given.noise, given.networks, request.min_snr)


def _folded(given: ObjectiveInputs, source: CleanSource, guidance: Guidance) -> GuidanceObjective:
    request = given.request
    low, high = request.scales or (guidance.scale, guidance.scale)
    width = _SCALE_WIDTH if request.scales else 0
    plan = ConsistencyPlan(scales=(low, high), width=width, rescale=guidance.rescale)
    if width:
        add_guidance_input(given.networks[1].model, width)
    steps = FewerSteps(source, given.noise, plan)
    if request.to_steps is None:
        return GuidanceObjective(steps)
    return ConsistencyObjective(steps, request.to_steps)


def _guidance(pipeline: Pipeline, request: DistillRequest) -> Guidance:
    """Return the guidance of a request with the settings of the runs."""
    settings = pipeline.settings("", **request.settings)
    scale, rescale = settings.guidance_scale, settings.guidance_rescale
    return Guidance(rows=settings.guidance_rows, scale=scale, rescale=rescale)
