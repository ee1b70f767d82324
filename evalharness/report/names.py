"""What a report calls things: points by their ratio or weights, constraints, and the verdict in one line."""

from __future__ import annotations

from dataclasses import dataclass

from psacpo.evalharness.config import Constraint
from psacpo.evalharness.report.schema import Frontier, Naive, Policy
from psacpo.evalharness.report.table import ratio_text
from psacpo.evalharness.weights import percents, weights_text


@dataclass(frozen=True)
class Words:
    """Of one sweep.

    Attributes:
        kind: "ratio" or "mixture".
        axis: Under the metrics' curves.
        note: What the short names mean.
    """

    kind: str
    axis: str
    note: str


def words(frontier: Frontier) -> Words:
    """Of a sweep over ratios, or over the weights of more adapters."""
    if not frontier.mixed:
        note = "q is the weight of the safety policy in the merge: q = 0 is the reward policy, q = 1 the safety policy."
        return Words("ratio", "ratio q (0: reward, 1: safety)", note)
    names = "/".join(frontier.adapters)
    note = f"A mixture is named by its weights in percent: {names}. They stand by rising weight of safety."
    return Words("mixture", f"mixtures by rising weight of safety ({names} in %)", note)


def label(policy: Policy) -> str:
    """`q = 0.25`, `reward 0.5, safety 0.5`, or a baseline's name."""
    if policy.weights:
        return weights_text(policy.weights)
    return policy.name if policy.ratio is None else f"q = {ratio_text(policy.ratio)}"


def chosen_text(point: Policy | Naive) -> str:
    """`q = 0.25`, or `reward 0.5, safety 0.5`."""
    return weights_text(point.weights) if point.weights else f"q = {ratio_text(point.ratio or 0.0)}"


def mark(policy: Policy, frontier: Frontier) -> str:
    """The shortest name, for a plot: `0.25`, `50/25/25`, or a baseline's name."""
    if policy.weights:
        return percents(policy.weights, frontier.adapters)
    return policy.name if policy.ratio is None else ratio_text(policy.ratio)


def place(policy: Policy, frontier: Frontier) -> float | None:
    """Where a point stands on the axis of the curves: at its ratio, or at its number in the order; None of a baseline."""
    if policy.weights:
        return float(next(number for number, point in enumerate(frontier.points) if point is policy))
    return policy.ratio


def headline(frontier: Frontier) -> str:
    """The verdict in one line."""
    limits = " and ".join(constraint_text(constraint) for _, constraint in frontier.choice.parsed())
    sure = f" at {frontier.choice.confidence * 100:g} % confidence"
    if frontier.chosen is not None:
        line = "Chosen weights: " if frontier.mixed else "Chosen ratio "
        line += chosen_text(frontier.chosen)
        return line + (f": meets {limits}{sure}" if limits else "")
    kind = words(frontier).kind
    return f"No {kind} meets {limits}{sure}" if limits else f"No {kind} was chosen"


def constraint_text(constraint: Constraint) -> str:
    """A constraint as a person writes it, such as unsafe_rate ≤ 0.05."""
    limit = f"{constraint.limit:g}".replace("-", "\N{MINUS SIGN}")
    return f"{constraint.metric} {'≤' if constraint.sense == '<=' else '≥'} {limit}"
