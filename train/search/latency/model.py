"""Prediction of a structure's latency from measured ones.

The time of a step is not the whole UNet's less what is left out, as parts take less time in a small
UNet: more of its weights and activations stay in the caches. So what is *left* is added up, and one
figure says how much faster it gets with less beside it:

    load(structure)    = fixed + sum of the costs of the parts that are left,   load(whole) = 1
    seconds(structure) = seconds(whole) * load * (1 - crowding * (1 - load))

Costs are the non-negative least squares of relative errors over all measured structures (Lawson &
Hanson, Solving Least Squares Problems, 1974, chapter 23), each weighted by how precisely it was
measured. There are hardly more structures than costs, so costs are also held small (ridge
regression: Hoerl & Kennard 1970), by as much as equal shares of the whole would be likely. The
crowding is the one that predicts structures best which are left out of the fit in turn. Held-out
ones only judge. As seconds rise with the load, a structure that is best for a load is best for its
seconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot, nan
from statistics import mean, median
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from latentforge.export.models.searched_structure import Choice, SearchedStructure, Site
from latentforge.measure.statistics import spearman
from latentforge.train.search.latency.measure import LatencyPlan
from latentforge.train.search.latency.records import Latency
from latentforge.train.search.latency.table import LatencyTable

__all__ = ["MAX_ERROR", "MIN_SPEARMAN", "LatencyModel", "PredictionErrors", "fit_latency"]

Array = NDArray[np.float64]
Load = TypeVar("Load", float, Array)

MAX_ERROR = 0.05
"""Mean relative error that a prediction of held-out structures may have."""

MIN_SPEARMAN = 0.95
"""Rank correlation that a prediction of held-out structures has to reach."""

_CROWDINGS = tuple(step / 20 for step in range(17))
_FOLDS = 5
_LEAST = 0.01  # of the whole latency: what a prediction may not fall below
_MISFIT = 0.01  # standard deviation of a ratio from a sum of costs, however well it is measured
_EXACT = 0.0001  # that of the whole UNet, whose ratio is 1 by definition

_FIXED = "fixed"
_WHOLE = SearchedStructure(choices={})
_RESNET: Mapping[Choice, tuple[str, ...]] = {"keep": ("half", "other half"), "half": ("half",)}
_TRANSFORMER: Mapping[Choice, tuple[str, ...]] = {
    "keep": ("attn1", "attn2", "ff"),
    "half": ("halves",),
    "no_self_attention": ("attn2", "ff"),
    "no_feed_forward": ("attn1", "attn2"),
    "cross_attention": ("attn2",),
}
_STAGE: Mapping[Choice, tuple[str, ...]] = {"keep": ("resamplers",)}
_PARTS = {"resnet": _RESNET, "transformer_block": _TRANSFORMER, "stage": _STAGE}
"""Parts that a choice leaves, by kind of the site; "drop" leaves none."""


@dataclass(frozen=True, kw_only=True)
class PredictionErrors:
    """Quality of a prediction on held-out structures; NaN without any.

    Attributes:
        mean_error: mean of |predicted - measured| / measured.
        spearman: rank correlation of both.
        points: (predicted, measured) seconds of each.
    """

    mean_error: float
    spearman: float
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> "PredictionErrors":
        """Return the errors of (predicted, measured) pairs."""
        pairs = tuple(points)
        return cls(
            mean_error=mean(abs(a / b - 1) for a, b in pairs) if pairs else nan,
            spearman=spearman([a for a, _ in pairs], [b for _, b in pairs]),
            points=pairs,
        )

    @property
    def is_good(self) -> bool:
        """True if the prediction is as good as a search needs it."""
        return self.mean_error <= MAX_ERROR and self.spearman >= MIN_SPEARMAN

    def __str__(self) -> str:
        limits = f"{MAX_ERROR:.0%} and {MIN_SPEARMAN}"
        verdict = f", worse than {limits}: trust measured latencies alone" * (not self.is_good)
        return (
            f"mean error {self.mean_error:.1%} and rank correlation {self.spearman:.3f} on "
            f"{len(self.points)} held-out structures{verdict}"
        )


@dataclass(frozen=True, kw_only=True)
class _UNetParts:
    """Parts of a UNet that take time; sites of equal layers share theirs."""

    sites: Sequence[Site]
    signatures: Mapping[str, str]

    def left(self, structure: SearchedStructure) -> Counter[str]:
        """Return the number of each part that a structure leaves."""
        gone, left = structure.removed(self.sites), Counter({_FIXED: 1})
        for site in self.sites:
            if site.name not in gone:
                parts = _PARTS[site.kind].get(structure.choice(site.name), ())
                left.update(f"{self.signatures[site.name]} {part}" for part in parts)
        for own in self.modules.values():
            if not all(site.name in gone for site in own):  # a norm and projections
                left[self.module_part(own)] += 1
        return left

    def module_part(self, own: Sequence[Site]) -> str:
        """Return the norm and projections of an attention module with these blocks."""
        return f"{self.signatures[own[0].name]} module of {len(own)}"

    @cached_property
    def modules(self) -> dict[str, list[Site]]:
        """Transformer blocks of each attention module."""
        modules: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.kind == "transformer_block":
                modules.setdefault(_module(site.name), []).append(site)
        return modules


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predicted seconds of a step by structure.

    Attributes:
        whole: seconds of the whole UNet's step: all predictions are relative to it.
        costs: of parts, in shares of the whole load.
        crowding: share of the time that a part saves when hardly anything is beside it.
        errors: on held-out structures.
    """

    whole: float
    costs: Mapping[str, float]
    crowding: float
    errors: PredictionErrors
    parts: _UNetParts

    def seconds(self, structure: SearchedStructure) -> float:
        """Return the predicted seconds of a step."""
        return self.whole * max(_crowded(self._load(structure), self.crowding), _LEAST)

    def saved(self, site: str, choice: Choice) -> float:
        """Return the load that a choice saves, in seconds of the whole UNet: these add up.

        Where the last transformer block takes its module with it, each of them has a share of that.
        """
        share = 1 - self._load(SearchedStructure.of({site: choice}, self.parts.sites))
        own = self.parts.modules.get(_module(site), ())
        if choice == "drop" and len(own) > 1:
            share += self.costs.get(self.parts.module_part(own), 0.0) / len(own)
        return self.whole * share

    def _load(self, structure: SearchedStructure) -> float:
        left = self.parts.left(structure)
        return sum(self.costs.get(name, 0.0) * count for name, count in left.items())

    @property
    def mean_error(self) -> float:
        """Mean relative error on held-out structures."""
        return self.errors.mean_error

    @property
    def spearman(self) -> float:
        """Rank correlation on held-out structures."""
        return self.errors.spearman

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """Predicted and measured seconds of held-out structures."""
        return self.errors.points


def _module(site: str) -> str:
    """Return the attention module that a transformer block is in."""
    return site.partition(".transformer_blocks.")[0]


def _crowded(load: Load, crowding: float) -> Load:
    """Return the share of the whole UNet's time that a load takes."""
    return load * (1 - crowding * (1 - load))


def _load_of(shares: Array, crowding: float) -> Array:
    """Return the loads that take these shares of the time: the inverse of _crowded()."""
    if not crowding:
        return shares
    free = 1 - crowding
    return np.asarray((np.sqrt(free**2 + 4 * crowding * shares) - free) / (2 * crowding))


def fit_latency(
    table: LatencyTable,
    plan: LatencyPlan,
    sites: Sequence[Site],
    signatures: Mapping[str, str],
) -> LatencyModel:
    """Fit a model to a table that has the latencies of a plan.

    Args:
        table: of measured latencies, those of other searches too.
        plan: structures that the table has, and those of them that the model is judged by.
        sites: of the UNet.
        signatures: texts by name of the site, equal for sites of equal layers.
    """
    parts = _UNetParts(sites=sites, signatures=signatures)
    ratios = {structure: table[structure].ratio.value for structure in plan.structures}
    whole = median(table[structure].whole for structure in plan.structures)
    fit = _Fit.of({s: table[s] for s in table if s not in plan.held_out}, parts)
    crowding = fit.best_crowding()
    model = LatencyModel(
        whole=whole,
        costs=fit.costs(crowding),
        crowding=crowding,
        errors=PredictionErrors.of(()),
        parts=parts,
    )
    points = [(model.seconds(s), whole * ratios[s]) for s in plan.held_out]
    return replace(model, errors=PredictionErrors.of(points))


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Least squares of the relative errors of measured structures.

    Attributes:
        names: of the parts.
        counts: (n, parts) of each that a structure leaves; the whole UNet is the first.
        shares: (n,) of the whole UNet's time.
        deviations: (n,) of the shares, relative to them.
    """

    names: Sequence[str]
    counts: Array
    shares: Array
    deviations: Array

    @classmethod
    def of(cls, latencies: Mapping[SearchedStructure, Latency], parts: _UNetParts) -> "_Fit":
        """Return the least squares of measured ratios to the whole UNet's time."""
        left = [parts.left(structure) for structure in (_WHOLE, *latencies)]
        names = sorted(left[0].keys() | {name for each in left for name in each})
        counts = np.array([[float(each[name]) for name in names] for each in left])
        measured = latencies.values()
        return cls(
            names=names,
            counts=counts,
            shares=np.array([1.0, *(latency.ratio.value for latency in measured)]),
            deviations=np.array([_EXACT, *(hypot(_MISFIT, each.deviation) for each in measured)]),
        )

    def costs(self, crowding: float) -> dict[str, float]:
        """Return the cost of each part."""
        solution = self._solution(crowding, np.ones(len(self.shares), bool))
        return dict(zip(self.names, solution.tolist(), strict=True))

    def best_crowding(self) -> float:
        """Return the smallest crowding that predicts what is left out as well as the best does.

        As well is within the standard error of the best one's mean error (Breiman et al.,
        Classification and Regression Trees, 1984, section 3.4.3).
        """
        if len(self.shares) <= _FOLDS:
            return 0.0
        errors = {crowding: self._left_out_errors(crowding) for crowding in _CROWDINGS}
        best = min(errors.values(), key=np.mean)
        enough = best.mean() + best.std() / len(best) ** 0.5
        return next(crowding for crowding, each in errors.items() if each.mean() <= enough)

    def _left_out_errors(self, crowding: float) -> Array:
        """Return the squared errors of all structures, (n - 1,), each by a fit without it."""
        index = np.arange(len(self.shares)) - 1
        errors = np.zeros(len(self.shares))
        for fold in range(_FOLDS):
            out = (index >= 0) & (index % _FOLDS == fold)
            loads = self.counts[out] @ self._solution(crowding, ~out)
            errors[out] = (_crowded(loads, crowding) / self.shares[out] - 1) / self.deviations[out]
        return np.square(errors[1:])

    def _solution(self, crowding: float, chosen: NDArray[np.bool_]) -> Array:
        """Return the costs of the parts, (parts,), from the chosen structures."""
        loads = _load_of(self.shares, crowding)
        slopes = 1 - crowding * (1 - 2 * loads)  # of the time by the load
        weights = slopes / self.shares / self.deviations
        rows, target = self.counts * weights[:, None], loads * weights
        ridge = np.eye(len(self.names)) * self.counts[0].sum()  # 1 / the deviation of a cost
        solution, _ = nnls(
            np.concatenate([rows[chosen], ridge]),
            np.concatenate([target[chosen], np.zeros(len(ridge))]),
        )
        return np.asarray(solution)
