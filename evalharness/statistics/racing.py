"""Spend answers where they decide something: tests that may be looked at after every prompt, and the next ratio to measure.

Arrays in, decisions out; who generates and who judges is no matter here. Prompts come in one seeded random order that all
ratios share, so that a prefix is a valid sample and pairs stay pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from psacpo.evalharness.statistics.bootstrap import Array
from psacpo.evalharness.statistics.bounds import betting_capital

Decision = Literal["below", "above"]


@dataclass(frozen=True)
class Look:
    """What a sequential test of one ratio came to.

    Attributes:
        decision: On which side of the limit the mean is, None where the prompts ran out first.
        used: Prompts that it took.
    """

    decision: Decision | None
    used: int


def sequential_test(values: Array, limit: float, *, alpha: float, batch: int = 1, both: bool = True) -> Look:
    """Whether a mean of values in [0, 1] is below a limit, decided as soon as it can be.

    Two gamblers bet on the values as they come (`bounds.betting_capital`), one that the mean is below the limit, one that
    it is above; the first to have 1 / alpha wins. By Ville's inequality either is wrong with a chance of at most alpha,
    whenever it is looked at, so stopping early costs nothing.

    Args:
        values: In the order in which they come, [n].
        batch: Looks happen after every so many values.
        both: Whether to give up as well when the mean is shown to be above.
    """
    below = _reached(betting_capital(values, limit, alpha=alpha, planned=None), alpha, batch)
    above = None
    if both:
        above = _reached(betting_capital(1 - values, 1 - limit, alpha=alpha, planned=None), alpha, batch)
    if below is not None and (above is None or below <= above):
        return Look("below", min(below, len(values)))
    if above is not None:
        return Look("above", min(above, len(values)))
    return Look(None, len(values))


def anytime_p(values: Array, limit: float, *, alpha: float, most: int | None = None) -> float:
    """For values in [0, 1] in the order in which they came: 1 over the most capital of a gambler so far, at any moment.

    Tests that their mean is above the limit, as `bounds.betting_p` does for a number of values that is fixed beforehand.

    Args:
        most: As many values as there can ever be, known beforehand: half of the capital is then bet as is best for those
            who wait for all of them, which decides close cases.
    """
    if not len(values) or limit <= 0:
        return 1.0
    if limit >= 1:
        return 0.0
    capital = betting_capital(values, limit, alpha=alpha, planned=None)
    if most is not None:
        capital = (capital + betting_capital(values, limit, alpha=alpha, planned=most)) / 2
    return min(1.0, 1.0 / float(capital.max()))


def _reached(capital: Array, alpha: float, batch: int) -> int | None:
    """After how many values, in whole batches, the capital has been at 1 / alpha."""
    over = np.flatnonzero(capital >= 1 / alpha)
    return None if not len(over) else batch * (int(over[0]) // batch + 1)


def confidence_sequence(values: Array, *, alpha: float, grid: int = 200) -> tuple[Array, Array]:
    """Bounds of the mean of values in [0, 1] after each of them that hold at all times at once: low and high, [n] each.

    The limits that neither gambler has ruled out at alpha / 2 so far (Waudby-Smith and Ramdas 2024), on a grid: bounds are
    rounded outwards by 1 / grid.
    """
    limits = (np.arange(grid) + 0.5) / grid
    low, high = np.zeros(len(values)), np.ones(len(values))
    for limit in limits:
        falls = np.maximum.accumulate(betting_capital(values, limit, alpha=alpha / 2, planned=None))
        rises = np.maximum.accumulate(betting_capital(1 - values, 1 - limit, alpha=alpha / 2, planned=None))
        # The mean is below this limit, or above it; ever since.
        high = np.where((falls >= 2 / alpha) & (limit < high), np.minimum(high, limit), high)
        low = np.where((rises >= 2 / alpha) & (limit > low), np.maximum(low, limit), low)
    return np.maximum(low - 1 / grid, 0.0), np.minimum(high + 1 / grid, 1.0)


@dataclass(frozen=True)
class Race:
    """How a walk over the ratios went.

    Attributes:
        certified: Places of the ratios shown to be below the limit, in the order of the walk.
        used: Prompts that each visited ratio took, in the order of the walk.
    """

    certified: list[int]
    used: list[int]


def race(
    order: Sequence[int],
    values: Callable[[int], Array],
    limit: float,
    *,
    alpha: float,
    batch: int = 25,
) -> Race:
    """Walk over the ratios from the safe end, each with as many prompts as it takes, up to the first that fails.

    The order is fixed in advance and each ratio is tested at the full level, so the chance that a ratio with a mean over
    the limit is certified is at most alpha (fixed-sequence testing with anytime-valid tests). Ratios past the first
    failure are never asked for.

    Args:
        order: Places of the ratios, the safest first.
        values: Place -> its values in [0, 1] in the shared order of prompts, as many as may be spent; called for the
            ratios that are visited alone.
    """
    certified: list[int] = []
    used: list[int] = []
    for place in order:
        look = sequential_test(values(place), limit, alpha=alpha, batch=batch)
        used.append(look.used)
        if look.decision != "below":
            break
        certified.append(place)
    return Race(certified, used)


@dataclass(frozen=True)
class Proposal:
    """A ratio to measure next, and what is hoped of it."""

    ratio: float
    why: Literal["crossing", "gap"]
    gain: float


def next_ratio(
    ratios: Sequence[float],
    points: Array,
    *,
    passed: Sequence[bool] | None = None,
    resolution: float = 0.025,
    noise: float = 0.0,
) -> Proposal | None:
    """The ratio that is worth measuring next, in the middle of two measured neighbours; None where none is.

    Where neighbours differ in meeting the constraint the crossing between them decides the choice, so it comes first.
    Otherwise it is the pair with the most hypervolume that a point between them could add: the rectangle that two
    non-dominated neighbours leave open, in units of the whole box.

    Args:
        ratios: Measured, rising, [K].
        points: Objectives of each, larger = better, [K, 2].
        passed: Whether each meets the constraint by what is known, [K].
        resolution: Neighbours closer than twice this are not split.
        noise: A gain below this, such as the hypervolume's own half width, is not worth a ratio.
    """
    wide = [k for k in range(len(ratios) - 1) if ratios[k + 1] - ratios[k] >= 2 * resolution - 1e-12]
    if passed is not None:
        for k in wide:
            if passed[k] != passed[k + 1]:
                return Proposal((ratios[k] + ratios[k + 1]) / 2, "crossing", 1.0)
    box = np.prod(points.max(axis=0) - points.min(axis=0))
    if box <= 0:
        return None
    gains = {
        k: float(np.prod(np.abs(points[k + 1] - points[k]))) / float(box) for k in wide if _trade(points[k : k + 2])
    }
    if not gains:
        return None
    best = max(gains, key=lambda k: gains[k])
    if gains[best] <= noise:
        return None
    return Proposal((ratios[best] + ratios[best + 1]) / 2, "gap", gains[best])


def _trade(pair: Array) -> bool:
    """Whether neither of two points dominates the other."""
    change = pair[1] - pair[0]
    return bool(change[0] * change[1] < 0)
