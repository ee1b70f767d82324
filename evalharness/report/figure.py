"""The frontier as a picture: reward against cost with uncertainty, the audit beside it, and the rates by ratio."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from psacpo.evalharness.config import Axes
from psacpo.evalharness.report.names import headline, words
from psacpo.evalharness.report.paint import BASELINE, CHOSEN, DPI, GREY, POINT, WIDTH
from psacpo.evalharness.report.rates import label_rates, rates_over
from psacpo.evalharness.report.scatter import certainty, filled_of, label_points, placed, scatter
from psacpo.evalharness.report.schema import Frontier, parse_frontier

HEIGHT = 5.6
HEIGHT_AUDIT = 8.6

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


_CANVASES: dict[str, Callable[[Figure, io.BytesIO, dict[str, Any]], None]] = {
    "png": lambda figure, buffer, metadata: FigureCanvasAgg(figure).print_png(buffer, metadata=metadata),
    "svg": lambda figure, buffer, metadata: FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata),
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
        jobs.append((panel, scatter(panel, frontier, span)))
    ends = rates_over(panels[-1], frontier, rates) if rates else []
    _legend(figure, frontier, spans)
    # The layout is settled by one drawing; labels are then put by hand, in pixels.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (policies, span) in jobs:
        label_points(panel, canvas.get_renderer(), frontier, policies, span)
    if rates:
        label_rates(panels[-1], canvas.get_renderer(), ends)
    written = {}
    for kind in kinds:
        buffer = io.BytesIO()
        # Not savefig, which draws all of it once more to see where things are.
        _CANVASES[kind](figure, buffer, _METADATA[kind])
        written[kind] = buffer.getvalue()
    return written


def _panels(figure: Figure, scatters: int, rates: bool) -> list[Any]:
    if not rates:
        return [figure.add_subplot(1, scatters, i + 1) for i in range(scatters)]
    if scatters == 1:
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
        return [figure.add_subplot(grid[0]), figure.add_subplot(grid[1])]
    grid = figure.add_gridspec(2, 2, height_ratios=[2.15, 1])
    return [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])]


def _legend(figure: Figure, frontier: Frontier, spans: Sequence[Axes]) -> None:
    def spot(**style: Any) -> Line2D:
        plain: dict[str, Any] = {"marker": "o", "markersize": 8, "mec": POINT, "mew": 1.4, "linestyle": "none"}
        return Line2D([], [], **(plain | style))

    filled = [mark for span in spans for mark in filled_of(frontier, span)]
    sure = [certainty(frontier, point, span) for span in spans for point in placed(frontier.points, span)]
    policies = [(policy, span) for span in spans for policy in placed(frontier.policies(), span)]
    confidence = f"{frontier.choice.confidence * 100:g} % interval"
    # Only what is in the picture: a mark that is explained and nowhere to be seen is looked for.
    entries = [
        (True in filled, spot(mfc=POINT), "not dominated"),
        (False in filled, spot(mfc="none"), f"dominated by another {words(frontier).kind}"),
        (min(sure, default=1.0) < _FAINT, spot(mfc=POINT, alpha=0.35), "fainter: less likely on the frontier"),
        (
            any(point is frontier.chosen for point, _ in policies),
            spot(mfc="none", mec=CHOSEN, markersize=12, mew=2),
            f"chosen {words(frontier).kind}",
        ),
        (any(not p.swept for p, _ in policies), spot(marker="s", mec="white", mfc=BASELINE), "baseline"),
        (
            any(p[name].low is not None for p, span in policies for name in (span.reward, span.cost)),
            Line2D([], [], color=GREY, lw=1),
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
