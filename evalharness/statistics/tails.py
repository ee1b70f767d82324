"""The bad end of scores: arrays in, numbers out. Scores here are costs, larger = worse.

Shapes: R rows, D draws, N prompts, S samples a prompt. NaN is a score that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from psacpo.evalharness.statistics.bootstrap import Array

# Floats of the largest intermediate array: draws are done in parts of that size.
_ROOM = 4_000_000


def cvar(values: Array, share: float) -> float:
    """Mean of the worst `share` of the values [R], the value at the edge counted in part (Rockafellar and Uryasev 2000).

    NaN where there is no value.
    """
    found = values[~np.isnan(values)]
    if not len(found):
        return float("nan")
    return float(weighted_cvars(found, np.zeros(len(found), dtype=np.intp), np.ones((1, 1)), [share])[0, 0])


def weighted_cvars(values: Array, clusters: NDArray[np.intp], weights: Array, shares: Sequence[float]) -> Array:
    """CVaR at several shares in each of D draws of clusters: [shares, D].

    Args:
        values: [R], none missing.
        clusters: Which cluster a value belongs to, [R].
        weights: How often each cluster is drawn, [D, C]. A draw without any value gives NaN.
    """
    order = np.argsort(-values, kind="stable")
    worst, owner = values[order], clusters[order]
    sizes = np.bincount(clusters, minlength=weights.shape[1]).astype(np.float64)
    found = np.full((len(shares), len(weights)), np.nan)
    # Only the worst rows are looked at: so many that every draw's tail ends among them, which few more than its share do.
    depth = min(len(values), 64 + round(1.5 * max(shares) * len(values)))
    step = max(1, _ROOM // max(depth, 1))
    for start in range(0, len(weights), step):
        drawn = weights[start : start + step]
        total = drawn @ sizes
        while True:
            counts = drawn[:, owner[:depth]]
            reached = np.cumsum(counts, axis=1)
            if depth == len(values) or (reached[:, -1] >= max(shares) * total).all():
                break
            depth = min(len(values), 2 * depth)
        for place, share in enumerate(shares):
            mass = (share * total)[:, None]
            taken = np.clip(mass - (reached - counts), 0, counts)
            with np.errstate(invalid="ignore", divide="ignore"):
                found[place, start : start + step] = np.where(total > 0, (taken @ worst[:depth]) / mass[:, 0], np.nan)
    return found


def prompt_cvars(values: Array, share: float) -> Array:
    """CVaR of each prompt's own samples: [N, S] -> [N]; NaN for a prompt without a score."""
    return np.array([cvar(row, share) for row in values], dtype=np.float64)


def worst_of(values: Array, n: int) -> Array:
    """Expected largest of n samples drawn without replacement from each prompt's: [N, S] -> [N], unbiased.

    With the m scores of a prompt in rising order it is the sum over i >= n of C(i - 1, n - 1) / C(m, n) times the i-th;
    for scores of 0 and 1 that is 1 - C(zeros, n) / C(m, n), as pass@k (Chen et al. 2021). NaN where m < n.
    """
    found = np.full(len(values), np.nan)
    known = (~np.isnan(values)).sum(axis=1)
    rising = np.sort(values, axis=1)  # NaN last
    for m in np.unique(known[known >= n]).tolist():
        rank = np.arange(n, m + 1, dtype=np.float64)
        chances = np.exp(_log_choose(rank - 1, n - 1) - _log_choose(np.array([float(m)]), n))
        rows = known == m
        found[rows] = rising[rows][:, n - 1 : m] @ chances
    return found


def _log_choose(n: Array, k: int) -> Array:
    found: Array = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return found
