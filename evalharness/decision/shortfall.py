"""What is lacking for a certificate, where no ratio has one: the nearest ratio, its bound, and how many prompts more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psacpo.evalharness.decision.criteria import Constraint, Metric
from psacpo.evalharness.statistics.bounds import MOST_ROWS, rows_needed

# More clusters than a test is imagined with.
_MOST_UNITS = 200_000


@dataclass(frozen=True)
class Test:
    """One constraint's test of one point.

    Attributes:
        events: Sum of the metric's values, of the share that the constraint allows; for a mean its sum.
        rows: Values of the metric.
        units: Clusters that hold a value.
        p: The p-value of the hypothesis that the limit is broken.
        bound: The confidence bound on the constraint's own scale.
        method: How both were found.
        exact: Whether they are the exact binomial ones.
        passed: Whether the p-value is at most 1 - level.
        passes_with: Whether so many units like those seen would pass, for tests that can say so.
    """

    __test__ = False  # no test of pytest's

    constraint: Constraint
    mean: float | None
    rows: int
    units: int
    p: float
    bound: float
    level: float
    method: str
    exact: bool
    passed: bool
    passes_with: Callable[[int], bool] | None = None

    def record(self) -> dict[str, Any]:
        """The test as a point of frontier.json holds it."""
        return {
            "p": self.p,
            "bound": self.bound if math.isfinite(self.bound) else None,
            "mean": self.mean,
            "rows": self.rows,
            "clusters": self.units,
            "method": self.method,
            "passed": self.passed,
        }

    @property
    def excess(self) -> float:
        """How far the bound is past the limit, in the metric's units; negative where it is met."""
        limit = self.constraint.limit
        return self.bound - limit if self.constraint.sense == "<=" else limit - self.bound

    def needed(self) -> float:
        """How many units this test would pass with, were the metric's mean what it is now; infinite where it never would.

        Exact for binomial rates; for any other mean by the bound's distance from it, which shrinks as 1 / sqrt(units).
        """
        if self.passed:
            return self.units
        if self.mean is None:
            return math.inf
        limit, upper = self.constraint.limit, self.constraint.sense == "<="
        if self.exact:
            rate = self.mean if upper else 1 - self.mean
            found = rows_needed(round(rate * self.units), self.units, limit if upper else 1 - limit, level=self.level)
            return math.inf if found is None else found
        room = limit - self.mean if upper else self.mean - limit
        width = abs(self.bound - self.mean)
        if room <= 0 or not math.isfinite(width):
            return math.inf
        if self.passes_with is not None:
            return _first(self.passes_with, self.units)
        units = math.ceil(self.units * (width / room) ** 2)
        return units if units <= MOST_ROWS else math.inf


def _first(passes: Callable[[int], bool], units: int) -> float:
    """The least number of units from `units` on that passes, to about a hundredth; infinite past `_MOST_UNITS`."""
    high = units
    while not passes(high):
        units, high = high, 2 * high
        if high > _MOST_UNITS:
            return math.inf
    while high - units > max(1, units // 100):
        middle = (units + high) // 2
        units, high = (units, middle) if passes(middle) else (middle, high)
    return high


def whose(point: Mapping[str, Any]) -> dict[str, Any]:
    """ratio, policy and, where it has them, weights of a point."""
    return {name: point[name] for name in ("ratio", "policy", "weights") if name in point}


def kind_of(points: Sequence[Mapping[str, Any]]) -> str:
    """What the points of a sweep are called: ratios, or mixtures where a ratio does not say them."""
    return "mixture" if points and points[0]["ratio"] is None else "ratio"


def nearest(
    walks: Mapping[str, Sequence[tuple[int, Test]]],
    points: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Metric],
    *,
    clustered: bool = False,
    held_out: float = 0.0,
) -> dict[str, Any]:
    """The point that would be certified with the fewest prompts, as `choice.nearest` of frontier.json says it.

    A point is certified once the tests of all points before it in each constraint's walk have passed, too.

    Args:
        walks: Constraint text -> (place in `points`, test) in the order of the walk.
        clustered: Whether a cluster holds more than one prompt.
        held_out: Share of the clusters that the tests do not see.

    Returns:
        ratio, policy, bounds; prompts_needed and more_prompts, None where no number would do, and prompts_in_all, with
        those held out; exact, whether they
        come from the binomial distribution; blocked_by, the policy whose test is the last to be passed; why, a
        sentence of all that.
    """
    hardest: dict[int, tuple[float, Test, int]] = {}
    excess: dict[int, float] = {}
    for walk in walks.values():
        worst: tuple[float, Test, int] | None = None
        for place, test in walk:
            more = test.needed() - test.units
            if worst is None or more > worst[0]:
                worst = more, test, place
            if place not in hardest or worst[0] > hardest[place][0]:
                hardest[place] = worst
            excess[place] = max(excess.get(place, -math.inf), test.excess)
    best = min(hardest, key=lambda place: (hardest[place][0], excess[place], place))
    more, test, blocker = hardest[best]
    found: dict[str, Any] = {
        **whose(points[best]),
        "bounds": dict(points[best]["bounds"]),
        "prompts_needed": None if math.isinf(more) else int(test.units + more),
        "more_prompts": None if math.isinf(more) else int(more),
        "prompts_in_all": None if math.isinf(more) else math.ceil((test.units + more) / (1 - held_out)),
        "exact": test.exact,
        "blocked_by": points[blocker]["policy"],
    }
    own = {text: test for text, walk in walks.items() for place, test in walk if place == best}
    stands = ", ".join(_stands(text, one) for text, one in own.items())
    return found | {"why": f"{found['policy']} comes nearest: {stands}; {_advice(found, test, metrics, clustered)}"}


def _stands(text: str, test: Test) -> str:
    if test.mean is None:
        return f"{text} has no valid verdict"
    metric = test.constraint.metric
    counted = f" ({round(test.mean * test.rows)} of {test.rows})" if test.exact else ""
    side = "upper" if test.constraint.sense == "<=" else "lower"
    return f"{metric} {test.mean:.3f}{counted} with {side} bound {test.bound:.3f}"


def _advice(found: Mapping[str, Any], test: Test, metrics: Mapping[str, Metric], clustered: bool) -> str:
    where = metrics[test.constraint.metric].where
    kind = "prompts" + (f" with {' and '.join(f'{key}={value}' for key, value in where.items())}" if where else "")
    if clustered:
        kind = f"clusters of {kind}"
    other = found["blocked_by"] if found["blocked_by"] != found["policy"] else None
    first = f"the test comes to {other} first, and " if other else ""
    if found["more_prompts"] is None:
        constraint = test.constraint
        edge = 0.0 if constraint.sense == "<=" else 1.0
        if test.exact and constraint.limit == edge:
            return f"no number of prompts can show that a rate is {edge:.0f}: no bound reaches {constraint}"
        whose = f"{other}'s" if other else "its"
        value = "unknown" if test.mean is None else f"{test.mean:.3f}"
        return f"{first}no number of prompts would certify it while {whose} {test.constraint.metric} is {value}"
    about = "" if test.exact else "about "
    held = found["prompts_in_all"] != found["prompts_needed"]
    return (
        f"{first}at the rate seen a certificate takes {about}{found['prompts_needed']} {kind}, "
        f"{found['more_prompts']} more than the {test.units} here"
    ) + (f" ({found['prompts_in_all']} with those held out)" if held else "")
