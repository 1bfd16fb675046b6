"""What a family is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.manifest import Conditioning, Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ComponentPlan", "FamilyDefaults", "Family", "ExportPlan", "Reference"]


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """One graph to export.

    Attributes:
        name: of the component in the manifest.
        folder: of the checkpoint that holds its weights.
        part: what diffusers calls the module in its pipelines.
        module: gives the torch module of the checkpoint, in float32.
        wrap: makes a module with one tensor for each input, by name, and one for each output in
            order; it may take the module apart.
        inputs: the signature, all free dimensions named.
        outputs: likewise.
        multiples: free dimensions that only take multiples of a number, and that number.
        overflows_fp16: whether the checkpoint says that it needs more than half precision.
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
        """The module to trace."""
        return self.wrap(self.module(checkpoint))


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """What a family's requests get; None for the sampler is that of the checkpoint's scheduler."""

    sampler: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """How one checkpoint is cut up.

    Attributes:
        components: in the order in which an image run uses them.
        conditioning: how prompts reach the UNet; names its tokenizers, which are folders too.
        latent: the latent space.
        sample_size: height and width that the model was trained for, in pixels.
        defaults: of a request.
    """

    components: tuple[ComponentPlan, ...]
    conditioning: Conditioning
    latent: Latent
    sample_size: int
    defaults: FamilyDefaults

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folders of the checkpoint."""
        return tuple(encoder.tokenizer for encoder in self.conditioning.encoders)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The diffusers pipelines that a family's pictures have to be those of.

    By name: importing them brings image processors, seconds and warnings that export can spare.
    """

    text: str
    image: str
    inpaint: str


def _as_it_is(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: in the manifest.
        pipelines: the pipeline classes that its checkpoints name.
        plan: cuts one up.
        reference: diffusers' pipelines for it.
        scheduler: a scheduler_config.json as those pipelines read it.
    """

    name: str
    pipelines: tuple[str, ...]
    plan: Callable[[Checkpoint], ExportPlan]
    reference: Reference
    scheduler: Callable[[Mapping[str, Any]], dict[str, Any]] = _as_it_is
