"""Which ratios provably meet the constraints, and which of them is chosen.

For each constraint the ratios are tested in an order fixed in advance, from the end of the sweep where the metric is
expected to be good, each at the full level, up to the first failure (fixed-sequence testing, "Learn then Test",
Angelopoulos et al. 2021). Constraints that start at the same end are tested together: a ratio passes if it passes all
of them (intersection-union), which needs no correction. Where constraints start at both ends there are two walks, each
at half the level. So the chance that any certified ratio breaks any constraint is at most 1 - confidence, whatever
number of ratios is tried and whichever of the certified is then chosen.

Of a sweep over weights of more than two adapters the order is that of `weights.place_of`: by the weight of safety.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psacpo.evalharness.decision.criteria import Constraint, Criteria, Metric, Range
from psacpo.evalharness.decision.measures import Mean, Measure, Tail, Worst
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.shortfall import Test, kind_of, nearest, whose
from psacpo.evalharness.statistics.bootstrap import Array, Mask, bootstrap_weights
from psacpo.evalharness.statistics.bounds import (
    betting_p,
    binomial_bound,
    binomial_p,
    fixed_sequence,
    inverted,
    share_p,
)

FEWEST_HELD = 20
"""Clusters; with fewer an interval of a rate is wider than .4, and the certificate has lost them for nothing."""
# Of the clusters: those that choose where a tail begins, which take no part in the test of its mean.
_SPLIT = 0.2


def hold_out(criteria: Criteria, scores: Scores) -> Mask:
    """Which clusters take no part in testing and choosing, [C]: a seeded draw from each role or category in turn."""
    if not criteria.constraints or round(criteria.holdout * len(scores.clusters)) < FEWEST_HELD:
        return np.zeros(len(scores.clusters), dtype=np.bool_)
    return stratified(scores, criteria.holdout, [criteria.seed, 1])


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


def starts_at_reward(criteria: Criteria, metric: Metric) -> bool:
    """Whether a constraint's walk over the ratios begins at q = 0: for helpfulness and refusals, which q worsens."""
    plain = criteria.all_metrics()
    return metric.judge == plain[criteria.axes.reward].judge or criteria.columns()[metric.judge].refuses


class Race(Protocol):
    """What an adaptive sweep has of its own: which clusters test, how, and who of the certified is best.

    Attributes:
        held: The clusters for the chosen ratio's own numbers, [C].
    """

    @property
    def held(self) -> Mask: ...

    def certifier(self, criteria: Criteria, scores: Scores, level: float) -> Certifier: ...

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
    certifier = Certifier(criteria, scores, ~held, level) if race is None else race.certifier(criteria, scores, level)
    certified = [True] * len(points)
    walks: dict[str, list[tuple[int, Test]]] = {}
    for constraint, forward in ends.items():
        order = list(range(len(points))) if forward else list(reversed(range(len(points))))
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
    choice["why"] = (
        f"best {reward} ({point[reward]['mean']:.3f}) of the {allowed} of {len(points)} {kind_of(points)}s that meet {text} {sure} "
        f"({bounds})"
    )
    if held.any() and measures[reward].count(scores.swept[best], held):
        choice["holdout"] = _held_out(criteria, metrics, measures, scores, held, scores.swept[best])
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
