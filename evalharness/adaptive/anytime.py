"""Tests that may be looked at after every prompt, in the place of `certifier.Certifier`'s, which see all prompts once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from psacpo.evalharness.adaptive.split import Places, Split, race_range
from psacpo.evalharness.decision.certifier import Certifier
from psacpo.evalharness.decision.criteria import Constraint, Criteria
from psacpo.evalharness.decision.measures import Mean, Measure, Worst
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.shortfall import Test
from psacpo.evalharness.statistics.bootstrap import Array, Mask
from psacpo.evalharness.statistics.racing import anytime_p


class AnytimeCertifier(Certifier):
    """Tests of the ratios on as many of the test's clusters as each has answered.

    The p-value is 1 over the most capital that a gambler has had so far, who bets on the clusters in an order that was
    drawn before any answer; by Ville's inequality it holds at whatever moment the sweep stops asking, and whyever. What a
    cluster can hold and what a score can be are known from the settings, not read off the answers so far. Where a tail
    begins is chosen by the design's clusters.

    Args:
        among: The clusters to test on, [C]; None is the test's.
        quick: Whether to leave out the bounds, which take most of the time: each is then the greatest value there is.
    """

    def __init__(
        self,
        criteria: Criteria,
        scores: Scores,
        parts: Split,
        level: float,
        *,
        among: Mask | None = None,
        quick: bool = False,
    ) -> None:
        self.quick = quick
        self.use = parts.test if among is None else among
        self.level, self.alpha = level, 1 - level
        order = np.random.default_rng([criteria.seed, 2]).permutation(len(scores.clusters))
        self.order = order[self.use[order]]
        self.parts = parts
        self._scores = scores
        matters = np.any([parts.tells[c.metric] for c in criteria.constraints], axis=0)
        self._matters = self.order[matters[self.order]]
        self.most = int((matters & parts.test).sum())
        metrics = criteria.all_metrics()
        self.ranges = {c.metric: race_range(criteria, metrics[c.metric]) for c in criteria.constraints}

    def test(self, constraint: Constraint, measure: Measure, k: int) -> Test:
        """One constraint on one policy; of the worst category, every category that there is has to pass."""
        if isinstance(measure, Worst) and (constraint.sense == "<=") != measure.higher:
            parts = [self._mean(constraint, part, k) for part in measure.parts.values()]
            return max(parts, key=lambda test: (test.p, test.excess))
        return super().test(constraint, measure, k)

    def _answered(self, k: int) -> Places:
        """The clusters that can hold a constraint's value, in order, up to the first that policy k has not answered.

        So what is added later, for whatever reason, comes after what has been looked at.
        """
        gaps = np.flatnonzero(~self._scores.asked(k)[self._matters])
        found: Places = self._matters[: gaps[0]] if len(gaps) else self._matters
        return found

    def broken(self, constraint: Constraint, measure: Measure, k: int) -> bool:
        """Whether a policy is shown to break a constraint, so that more prompts would be wasted on it."""
        other = constraint.model_copy(update={"sense": ">=" if constraint.sense == "<=" else "<="})
        parts = list(measure.parts.values()) if isinstance(measure, Worst) else [measure]
        return any(isinstance(part, Mean) and self._mean(other, part, k).p <= self.alpha for part in parts)

    def _mean(self, constraint: Constraint, measure: Mean, k: int) -> Test:
        order = self._answered(k)
        used = order[measure.counts[k, order] > 0]
        bounds = self.ranges[constraint.metric]
        if bounds is None or not len(used):
            return self._nothing(constraint, measure, k)
        most = self.parts.most[constraint.metric]
        return self._bounded(constraint, measure, k, measure.sums[k, used], measure.counts[k, used], bounds, most=most)

    def _apart(self, k: int) -> tuple[Mask, Places]:
        return self.parts.design, self._answered(k)

    def _bootstrap(self, constraint: Constraint, measure: Measure, k: int) -> Test:
        return self._nothing(constraint, measure, k)

    def _bound(self, p: Callable[[float], float], low: float, high: float) -> float:
        return high if self.quick else super()._bound(p, low, high)

    def _p(self, values: Array, limit: float) -> float:
        return anytime_p(values, limit, alpha=self.alpha, most=self.most)

    def _bounded(
        self,
        constraint: Constraint,
        measure: Measure,
        k: int,
        sums: Array,
        counts: Array,
        bounds: tuple[float, float],
        most: float | None = None,
    ) -> Test:
        if most is None:
            most = self.parts.most[constraint.metric]
        found = super()._bounded(constraint, measure, k, sums, counts, bounds, most=most)
        return replace(found, method=f"anytime-valid {found.method}")

    def _nothing(self, constraint: Constraint, measure: Measure, k: int) -> Test:
        sign = 1.0 if constraint.sense == "<=" else -1.0
        return self._test(constraint, measure, k, p=1.0, bound=sign * np.inf, method="no rows")


def decided(
    certifier: AnytimeCertifier, tests: Sequence[tuple[Constraint, Measure]], k: int
) -> tuple[bool | None, Constraint | None]:
    """Whether a policy has passed all of some constraints (True), is shown to break one (False, and which), or neither."""
    for constraint, measure in tests:
        if certifier.broken(constraint, measure, k):
            return False, constraint
    passed = all(certifier.test(constraint, measure, k).passed for constraint, measure in tests)
    return (True, None) if passed else (None, None)


def sorter(criteria: Criteria, scores: Scores, parts: Split, level: float) -> AnytimeCertifier | None:
    """What the design's clusters say of each mixture of a sweep over weights; None for ratios, whose order is known."""
    if not any(scores.policies[k].point for k in scores.swept):
        return None
    return AnytimeCertifier(criteria, scores, parts, level, among=parts.design, quick=True)
