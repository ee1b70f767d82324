"""A metric as numbers: scores in, what can be averaged over clusters of prompts and resampled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psacpo.errors import InputError
from psacpo.evalharness.decision.criteria import LENGTH, Criteria, Metric, Range
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.statistics.bootstrap import Array, Estimate, Mask, estimate, interval, ratio_means
from psacpo.evalharness.statistics.pairwise import length_adjusted_win_rates
from psacpo.evalharness.statistics.tails import prompt_cvars, weighted_cvars, worst_of

_ONE = np.ones((1, 1))
# Draws times comparisons that a length adjustment is fitted to: a few seconds.
_MOST_FITTED = 1_000_000


class Measure(Protocol):
    """One metric of all K policies."""

    def count(self, k: int, use: Mask) -> int:
        """How many values it is made of in the clusters that are used, [C]."""
        ...

    def mean(self, k: int, use: Mask) -> float | None:
        """Its value over the clusters that are used; None where there is none."""
        ...

    def draws(self, k: int, weights: Array) -> Array:
        """Its value in each draw of clusters, [D, C] -> [D]; NaN where a draw holds none."""
        ...

    def estimate(self, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None = None) -> Estimate:
        """Its value with an interval; `weights` draw among the clusters that are used, `draws` are its own in them."""
        ...


@dataclass(frozen=True)
class Mean:
    """A mean over rows.

    Attributes:
        sums: Of the values in each cluster, [K, C].
        counts: Of the values, [K, C].
        rate: Every value is 0 or 1.
        range: The least and the greatest value that there can be; None where nobody knows.
    """

    sums: Array
    counts: Array
    rate: bool
    range: Range | None

    def count(self, k: int, use: Mask) -> int:
        return int(self.counts[k, use].sum())

    def mean(self, k: int, use: Mask) -> float | None:
        n = self.counts[k, use].sum()
        return float(self.sums[k, use].sum() / n) if n else None

    def draws(self, k: int, weights: Array) -> Array:
        return ratio_means(weights, self.sums[k], self.counts[k])

    def estimate(self, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None = None) -> Estimate:
        return estimate(weights, self.sums[k] * use, self.counts[k] * use, confidence=confidence, rate=self.rate)


@dataclass(frozen=True)
class Tail:
    """The mean of the worst share of all rows.

    Attributes:
        costs: The values of each policy, larger = worse, [R] each.
        owner: The clusters they belong to, [R] each.
        sign: What turns a cost back to the metric's own scale.
        range: Of the costs.
    """

    costs: Sequence[Array]
    owner: Sequence[NDArray[np.intp]]
    share: float
    sign: float
    range: Range | None

    def count(self, k: int, use: Mask) -> int:
        return int(use[self.owner[k]].sum())

    def mean(self, k: int, use: Mask) -> float | None:
        rows = self.costs[k][use[self.owner[k]]]
        if not len(rows):
            return None
        found = weighted_cvars(rows, np.zeros(len(rows), dtype=np.intp), _ONE, [self.share])
        return self.sign * float(found[0, 0])

    def draws(self, k: int, weights: Array) -> Array:
        found: Array = self.sign * weighted_cvars(self.costs[k], self.owner[k], weights, [self.share])[0]
        return found

    def estimate(self, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None = None) -> Estimate:
        return _percentiles(self, k, weights, use, confidence, draws)


@dataclass(frozen=True)
class Worst:
    """The worst of several means, each of one category. As the extreme of noisy means it is biased to the bad side."""

    parts: Mapping[str, Mean]
    higher: bool

    def count(self, k: int, use: Mask) -> int:
        return sum(part.count(k, use) for part in self.parts.values())

    def mean(self, k: int, use: Mask) -> float | None:
        where = self.where(k, use)
        return None if where is None else self.parts[where].mean(k, use)

    def where(self, k: int, use: Mask) -> str | None:
        """The category that is worst."""
        sign = -1 if self.higher else 1
        means = {name: mean for name, part in self.parts.items() if (mean := part.mean(k, use)) is not None}
        return max(means, key=lambda name: sign * means[name]) if means else None

    def draws(self, k: int, weights: Array) -> Array:
        rows = np.stack([part.draws(k, weights) for part in self.parts.values()])
        # A category that a draw missed is not the worst; one that all missed leaves NaN.
        bottom = np.where(np.isnan(rows), np.inf if self.higher else -np.inf, rows)
        found = bottom.min(axis=0) if self.higher else bottom.max(axis=0)
        return np.asarray(np.where(np.isfinite(found), found, np.nan), dtype=np.float64)

    def estimate(self, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None = None) -> Estimate:
        return _percentiles(self, k, weights, use, confidence, draws)


@dataclass(frozen=True)
class Adjusted:
    """A win rate at equal length: one logistic fit over all policies in each draw (see `pairwise`).

    Attributes:
        preference: [R], from 0 to 1, of all policies; with the difference in length, the policy and the cluster.
        policies: How many there are.
    """

    preference: Array
    longer: Array
    policy: NDArray[np.int64]
    owner: NDArray[np.intp]
    policies: int
    _known: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def count(self, k: int, use: Mask) -> int:
        return int(use[self.owner[self.policy == k]].sum())

    def mean(self, k: int, use: Mask) -> float | None:
        found = self._rates(use[None, :].astype(np.float64))[0, k]
        return float(found) if np.isfinite(found) else None

    def draws(self, k: int, weights: Array) -> Array:
        """NaN beyond as many draws as are fitted in reasonable time: `_MOST_FITTED` numbers."""
        if id(weights) not in self._known:
            draws = max(100, _MOST_FITTED // max(len(self.preference), 1))
            rates = np.full((len(weights), self.policies), np.nan)
            rates[:draws] = self._rates(weights[:draws])
            self._known[id(weights)] = weights, rates  # held on to, so that no other array gets its id
        return self._known[id(weights)][1][:, k]

    def estimate(self, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None = None) -> Estimate:
        return _percentiles(self, k, weights, use, confidence, draws)

    def _rates(self, weights: Array) -> Array:
        rates = np.full((len(weights), self.policies), np.nan)
        if len(self.preference):
            found = length_adjusted_win_rates(self.preference, self.longer, self.policy, weights[:, self.owner])
            rates[:, : found.shape[1]] = found
        return rates


def _percentiles(
    measure: Measure, k: int, weights: Array, use: Mask, confidence: float, draws: Array | None
) -> Estimate:
    mean = measure.mean(k, use)
    if mean is None:
        return Estimate(None, None, None, 0)
    drawn = measure.draws(k, weights) if draws is None else draws
    return interval(mean, drawn, measure.count(k, use), confidence=confidence)


def make_measure(criteria: Criteria, name: str, metric: Metric, scores: Scores) -> Measure:
    """A metric's numbers.

    Raises:
        InputError: A score is outside the range that the metric declares, or no prompt has the field of its categories.
    """
    values = scores.values.get(metric.judge)
    if values is None:
        values = np.full((len(scores.policies), len(scores.prompts), 1), np.nan)
    _require_range(name, metric, values)
    if metric.where:
        counted = np.array(
            [all(row.fields.get(key) == want for key, want in metric.where.items()) for row in scores.prompts]
        )
        values = np.where(counted[None, :, None], values, np.nan)
    if metric.worst is not None:
        return _worst(criteria, name, metric, scores, values)
    sign = 1.0 if criteria.better(metric) == "lower" else -1.0
    if metric.tail is not None and metric.per == "answers":
        return _pooled(metric, scores, sign * values, sign)
    if metric.tail is not None:
        share = metric.tail
        rows = sign * np.stack([prompt_cvars(sign * own, share) for own in values])
        return _mean(scores, rows, metric.range)
    if metric.worst_of is not None and metric.above is not None:
        n = metric.worst_of
        return _mean(scores, np.stack([worst_of(own, n) for own in _above(values, metric.above)]), (0.0, 1.0))
    if metric.worst_of is not None:
        n = metric.worst_of
        return _mean(scores, sign * np.stack([worst_of(sign * own, n) for own in values]), metric.range)
    column = criteria.columns()[metric.judge]
    upward = column.better == "higher"
    if metric.length_adjusted:
        anchor = metric.versus or column.anchor
        assert anchor is not None
        wins = _wins(scores, values if upward else -values, metric.versus) if metric.versus else values
        return _adjusted(scores, wins if metric.versus or upward else 1 - values, anchor)
    if metric.versus is not None:
        return _mean(scores, _wins(scores, values if upward else -values, metric.versus), (0.0, 1.0))
    if metric.above is not None:
        values = _above(values, metric.above)
    known = metric.range if column.anchor is None else (0.0, 1.0)
    return _mean(scores, values, known if metric.above is None else (0.0, 1.0))


def _mean(scores: Scores, values: Array, bounds: Range | None) -> Mean:
    sums, counts = scores.by_cluster(values)
    known = values[~np.isnan(values)]
    rate = bool(np.isin(known, (0.0, 1.0)).all())
    return Mean(sums, counts, rate, (0.0, 1.0) if rate else bounds)


def _above(values: Array, limit: float) -> Array:
    return np.where(np.isnan(values), np.nan, (values > limit).astype(np.float64))


def _pooled(metric: Metric, scores: Scores, costs: Array, sign: float) -> Tail:
    assert metric.tail is not None
    known = ~np.isnan(costs)
    owner = np.broadcast_to(scores.owner[:, None], costs.shape[1:])
    bounds = metric.range
    if bounds is not None and sign < 0:
        bounds = -bounds[1], -bounds[0]
    return Tail(
        [own[mask] for own, mask in zip(costs, known, strict=True)],
        [owner[mask] for mask in known],
        metric.tail,
        sign,
        bounds,
    )


def _wins(scores: Scores, values: Array, anchor: str) -> Array:
    """1 where a policy's score is above the anchor's for the same prompt and sample, a half where it is equal."""
    [place] = [index for index, policy in enumerate(scores.policies) if policy.name == anchor]
    other = values[place]
    wins = np.where(values > other, 1.0, np.where(values == other, 0.5, 0.0))
    return np.where(np.isnan(values) | np.isnan(other), np.nan, wins)


def _adjusted(scores: Scores, wins: Array, anchor: str) -> Adjusted:
    [place] = [index for index, policy in enumerate(scores.policies) if policy.name == anchor]
    lengths = scores.values.get(LENGTH, np.full_like(wins, np.nan))
    longer = np.broadcast_to(lengths - lengths[place], wins.shape)
    k, prompt, sample = np.nonzero(np.isfinite(wins) & np.isfinite(longer))
    return Adjusted(
        wins[k, prompt, sample],
        longer[k, prompt, sample],
        k.astype(np.int64),
        scores.owner[prompt],
        len(scores.policies),
    )


def _worst(criteria: Criteria, name: str, metric: Metric, scores: Scores, values: Array) -> Worst:
    assert metric.worst is not None
    kinds: list[Any] = [row.fields.get(metric.worst) for row in scores.prompts]
    found = sorted({str(kind) for kind in kinds if kind is not None})
    if not found:
        raise InputError(f"metric '{name}': no prompt has a field '{metric.worst}'")
    if metric.above is not None:
        values = _above(values, metric.above)
    parts = {}
    for kind in found:
        mine = np.array([own is not None and str(own) == kind for own in kinds])
        part = _mean(scores, np.where(mine[None, :, None], values, np.nan), metric.range)
        parts[kind] = replace(part, range=(0.0, 1.0)) if metric.above is not None else part
    return Worst(parts, higher=criteria.better(metric) == "higher")


def _require_range(name: str, metric: Metric, values: Array) -> None:
    if metric.range is None:
        return
    known = values[~np.isnan(values)]
    outside = known[(known < metric.range[0]) | (known > metric.range[1])]
    if len(outside):
        raise InputError(
            f"metric '{name}': judge '{metric.judge}' gave a score outside the metric's range",
            given=float(outside[0]),
            allowed=f"{metric.range[0]:g} to {metric.range[1]:g}",
        )
