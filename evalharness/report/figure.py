"""The frontier as a picture: reward against cost with uncertainty, the audit beside it, and the rates by ratio."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from psacpo.evalharness.config import Axes, Constraint
from psacpo.evalharness.judges.settings import Better
from psacpo.evalharness.report.labels import place, spread
from psacpo.evalharness.report.names import chosen_text, mark, words
from psacpo.evalharness.report.names import place as place_of
from psacpo.evalharness.report.schema import Frontier, Policy, parse_frontier
from psacpo.evalharness.report.table import ratio_text

DPI = 200
WIDTH = 12.0  # inches; the page shows the figure at half its pixels
HEIGHT = 5.6
HEIGHT_AUDIT = 8.6

# Okabe and Ito's palette, told apart with any common colour blindness.
_POINT = "#0072B2"
_CHOSEN = "#D55E00"
_BASELINE = "#333333"
_LIMIT = "#A3316F"
_RATES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7A5C00", "#D55E00")
_RATE_MARKERS = "osD^vPX"
_BASELINE_MARKERS = "s^Dv*PX"
_GREY = "#666666"
# A point that is at least as certain to be on the frontier looks like any other.
_FAINT = 0.75
# Nothing of the time or the version goes into the files: the same frontier gives the same bytes.
_METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "text.parse_math": False,
    # Names of elements in an SVG are random without it.
    "svg.hashsalt": "psacpo",
}


def draw(frontier: Mapping[str, Any]) -> bytes:
    """The figure of a frontier.json as PNG bytes; equal input gives equal bytes.

    Raises:
        InputError: The mapping is no frontier.json of schema 1.
    """
    return draw_frontier(parse_frontier(frontier), ["png"])["png"]


def draw_frontier(frontier: Frontier, kinds: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """The figure of a frontier that is read already, as {"png": .., "svg": ..}; letters in the SVG are outlines."""
    plain = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(plain | _STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names may be in any script
        return _pictures(frontier, kinds)


def _pictures(frontier: Frontier, kinds: Sequence[str]) -> dict[str, bytes]:
    spans = frontier.spans()
    rates = [name for name in frontier.rates() if any(point[name].mean is not None for point in frontier.points)]
    height = HEIGHT_AUDIT if len(spans) > 1 and rates else HEIGHT
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(headline(frontier), x=0.012, ha="left", fontsize=13.5, fontweight="bold")
    panels = _panels(figure, len(spans), bool(rates))
    jobs = []
    titles = ["By the judges", "Audit: the same policies by judges outside training"]
    for panel, span, title in zip(panels, spans, titles, strict=False):
        panel.set_title(title if len(spans) > 1 else "Reward against cost", pad=8)
        jobs.append((panel, _scatter(panel, frontier, span)))
    ends = _rates(panels[-1], frontier, rates) if rates else []
    _legend(figure, frontier, spans)
    # The layout is settled by one drawing; labels are then put by hand, in pixels.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (policies, span) in jobs:
        _label_points(panel, canvas.get_renderer(), frontier, policies, span)
    if rates:
        _label_rates(panels[-1], canvas.get_renderer(), ends)
    written = {}
    for kind in kinds:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=_METADATA[kind])
        written[kind] = buffer.getvalue()
    return written


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


def _panels(figure: Figure, scatters: int, rates: bool) -> list[Any]:
    if not rates:
        return [figure.add_subplot(1, scatters, i + 1) for i in range(scatters)]
    if scatters == 1:
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
        return [figure.add_subplot(grid[0]), figure.add_subplot(grid[1])]
    grid = figure.add_gridspec(2, 2, height_ratios=[2.15, 1])
    return [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])]


def _scatter(panel: Any, frontier: Frontier, span: Axes) -> tuple[list[Policy], Axes]:
    """Curve, points, bars and limits of one pair of metrics; gives the policies that have a place in it."""

    def at(policy: Policy) -> tuple[float, float] | None:
        x, y = policy[span.cost].mean, policy[span.reward].mean
        return None if x is None or y is None else (x, y)

    points = _placed(frontier.points, span)
    curve = np.array([at(point) for point in points]).reshape(-1, 2)
    if not frontier.mixed:  # the points of a simplex lie on no line
        panel.plot(curve[:, 0], curve[:, 1], color="#9DB9CC", lw=1.4, zorder=2)
    for point, filled in zip(points, _filled(frontier, span), strict=True):
        _bars(panel, point, span, _POINT)
        sure = 0.35 + 0.65 * _certainty(frontier, point, span)
        spot = {"marker": "o", "linestyle": "none", "markersize": 8.5, "zorder": 5}
        # A white disc below keeps bars and curve from showing through a faint point.
        panel.plot(*_xy(at(point)), color="white", markeredgewidth=0, **spot)
        face = _POINT if filled else "none"
        panel.plot(*_xy(at(point)), mec=_POINT, mfc=face, mew=1.5, alpha=sure, **spot)
    if (chosen := frontier.chosen) and at(chosen):
        panel.plot(*_xy(at(chosen)), marker="o", markersize=15, mfc="none", mec=_CHOSEN, mew=2.2, zorder=6)
    baselines = [policy for policy in frontier.baselines if at(policy)]
    for number, policy in enumerate(frontier.baselines):
        if not at(policy):
            continue
        _bars(panel, policy, span, _BASELINE)
        marker = _BASELINE_MARKERS[number % len(_BASELINE_MARKERS)]
        panel.plot(*_xy(at(policy)), marker=marker, color=_BASELINE, markersize=8, mec="white", mew=0.8, zorder=5)
    _limits(panel, frontier, span)
    panel.set_xlabel(_axis_title(span.cost, frontier.metrics[span.cost].better))
    panel.set_ylabel(_axis_title(span.reward, frontier.metrics[span.reward].better))
    return points + baselines, span


def _placed(policies: Sequence[Policy], span: Axes) -> list[Policy]:
    """The policies that have a place in a panel."""
    return [p for p in policies if p[span.cost].mean is not None and p[span.reward].mean is not None]


def _filled(frontier: Frontier, span: Axes) -> list[bool]:
    """Whether each point that has a place in a panel is dominated by none: by the file, or for the audit by its means."""
    points = _placed(frontier.points, span)
    if span == frontier.axes:
        return [point.nondominated is not False for point in points]
    return _undominated(points, frontier, span)


def _certainty(frontier: Frontier, point: Policy, span: Axes) -> float:
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
            (panel.axvline if vertical else panel.axhline)(limit, color=_LIMIT, lw=1.3, ls=(0, (5, 3)), zorder=2.5)
        forbidden = (max(low, limit), high) if constraint.sense == "<=" else (low, min(high, limit))
        if forbidden[0] < forbidden[1]:
            (panel.axvspan if vertical else panel.axhspan)(*forbidden, color=_LIMIT, alpha=0.06, lw=0, zorder=0)
        text = constraint_text(constraint) + ("" if seen else " (off the scale)")
        side = 0.985 if limit > (low + high) / 2 or not seen else 0.015
        if vertical:
            where = (min(max(limit, low), high), 0.012)
            align = {"ha": "right" if side > 0.5 else "left", "va": "bottom", "rotation": 90}
            panel.text(*where, text, transform=panel.get_xaxis_transform(), color=_LIMIT, fontsize=8.5, **align)
        else:
            where = (0.985, min(max(limit, low), high))
            align = {"ha": "right", "va": "top" if side > 0.5 else "bottom"}
            panel.text(*where, text, transform=panel.get_yaxis_transform(), color=_LIMIT, fontsize=8.5, **align)


def _label_points(panel: Any, renderer: Any, frontier: Frontier, policies: Sequence[Policy], span: Axes) -> None:
    """Name every point and baseline where the name covers nothing, with a thin line where it had to move away."""
    if not policies:
        return
    scale = DPI / 100
    texts, places = [], []
    for policy in policies:
        chosen = policy is frontier.chosen
        name = _short(mark(policy, frontier)) if policy.ratio is None else f"q={ratio_text(policy.ratio)}"
        texts.append(
            panel.text(
                0,
                0,
                name + (" chosen" if chosen else ""),
                fontsize=9 if not chosen else 9.5,
                fontweight="bold" if chosen else "normal",
                color=_CHOSEN if chosen else "#1F3B4D" if policy.swept else _BASELINE,
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


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _rates(panel: Any, frontier: Frontier, rates: Sequence[str]) -> list[tuple[float, str, str]]:
    """Each rate as a curve over the ratio with its interval; gives where, what and in which colour to name at the right."""
    panel.set_title(f"Rates by {words(frontier).kind}", pad=8)
    ratios = [place_of(point, frontier) or 0.0 for point in frontier.points]
    ends = []
    top = 0.0
    for number, name in enumerate(rates):
        colour = _RATES[number % len(_RATES)]
        shown = zip(ratios, frontier.points, strict=True)
        known = [(ratio, point[name]) for ratio, point in shown if point[name].mean is not None]
        x = [ratio for ratio, _ in known]
        y = [estimate.mean or 0.0 for _, estimate in known]
        low = [e.low if e.low is not None else e.mean or 0.0 for _, e in known]
        high = [e.high if e.high is not None else e.mean or 0.0 for _, e in known]
        marker = _RATE_MARKERS[number % len(_RATE_MARKERS)]
        panel.plot(x, y, color=colour, lw=1.6, marker=marker, markersize=4.5, zorder=4)
        panel.fill_between(x, low, high, color=colour, alpha=0.13, lw=0, zorder=2)
        ends.append((y[-1], _short(name), colour))
        top = max(top, *high)
        for _, constraint in frontier.choice.parsed():
            if constraint.metric == name:
                panel.axhline(constraint.limit, color=colour, lw=1.2, ls=(0, (5, 3)), zorder=3)
                ends.append((constraint.limit, "limit " + constraint_text(constraint), colour))
                top = max(top, min(constraint.limit, 1.0))
    if frontier.chosen is not None:
        panel.axvline(place_of(frontier.chosen, frontier) or 0.0, color=_CHOSEN, lw=1.3, zorder=1)
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


def _label_rates(panel: Any, renderer: Any, ends: Sequence[tuple[float, str, str]]) -> None:
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


def _legend(figure: Figure, frontier: Frontier, spans: Sequence[Axes]) -> None:
    def spot(**style: Any) -> Line2D:
        plain: dict[str, Any] = {"marker": "o", "markersize": 8, "mec": _POINT, "mew": 1.4, "linestyle": "none"}
        return Line2D([], [], **(plain | style))

    filled = [mark for span in spans for mark in _filled(frontier, span)]
    sure = [_certainty(frontier, point, span) for span in spans for point in _placed(frontier.points, span)]
    policies = [(policy, span) for span in spans for policy in _placed(frontier.policies(), span)]
    confidence = f"{frontier.choice.confidence * 100:g} % interval"
    # Only what is in the picture: a mark that is explained and nowhere to be seen is looked for.
    entries = [
        (True in filled, spot(mfc=_POINT), "not dominated"),
        (False in filled, spot(mfc="none"), f"dominated by another {words(frontier).kind}"),
        (min(sure, default=1.0) < _FAINT, spot(mfc=_POINT, alpha=0.35), "fainter: less likely on the frontier"),
        (
            any(point is frontier.chosen for point, _ in policies),
            spot(mfc="none", mec=_CHOSEN, markersize=12, mew=2),
            f"chosen {words(frontier).kind}",
        ),
        (any(not p.swept for p, _ in policies), spot(marker="s", mec="white", mfc=_BASELINE), "baseline"),
        (
            any(p[name].low is not None for p, span in policies for name in (span.reward, span.cost)),
            Line2D([], [], color=_GREY, lw=1),
            confidence,
        ),
    ]
    shown = [(handle, label) for there, handle, label in entries if there]
    if not shown:
        return
    figure.legend(
        [handle for handle, _ in shown],
        [label for _, label in shown],
        loc="outside lower left",
        ncols=len(shown),
        fontsize=9,
        handletextpad=0.5,
        columnspacing=1.6,
        labelcolor="#333333",
    )
