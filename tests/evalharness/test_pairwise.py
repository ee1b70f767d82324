"""Win rates, length adjustment, Bradley-Terry and Elo against hand-worked values and other people's code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from psacpo.errors import InputError
from psacpo.evalharness.statistics.pairwise import (
    bradley_terry,
    elo,
    length_adjusted_win_rate,
    length_adjusted_win_rates,
    win_rate,
)

CHOIX = Path(__file__).parents[1] / "data" / "choix"


def test_a_win_rate_by_hand() -> None:
    # Squared deviations from .65: .1225 + .4225 + .0225 + .1225 + .01 = .70, over 4 is .175, over 5 rows is .035.
    found = win_rate(np.array([1, 0, 0.5, 1, 0.75]))
    assert found.mean == pytest.approx(0.65)
    assert found.standard_error == pytest.approx(math.sqrt(0.035))
    assert (found.wins, found.losses, found.ties, found.n) == (3, 1, 1, 5)
    assert found.discrete == pytest.approx(0.7)
    assert win_rate(np.array([1.0])).standard_error is None


@pytest.mark.parametrize("bad", [[], [1.5], [0.5, math.nan], [-0.1]])
def test_what_is_no_preference_is_refused(bad: list[float]) -> None:
    with pytest.raises(InputError, match="win rate"):
        win_rate(np.array(bad))


def test_a_length_adjusted_win_rate_by_hand() -> None:
    # Longer by 1 in half of the rows, shorter by 1 in the others: tanh(+-1), and the two rates fix the line.
    # Wins .9 when longer, .5 when shorter: a = (logit .9 + logit .5) / 2 = ln(9) / 2, so the odds are 3.
    n = 20_000
    preference = np.concatenate([np.full(n, 0.9), np.full(n, 0.5)])
    delta = np.concatenate([np.ones(n), -np.ones(n)])
    assert length_adjusted_win_rate(preference, delta)[0] == pytest.approx(0.75, abs=1e-5)
    # The unit of length does not count, nor does length when all are as long.
    assert length_adjusted_win_rate(preference, delta * 37)[0] == pytest.approx(0.75, abs=1e-5)
    assert length_adjusted_win_rate(preference, np.zeros(2 * n))[0] == pytest.approx(0.7, abs=1e-5)
    assert length_adjusted_win_rate(np.ones(50), np.arange(50.0))[0] > 0.9


def test_length_adjustment_is_the_likeliest_fit_in_every_draw() -> None:
    draw = np.random.default_rng(3)
    n, k = 300, 4
    policy = np.arange(n) % k
    delta = draw.normal(40 * policy, 60)
    truth = np.array([-1.0, 0.0, 0.7, 2.5])
    preference = (draw.random(n) < expit(truth[policy] + 1.5 * np.tanh(delta / 60))).astype(float)
    weights = draw.multinomial(n, np.full(n, 1 / n), size=3).astype(float)
    weights[2, policy == 1] = 0
    found = length_adjusted_win_rates(preference, delta, policy, weights)
    x = np.tanh(delta / np.array([delta[policy == i].std() for i in range(k)])[policy])
    for row, drawn in enumerate(weights):

        def lost(t: Any, drawn: Any = drawn) -> float:
            eta = t[policy] + t[k] * x
            return float((drawn * (np.logaddexp(0, eta) - preference * eta)).sum() + 0.005 * (t**2).sum())

        best = minimize(lost, np.zeros(k + 1), method="BFGS", options={"gtol": 1e-7}).x[:k]
        there = ~np.isnan(found[row])
        assert there.tolist() == [drawn[policy == i].sum() > 0 for i in range(k)]
        np.testing.assert_allclose(found[row][there], expit(best)[there], atol=1e-5)
    assert np.isnan(found[2, 1])


def table(data: list[list[int]], k: int) -> Any:
    wins = np.zeros((k, k))
    for winner, loser in data:
        wins[winner, loser] += 1
    return wins


@pytest.mark.parametrize("case", ["testcase-pairwise-1.json", "testcase-pairwise-2.json"])
def test_bradley_terry_is_that_of_choix(case: str) -> None:
    given = json.loads((CHOIX / case).read_text())
    found = bradley_terry(table(given["data"], given["n_items"]))
    np.testing.assert_allclose(found.log_strength, given["ml_est"], atol=1e-8)
    assert found.tie is None


def test_bradley_terry_with_ties_by_hand() -> None:
    # Two policies, 12 wins, 3 losses, 6 ties: p_1 / p_2 = 12 / 3, nu = 6 / sqrt(12 * 3) = 1.
    wins, ties = np.array([[0, 12], [3, 0]]), np.array([[0, 6], [6, 0]])
    found = bradley_terry(wins, ties)
    np.testing.assert_allclose(found.log_strength, [math.log(4) / 2, -math.log(4) / 2], atol=1e-8)
    assert found.tie == pytest.approx(0, abs=1e-8)
    # Each tie as half a win of both: 15 to 6.
    half = bradley_terry(wins, ties, davidson=False)
    np.testing.assert_allclose(half.log_strength, [math.log(2.5) / 2, -math.log(2.5) / 2], atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_the_likeliest_strengths_expect_what_was_seen(seed: int, k: int, davidson: bool) -> None:
    draw = np.random.default_rng(seed)
    wins = draw.integers(1, 9, (k, k)).astype(float)
    ties = draw.integers(1, 9, (k, k)).astype(float)
    np.fill_diagonal(wins, 0)
    ties = np.triu(ties, 1) + np.triu(ties, 1).T
    found = bradley_terry(wins, ties, davidson=davidson)
    p, nu = np.exp(found.log_strength), math.exp(found.tie) if found.tie is not None else 0.0
    between = nu * np.sqrt(np.outer(p, p))
    total = p[:, None] + p[None] + between
    n = wins + wins.T + ties
    expected = (n * (p[:, None] + between / 2) / total).sum(axis=1)
    np.testing.assert_allclose(expected, (wins + ties / 2).sum(axis=1), atol=1e-6)
    if davidson:
        assert (n * between / total).sum() == pytest.approx(ties.sum(), abs=1e-6)


def test_strengths_that_are_not_finite_are_refused() -> None:
    wins = table([[0, 1], [1, 2]], 3)
    with pytest.raises(InputError, match="no finite strength fits; allowed: a prior over 0"):
        bradley_terry(wins)
    assert (np.diff(bradley_terry(wins, prior=0.1).log_strength) < 0).all()
    with pytest.raises(InputError, match="ties are not symmetric"):
        bradley_terry(wins, table([[0, 1]], 3))


def test_elo_by_hand() -> None:
    assert elo([(0, 1, 1.0)], 2) == [1216.0, 1184.0]
    # The second expects 1 / (1 + 10 ** (32 / 400)) = .454078 and wins: 1184 + 32 * .545922.
    assert elo([(0, 1, 1.0), (1, 0, 1.0)], 2) == pytest.approx([1198.5305, 1201.4695], abs=1e-4)
    assert elo([(0, 1, 0.5)], 3) == [1200.0, 1200.0, 1200.0]
