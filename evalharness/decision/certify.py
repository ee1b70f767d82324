"""Which ratios provably meet the constraints, and which of them is chosen.

For each constraint the ratios are tested in an order fixed in advance, from the end of the sweep where the metric is
expected to be good, each at the full level, up to the first failure (fixed-sequence testing, "Learn then Test",
Angelopoulos et al. 2021). Constraints that start at the same end are tested together: a ratio passes if it passes all
of them (intersection-union), which needs no correction. Where constraints start at both ends there are two walks, each
at half the level. So the chance that any certified ratio breaks any constraint is at most 1 - confidence, whatever
number of ratios is tried and whichever of the certified is then chosen.

Of a sweep over weights of more than two adapters the order is learned from a few clusters that test nothing
(`order.learned`); with too few of them it is that of `weights.place_of`: by the weight of safety.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from psacpo.evalharness.decision.certifier import Certifier
from psacpo.evalharness.decision.criteria import Constraint, Criteria, Metric
from psacpo.evalharness.decision.measures import Measure
from psacpo.evalharness.decision.order import learned, ordering, stratified
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.shortfall import Test, kind_of, nearest, whose
from psacpo.evalharness.statistics.bootstrap import Mask, bootstrap_weights
from psacpo.evalharness.statistics.bounds import fixed_sequence

FEWEST_HELD = 20
"""Clusters; with fewer an interval of a rate is wider than .4, and the certificate has lost them for nothing."""


def hold_out(criteria: Criteria, scores: Scores) -> Mask:
    """Which clusters take no part in testing and choosing, [C]: a seeded draw from each role or category in turn."""
    if not criteria.constraints or round(criteria.holdout * len(scores.clusters)) < FEWEST_HELD:
        return np.zeros(len(scores.clusters), dtype=np.bool_)
    return stratified(scores, criteria.holdout, [criteria.seed, 1])


def starts_at_reward(criteria: Criteria, metric: Metric) -> bool:
    """Whether a constraint's walk over the ratios begins at q = 0: for helpfulness and refusals, which q worsens."""
    plain = criteria.all_metrics()
    return metric.judge == plain[criteria.axes.reward].judge or criteria.columns()[metric.judge].refuses


class Race(Protocol):
    """What an adaptive sweep has of its own: which clusters test, how, and who of the certified is best.

    Attributes:
        held: The clusters for the chosen ratio's own numbers, [C].
        shared: Those that every policy answered, and no test sees, [C].
    """

    @property
    def held(self) -> Mask: ...

    @property
    def shared(self) -> Mask: ...

    def certifier(self, criteria: Criteria, scores: Scores, level: float) -> Certifier: ...

    def order(self, criteria: Criteria, scores: Scores, level: float) -> Certifier | None: ...

    def pick(
        self,
        criteria: Criteria,
        metrics: Mapping[str, Metric],
        measures: Mapping[str, Measure],
        scores: Scores,
        certified: Sequence[bool],
    ) -> int | None: ...


def certify(
    criteria: Criteria,
    metrics: Mapping[str, Metric],
    measures: Mapping[str, Measure],
    scores: Scores,
    points: Sequence[dict[str, Any]],
    race: Race | None = None,
) -> dict[str, Any]:
    """The most helpful ratio that is certified for every constraint: `choice` of frontier.json; the points are marked.

    Args:
        points: The swept ratios' entries in the order of `scores.swept`; each gets certified, bounds and tests.
        race: Of an adaptive sweep, whose ratios have not all answered the same prompts.
    """
    choice: dict[str, Any] = {
        "ratio": None,
        "policy": None,
        "constraints": [str(constraint) for constraint in criteria.constraints],
        "confidence": criteria.confidence,
        "method": "none",
        "why": "no constraint was given",
    }
    for point in points:
        point |= {"certified": None, "bounds": {}}
    if not criteria.constraints:
        return choice
    held = hold_out(criteria, scores) if race is None else race.held
    ends = {constraint: starts_at_reward(criteria, metrics[constraint.metric]) for constraint in criteria.constraints}
    level = 1 - (1 - criteria.confidence) / len(set(ends.values()))
    if race is None:
        apart = ordering(scores, ~held, criteria.seed)
        certifier = Certifier(criteria, scores, ~held & ~apart, level)
        sorter = Certifier(criteria, scores, apart, level) if apart.any() else None
    else:
        certifier, sorter = race.certifier(criteria, scores, level), race.order(criteria, scores, level)
    certified = [True] * len(points)
    walks: dict[str, list[tuple[int, Test]]] = {}
    orders: dict[bool, list[int]] = {}
    for forward in dict.fromkeys(ends.values()):
        group = [constraint for constraint, end in ends.items() if end == forward]
        order = list(range(len(points))) if forward else list(reversed(range(len(points))))
        if sorter is not None:
            order = learned(
                sorter, [(c, measures[c.metric]) for c in group], order, scores.swept, int(certifier.use.sum())
            )
        orders[forward] = order
    for constraint, forward in ends.items():
        order = orders[forward]
        walk = walks[str(constraint)] = [
            (place, certifier.test(constraint, measures[constraint.metric], scores.swept[place])) for place in order
        ]
        for place, test in walk:
            points[place]["bounds"][str(constraint)] = test.bound if np.isfinite(test.bound) else None
            points[place].setdefault("tests", {})[str(constraint)] = test.record()
        for place, standing in zip(order, fixed_sequence([test.passed for _, test in walk]), strict=True):
            certified[place] &= standing
    for point, passed in zip(points, certified, strict=True):
        point["certified"] = passed
    methods = sorted({test.method for walk in walks.values() for _, test in walk if test.rows}) or ["no rows"]
    choice |= {
        "method": f"fixed-sequence test; bounds: {', '.join(methods)}",
        "level": level,
        "calibration": {"prompts": scores.prompts_in(certifier.use), "clusters": int(certifier.use.sum())},
        "naive": _naive(criteria, metrics, points),
        "holdout": None,
    }
    if sorter is not None:
        choice["order"] = {
            "prompts": scores.prompts_in(sorter.use),
            "clusters": int(sorter.use.sum()),
            "walks": {str(c): [points[place]["policy"] for place in orders[end]] for c, end in ends.items()},
        }
    if race is None:
        best = _pick(criteria, metrics, measures, scores, ~held, certified)
    else:
        best = race.pick(criteria, metrics, measures, scores, certified)
    text = " and ".join(choice["constraints"])
    allowed = sum(certified)
    sure = f"with {criteria.confidence:.0%} confidence"
    if not allowed:
        choice["nearest"] = nearest(
            walks,
            points,
            metrics,
            clustered=len(scores.clusters) < len(scores.prompts),
            held_out=1 - float(certifier.use.mean()),
        )
        choice["why"] = (
            f"no {kind_of(points)} meets {text} {sure} on {choice['calibration']['prompts']} prompts; "
            + choice["nearest"].pop("why")
        )
        return choice
    reward = criteria.axes.reward
    if best is None:
        choice["why"] = (
            f"{allowed} of {len(points)} {kind_of(points)}s meet {text}, and none of them has a valid {reward}"
        )
        return choice
    point = points[best]
    bounds = ", ".join(f"{name}: bound {value:.3f}" for name, value in point["bounds"].items())
    choice |= whose(point)
    k = scores.swept[best]
    mean, of = point[reward]["mean"], ""
    if race is not None:  # the certified are compared on more prompts than those that all points answered
        mean, of = measures[reward].mean(k, ~held), f" on {scores.prompts_in(scores.asked(k) & ~held)} prompts"
    choice["why"] = (
        f"best {reward} ({mean:.3f}{of}) of the {allowed} of {len(points)} {kind_of(points)}s that meet {text} {sure} "
        f"({bounds})"
    )
    if held.any() and measures[reward].count(k, held):
        choice["holdout"] = _held_out(criteria, metrics, measures, scores, held, k)
        choice["why"] += f"; on {choice['holdout']['prompts']} prompts held out: {_numbers(criteria, choice)}"
    return choice


def _pick(
    criteria: Criteria,
    metrics: Mapping[str, Metric],
    measures: Mapping[str, Measure],
    scores: Scores,
    use: Mask,
    certified: Sequence[bool],
) -> int | None:
    """The place of the certified point with the best reward on the calibration prompts."""
    reward = criteria.axes.reward
    sign = 1 if criteria.better(metrics[reward]) == "higher" else -1
    found = {
        place: sign * mean
        for place, passed in enumerate(certified)
        if passed and (mean := measures[reward].mean(scores.swept[place], use)) is not None
    }
    return max(found, key=lambda place: found[place]) if found else None


def _naive(
    criteria: Criteria, metrics: Mapping[str, Metric], points: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What the best point estimate would have chosen: to be shown, not to be used."""
    reward = criteria.axes.reward
    sign = 1 if criteria.better(metrics[reward]) == "higher" else -1
    meeting = [
        point
        for point in points
        if point[reward]["mean"] is not None and all(meets(c, point[c.metric]["mean"]) for c in criteria.constraints)
    ]
    if not meeting:
        return None
    best = max(meeting, key=lambda point: sign * float(point[reward]["mean"]))
    return {
        **whose(best),
        "certified": best["certified"],
        "why": f"best {reward} of the {len(meeting)} of {len(points)} {kind_of(points)}s whose mean meets the limits, untested",
    }


def meets(constraint: Constraint, value: float | None) -> bool:
    """Whether a value is on the right side of the limit."""
    if value is None:
        return False
    return value <= constraint.limit if constraint.sense == "<=" else value >= constraint.limit


def _held_out(
    criteria: Criteria,
    metrics: Mapping[str, Metric],
    measures: Mapping[str, Measure],
    scores: Scores,
    held: Mask,
    k: int,
) -> dict[str, Any]:
    """The chosen policy on prompts that took no part in its being chosen."""
    weights = bootstrap_weights(len(held), criteria.resamples, criteria.seed, held)
    found = {name: asdict(measures[name].estimate(k, weights, held, criteria.confidence)) for name in metrics}
    return {
        "share": criteria.holdout,
        "prompts": scores.prompts_in(held),
        "clusters": int(held.sum()),
        "metrics": found,
        "meets": {str(c): meets(c, found[c.metric]["mean"]) for c in criteria.constraints},
    }


def _numbers(criteria: Criteria, choice: Mapping[str, Any]) -> str:
    names = [criteria.axes.reward, *(constraint.metric for constraint in criteria.constraints)]
    cells = {name: choice["holdout"]["metrics"][name]["mean"] for name in dict.fromkeys(names)}
    return ", ".join(f"{name} {'unknown' if mean is None else f'{mean:.3f}'}" for name, mean in cells.items())
