"""What a family is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.manifest import Latent
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ComponentPlan", "Family", "Plan"]


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """One graph to export.

    Attributes:
        name: of the component in the manifest.
        folder: of the checkpoint that holds its weights.
        load: gives the torch module, in float32, with one tensor for each input in order and
            one for each output.
        inputs: the signature, all free dimensions named.
        outputs: likewise.
        multiples: free dimensions that only take multiples of a number, and that number.
    """

    name: str
    folder: str
    load: Callable[[Checkpoint], nn.Module]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    multiples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one checkpoint is cut up.

    Attributes:
        components: in the order in which an image run uses them.
        tokenizers: folders of the checkpoint by the tokenizer's name.
        latent: the latent space.
        sample_size: height and width that the model was trained for, in pixels.
        steps: the default number.
        guidance_scale: the default.
    """

    components: tuple[ComponentPlan, ...]
    tokenizers: Mapping[str, str]
    latent: Latent
    sample_size: int
    steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint: its name, the pipeline classes it goes by, and its plan."""

    name: str
    pipelines: tuple[str, ...]
    plan: Callable[[Checkpoint], Plan]
