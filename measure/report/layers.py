"""Layers by time: what operators take together, and the hottest of all."""

from collections import defaultdict
from dataclasses import dataclass

from latentforge.measure.results import LayerTiming, ProfileTable

__all__ = ["Hot", "LayerSegment", "layers"]

_OPERATORS, _LAYERS = 10, 40


@dataclass(frozen=True, kw_only=True)
class LayerSegment:
    """Some layers' share of the seconds of all."""

    name: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Hot:
    """A participant's profile, arranged; ``listed`` is the share of the layers that it tells of."""

    name: str
    total: float
    listed: float
    operators: tuple[LayerSegment, ...]
    layers: tuple[tuple[LayerTiming, float], ...]


def layers(profile: ProfileTable) -> Hot:
    """Sum the layers that are there by component and operator; hottest first."""
    total = profile.total if profile.total > 0 else 1.0
    groups: dict[str, list[LayerTiming]] = defaultdict(list)
    for layer in profile.layers:
        groups[f"{layer.component} {layer.operator}"].append(layer)
    parts = [_part(name, own, total) for name, own in groups.items()]
    hottest = sorted(profile.layers, key=lambda layer: -layer.seconds)
    return Hot(
        name=profile.name,
        total=profile.total,
        listed=sum(layer.seconds for layer in profile.layers) / total,
        operators=tuple(sorted(parts, key=lambda part: -part.seconds)[:_OPERATORS]),
        layers=tuple((layer, layer.seconds / total) for layer in hottest[:_LAYERS]),
    )


def _part(name: str, own: list[LayerTiming], total: float) -> LayerSegment:
    seconds = sum(layer.seconds for layer in own)
    return LayerSegment(name=name, count=len(own), seconds=seconds, share=seconds / total)
