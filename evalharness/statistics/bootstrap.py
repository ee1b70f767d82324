"""The frontier's statistics: arrays in, numbers out.

Shapes: K policies, C clusters of prompts, D bootstrap draws. A metric of one policy enters as two arrays [C]: the sum
of its values in each cluster and their count. Clusters, not rows, are resampled, with the same draw for every policy
and metric, so that everything derived from a draw (frontier, hypervolume, differences) is drawn jointly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def bootstrap_weights(clusters: int, draws: int, seed: int, among: Mask | None = None) -> Array:
    """How often each cluster is drawn in each resample: [D, C], rows sum to C (Efron's multinomial bootstrap).

    Args:
        among: Clusters that can be drawn, [C]; rows then sum to their number, and the others' columns are 0.
    """
    generator = np.random.default_rng(seed)
    drawn = np.ones(clusters, dtype=np.bool_) if among is None else among
    count = int(drawn.sum())
    weights = np.zeros((draws, clusters))
    if count:
        weights[:, drawn] = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    return weights


def ratio_means(weights: Array, sums: Array, counts: Array) -> Array:
    """Mean of a metric in each draw, [D]: weighted sum over weighted count; NaN where a draw holds no value."""
    total = weights @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = np.where(total > 0, (weights @ sums) / total, np.nan)
    return means


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with a two-sided interval; all None when there is no row."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def estimate(weights: Array, sums: Array, counts: Array, *, confidence: float, rate: bool) -> Estimate:
    """Mean and interval of one metric of one policy.

    A rate with one row a cluster has Wilson's interval (Wilson 1927). Everything else has the bootstrap's percentiles,
    except a rate that is 0 or 1 in every row: there they have no width, and the exact interval for as many
    independent rows as there are clusters stands in (zero events in n: about 3/n, Hanley and Lippman-Hand 1983).
    """
    n = int(counts.sum())
    if n == 0:
        return Estimate(None, None, None, 0)
    mean = float(sums.sum() / counts.sum())
    if rate and mean in (0.0, 1.0):
        edge = ((1 - confidence) / 2) ** (1 / int((counts > 0).sum()))
        return Estimate(mean, edge if mean == 1 else 0.0, 1.0 if mean == 1 else 1 - edge, n)
    if rate and counts.max() <= 1:
        return Estimate(mean, *wilson(mean, n, confidence), n)
    return interval(mean, ratio_means(weights, sums, counts), n, confidence=confidence)


def interval(mean: float, draws: Array, n: int, *, confidence: float) -> Estimate:
    """An estimate whose interval is the percentiles of its draws [D]; draws that are NaN do not count."""
    tail = (1 - confidence) / 2
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Estimate(mean, None, None, n)
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n)


def wilson(rate: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a rate that was seen in n independent rows."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(weights: Array, one: tuple[Array, Array], other: tuple[Array, Array], *, confidence: float) -> Estimate:
    """Mean of `other` minus mean of `one` with a percentile interval over the same draws of clusters for both.

    Args:
        one: Sums and counts of a metric of one policy by cluster, [C] each.
        other: The same of another policy. Answers to one prompt are paired by being in one cluster.
    """
    n = int(min(one[1].sum(), other[1].sum()))
    if n == 0:
        return Estimate(None, None, None, 0)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(ratio_means(weights, *other) - ratio_means(weights, *one), [tail, 1 - tail])
    mean = other[0].sum() / other[1].sum() - one[0].sum() / one[1].sum()
    return Estimate(float(mean), float(low), float(high), n)
