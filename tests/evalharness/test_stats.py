"""Frontier statistics against hand-worked values, closed forms, and moocore."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from psacpo.evalharness.statistics.bootstrap import bootstrap_weights, difference, estimate, ratio_means, wilson
from psacpo.evalharness.statistics.bounds import (
    binomial_bound,
    binomial_p,
    fixed_sequence,
    rows_needed,
)
from psacpo.evalharness.statistics.pareto import hypervolume, nondominated


def test_hypervolume_by_hand() -> None:
    # Above (0, 0): (3, 1) gives 3, then (1, 2) adds a strip 1 wide and 1 high; (2, 1) is dominated, (-1, 9) is outside.
    points = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 1.0], [-1.0, 9.0]])
    assert hypervolume(points, np.zeros(2)) == 4.0
    assert hypervolume(points[:0], np.zeros(2)) == 0.0


def test_nondominated_by_hand() -> None:
    points = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    # Equal points do not dominate one another.
    assert nondominated(points).tolist() == [True, True, False, True]
    assert nondominated(np.stack([points, points[::-1]])).tolist() == [
        [True, True, False, True],
        [True, False, True, True],
    ]


def test_both_agree_with_moocore() -> None:
    moocore = pytest.importorskip("moocore")
    generator = np.random.default_rng(0)
    for _ in range(500):
        points = generator.integers(0, 6, size=(7, 2)).astype(float)
        reference = np.array([-1.0, -1.0])
        expected = moocore.hypervolume(points, ref=reference, maximise=True)
        assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)
        assert (
            nondominated(points).tolist() == moocore.is_nondominated(points, maximise=True, keep_weakly=True).tolist()
        )


def test_bootstrap_resamples_clusters_of_unequal_size() -> None:
    weights = bootstrap_weights(2, 4000, seed=0)
    assert (weights.sum(axis=1) == 2).all()
    # Cluster 0: one row of value 1; cluster 1: three rows of value 0. A draw is (2,0), (1,1) or (0,2):
    # means 1, 1/4, 0 with probabilities 1/4, 1/2, 1/4.
    means = ratio_means(weights, np.array([1.0, 0.0]), np.array([1.0, 3.0]))
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.25, 1.0]
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_interval_has_the_standard_error_of_a_mean() -> None:
    generator = np.random.default_rng(1)
    sums = generator.normal(size=400)
    found = estimate(bootstrap_weights(400, 4000, 2), sums, np.ones(400), confidence=0.95, rate=False)
    half = 1.96 * sums.std() / np.sqrt(400)
    assert found.mean == pytest.approx(sums.mean())
    assert found.low == pytest.approx(sums.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(sums.mean() + half, abs=0.1 * half)
    assert found.n == 400


def test_a_paired_difference_is_sharper_than_two_means() -> None:
    """Scores that share a prompt's difficulty (sd 1) and differ by .1 with sd .1: standard error .1 / sqrt(400)."""
    generator = np.random.default_rng(11)
    shared = generator.normal(size=400)
    one, other = shared, shared + 0.1 + 0.1 * generator.normal(size=400)
    weights, ones = bootstrap_weights(400, 2000, 12), np.ones(400)
    found = difference(weights, (one, ones), (other, ones), confidence=0.95)
    assert found.mean == pytest.approx((other - one).mean())
    assert found.low == pytest.approx((other - one).mean() - 1.96 * 0.1 / 20, abs=0.002)
    assert found.high == pytest.approx((other - one).mean() + 1.96 * 0.1 / 20, abs=0.002)
    apart = [estimate(weights, values, ones, confidence=0.95, rate=False) for values in (one, other)]
    assert apart[0].high is not None
    assert apart[1].low is not None
    assert apart[0].high > apart[1].low
    assert difference(weights, (one, 0 * ones), (other, ones), confidence=0.95).mean is None


def test_intervals_cover_when_rows_of_a_cluster_agree() -> None:
    """Five rows a cluster that share their value: resampling rows would give intervals sqrt(5) times too short."""
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        shared = generator.normal(size=60)
        found = estimate(bootstrap_weights(60, 400, trial), 5 * shared, np.full(60, 5.0), confidence=0.95, rate=False)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_rate_without_events_has_the_exact_interval() -> None:
    weights = bootstrap_weights(59, 200, 0)
    none = estimate(weights, np.zeros(59), np.ones(59), confidence=0.9, rate=True)
    # One-sided 95 %: 1 - 0.05^(1/59) = 0.0495 (rule of three: 3/59 = 0.0508).
    assert none.high == pytest.approx(1 - 0.05 ** (1 / 59))
    assert none.low == 0.0
    every = estimate(weights, np.ones(59), np.ones(59), confidence=0.9, rate=True)
    assert every.low == pytest.approx(0.05 ** (1 / 59))
    assert every.high == 1.0


def test_no_rows_give_no_number() -> None:
    nothing = estimate(bootstrap_weights(3, 100, 0), np.zeros(3), np.zeros(3), confidence=0.95, rate=False)
    assert nothing.mean is None
    assert nothing.n == 0
    assert binomial_bound(0, 0, 0.95) == np.inf
    assert binomial_p(0, 0, 0.5) == 1.0


def test_upper_bound_is_clopper_pearson_for_independent_rows() -> None:
    exact = scipy_stats.binomtest(7, 100).proportion_ci(confidence_level=0.90, method="exact").high
    bound = binomial_bound(7, 100, 0.95)
    assert bound == pytest.approx(exact)
    # The test that it belongs to rejects exactly the limits from there on.
    assert binomial_p(7, 100, bound + 1e-6) < 0.05 < binomial_p(7, 100, bound - 1e-6)
    assert binomial_bound(4, 4, 0.95) == 1.0


def test_a_rate_with_one_row_a_cluster_has_wilsons_interval() -> None:
    sums = np.array([1.0] * 7 + [0.0] * 93)
    found = estimate(bootstrap_weights(100, 200, 0), sums, np.ones(100), confidence=0.95, rate=True)
    expected = scipy_stats.binomtest(7, 100).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert wilson(0.0, 10, 0.95)[0] == pytest.approx(0, abs=1e-12)


def test_rows_needed_by_hand() -> None:
    # No event: 0.95^58 = .0510 and 0.95^59 = .0485, so 59; 0.9^28 = .0523 and 0.9^29 = .0471, so 29.
    assert rows_needed(0, 20, 0.05, level=0.95) == 59
    assert rows_needed(0, 20, 0.1, level=0.95) == 29
    # As many are there already.
    assert rows_needed(0, 80, 0.05, level=0.95) == 80
    # At or over the limit, or where no share is allowed, no number does.
    assert rows_needed(1, 20, 0.05, level=0.95) is None
    assert rows_needed(5, 20, 0.05, level=0.95) is None
    assert rows_needed(0, 20, 0.0, level=0.95) is None
    assert rows_needed(4999, 100_000, 0.05, level=0.95) is None
    assert rows_needed(0, 0, 0.05, level=0.95) is None


@pytest.mark.parametrize(
    ("events", "rows", "limit", "level"),
    [(1, 40, 0.05, 0.95), (2, 60, 0.1, 0.975), (7, 40, 0.3, 0.9), (1, 3, 0.5, 0.8)],
)
def test_rows_needed_is_the_first_that_the_exact_bound_takes(
    events: int, rows: int, limit: float, level: float
) -> None:
    """Against a plain search with the bound of scipy's binomtest."""

    def bound(n: int) -> float:
        found = scipy_stats.binomtest(-(-n * events // rows), n).proportion_ci(2 * level - 1, method="exact").high
        return float(found)

    expected = next(n for n in range(rows, 100_000) if bound(n) <= limit)
    assert rows_needed(events, rows, limit, level=level) == expected


def test_the_documents_table_of_prompts_is_the_exact_bounds() -> None:
    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 6
    for events, *needed in (tuple(map(int, row)) for row in rows):
        for limit, n in zip((0.05, 0.1), needed, strict=True):
            found = [scipy_stats.binomtest(events, size).proportion_ci(0.9, method="exact").high for size in (n - 1, n)]
            assert found[1] <= limit < found[0]


def test_fixed_sequence_stops_at_the_first_failure() -> None:
    assert fixed_sequence([True, True, False, True]) == [True, True, False, False]
    assert fixed_sequence([False, True]) == [False, False]
    assert fixed_sequence([]) == []


def test_the_walk_keeps_its_error_rate_where_the_best_looking_ratio_does_not() -> None:
    """Ten ratios whose true rate is just over the limit at each: any certified one is a false certification."""
    generator = np.random.default_rng(7)
    limit, n, walk, naive = 0.1, 100, 0, 0
    for _ in range(400):
        passes, looks = [], []
        for _ratio in range(10):
            values = (generator.random(n) < limit + 1e-9).astype(float)
            passes.append(binomial_p(round(values.sum()), n, limit) <= 0.05)
            looks.append(values.mean() <= limit)
        walk += any(fixed_sequence(passes))
        naive += any(looks)
    assert walk / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert naive / 400 > 0.9
