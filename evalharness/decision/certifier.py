"""Tests of a constraint on one policy: which p-value and bound fit a metric, and the clusters they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psacpo.evalharness.decision.criteria import Constraint, Criteria, Range
from psacpo.evalharness.decision.measures import Mean, Measure, Tail, Worst
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.shortfall import Test
from psacpo.evalharness.statistics.bootstrap import Array, Mask, bootstrap_weights
from psacpo.evalharness.statistics.bounds import betting_p, binomial_bound, binomial_p, inverted, share_p

# Of the clusters: those that choose where a tail begins, which take no part in the test of its mean.
_SPLIT = 0.2


class Certifier:
    """Tests of one run's policies on its calibration prompts.

    Attributes:
        use: The clusters that are tested on, [C].
        level: 1 - the chance of error that each test has.
    """

    def __init__(self, criteria: Criteria, scores: Scores, use: Mask, level: float) -> None:
        self.use, self.level, self.alpha = use, level, 1 - level
        clusters = len(scores.clusters)
        self.weights = bootstrap_weights(clusters, criteria.resamples, criteria.seed, use)
        order = np.random.default_rng([criteria.seed, 2]).permutation(clusters)
        self.order = order[use[order]]

    def test(self, constraint: Constraint, measure: Measure, k: int) -> Test:
        """One constraint on one policy."""
        upper = constraint.sense == "<="
        if isinstance(measure, Worst) and upper != measure.higher:
            # No category may be over the limit: the test that is passed last speaks for all.
            parts = [self._mean(constraint, part, k) for part in measure.parts.values() if part.count(k, self.use)]
            if parts:
                return max(parts, key=lambda test: (test.p, test.excess))
        if isinstance(measure, Mean):
            return self._mean(constraint, measure, k)
        if isinstance(measure, Tail) and measure.range is not None and upper == (measure.sign > 0):
            return self._tail(constraint, measure, k)
        return self._bootstrap(constraint, measure, k)

    def _mean(self, constraint: Constraint, measure: Mean, k: int) -> Test:
        used = self.order[measure.counts[k, self.order] > 0]
        sums, counts = measure.sums[k, used], measure.counts[k, used]
        upper = constraint.sense == "<="
        if measure.rate and len(used) and measure.counts[:, self.order].max() <= 1:
            events, limit = round(float(sums.sum())), constraint.limit
            if not upper:
                events, limit = len(used) - events, 1 - limit
            p = binomial_p(events, len(used), limit) if limit >= 0 else 1.0
            bound = binomial_bound(events, len(used), self.level)
            return self._test(
                constraint, measure, k, p=p, bound=bound if upper else 1 - bound, method="exact binomial", exact=True
            )
        if measure.range is not None and len(used):
            return self._bounded(constraint, measure, k, sums, counts, measure.range)
        return self._bootstrap(constraint, measure, k)

    def _bounded(
        self,
        constraint: Constraint,
        measure: Measure,
        k: int,
        sums: Array,
        counts: Array,
        bounds: Range,
        most: float | None = None,
    ) -> Test:
        """By betting on the clusters, in an order that was drawn beforehand; none holds more values than `most`."""
        sign = 1.0 if constraint.sense == "<=" else -1.0
        low, high = bounds if sign > 0 else (-bounds[1], -bounds[0])
        width, limit = high - low, sign * constraint.limit
        shares = (sign * sums - low * counts) / width  # sums of values from 0 to 1
        largest = counts.max() if most is None else most

        def p(at: float) -> float:
            # The mean over rows is at most m where the clusters' mean of (sum - m * count) is at most 0.
            scaled = (at - low) / width
            return self._p(np.clip(scaled + (shares - scaled * counts) / largest, 0, 1), scaled)

        def passes_with(units: int) -> bool:
            scaled = (limit - low) / width
            values = np.clip(scaled + (shares - scaled * counts) / largest, 0, 1)
            return self._p(np.resize(values, units), scaled) <= self.alpha

        bound = self._bound(p, low, high)
        return self._test(
            constraint,
            measure,
            k,
            p=p(limit),
            bound=sign * bound,
            method="betting on clusters",
            passes_with=passes_with,
        )

    def _tail(self, constraint: Constraint, measure: Tail, k: int) -> Test:
        """By the mean of edge + (cost - edge)+ / share, which is at least the tail's mean for any fixed edge.

        (Rockafellar and Uryasev 2000.) The edge is the quantile of clusters that take no further part.
        """
        assert measure.range is not None
        chooses, rest = self._apart(k)
        costs, owner = measure.costs[k], measure.owner[k]
        choosing = costs[chooses[owner]]
        edge = float(np.quantile(choosing, 1 - measure.share)) if len(choosing) else measure.range[1]
        above = edge + np.maximum(costs - edge, 0) / measure.share
        sums = np.bincount(owner, above, minlength=len(self.use))[rest].astype(np.float64)
        counts = np.bincount(owner, minlength=len(self.use))[rest].astype(np.float64)
        bounds = edge, edge + max(measure.range[1] - edge, 1e-12) / measure.share
        limit = measure.sign * constraint.limit
        upper = Constraint(metric=constraint.metric, sense="<=", limit=limit)
        if not counts.any() or not bounds[0] < limit:
            return self._test(constraint, measure, k, p=1.0, bound=measure.sign * bounds[1], method="betting on a tail")
        found = self._bounded(upper, measure, k, sums[counts > 0], counts[counts > 0], bounds)
        return self._test(
            constraint,
            measure,
            k,
            p=found.p,
            bound=measure.sign * found.bound,
            method="betting on a tail",
            passes_with=found.passes_with,
        )

    def _apart(self, k: int) -> tuple[Mask, NDArray[np.intp]]:
        """The clusters [C] that choose where a policy's tail begins, and the places of those that test it, in order."""
        split = self.order[: max(1, round(_SPLIT * len(self.order)))]
        chooses = np.zeros(len(self.use), dtype=np.bool_)
        chooses[split] = True
        return chooses, self.order[len(split) :]

    def _bound(self, p: Callable[[float], float], low: float, high: float) -> float:
        """The least limit that a test by `p` passes."""
        return inverted(p, self.alpha, low, high)

    def _p(self, values: Array, limit: float) -> float:
        """Of the hypothesis that values from 0 to 1 have a mean above the limit."""
        return betting_p(values, limit, alpha=self.alpha)

    def _bootstrap(self, constraint: Constraint, measure: Measure, k: int) -> Test:
        sign = 1.0 if constraint.sense == "<=" else -1.0
        draws = sign * measure.draws(k, self.weights)
        known = draws[np.isfinite(draws)]
        if measure.mean(k, self.use) is None or not len(known):
            return self._test(constraint, measure, k, p=1.0, bound=sign * np.inf, method="no rows")
        return self._test(
            constraint,
            measure,
            k,
            p=share_p(known, sign * constraint.limit),
            bound=sign * float(np.quantile(known, self.level)),
            method="clustered bootstrap (approximate)",
        )

    def _test(
        self,
        constraint: Constraint,
        measure: Measure,
        k: int,
        *,
        p: float,
        bound: float,
        method: str,
        exact: bool = False,
        passes_with: Any = None,
    ) -> Test:
        return Test(
            constraint=constraint,
            mean=measure.mean(k, self.use),
            rows=measure.count(k, self.use),
            units=_units(measure, k, self.use),
            p=p,
            bound=bound,
            level=self.level,
            method=method,
            exact=exact,
            passed=p <= self.alpha if np.isfinite(bound) else False,
            passes_with=passes_with,
        )


def _units(measure: Measure, k: int, use: Mask) -> int:
    """Clusters that hold a value."""
    if isinstance(measure, Mean):
        return int((measure.counts[k, use] > 0).sum())
    if isinstance(measure, Worst):
        held = sum(part.counts[k] for part in measure.parts.values())
        return int((np.asarray(held)[use] > 0).sum())
    if isinstance(measure, Tail):
        return len(np.unique(measure.owner[k][use[measure.owner[k]]]))
    return int(use.sum())
