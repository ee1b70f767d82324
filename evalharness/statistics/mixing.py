"""Which mixture of several adapters to measure next: points of a simplex, which of them are neighbours, and their middle.

Arrays in, decisions out. A vector of weights [A] is from 0 to 1 and sums to 1; two are as far apart as the weight that
has to be moved to make one the other, half of the sum of the differences: on a line between two adapters that is the
difference of ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from psacpo.evalharness.statistics.bootstrap import Array, Mask
from psacpo.evalharness.statistics.pareto import nondominated

_DIGITS = 4
# How far rounding to so many digits may move a vector.
_ROUNDED = 5e-4


@dataclass(frozen=True)
class Mixture:
    """Weights to measure next, [A], to four digits, and what is hoped of them."""

    weights: Array
    why: Literal["crossing", "gap"]
    gain: float


def coarse(adapters: int) -> Array:
    """Every adapter alone, the middle of every two, and that of all: [P, A] with P = A + A (A - 1) / 2 + 1.

    Of two adapters the middle of all is that of the two, and is there once.
    """
    alone = np.eye(adapters)
    found = [*alone, *((alone[i] + alone[j]) / 2 for i, j in combinations(range(adapters), 2))]
    if adapters > 2:
        found.append(rounded(np.full(adapters, 1 / adapters)))
    return np.stack(found)


def rounded(weights: Array) -> Array:
    """Weights to four digits that still sum to 1: the greatest takes the rest."""
    found = np.round(weights, _DIGITS)
    found[int(np.argmax(found))] += 1 - found.sum()
    return np.asarray(np.round(found, _DIGITS), dtype=np.float64)


def apart(one: Array, other: Array) -> Array:
    """How far vectors [..., A] are from each other, [...]."""
    return np.asarray(np.abs(one - other).sum(axis=-1) / 2, dtype=np.float64)


def neighbours(vectors: Array) -> list[tuple[int, int]]:
    """Pairs of vectors [K, A] with no other in the ball between them, its edge included (Gabriel and Sokal 1969)."""
    found = []
    for i, j in combinations(range(len(vectors)), 2):
        middle, radius = (vectors[i] + vectors[j]) / 2, np.linalg.norm(vectors[i] - vectors[j]) / 2
        others = np.delete(vectors, [i, j], axis=0)
        if not (np.linalg.norm(others - middle, axis=1) <= radius + _ROUNDED).any():
            found.append((i, j))
    return found


def next_mixture(
    vectors: Array,
    points: Array,
    *,
    passed: Sequence[bool] | None = None,
    resolution: float = 0.025,
    noise: float = 0.0,
) -> Mixture | None:
    """The weights that are worth measuring next, in the middle of two measured ones; None where none are.

    Where neighbours differ in meeting the constraint, the choice lies at such a crossing: first the one whose middle
    promises the most over the best that passes, halfway between the two. Otherwise it is the middle of two that follow
    each other on the non-dominated set and leave the largest rectangle open, in units of the whole box.

    Args:
        vectors: Measured, [K, A].
        points: Objectives of each, larger = better, the first of them what the choice is by, [K, 2].
        passed: Whether each meets the constraint by what is known, [K].
        resolution: Weights closer than twice this are not split, and none closer to measured ones is taken.
        noise: A gain below this, such as the hypervolume's own half width, is not worth a measurement.
    """
    spans = points.max(axis=0) - points.min(axis=0)
    if not (spans > 0).all():
        return None
    if passed is not None and any(passed):
        kept = np.array(passed, dtype=np.bool_)
        best = points[kept, 0].max()
        edges = [pair for pair in neighbours(vectors) if kept[pair[0]] != kept[pair[1]]]
        gains = {pair: float((points[list(pair), 0].mean() - best) / spans[0]) for pair in edges}
        if (found := _best(vectors, gains, resolution, resolution)) is not None:
            return Mixture(*found[:1], "crossing", found[1])
    front = np.flatnonzero(_front(points))
    front = front[np.argsort(points[front, 0], kind="stable")]
    gains = {(int(i), int(j)): float(np.prod(np.abs(points[i] - points[j]) / spans)) for i, j in pairwise(front)}
    found = _best(vectors, gains, noise, resolution)
    return None if found is None else Mixture(found[0], "gap", found[1])


def _best(
    vectors: Array, gains: dict[tuple[int, int], float], least: float, resolution: float
) -> tuple[Array, float] | None:
    """The middle of the pair that promises the most, over `least`, of those that are far enough from all that is there."""
    for (i, j), gain in sorted(gains.items(), key=lambda item: -item[1]):
        if gain <= least:
            return None
        middle = rounded((vectors[i] + vectors[j]) / 2)
        if (
            apart(vectors[i], vectors[j]) >= 2 * resolution - 1e-12
            and apart(vectors, middle).min() >= resolution - 1e-4
        ):
            return middle, gain
    return None


def _front(points: Array) -> Mask:
    """Non-dominated, and of equal points the first alone, [K]."""
    _, first = np.unique(points, axis=0, return_index=True)
    once = np.zeros(len(points), dtype=np.bool_)
    once[first] = True
    return nondominated(points) & once
