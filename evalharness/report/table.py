"""The numbers as columns: which metric stands where, how its values are written, and frontier.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

from psacpo.evalharness.judges.settings import Better
from psacpo.evalharness.report.schema import Estimate, Frontier

UNDEFINED = "–"


@dataclass(frozen=True)
class Column:
    """One metric of the table.

    Attributes:
        decimals: Digits after the point: two significant ones of the typical interval's width.
        audit: Whether the metric belongs to the audit.
        best: The best mean over the points, None where there is none.
    """

    metric: str
    better: Better
    meaning: str
    decimals: int
    audit: bool
    best: float | None

    def write(self, value: float | None) -> str:
        """`value` with this column's number of digits."""
        return UNDEFINED if value is None else f"{round(value, self.decimals) + 0.0:.{self.decimals}f}"


def columns(frontier: Frontier) -> list[Column]:
    """The metrics in reading order: each axis with its audit beside it, then the constrained ones, then the rest."""
    order = [metric for pair in zip(*_axes(frontier), strict=True) for metric in pair]
    order += [constraint.metric for _, constraint in frontier.choice.parsed()]
    order += sorted(frontier.metrics, key=lambda name: frontier.metrics[name].derived)
    audit = {frontier.audit.reward, frontier.audit.cost} if frontier.audit else set()
    audit -= {frontier.axes.reward, frontier.axes.cost}
    return [_column(frontier, name, name in audit) for name in dict.fromkeys(order) if name in frontier.metrics]


def _axes(frontier: Frontier) -> list[tuple[str, str]]:
    return [(span.reward, span.cost) for span in frontier.spans()]


def _column(frontier: Frontier, name: str, audit: bool) -> Column:
    spec = frontier.metrics[name]
    means = [mean for point in frontier.points if (mean := point[name].mean) is not None]
    pick = max if spec.better == "higher" else min
    where = " and ".join(f"{key} is {value}" for key, value in spec.where.items())
    what = f"mean score of judge {spec.judge}" if spec.judge else "mean"
    if spec.above is not None:
        what = f"share of answers that judge {spec.judge} scores above {spec.above:g}"
    return Column(
        metric=name,
        better=spec.better,
        meaning=spec.meaning or what + (f", over prompts whose {where}" if where else ""),
        # A rate is compared with a limit, so it has a digit more.
        decimals=max(3 if frontier.is_rate(name) else 0, decimals(p[name] for p in frontier.policies())),
        audit=audit,
        best=pick(means) if means else None,
    )


def decimals(estimates: Iterable[Estimate]) -> int:
    """Digits after the point that show two significant digits of the median interval width; 3 without intervals."""
    widths = sorted(e.high - e.low for e in estimates if e.low is not None and e.high is not None and e.high > e.low)
    if not widths:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))


def ratio_text(ratio: float) -> str:
    """A ratio in at most four significant digits."""
    return f"{ratio:.4g}"


def frontier_csv(frontier: Frontier) -> str:
    """One row per point and baseline; values in full precision, undefined ones empty."""
    names = [column.metric for column in columns(frontier)]
    header = ["name", "ratio", *(f"{name}_{part}" for name in names for part in ("mean", "low", "high"))]
    counted = ["answered"] if frontier.adaptive else []
    header += ["n_prompts", *counted, "p_on_frontier", "certified", "nondominated"]
    header += [f"weight_{name}" for name in frontier.adapters]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(name) for name in header])
    for policy in frontier.policies():
        values: list[object] = [policy.name, policy.ratio]
        for name in names:
            values += [policy[name].mean, policy[name].low, policy[name].high]
        values += [
            policy.n_prompts,
            *(policy.answered for _ in counted),
            policy.p_on_frontier,
            policy.certified,
            policy.nondominated,
        ]
        values += [policy.weights.get(name, 0.0) if policy.weights else None for name in frontier.adapters]
        writer.writerow([_cell(value) for value in values])
    return buffer.getvalue()


def _cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: text that starts like one gets an apostrophe in front."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value
