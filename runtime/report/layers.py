"""Layers by time: what operators take together, and the hottest of all."""

from collections import defaultdict
from dataclasses import dataclass

from latentforge.runtime.results import Layer, ProfileTable

__all__ = ["Hot", "Part", "layers"]

_OPERATORS, _LAYERS = 10, 40


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some layers' share of the seconds of all."""

    name: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Hot:
    """A contender's profile, arranged; ``listed`` is the share of the layers that it tells of."""

    name: str
    total: float
    listed: float
    operators: tuple[Part, ...]
    layers: tuple[tuple[Layer, float], ...]


def layers(profile: ProfileTable) -> Hot:
    """Sum the layers that are there by component and operator; hottest first."""
    total = profile.total if profile.total > 0 else 1.0
    groups: dict[str, list[Layer]] = defaultdict(list)
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


def _part(name: str, own: list[Layer], total: float) -> Part:
    seconds = sum(layer.seconds for layer in own)
    return Part(name=name, count=len(own), seconds=seconds, share=seconds / total)
