"""The frontier's statistics: arrays in, numbers out.

Shapes: K policies, C clusters of prompts, D bootstrap draws. A metric of one policy enters as two arrays [C]: the sum
of its values in each cluster and their count. Clusters, not rows, are resampled, with the same draw for every policy
and metric, so that everything derived from a draw (frontier, hypervolume, differences) is drawn jointly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
MOST_ROWS = 1_000_000
"""More rows than anyone judges: `rows_needed` looks no further."""


def bootstrap_weights(clusters: int, draws: int, seed: int) -> Array:
    """How often each cluster is drawn in each resample: [D, C], rows sum to C (Efron's multinomial bootstrap)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(np.float64)


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
    """Mean and percentile interval of one metric of one policy.

    A rate that is 0 or 1 in every row has a bootstrap interval of no width. There the exact one for as many
    independent rows as there are clusters stands in (zero events in n: about 3/n, Hanley and Lippman-Hand 1983).
    """
    n = int(counts.sum())
    if n == 0:
        return Estimate(None, None, None, 0)
    mean = float(sums.sum() / counts.sum())
    tail = (1 - confidence) / 2
    if rate and mean in (0.0, 1.0):
        edge = tail ** (1 / int((counts > 0).sum()))
        return Estimate(mean, edge if mean == 1 else 0.0, 1.0 if mean == 1 else 1 - edge, n)
    low, high = np.nanquantile(ratio_means(weights, sums, counts), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n)


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


def upper_bound(weights: Array, sums: Array, counts: Array, *, level: float, rate: bool) -> tuple[float, str]:
    """A one-sided upper confidence bound for a mean at `level`, and the name of the method.

    A rate with one row a cluster has the exact binomial bound (Clopper and Pearson 1934). Anything else has the
    percentile of the clustered bootstrap, which is approximate, and the exact bound with clusters as rows where a
    rate is degenerate.
    """
    present = counts > 0
    clusters = int(present.sum())
    if clusters == 0:
        return float("inf"), "no rows"
    mean = float(sums.sum() / counts.sum())
    if rate and (counts[present] == 1).all():
        events = round(float(sums.sum()))
        bound = 1.0 if events == clusters else float(stats.beta.ppf(level, events + 1, clusters - events))
        return bound, "exact binomial"
    if rate and mean in (0.0, 1.0):
        return (1.0 if mean == 1 else 1 - (1 - level) ** (1 / clusters)), "exact binomial on clusters"
    return float(np.nanquantile(ratio_means(weights, sums, counts), level)), "clustered bootstrap (approximate)"


def rows_needed(events: int, rows: int, limit: float, *, level: float) -> int | None:
    """The fewest rows whose exact upper bound at `level` is at most `limit`, were events as frequent as they are now.

    N rows are taken to hold ceil(N * events / rows) events, and N is the smallest with P(X <= that) <= 1 - level for
    X binomial(N, limit), at least `rows`. Without any event that is (1 - limit)^N <= 1 - level: the rule of three,
    N = 3 / limit, in its exact form.

    Returns:
        N; None where the rate is not below the limit or N would be over `MOST_ROWS`.
    """
    if rows < 1 or limit <= 0 or events >= limit * rows:
        return None
    if limit >= 1:
        return rows

    if events == 0:
        found = max(rows, math.ceil(math.log(1 - level) / math.log1p(-limit)))
        return found if found <= MOST_ROWS else None

    def enough(count: Array, at: Array) -> Mask:
        return np.asarray(stats.binom.cdf(count, at, limit) <= 1 - level, dtype=np.bool_)

    # As the count of events steps up by one the bound jumps, and it falls until the next step: so the ends of steps are
    # looked at first, and then the rows within the first step whose end will do.
    start, most = events, MOST_ROWS * events // rows
    while start <= most:
        steps = np.arange(start, min(2 * start, most + 1), dtype=np.float64)
        fitting = np.flatnonzero(enough(steps, np.floor(steps * rows / events)))
        if len(fitting):
            step = int(steps[fitting[0]])
            within = np.arange(max(rows, (step - 1) * rows // events + 1), step * rows // events + 1, dtype=np.float64)
            return int(within[np.flatnonzero(enough(np.full_like(within, step), within))[0]])
        start *= 2
    return None


def nondominated(points: Array) -> Mask:
    """Which of the points [..., K, 2], both coordinates larger = better, no other point beats: [..., K].

    A point is dominated if another is at least as good in both coordinates and better in one.
    """
    ahead = points[..., None, :, :] >= points[..., :, None, :]
    better = points[..., None, :, :] > points[..., :, None, :]
    dominated = np.any(np.all(ahead, axis=-1) & np.any(better, axis=-1), axis=-1)
    return np.asarray(~dominated, dtype=np.bool_)


def hypervolume(points: Array, reference: Array) -> float:
    """Area that points [K, 2] (larger = better) dominate above a reference point [2] (Zitzler and Thiele 1999)."""
    above = points[(points > reference).all(axis=-1)]
    area, height = 0.0, float(reference[1])
    for x, y in sorted(above.tolist(), key=lambda point: (-point[0], -point[1])):
        if y > height:
            area += (x - float(reference[0])) * (y - height)
            height = y
    return area


def fixed_sequence(passes: Sequence[bool]) -> list[bool]:
    """Certified so far along a sequence fixed in advance: true up to the first failure, false from there on.

    Each step may be tested at the full level and the chance of any false certification is still at most that level
    (fixed-sequence testing; Angelopoulos et al. 2021, "Learn then Test").
    """
    certified, standing = [], True
    for passed in passes:
        standing = standing and passed
        certified.append(standing)
    return certified
