"""Krippendorff's alpha: how far judges agree beyond chance. Arrays in, a number out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from psacpo.errors import unknown_name

Array = NDArray[np.float64]


def _unequal(values: Array) -> float:
    """Ordered pairs of two different values."""
    _, counts = np.unique(values, return_counts=True)
    return float(len(values) ** 2 - (counts**2).sum())


def _squared(values: Array) -> float:
    """Sum over ordered pairs of their squared difference: 2 n times the sum of squares about the mean."""
    return float(2 * len(values) * ((values - values.mean()) ** 2).sum())


LEVELS: dict[str, Callable[[Array], float]] = {"nominal": _unequal, "interval": _squared}


def krippendorff_alpha(ratings: Array, level: str) -> float | None:
    """alpha = 1 - D_observed / D_expected (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).

    Args:
        ratings: [raters, units]; NaN where a rater says nothing of a unit. Units with one rating play no part.
        level: "nominal" (equal or not) or "interval" (squared difference).

    Returns:
        1 for full agreement, 0 for that of chance, below 0 for less; None where no two ratings can be compared, or all
        are the same, so that chance alone would agree.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    disagreement = LEVELS[level]
    units = [unit[~np.isnan(unit)] for unit in np.asarray(ratings, dtype=np.float64).T]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    values = np.concatenate(units)
    expected = disagreement(values) / (len(values) * (len(values) - 1))
    if expected == 0:
        return None
    observed = sum(disagreement(unit) / (len(unit) - 1) for unit in units) / len(values)
    return 1 - observed / expected
