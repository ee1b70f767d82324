"""In which order a sweep's points are tested: fixed before any answer, or learned from prompts that test nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psacpo.evalharness.decision.certifier import Certifier
from psacpo.evalharness.decision.criteria import Constraint
from psacpo.evalharness.decision.measures import Measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.statistics.bootstrap import Mask

SHARE = 0.15
"""Of the clusters: those that order a sweep over weights."""
FEWEST = 20
"""Clusters; fewer tell too little of the order for what the tests lose by them."""


def ordering(scores: Scores, free: Mask, seed: int) -> Mask:
    """The clusters [C] that say in which order mixtures are tested; none for a sweep over ratios, whose order is known.

    Mixtures of three adapters have no natural order, and a walk along any one that is fixed blindly ends at the first
    bad mixture that happens to stand in it, however good those behind it are.
    """
    none = np.zeros(len(free), dtype=np.bool_)
    several = any(scores.policies[k].point for k in scores.swept)
    if not several or round(SHARE * free.sum()) < FEWEST:
        return none
    return stratified(scores, SHARE, [seed, 4], among=free)


def stratified(scores: Scores, share: float, seed: Sequence[int], among: Mask | None = None) -> Mask:
    """A share of the clusters, [C], drawn evenly from each role or category; `among` [C] are those that can be drawn."""
    drawn = np.zeros(len(scores.clusters), dtype=np.bool_)
    strata: dict[str, list[int]] = {}
    seen: set[int] = set()
    for row, place in zip(scores.prompts, scores.owner.tolist(), strict=True):
        if place not in seen and (among is None or among[place]):
            seen.add(place)
            kind = row.fields.get("role"), row.fields.get("category")
            strata.setdefault(str(kind), []).append(place)
    generator = np.random.default_rng(seed)
    owed = 0.0
    for _, places in sorted(strata.items()):
        owed += share * len(places)
        taken = round(owed)
        owed -= taken
        drawn[generator.permutation(sorted(places))[:taken]] = True
    return drawn


def learned(
    certifier: Certifier,
    tests: Sequence[tuple[Constraint, Measure]],
    places: Sequence[int],
    tested: Sequence[int],
    clusters: int,
) -> list[int]:
    """Some points, the safest first, by what they show on clusters that take no part in the tests.

    As these clusters are independent of those that test, the order is as good as fixed in advance, and each test may be
    made at the full level ("split fixed-sequence testing", Angelopoulos et al. 2021, section 4). First come the points
    that half of the test's clusters would certify if these were like them, then those that all would, both in the order
    that is given: among points that look safe, which looks safest is mostly luck. The rest follow by how many they lack.

    Args:
        certifier: Of the clusters that order.
        tests: The constraints that are walked together: a point is as safe as its worst one.
        places: The points in the order that is taken where nothing speaks against it.
        tested: The place of each point among the policies.
        clusters: Of the test.
    """
    scale = clusters / max(1, int(certifier.use.sum()))

    def risk(place: int) -> tuple[float, float]:
        found = [certifier.test(constraint, measure, tested[place]) for constraint, measure in tests]
        share = max(test.needed() / max(1.0, scale * test.units) for test in found)
        if share <= 1:
            return (0.5 if share <= 0.5 else 1.0), 0.0
        return share, max(_past(test.constraint, test.mean) for test in found)

    return sorted(places, key=risk)


def _past(constraint: Constraint, mean: float | None) -> float:
    """How far a mean is past the limit; negative where it is met."""
    if mean is None:
        return np.inf
    return mean - constraint.limit if constraint.sense == "<=" else constraint.limit - mean
