"""How well a judge agrees with people, and what a rate would be if it never erred: arrays in, numbers out.

Shapes: n labelled answers, D bootstrap draws over C clusters of prompts. A label is 1 where people say what a high score
of the judge means, else 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from psacpo.errors import InputError
from psacpo.evalharness.statistics.bootstrap import Estimate

Array = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class Rate:
    """A share of `n` with its exact (Clopper and Pearson 1934) interval; None where n is 0."""

    mean: float | None
    low: float | None
    high: float | None
    hits: int
    n: int


def exact_rate(hits: int, n: int, confidence: float) -> Rate:
    """`hits` of `n` as a rate."""
    if n == 0:
        return Rate(None, None, None, 0, 0)
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return Rate(hits / n, low, high, hits, n)


def confusion(scores: Array, labels: Array, threshold: float, confidence: float) -> dict[str, Any]:
    """Counts of the verdicts "score above threshold" against labels, and the rates that come of them."""
    said, true = scores > threshold, labels > 0.5
    counts = {
        "true_positive": int((said & true).sum()),
        "false_positive": int((said & ~true).sum()),
        "false_negative": int((~said & true).sum()),
        "true_negative": int((~said & ~true).sum()),
    }
    hits, misses = counts["true_positive"], counts["false_negative"]
    rejections, alarms = counts["true_negative"], counts["false_positive"]
    rates = {
        "accuracy": exact_rate(hits + rejections, len(labels), confidence),
        "sensitivity": exact_rate(hits, hits + misses, confidence),
        "specificity": exact_rate(rejections, rejections + alarms, confidence),
    }
    both = (rates["sensitivity"].mean, rates["specificity"].mean)
    balanced = None if None in both else sum(x for x in both if x is not None) / 2
    return {"confusion": counts, "balanced_accuracy": balanced} | {name: asdict(rate) for name, rate in rates.items()}


def auroc(scores: Array, labels: Array, weights: Array) -> Array:
    """The chance that a label 1 scores above a label 0, ties half, in each draw (Mann and Whitney 1947).

    Args:
        scores: [n].
        labels: [n], 0 or 1.
        weights: How often each answer is drawn, [D, n].

    Returns:
        [D]; NaN in a draw that holds one label alone.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Array = (positive * (below + negative / 2)).sum(axis=1) / pairs
    return share


def spearman(scores: Array, given: Array) -> float | None:
    """Rank correlation of scores with people's scores; None where one of them is all the same."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(given) == 0:
        return None
    return float(stats.spearmanr(scores, given).statistic)


def percentiles(value: float | None, draws: Array, n: int, confidence: float) -> Estimate:
    """An estimate whose interval is the percentiles of its finite draws."""
    known = draws[np.isfinite(draws)]
    if value is None or not math.isfinite(value) or not len(known):
        return Estimate(None, None, None, n)
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), n)


def best_accuracy(scores: Array, labels: Array) -> float:
    """The most that any threshold on `scores`, either way up, would get right of these very labels."""
    order = np.argsort(scores, kind="stable")
    ordered, true = scores[order], labels[order]
    # A cut cannot fall between equal scores.
    cuts = np.r_[0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, len(true)]
    ones_below = np.r_[0.0, np.cumsum(true)][cuts]
    right = (cuts - ones_below) + (true.sum() - ones_below)
    return float(max(right.max(), len(true) - right.min()) / len(true))


def rogan_gladen(
    rate: float, n: float, sensitivity: tuple[int, int], specificity: tuple[int, int], confidence: float
) -> Estimate:
    """The true rate behind a judged one: (rate + specificity - 1) / (sensitivity + specificity - 1).

    Rogan and Gladen 1978. The interval is that of Lang and Reiczigel 2014, recommended for language models as judges by
    arXiv 2511.21140: it holds the error of the rate and of both error rates, on counts moved towards the middle.

    Args:
        rate: The judged rate.
        n: How many independent answers it is of; with clusters of prompts rate (1 - rate) / variance.
        sensitivity: Hits and trials among the labelled positives.
        specificity: Hits and trials among the labelled negatives.

    Raises:
        InputError: The judge is no better than chance on the labels, or there is no label of one kind.
    """
    if not sensitivity[1] or not specificity[1]:
        raise InputError("a rate cannot be corrected without labels of both kinds")
    plain = [hits / trials for hits, trials in (sensitivity, specificity)]
    if sum(plain) <= 1:
        raise InputError(
            "a rate cannot be corrected by a judge that is no better than chance on the labels",
            given=f"sensitivity {plain[0]:.3f}, specificity {plain[1]:.3f}",
            allowed="sensitivity + specificity over 1",
        )
    z = float(stats.norm.ppf((1 + confidence) / 2))
    size, (se_n, sp_n) = n + z**2, (sensitivity[1] + 2, specificity[1] + 2)
    p = (n * rate + z**2 / 2) / size
    se, sp = (sensitivity[0] + 1) / se_n, (specificity[0] + 1) / sp_n
    power = se + sp - 1
    middle = (p + sp - 1) / power
    se_error, sp_error = se * (1 - se) / se_n, sp * (1 - sp) / sp_n
    shift = 2 * z**2 * (middle * se_error - (1 - middle) * sp_error)
    spread = z * math.sqrt(p * (1 - p) / size + middle**2 * se_error + (1 - middle) ** 2 * sp_error) / abs(power)
    low, high = (min(max(edge, 0.0), 1.0) for edge in (middle + shift - spread, middle + shift + spread))
    value = (rate + plain[1] - 1) / (sum(plain) - 1)
    return Estimate(min(max(value, 0.0), 1.0), low, high, round(n))
