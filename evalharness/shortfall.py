"""What is lacking for a certificate, where no ratio has one: the nearest ratio, its bound, and how many prompts more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psacpo.evalharness.config import Constraint, Metric
from psacpo.evalharness.stats import MOST_ROWS, rows_needed


@dataclass(frozen=True)
class Test:
    """One constraint's test of one point.

    Attributes:
        events: Sum of the metric's values, of the share that the constraint allows; for a mean its sum.
        rows: Values of the metric.
        units: Clusters that hold a value.
        bound: The confidence bound on the constraint's own scale.
        exact: Whether the bound is the exact binomial one.
        passed: Whether the bound meets the limit.
    """

    __test__ = False  # no test of pytest's

    constraint: Constraint
    mean: float | None
    rows: int
    units: int
    bound: float
    level: float
    exact: bool
    passed: bool

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
        units = math.ceil(self.units * (width / room) ** 2)
        return units if units <= MOST_ROWS else math.inf


def nearest(
    walks: Mapping[str, Sequence[tuple[int, Test]]], points: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """The point that would be certified with the fewest prompts, as `choice.nearest` of frontier.json says it.

    A point is certified once the tests of all points before it in each constraint's walk have passed, too.

    Args:
        walks: Constraint text -> (place in `points`, test) in the order of the walk.

    Returns:
        ratio, policy, bounds; prompts_needed and more_prompts, None where no number would do; exact, whether they
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
    best = min(hardest, key=lambda place: (hardest[place][0], excess[place], points[place]["ratio"]))
    more, test, blocker = hardest[best]
    found: dict[str, Any] = {
        "ratio": points[best]["ratio"],
        "policy": points[best]["policy"],
        "bounds": dict(points[best]["bounds"]),
        "prompts_needed": None if math.isinf(more) else int(test.units + more),
        "more_prompts": None if math.isinf(more) else int(more),
        "exact": test.exact,
        "blocked_by": points[blocker]["policy"],
    }
    own = {text: test for text, walk in walks.items() for place, test in walk if place == best}
    stands = ", ".join(_stands(text, one) for text, one in own.items())
    return found | {"why": f"{found['policy']} comes nearest: {stands}; {_advice(found, test, metrics)}"}


def _stands(text: str, test: Test) -> str:
    if test.mean is None:
        return f"{text} has no valid verdict"
    metric = test.constraint.metric
    counted = f" ({round(test.mean * test.rows)} of {test.rows})" if test.exact else ""
    side = "upper" if test.constraint.sense == "<=" else "lower"
    return f"{metric} {test.mean:.3f}{counted} with {side} bound {test.bound:.3f}"


def _advice(found: Mapping[str, Any], test: Test, metrics: Mapping[str, Metric]) -> str:
    where = metrics[test.constraint.metric].where
    kind = "prompts" + (f" with {' and '.join(f'{key}={value}' for key, value in where.items())}" if where else "")
    if test.rows != test.units:
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
    return (
        f"{first}at the rate seen a certificate takes {about}{found['prompts_needed']} {kind}, "
        f"{found['more_prompts']} more than the {test.units} here"
    )
