"""Comparisons of answers as numbers: win rates, length adjustment, Bradley-Terry strengths, Elo. Arrays in, numbers out.

A preference is in [0, 1]: 1 the policy's answer is better, 0 the other's, 0.5 a tie, and anything between for judges
that give probabilities. An invalid verdict is no preference: it is left out before it comes here.

Shapes: N comparisons, D bootstrap draws, K policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from psacpo.errors import InputError

Array = NDArray[np.float64]

_STEPS, _HALVINGS, _TOLERANCE = 100, 30, 1e-7
# Numbers of one array: draws times comparisons that are fitted at once.
_LARGEST = 200_000


@dataclass(frozen=True)
class WinRate:
    """The mean preference with what AlpacaEval's leaderboard says beside it.

    Attributes:
        mean: In [0, 1].
        standard_error: Sample standard deviation over sqrt(N); None for a single comparison. It takes comparisons for
            independent: where prompts come in clusters, resample those instead.
        wins: Preferences over 0.5; `losses` under it, `ties` at it.
        discrete: The win rate with each comparison rounded to win, tie or loss.
    """

    mean: float
    standard_error: float | None
    wins: int
    losses: int
    ties: int
    n: int

    @property
    def discrete(self) -> float:
        """Wins and half the ties over all."""
        return (self.wins + 0.5 * self.ties) / self.n


def win_rate(preference: Array) -> WinRate:
    """The win rate of [N] preferences.

    Raises:
        InputError: There is none, or one is outside [0, 1].
    """
    values = _preferences(preference)
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    return WinRate(float(values.mean()), error, wins, losses, n - wins - losses, n)


def length_adjusted_win_rates(
    preference: Array,
    delta_length: Array,
    policy: NDArray[np.int64],
    weights: Array | None = None,
    *,
    ridge: float = 0.01,
) -> Array:
    """What each policy's win rate would be if its answers were as long as the others', in each draw: [D, K].

    logit P(win) = a_k + b * tanh(delta / sd_k(delta)), fitted by maximum likelihood, read at delta = 0. It is the length
    part of AlpacaEval 2's model (Dubois et al. 2024, arXiv 2404.04475, section 3) with one b for all policies, for the
    taste for length is the judge's and not theirs: so a policy that almost always wins, or is almost always the longer
    one, still has a well determined answer. AlpacaEval's difficulty of each instruction is left out: it is fitted on
    other models' annotations and exists for its own 805 instructions only.

    Args:
        preference: [N] in [0, 1], of all policies that one judge compared with one anchor.
        delta_length: [N], the policy's length minus the anchor's, in any one unit.
        policy: [N], numbers from 0 to K - 1.
        weights: [D, N], how often each comparison is drawn; None is one draw of each once. Weights of clusters [D, C]
            become these by `weights[:, cluster_of_row]`. A policy without a comparison in a draw has NaN there.
        ridge: Penalty ridge/2 * (sum of a_k^2 + b^2), so that a policy that wins always has a fit. At N = 100 and win
            rates from 20 to 80 % it moves them by under 0.02 points.

    Raises:
        InputError: There is no comparison, a preference is outside [0, 1], or a length is no number.
    """
    target = _preferences(preference)
    delta, of = np.asarray(delta_length, dtype=np.float64), np.asarray(policy)
    if delta.shape != target.shape or of.shape != target.shape or not np.isfinite(delta).all():
        raise InputError("length adjustment: a length or a policy is missing, or a length is no number")
    drawn = np.ones((1, len(target))) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(of, kind="stable")
    target, delta, drawn = target[order], delta[order], drawn[:, order]
    present, starts, counts = np.unique(of[order], return_index=True, return_counts=True)
    mean = np.repeat(np.add.reduceat(delta, starts) / counts, counts)
    spread = np.repeat(np.sqrt(np.add.reduceat((delta - mean) ** 2, starts) / counts), counts)
    # A policy whose difference never varies tells nothing of b and needs no adjustment.
    x = np.tanh(np.divide(delta, spread, out=np.zeros_like(delta), where=spread > 0))
    whole = _logistic(target, x, starts, np.ones((1, len(target))), ridge, None)
    chunk = max(1, _LARGEST // len(target))
    fits = [
        _logistic(target, x, starts, drawn[start : start + chunk], ridge, whole)[0]
        for start in range(0, len(drawn), chunk)
    ]
    rates = np.full((len(drawn), int(of.max()) + 1), np.nan)
    rates[:, present] = np.where(np.add.reduceat(drawn, starts, axis=1) > 0, expit(np.concatenate(fits)), np.nan)
    return rates


def length_adjusted_win_rate(preference: Array, delta_length: Array, weights: Array | None = None) -> Array:
    """`length_adjusted_win_rates` of one policy alone: [D]."""
    return length_adjusted_win_rates(preference, delta_length, np.zeros(len(preference), np.int64), weights)[:, 0]


def _logistic(
    target: Array,
    x: Array,
    starts: NDArray[np.int64],
    weights: Array,
    ridge: float,
    first: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Newton's method for K intercepts [D, K] and one slope [D], all draws at once.

    The penalised likelihood is strictly concave; a step is halved where it does not raise it. The Hessian is a diagonal
    with one more row and column, which is solved by eliminating the diagonal.

    Args:
        starts: [K], where each policy's rows begin; rows are sorted by policy.
        first: The fit [1, K], [1] to start from; None is 0.
    """
    counts = np.diff([*starts, len(target)])
    a, b = (np.zeros((1, len(starts))), np.zeros(1)) if first is None else first
    a, b = np.repeat(a, len(weights), axis=0), np.repeat(b, len(weights))

    def look(a: Array, b: Array) -> tuple[Array, Array]:
        eta = np.repeat(a, counts, axis=1) + b[:, None] * x
        likelihood = (weights * (target * eta - np.logaddexp(0, eta))).sum(axis=1)
        return np.asarray(likelihood - ridge / 2 * ((a**2).sum(axis=1) + b**2)), eta

    value, eta = look(a, b)
    for _ in range(_STEPS):
        p = expit(eta)
        slope, curve = weights * (target - p), weights * p * (1 - p)
        g_a, g_b = np.add.reduceat(slope, starts, axis=1) - ridge * a, slope @ x - ridge * b
        h_aa, h_ab = np.add.reduceat(curve, starts, axis=1) + ridge, np.add.reduceat(curve * x, starts, axis=1)
        h_bb = curve @ x**2 + ridge
        step_b = (g_b - (h_ab * g_a / h_aa).sum(axis=1)) / (h_bb - (h_ab**2 / h_aa).sum(axis=1))
        step_a = (g_a - h_ab * step_b[:, None]) / h_aa
        size = np.ones(len(weights))
        for _ in range(_HALVINGS):
            tried, eta = look(a + size[:, None] * step_a, b + size * step_b)
            worse = tried < value - 1e-12 * np.abs(value)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        a, b, value = a + size[:, None] * step_a, b + size * step_b, tried
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < _TOLERANCE:
            break
    return a, b


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths.

    Attributes:
        log_strength: [K], their sum is 0; a difference of 400/ln(10) Elo points is a factor of e in the odds.
        tie: log of Davidson's nu; None where ties were counted as half a win.
    """

    log_strength: Array
    tie: float | None


def bradley_terry(wins: Array, ties: Array | None = None, *, davidson: bool = True, prior: float = 0.0) -> Strengths:
    """Maximum-likelihood strengths of K policies from who beat whom, in whatever order it happened.

    P(i beats j) : P(j beats i) : P(tie) = p_i : p_j : nu * sqrt(p_i p_j) (Davidson 1970), or without the third part
    and each tie as half a win of both (Bradley and Terry 1952).

    Args:
        wins: [K, K], how often the policy of the row beat that of the column; fractions are allowed.
        ties: [K, K], symmetric: how often the two tied; None is never.
        davidson: Fit nu; only where there are ties.
        prior: Penalty prior/2 * sum of squared log-strengths, so that a policy that never lost has a finite one.

    Raises:
        InputError: The tables do not fit, or, with `prior` 0, some policies won (or lost) every comparison with all
            others, so that no finite strength is the likeliest.
    """
    won = np.asarray(wins, dtype=np.float64)
    tied = np.zeros_like(won) if ties is None else np.asarray(ties, dtype=np.float64)
    k = len(won)
    if won.shape != (k, k) or tied.shape != (k, k) or k < 2 or not np.isfinite(won + tied).all():
        raise InputError("Bradley-Terry: wins and ties are no K x K tables of numbers", given=(won.shape, tied.shape))
    if (won < 0).any() or (tied < 0).any() or np.diagonal(won + tied).any() or not np.array_equal(tied, tied.T):
        raise InputError("Bradley-Terry: counts are below 0, on the diagonal, or ties are not symmetric")
    groups, _ = connected_components(
        csr_matrix((won + tied > 0).astype(np.float64)), directed=True, connection="strong"
    )
    if groups > 1 and prior == 0:
        raise InputError(
            "Bradley-Terry: some policies won or lost every comparison with the others: no finite strength fits",
            allowed="a prior over 0, or more comparisons",
        )
    with_ties = davidson and bool(tied.any())
    if not with_ties:
        won = won + tied / 2
    solution = _davidson(won, tied if with_ties else None, prior)
    theta = solution[:k] - solution[:k].mean()
    return Strengths(theta, float(solution[k]) if with_ties else None)


def _davidson(won: Array, tied: Array | None, prior: float) -> Array:
    """Newton's method on the multinomial logit; the direction that leaves the likelihood as it is stays at 0."""
    k = len(won)
    first, second = np.triu_indices(k, 1)
    pairs, width = np.arange(len(first)), k + (tied is not None)
    features = np.zeros((len(first), 2 + (tied is not None), width))
    features[pairs, 0, first] = features[pairs, 1, second] = 1
    counts = [won[first, second], won[second, first]]
    if tied is not None:
        features[pairs, 2, first] = features[pairs, 2, second] = 0.5
        features[pairs, 2, k] = 1
        counts.append(tied[first, second])
    y = np.stack(counts, axis=1)
    n = y.sum(axis=1, keepdims=True)
    ridge = np.diag([prior] * k + [0.0] * (width - k))

    def look(solution: Array) -> tuple[float, Array]:
        eta = features @ solution
        log_p = eta - np.logaddexp.reduce(eta, axis=1, keepdims=True)
        return float((y * log_p).sum() - solution @ ridge @ solution / 2), np.exp(log_p)

    solution = np.zeros(width)
    value, p = look(solution)
    for _ in range(_STEPS):
        gradient = np.einsum("pc,pcw->w", y - n * p, features) - ridge @ solution
        centred = features - np.einsum("pc,pcw->pw", p, features)[:, None]
        hessian = np.einsum("pc,pcw,pcv->wv", n * p, centred, centred) + ridge
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-12)[0]
        size = 1.0
        while (tried := look(solution + size * step))[0] < value - 1e-12 * abs(value) and size > 1e-9:
            size /= 2
        solution = solution + size * step
        value, p = tried
        if np.abs(step).max() < _TOLERANCE:
            break
    return solution


def elo(
    outcomes: Sequence[tuple[int, int, float]], policies: int, *, k: float = 32.0, start: float = 1200.0
) -> list[float]:
    """Ratings after the outcomes in the order given: r += k * (outcome - 1 / (1 + 10 ** ((r_other - r) / 400))).

    They hang on that order and never settle; they are here to be compared with numbers that others published.
    `bradley_terry` is the estimate.

    Args:
        outcomes: (policy, other policy, outcome of the first in [0, 1]).
        policies: How many there are.
    """
    ratings = [start] * policies
    for one, other, outcome in outcomes:
        change = k * (outcome - 1 / (1 + 10 ** ((ratings[other] - ratings[one]) / 400)))
        ratings[one] += change
        ratings[other] -= change
    return ratings


def _preferences(preference: Array) -> Array:
    values = np.asarray(preference, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise InputError("win rate: there is no comparison")
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("win rate: a preference is outside [0, 1]", allowed="1 win, 0.5 tie, 0 loss; no invalid ones")
    return values
