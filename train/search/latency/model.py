"""Prediction of a structure's latency from measured ones.

The time that a structure saves is a sum over its choices, each measured alone in place, corrected
by ridge regression on random structures:

    saved(structure) = sum of saved(site, choice)
                     + sum over pairs of blocks c(a, b) saved(a) saved(b)

where saved(a) is the sum of single measurements in block a. Pairs are added one by one, as long as
they help with structures that are left out of the regression in turn; held-out ones only judge.
Regression shrinks towards the single measurements, not to zero, and weighs relative errors.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

from latentforge.export.models.searched_structure import SearchedStructure, Site
from latentforge.measure.statistics import spearman
from latentforge.train.search.latency.measure import LatencyPlan
from latentforge.train.search.latency.table import LatencyTable

__all__ = ["MAX_ERROR", "MIN_SPEARMAN", "LatencyModel", "PredictionErrors", "fit_latency"]

Array = NDArray[np.float64]

MAX_ERROR = 0.05
"""Mean relative error that a prediction of held-out structures may have."""

MIN_SPEARMAN = 0.95
"""Rank correlation that a prediction of held-out structures has to reach."""

_PENALTIES = tuple(10.0**power for power in range(-4, 3))
_MAX_PAIRS = 4
_LEAST = 0.01  # of the whole latency: what a prediction may not fall below
_GAIN = 0.95  # of the error without a pair, that a pair has to reach

_WHOLE = "*"
"""Block that stands for all blocks in a pair."""


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
class _Terms:
    """Terms of the sum that structures of one UNet have."""

    sites: Sequence[Site]
    signatures: Mapping[str, str]

    def of(self, structure: SearchedStructure) -> dict[str, Counter[str]]:
        """Return the number of each term by block."""
        terms: dict[str, Counter[str]] = {}
        for site in self.sites:
            if (choice := structure.choice(site.name)) != "keep":
                name = self.name(site, choice)
                terms.setdefault(site.block, Counter())[name] += 1
        for module, own in self.modules().items():
            if len(own) > 1 and all(structure.choice(s.name) == "drop" for s in own):
                terms[own[0].block][self.module_name(module, own)] += 1
        return terms

    def name(self, site: Site, choice: str) -> str:
        """Return the term of a choice, which sites of equal layers share."""
        return f"{self.signatures[site.name]} {choice}"

    def modules(self) -> dict[str, list[Site]]:
        """Return the transformer blocks of each attention module."""
        modules: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.kind == "transformer_block":
                modules.setdefault(site.name.partition(".transformer_blocks.")[0], []).append(site)
        return modules

    def module_name(self, module: str, own: Sequence[Site]) -> str:
        """Return the term of an attention module that is empty: its norm and projections."""
        return f"{self.signatures[own[0].name]} module of {len(own)}"


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predicted seconds of a step by structure.

    Attributes:
        whole: seconds of the whole UNet's step: all predictions are relative to it.
        saved_shares: share of it that a term saves.
        single_shares: the same as it was measured alone.
        pairs: coefficient by pair of blocks.
        errors: on held-out structures.
    """

    whole: float
    saved_shares: Mapping[str, float]
    single_shares: Mapping[str, float]
    pairs: Mapping[tuple[str, str], float]
    errors: PredictionErrors
    terms: _Terms

    def seconds(self, structure: SearchedStructure) -> float:
        """Return the predicted seconds of a step."""
        terms = self.terms.of(structure)
        single = _shares(terms, self.single_shares)
        share = sum(_shares(terms, self.saved_shares).values()) + sum(
            coefficient * _product(single, pair) for pair, coefficient in self.pairs.items()
        )
        return self.whole * max(1 - share, _LEAST)

    def saved(self, site: str, choice: str) -> float:
        """Return the seconds that a choice saves, as far as they add up with others'.

        Where the last transformer block takes its module with it, each of them has a share of that.
        """
        own = next(each for each in self.terms.sites if each.name == site)
        share = 0.0 if choice == "keep" else self.saved_shares.get(self.terms.name(own, choice), 0)
        if choice == "drop" and own.kind == "transformer_block":
            module = site.partition(".transformer_blocks.")[0]
            blocks = self.terms.modules()[module]
            name = self.terms.module_name(module, blocks)
            share += self.saved_shares.get(name, 0.0) / len(blocks)
        return self.whole * share

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


def _shares(
    terms: Mapping[str, Mapping[str, int]], shares: Mapping[str, float]
) -> dict[str, float]:
    """Return the share that each block saves, without pairs."""
    return {
        block: sum(shares.get(name, 0.0) * count for name, count in own.items())
        for block, own in terms.items()
    }


def _product(blocks: Mapping[str, float], pair: tuple[str, str]) -> float:
    """Return the product of the shares that two blocks save."""
    total = sum(blocks.values())
    first, second = (total if name == _WHOLE else blocks.get(name, 0.0) for name in pair)
    return first * second


def fit_latency(
    table: LatencyTable,
    plan: LatencyPlan,
    sites: Sequence[Site],
    signatures: Mapping[str, str],
) -> LatencyModel:
    """Fit a model to a table that has the latencies of a plan.

    Args:
        table: of measured latencies.
        plan: structures that were measured, and those of them that the model is judged by.
        sites: of the UNet.
        signatures: texts by name of the site, equal for sites of equal layers.
    """
    return _Fit(table, plan, _Terms(sites=sites, signatures=signatures)).model()


class _Fit:
    """Ridge regression of the share that random structures save."""

    def __init__(self, table: LatencyTable, plan: LatencyPlan, terms: _Terms) -> None:
        self._table, self._plan, self._terms = table, plan, terms
        self._prior = self._single_shares()
        names = {name for s in plan.fitted for own in terms.of(s).values() for name in own}
        self._names = sorted(names | self._prior.keys())
        self._saved = np.array([1 - table[s].ratio.value for s in plan.fitted])
        self._whole = median(latency.whole for latency in (table[s] for s in plan.structures))

    def model(self) -> LatencyModel:
        """Add pairs until none helps any more."""
        model, error = self._fitted(())
        while self._plan.fitted and len(model.pairs) < _MAX_PAIRS:
            candidates = [
                self._fitted((*model.pairs, pair))
                for pair in self._possible_pairs()
                if pair not in model.pairs
            ]
            better, least = min(candidates, key=lambda candidate: candidate[1])
            if least > _GAIN * error:
                break
            model, error = better, least
        return model

    def _single_shares(self) -> dict[str, float]:
        """Return the share that each term saves alone."""
        shares = {}
        for structure in self._plan.single:
            [terms] = self._terms.of(structure).values()
            shares[next(iter(terms))] = 1 - self._table[structure].ratio.value
        return shares

    def _possible_pairs(self) -> list[tuple[str, str]]:
        """Return pairs of blocks that are neighbours in the forward pass, or by skips."""
        blocks = list(dict.fromkeys(site.block for site in self._terms.sites))
        down = [block for block in blocks if block.startswith("down")]
        up = [block for block in blocks if block.startswith("up")]
        neighbours = zip(blocks, blocks[1:], strict=False)
        by_skips = zip(down, reversed(up), strict=False)
        own = ((block, block) for block in (*blocks, _WHOLE))
        return list(dict.fromkeys([*own, *neighbours, *by_skips]))

    def _fitted(self, pairs: Sequence[tuple[str, str]]) -> tuple[LatencyModel, float]:
        """Return the model with these pairs, and its error on structures left out one by one."""
        prior = np.array([self._prior.get(name, 0.0) for name in self._names] + [0.0] * len(pairs))
        rows = np.array([self._row(structure, pairs) for structure in self._plan.fitted])
        rows = rows.reshape(-1, len(prior))
        weights = 1 / (1 - self._saved) ** 2  # of squared errors, to be relative
        scales = np.abs(prior) + np.abs(prior).mean()
        scales[len(self._names) :] = 1.0
        options = [
            _ridge(rows, self._saved - rows @ prior, weights, penalty / scales**2)
            for penalty in _PENALTIES
        ]
        change, error = min(options, key=lambda option: option[1])
        solution = prior + change
        model = LatencyModel(
            whole=self._whole,
            saved_shares=dict(zip(self._names, solution.tolist(), strict=False)),
            single_shares=self._prior,
            pairs=dict(zip(pairs, solution[len(self._names) :].tolist(), strict=True)),
            errors=PredictionErrors(mean_error=0.0, spearman=0.0, points=()),
            terms=self._terms,
        )
        return replace(model, errors=self._errors(model)), error

    def _row(self, structure: SearchedStructure, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the count of each term, and the product of each pair by the single shares."""
        blocks = self._terms.of(structure)
        counts = sum(blocks.values(), Counter[str]())
        shares = _shares(blocks, self._prior)
        return [
            *(counts[name] for name in self._names),
            *(_product(shares, pair) for pair in pairs),
        ]

    def _errors(self, model: LatencyModel) -> PredictionErrors:
        """Return the errors on held-out structures, relative to the same whole latency."""
        return PredictionErrors.of(
            (model.seconds(s), self._whole * self._table[s].ratio.value)
            for s in self._plan.held_out
        )


def _ridge(rows: Array, target: Array, weights: Array, penalties: Array) -> tuple[Array, float]:
    """Solve a ridge regression.

    Args:
        rows: (n, d) of structures.
        target: (n,) to explain.
        weights: (n,) of squared errors.
        penalties: (d,) of squared coefficients.

    Returns:
        (d,) coefficients, and the root mean square of the weighted errors of each structure when
        it is left out, by the leverages (Hastie et al., Elements of Statistical Learning, 7.10).
    """
    weighted = rows * weights[:, None]
    inverse = np.linalg.inv(weighted.T @ rows + np.diag(penalties))
    solution = inverse @ (weighted.T @ target)
    leverages = np.einsum("nd,de,ne->n", rows, inverse, weighted)
    residuals = (target - rows @ solution) / np.maximum(1 - leverages, 1e-6)
    error = np.sqrt(np.mean(weights * residuals**2)) if len(rows) else 0.0
    return solution, float(error)
