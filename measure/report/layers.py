"""Layer profile: time by operator, and the slowest layers."""

from collections import defaultdict
from dataclasses import dataclass

from latentforge.measure.results import LayerTiming, ProfileTable

__all__ = ["LayerGroup", "LayerProfile", "layer_profile"]

_MAX_GROUPS, _MAX_LAYERS = 10, 40


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one component and operator; ``share`` is of the time of all layers."""

    name: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Profile of one participant, arranged for the page.

    Attributes:
        total: seconds of all layers.
        listed: share of ``total`` that the layers of the result file account for.
        groups: slowest first.
        layers: slowest first, each with its share of ``total``.
    """

    name: str
    total: float
    listed: float
    groups: tuple[LayerGroup, ...]
    layers: tuple[tuple[LayerTiming, float], ...]


def layer_profile(profile: ProfileTable) -> LayerProfile:
    """Sum the layers by component and operator, and sort by time."""
    total = profile.total if profile.total > 0 else 1.0
    by_operator: dict[str, list[LayerTiming]] = defaultdict(list)
    for layer in profile.layers:
        by_operator[f"{layer.component} {layer.operator}"].append(layer)
    groups = [_group(name, layers, total) for name, layers in by_operator.items()]
    slowest = sorted(profile.layers, key=lambda layer: -layer.seconds)
    return LayerProfile(
        name=profile.name,
        total=profile.total,
        listed=sum(layer.seconds for layer in profile.layers) / total,
        groups=tuple(sorted(groups, key=lambda group: -group.seconds)[:_MAX_GROUPS]),
        layers=tuple((layer, layer.seconds / total) for layer in slowest[:_MAX_LAYERS]),
    )


def _group(name: str, layers: list[LayerTiming], total: float) -> LayerGroup:
    seconds = sum(layer.seconds for layer in layers)
    return LayerGroup(name=name, count=len(layers), seconds=seconds, share=seconds / total)
