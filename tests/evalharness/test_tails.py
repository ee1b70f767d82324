"""Tails against hand-worked values, brute force over subsets, and the definition of CVaR."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from psacpo.evalharness.statistics.bootstrap import bootstrap_weights
from psacpo.evalharness.statistics.tails import cvar, prompt_cvars, weighted_cvars, worst_of


def test_cvar_by_hand() -> None:
    # The worst 30 % of 5 values is 1.5 of them: 10 and half of 4.
    values = np.array([1.0, 10.0, 4.0, 2.0, 3.0])
    assert cvar(values, 0.3) == pytest.approx((10 + 0.5 * 4) / 1.5)
    assert cvar(values, 0.2) == 10.0
    assert cvar(values, 0.01) == 10.0
    assert cvar(np.array([1.0, np.nan, 3.0]), 0.5) == 3.0
    assert np.isnan(cvar(np.array([np.nan]), 0.5))
    np.testing.assert_allclose(
        prompt_cvars(np.array([[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan]]), 0.5), [3, 5, np.nan]
    )


def test_cvar_is_the_least_of_rockafellar_and_uryasevs_means() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=200)
    for share in (0.01, 0.07, 0.5, 0.99):
        edges = values[:, None] + np.maximum(values[None, :] - values[:, None], 0) / share
        assert cvar(values, share) == pytest.approx(edges.mean(axis=1).min())


def test_a_draws_cvar_is_that_of_the_rows_it_holds() -> None:
    generator = np.random.default_rng(1)
    values, owner = generator.normal(size=300), generator.integers(0, 20, size=300)
    weights = bootstrap_weights(20, 50, 0)
    found = weighted_cvars(values, owner, weights, [0.1, 0.013])
    for draw, drawn in enumerate(weights):
        rows = np.repeat(values, drawn[owner].astype(int))
        assert found[:, draw] == pytest.approx([cvar(rows, 0.1), cvar(rows, 0.013)])
    # A few clusters hold the whole tail: as deep as it takes.
    heavy = np.where(owner == 3, 10.0, 0.0)
    one = np.zeros((1, 20))
    one[0, 3] = 20
    assert weighted_cvars(heavy, owner, one, [0.5])[0, 0] == 10.0
    assert np.isnan(weighted_cvars(values[owner != 3], owner[owner != 3], one, [0.5])).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_worst_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    generator = np.random.default_rng(2)
    values = generator.normal(size=(4, 5))
    values[1, 2] = np.nan
    values[2, :3] = np.nan
    events = np.where(np.isnan(values), np.nan, (values > 0).astype(float))
    found, chance = worst_of(values, n), worst_of(events, n)
    for row, own in enumerate(values):
        known = own[~np.isnan(own)]
        if len(known) < n:
            assert np.isnan(found[row])
            continue
        subsets = list(combinations(known, n))
        assert found[row] == pytest.approx(np.mean([max(subset) for subset in subsets]))
        # With 0 and 1 it is 1 - C(safe, n) / C(m, n), the estimator of pass@k.
        assert chance[row] == pytest.approx(np.mean([max(subset) > 0 for subset in subsets]))
