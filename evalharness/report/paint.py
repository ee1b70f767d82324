"""Sizes and colours of the figure."""

from __future__ import annotations

DPI = 200
WIDTH = 12.0  # inches; the page shows the figure at half its pixels

# Okabe and Ito's palette, told apart with any common colour blindness.
POINT = "#0072B2"
CHOSEN = "#D55E00"
BASELINE = "#333333"
LIMIT = "#A3316F"
RATES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7A5C00", "#D55E00")
RATE_MARKERS = "osD^vPX"
BASELINE_MARKERS = "s^Dv*PX"
GREY = "#666666"


def shortened(name: str, length: int = 28) -> str:
    """A name in at most so many letters."""
    return name if len(name) <= length else name[: length - 1] + "…"
