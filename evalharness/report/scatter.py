"""The panel of two metrics: points with intervals, the frontier's curve, baselines, limits, and names that cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from psacpo.evalharness.config import Axes
from psacpo.evalharness.judges.settings import Better
from psacpo.evalharness.report.labels import place
from psacpo.evalharness.report.names import constraint_text, mark
from psacpo.evalharness.report.paint import BASELINE, BASELINE_MARKERS, CHOSEN, DPI, LIMIT, POINT, shortened
from psacpo.evalharness.report.schema import Frontier, Policy
from psacpo.evalharness.report.table import ratio_text


def scatter(panel: Any, frontier: Frontier, span: Axes) -> tuple[list[Policy], Axes]:
    """Curve, points, bars and limits of one pair of metrics; gives the policies that have a place in it."""

    def at(policy: Policy) -> tuple[float, float] | None:
        x, y = policy[span.cost].mean, policy[span.reward].mean
        return None if x is None or y is None else (x, y)

    points = placed(frontier.points, span)
    curve = np.array([at(point) for point in points]).reshape(-1, 2)
    if not frontier.mixed:  # the points of a simplex lie on no line
        panel.plot(curve[:, 0], curve[:, 1], color="#9DB9CC", lw=1.4, zorder=2)
    for point, filled in zip(points, filled_of(frontier, span), strict=True):
        _bars(panel, point, span, POINT)
        sure = 0.35 + 0.65 * certainty(frontier, point, span)
        spot = {"marker": "o", "linestyle": "none", "markersize": 8.5, "zorder": 5}
        # A white disc below keeps bars and curve from showing through a faint point.
        panel.plot(*_xy(at(point)), color="white", markeredgewidth=0, **spot)
        face = POINT if filled else "none"
        panel.plot(*_xy(at(point)), mec=POINT, mfc=face, mew=1.5, alpha=sure, **spot)
    if (chosen := frontier.chosen) and at(chosen):
        panel.plot(*_xy(at(chosen)), marker="o", markersize=15, mfc="none", mec=CHOSEN, mew=2.2, zorder=6)
    baselines = [policy for policy in frontier.baselines if at(policy)]
    for number, policy in enumerate(frontier.baselines):
        if not at(policy):
            continue
        _bars(panel, policy, span, BASELINE)
        marker = BASELINE_MARKERS[number % len(BASELINE_MARKERS)]
        panel.plot(*_xy(at(policy)), marker=marker, color=BASELINE, markersize=8, mec="white", mew=0.8, zorder=5)
    _limits(panel, frontier, span)
    panel.set_xlabel(_axis_title(span.cost, frontier.metrics[span.cost].better))
    panel.set_ylabel(_axis_title(span.reward, frontier.metrics[span.reward].better))
    return points + baselines, span


def placed(policies: Sequence[Policy], span: Axes) -> list[Policy]:
    """The policies that have a place in a panel."""
    return [p for p in policies if p[span.cost].mean is not None and p[span.reward].mean is not None]


def filled_of(frontier: Frontier, span: Axes) -> list[bool]:
    """Whether each point that has a place in a panel is dominated by none: by the file, or for the audit by its means."""
    points = placed(frontier.points, span)
    if span == frontier.axes:
        return [point.nondominated is not False for point in points]
    return _undominated(points, frontier, span)


def certainty(frontier: Frontier, point: Policy, span: Axes) -> float:
    """The probability that a point is on the frontier; the file holds those of the frontier's own axes only."""
    return point.p_on_frontier if span == frontier.axes and point.p_on_frontier is not None else 1.0


def _undominated(points: Sequence[Policy], frontier: Frontier, span: Axes) -> list[bool]:
    """Whether no other point is at least as good on both metrics and better on one, by the means."""
    signs = [1.0 if frontier.metrics[metric].better == "higher" else -1.0 for metric in (span.reward, span.cost)]
    means = np.array([[p[span.reward].mean, p[span.cost].mean] for p in points], dtype=float).reshape(-1, 2) * signs
    no_worse = (means[:, None] >= means[None]).all(axis=2)
    better = (means[:, None] > means[None]).any(axis=2)
    dominates = np.logical_and(no_worse, better)  # row over column
    return [not dominates[:, i].any() for i in range(len(points))]


def _xy(place: tuple[float, float] | None) -> tuple[list[float], list[float]]:
    return ([place[0]], [place[1]]) if place else ([], [])


def _axis_title(metric: str, better: Better) -> str:
    return f"{metric}   (better →)" if better == "higher" else f"(← better)   {metric}"


def _bars(panel: Any, policy: Policy, span: Axes, colour: str) -> None:
    """The intervals on both axes, as thin lines."""
    x, y = policy[span.cost], policy[span.reward]
    style = {"color": colour, "lw": 1.0, "alpha": 0.4, "zorder": 3, "solid_capstyle": "butt"}
    if x.low is not None and x.high is not None:
        panel.plot([x.low, x.high], [y.mean, y.mean], **style)
    if y.low is not None and y.high is not None:
        panel.plot([x.mean, x.mean], [y.low, y.high], **style)


def _limits(panel: Any, frontier: Frontier, span: Axes) -> None:
    """Axis limits with room for labels, then each constraint on an axis metric: its line, the forbidden side shaded.

    A limit far from all points would press them together, so the view reaches at most half its width further.
    """
    panel.margins(0.09, 0.11)
    panel.autoscale_view()
    for _, constraint in frontier.choice.parsed():
        vertical = constraint.metric == span.cost
        if not vertical and constraint.metric != span.reward:
            continue
        low, high = panel.get_xlim() if vertical else panel.get_ylim()
        limit, width = constraint.limit, high - low
        seen = low - 0.5 * width <= limit <= high + 0.5 * width
        if seen:
            low, high = min(low, limit - 0.06 * width), max(high, limit + 0.06 * width)
            (panel.set_xlim if vertical else panel.set_ylim)(low, high)
            (panel.axvline if vertical else panel.axhline)(limit, color=LIMIT, lw=1.3, ls=(0, (5, 3)), zorder=2.5)
        forbidden = (max(low, limit), high) if constraint.sense == "<=" else (low, min(high, limit))
        if forbidden[0] < forbidden[1]:
            (panel.axvspan if vertical else panel.axhspan)(*forbidden, color=LIMIT, alpha=0.06, lw=0, zorder=0)
        text = constraint_text(constraint) + ("" if seen else " (off the scale)")
        side = 0.985 if limit > (low + high) / 2 or not seen else 0.015
        if vertical:
            where = (min(max(limit, low), high), 0.012)
            align = {"ha": "right" if side > 0.5 else "left", "va": "bottom", "rotation": 90}
            panel.text(*where, text, transform=panel.get_xaxis_transform(), color=LIMIT, fontsize=8.5, **align)
        else:
            where = (0.985, min(max(limit, low), high))
            align = {"ha": "right", "va": "top" if side > 0.5 else "bottom"}
            panel.text(*where, text, transform=panel.get_yaxis_transform(), color=LIMIT, fontsize=8.5, **align)


def label_points(panel: Any, renderer: Any, frontier: Frontier, policies: Sequence[Policy], span: Axes) -> None:
    """Name every point and baseline where the name covers nothing, with a thin line where it had to move away."""
    if not policies:
        return
    scale = DPI / 100
    texts, places = [], []
    for policy in policies:
        chosen = policy is frontier.chosen
        name = shortened(mark(policy, frontier)) if policy.ratio is None else f"q={ratio_text(policy.ratio)}"
        texts.append(
            panel.text(
                0,
                0,
                name + (" chosen" if chosen else ""),
                fontsize=9 if not chosen else 9.5,
                fontweight="bold" if chosen else "normal",
                color=CHOSEN if chosen else "#1F3B4D" if policy.swept else BASELINE,
                ha="center",
                va="center",
                zorder=8,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
        )
        places.append((policy[span.cost].mean, policy[span.reward].mean))
    to_pixels = panel.transData
    anchors = to_pixels.transform(np.array(places, dtype=float))
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([[extent.width, extent.height] for extent in extents]) + np.array([5.0, 2.0]) * scale
    others = [t.get_window_extent(renderer).extents for t in panel.texts if t not in texts]
    frame = panel.bbox.extents
    order = sorted(range(len(policies)), key=lambda i: policies[i] is not frontier.chosen)
    centres = place(
        anchors,
        sizes,
        frame,
        radius=7.0 * scale,
        hard=np.array(others, dtype=float).reshape(-1, 4),
        soft=_inked(panel, scale),
        order=order,
        scale=scale,
    )
    back = to_pixels.inverted()
    for text, anchor, centre, size in zip(texts, anchors, centres, sizes, strict=True):
        text.set_position(back.transform(centre))
        nearest = np.clip(anchor, centre - size / 2, centre + size / 2)
        if np.linalg.norm(nearest - anchor) > 15 * scale:
            ends = back.transform(np.array([anchor, nearest]))
            panel.plot(ends[:, 0], ends[:, 1], color="#999999", lw=0.6, zorder=2.8, scalex=False, scaley=False)


def _inked(panel: Any, scale: float) -> Any:
    """Points every few pixels on all lines drawn so far, in pixels. Shape (points, 2)."""
    found = [np.empty((0, 2))]
    for line in panel.lines:
        path = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        for start, end in pairwise(path):
            steps = max(2, int(np.hypot(*(end - start)) / (4 * scale)))
            found.append(start + np.linspace(0, 1, steps)[:, None] * (end - start))
    return np.concatenate(found)
