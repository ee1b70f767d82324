"""One-sided tests of a mean against a limit, and the bounds that they make: arrays in, p-values out.

Each tests that the mean is above `limit` (the hypothesis) against its being at or below; a small p-value speaks for the
latter. A lower limit is tested by turning the values round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from psacpo.evalharness.statistics.bootstrap import Array, Mask

MOST_ROWS = 1_000_000
"""More rows than anyone judges: `rows_needed` looks no further."""

# Of the betting test: the most that the cautious bet puts at stake, as share of what it can lose, and its part.
_STAKE = 0.75
_CAUTIOUS = 0.5
# Logarithm of more capital than any test asks for.
_RICH = 600.0


def binomial_p(events: int, rows: int, limit: float) -> float:
    """P(X <= events) for X binomial(rows, limit): exact for independent rows of 0 and 1."""
    return float(stats.binom.cdf(events, rows, min(max(limit, 0.0), 1.0))) if rows else 1.0


def binomial_bound(events: int, rows: int, level: float) -> float:
    """The upper confidence bound that belongs to `binomial_p` (Clopper and Pearson 1934)."""
    if rows == 0 or events == rows:
        return 1.0 if rows else math.inf
    return float(stats.beta.ppf(level, events + 1, rows - events))


def hoeffding_bentkus_p(values: Array, limit: float) -> float:
    """For independent values in [0, 1]: the better of Hoeffding's and Bentkus' bounds (Bates et al. 2021)."""
    n, mean = len(values), float(values.mean()) if len(values) else 1.0
    if n == 0 or limit <= 0 or mean >= limit:
        return 1.0
    if limit >= 1:
        return 0.0
    near = 0.0 if mean <= 0 else mean * math.log(mean / limit)
    far = (1 - mean) * math.log((1 - mean) / (1 - limit))
    # A sum of fractions a rounding error above a whole number is that number.
    bentkus = math.e * float(stats.binom.cdf(math.ceil(n * mean - 1e-9), n, limit))
    return min(1.0, math.exp(-n * (near + far)), bentkus)


def betting_p(values: Array, limit: float, *, alpha: float = 0.05) -> float:
    """For independent values in [0, 1], in an order that does not hang on them: 1 over the most capital of a gambler.

    The gambler stakes on the mean's being below the limit, half on predictable plug-in bets (Waudby-Smith and Ramdas
    2024, eq. 26, cut off at 3/4 of the capital) and half on staking all every time, which is best where no value is
    above 0. If the mean is at the limit or above it, the capital is a supermartingale that starts at 1, so the chance
    that it ever reaches 1 / p is at most p (Ville).

    Args:
        values: [n].
        alpha: The level that the bets are tuned to; any other is valid too.
    """
    n = len(values)
    if n == 0 or limit <= 0:
        return 1.0
    if limit >= 1:
        return 0.0
    capital = betting_capital(values, limit, alpha=alpha, planned=n)
    return min(1.0, 1.0 / float(capital.max()))


def betting_capital(values: Array, limit: float, *, alpha: float, planned: int | None) -> Array:
    """The gambler's capital after each value, [n].

    Args:
        planned: How many values the bets are tuned to; None is any number, for whom it may end at any time.
    """
    seen = np.arange(1, len(values) + 1)
    horizon = seen * np.log1p(seen) if planned is None else planned
    mean = (0.5 + np.cumsum(values)) / (seen + 1)
    spread = (0.25 + np.cumsum((values - mean) ** 2)) / (seen + 1)
    # A bet may use what came before it and nothing else.
    before = np.concatenate([[0.25], spread[:-1]])
    bets = np.minimum(np.sqrt(2 * math.log(1 / alpha) / (horizon * before)), _STAKE / (1 - limit))
    with np.errstate(divide="ignore"):
        cautious = np.cumsum(np.log1p(-bets * (values - limit)))
        bold = np.cumsum(np.log(np.maximum((1 - values) / (1 - limit), 0.0)))
    cautious, bold = np.exp(np.minimum(cautious, _RICH)), np.exp(np.minimum(bold, _RICH))
    return np.asarray(_CAUTIOUS * cautious + (1 - _CAUTIOUS) * bold, dtype=np.float64)


def share_p(means: Array, limit: float) -> float:
    """Share of a bootstrap's means that are above the limit; approximate, and never 0."""
    known = means[np.isfinite(means)]
    return float((1 + (known > limit).sum()) / (1 + len(known))) if len(known) else 1.0


def inverted(p: Callable[[float], float], alpha: float, low: float, high: float) -> float:
    """The least limit in [low, high] at which a test rejects, to 1e-6 of the range: its upper confidence bound."""
    if p(high) > alpha:
        return high
    for _ in range(21):
        middle = (low + high) / 2
        low, high = (low, middle) if p(middle) <= alpha else (middle, high)
    return high


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
