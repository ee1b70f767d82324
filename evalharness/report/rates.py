"""The panel of the rates: each a curve over the ratio with its interval, named at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psacpo.evalharness.report.labels import spread
from psacpo.evalharness.report.names import constraint_text, mark, place, words
from psacpo.evalharness.report.paint import CHOSEN, DPI, RATE_MARKERS, RATES, WIDTH, shortened
from psacpo.evalharness.report.schema import Frontier


def rates_over(panel: Any, frontier: Frontier, rates: Sequence[str]) -> list[tuple[float, str, str]]:
    """Each rate as a curve over the ratio with its interval; gives where, what and in which colour to name at the right."""
    panel.set_title(f"Rates by {words(frontier).kind}", pad=8)
    ratios = [place(point, frontier) or 0.0 for point in frontier.points]
    ends = []
    top = 0.0
    for number, name in enumerate(rates):
        colour = RATES[number % len(RATES)]
        shown = zip(ratios, frontier.points, strict=True)
        known = [(ratio, point[name]) for ratio, point in shown if point[name].mean is not None]
        x = [ratio for ratio, _ in known]
        y = [estimate.mean or 0.0 for _, estimate in known]
        low = [e.low if e.low is not None else e.mean or 0.0 for _, e in known]
        high = [e.high if e.high is not None else e.mean or 0.0 for _, e in known]
        marker = RATE_MARKERS[number % len(RATE_MARKERS)]
        panel.plot(x, y, color=colour, lw=1.6, marker=marker, markersize=4.5, zorder=4)
        panel.fill_between(x, low, high, color=colour, alpha=0.13, lw=0, zorder=2)
        ends.append((y[-1], shortened(name), colour))
        top = max(top, *high)
        for _, constraint in frontier.choice.parsed():
            if constraint.metric == name:
                panel.axhline(constraint.limit, color=colour, lw=1.2, ls=(0, (5, 3)), zorder=3)
                ends.append((constraint.limit, "limit " + constraint_text(constraint), colour))
                top = max(top, min(constraint.limit, 1.0))
    if frontier.chosen is not None:
        panel.axvline(place(frontier.chosen, frontier) or 0.0, color=CHOSEN, lw=1.3, zorder=1)
    panel.set_ylim(-0.02 * max(top, 0.02), 1.08 * max(top, 0.02))
    span = (max(ratios) - min(ratios)) or 1.0
    panel.set_xlim(min(ratios) - 0.02 * span, max(ratios) + 0.02 * span)
    if len(ratios) <= 11:
        panel.set_xticks(ratios, [mark(point, frontier) for point in frontier.points])
    elif frontier.mixed:
        panel.set_xticks([])
    panel.tick_params(axis="x", labelsize=8.5)
    panel.set_xlabel(words(frontier).axis)
    return ends


def label_rates(panel: Any, renderer: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """The names of the curves at their right ends, moved apart; the panel gives way to them."""
    widest = 0.0
    for _, name, _ in ends:
        probe = panel.text(0, 0, name, fontsize=9)
        widest = max(widest, probe.get_window_extent(renderer).width)
        probe.remove()
    box = panel.get_position()
    room = widest / (WIDTH * DPI) + 0.015
    panel.set_position((box.x0, box.y0, max(box.width - room, 0.1), box.height))
    low, high = panel.get_ylim()
    height = panel.bbox.height / DPI * 72  # points
    gap = 11.5 / height * (high - low)
    places = spread([min(max(value, low), high) for value, _, _ in ends], gap, low, high)
    for (_, name, colour), y in zip(ends, places, strict=True):
        panel.text(
            1.015, y, name, transform=panel.get_yaxis_transform(), color=colour, fontsize=9, va="center", ha="left"
        )
