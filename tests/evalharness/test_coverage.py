"""What the statistics promise, by simulation with known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psacpo.evalharness.statistics.bootstrap import bootstrap_weights
from psacpo.evalharness.statistics.bounds import betting_p, binomial_p, fixed_sequence
from psacpo.evalharness.statistics.tails import weighted_cvars

RATIOS = np.linspace(0, 1, 21)


@pytest.mark.slow
def test_intervals_of_means_differences_and_win_rates_cover() -> None:
    """1,000 runs of 80 clusters of 1 to 4 prompts that share much of their score: 93 to 97 % of the 95 % intervals hold."""
    generator = np.random.default_rng(0)
    runs, clusters = 1000, 80
    weights = bootstrap_weights(clusters, 800, 0)
    sizes = generator.integers(1, 5, size=(runs, clusters))
    hits: dict[str, int] = dict.fromkeys(["mean", "difference", "win rate", "rows apart"], 0)
    for own in sizes:
        owner = np.repeat(np.arange(clusters), own)
        shared = generator.normal(size=clusters)[owner]
        one = shared + generator.normal(size=len(owner))
        other = shared + 0.4 + generator.normal(size=len(owner))
        total = weights @ own

        def interval(values: np.ndarray, owner: np.ndarray = owner, total: np.ndarray = total) -> Any:
            sums = np.bincount(owner, values, minlength=clusters)
            return np.quantile(weights @ sums / total, [0.025, 0.975])

        # other - one is normal with mean .4 and variance 2.
        truths = {"mean": (one, 0.0), "difference": (other - one, 0.4), "win rate": ((other > one) * 1.0, 0.61135)}
        for name, (values, truth) in truths.items():
            low, high = interval(values)
            hits[name] += low <= truth <= high
        half = 1.96 * one.std() / np.sqrt(len(one))
        hits["rows apart"] += abs(one.mean()) <= half
    for name in ("mean", "difference", "win rate"):
        assert 0.93 <= hits[name] / runs <= 0.97, (name, hits)
    # Rows taken for independent: the intervals are far too short.
    assert hits["rows apart"] / runs < 0.88


@pytest.mark.slow
def test_intervals_of_tails_cover_where_the_tail_has_rows_enough() -> None:
    """CVaR 10 % of 300 x 4 normal scores with a prompt's share: 120 rows in the tail."""
    generator = np.random.default_rng(1)
    runs, prompts, samples = 300, 300, 4
    weights = bootstrap_weights(prompts, 300, 0)
    owner = np.repeat(np.arange(prompts), samples)
    # A normal of sd s has CVaR s * phi(z) / .1 with z its 90 % quantile.
    truth = np.sqrt(2) * np.exp(-(1.2815516**2) / 2) / np.sqrt(2 * np.pi) / 0.1
    hits = 0
    for _ in range(runs):
        scores = generator.normal(size=prompts)[owner] + generator.normal(size=len(owner))
        low, high = np.quantile(weighted_cvars(scores, owner, weights, [0.1])[0], [0.025, 0.975])
        hits += low <= truth <= high
    assert 0.90 <= hits / runs <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "samples"), [(200, 1), (120, 4)])
def test_the_chosen_ratio_breaks_the_limit_in_at_most_a_twentieth_of_1000_sweeps(prompts: int, samples: int) -> None:
    """21 ratios, true unsafe rate falling from 18 to 2 %, limit 10 %: the walk, and the best-looking ratio."""
    generator = np.random.default_rng(2)
    true = 0.18 - 0.16 * RATIOS
    limit, sweeps = 0.1, 1000
    broken, naive, chosen = 0, 0, 0
    for _ in range(sweeps):
        # The same prompts at every ratio; a prompt's own rate is beta distributed about the true one.
        difficulty = generator.random((prompts, 1))
        rates = np.clip(true[:, None, None] * 2 * difficulty[None], 0, 1)
        events = generator.random((len(RATIOS), prompts, samples)) < rates
        means = events.mean(axis=(1, 2))
        looks = np.flatnonzero(means <= limit)
        naive += bool(len(looks)) and true[looks[0]] > limit
        passes = []
        for own in events[::-1]:
            p = binomial_p(int(own.sum()), prompts, limit) if samples == 1 else betting_p(own.mean(axis=1), limit)
            passes.append(p <= 0.05)
            if not passes[-1]:
                break
        certified = sum(fixed_sequence(passes))
        if certified:
            chosen += 1
            broken += true[len(RATIOS) - certified] > limit
    assert broken / sweeps <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / sweeps)
    assert naive / sweeps > 0.35
    assert chosen / sweeps > 0.99
