"""Types that describe a model family and the export of one of its checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.manifest import Conditioning, Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ComponentPlan", "FamilyDefaults", "Family", "ExportPlan", "ImageSize", "Reference"]

ImageSize = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """Plan for the export of one component to one graph.

    Attributes:
        name: name of the component in the manifest.
        folder: folder of the checkpoint with its weights.
        part: name of the module in diffusers' pipelines.
        module: loads the torch module of a checkpoint, in float32.
        wrap: wraps the module so that it takes one tensor per input, by name, and returns one per
            output, in order; it may modify the module.
        inputs: tensor specs by name, with names for the free dimensions.
        outputs: likewise.
        multiples: divisors of free dimensions, by dimension name.
        overflows_fp16: the checkpoint states that the values exceed the range of half precision.
    """

    name: str
    folder: str
    part: str
    module: Callable[[Checkpoint], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    multiples: Mapping[str, int] = field(default_factory=dict)
    overflows_fp16: bool = False

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """Load the module of a checkpoint, wrapped for tracing."""
        return self.wrap(self.module(checkpoint))


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """Default settings of a family's requests.

    Attributes:
        sampler: name of the sampler; None takes the one of the checkpoint's scheduler.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
        guidance_rescale: strength of guidance rescaling, 0 to 1 (Lin et al. 2023).
        image_guidance_scale: scale of guidance by an image, at least 1 (Brooks et al. 2023).
        noise_level: noise on an image to enlarge, a timestep of its own schedule.
    """

    sampler: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    image_guidance_scale: float = 1.0
    noise_level: int = 0


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Plan for the export of one checkpoint.

    Attributes:
        components: plans of the components, in the order in which text to image runs them.
        conditioning: text encoders and their outputs that condition the denoiser.
        latent: the latent space.
        sample_size: height and width of the training images.
        defaults: default settings of a request.
    """

    components: tuple[ComponentPlan, ...]
    conditioning: Conditioning
    latent: Latent
    sample_size: ImageSize
    defaults: FamilyDefaults

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers, which are also their folders in the checkpoint."""
        return tuple(encoder.tokenizer for encoder in self.conditioning.encoders)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Class names of the diffusers pipelines whose images a family has to reproduce.

    They are names because importing the classes loads image processors, takes seconds and emits
    warnings that export does not need.

    Attributes:
        image: pipeline for requests with an image.
        text: pipeline for text to image; None for a model that needs an image.
        inpaint: pipeline for inpainting, likewise.
    """

    image: str
    text: str | None = None
    inpaint: str | None = None


def _unchanged(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Model family: a kind of checkpoint that export supports.

    Attributes:
        name: name in the manifest.
        pipelines: pipeline classes that model_index.json may name.
        plan: returns the export plan of a checkpoint.
        reference: diffusers' pipelines for the family.
        scheduler: returns a scheduler_config.json with the corrections that those pipelines make.
    """

    name: str
    pipelines: tuple[str, ...]
    plan: Callable[[Checkpoint], ExportPlan]
    reference: Reference
    scheduler: Callable[[Mapping[str, Any]], dict[str, Any]] = _unchanged
