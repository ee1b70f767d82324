"""The adaptive sweep's promises, by simulation of its whole decision procedure with known truth."""

from __future__ import annotations

import numpy as np
import pytest

from psacpo.evalharness.adaptive.settings import Adaptive
from psacpo.evalharness.adaptive.simulation import play, world
from psacpo.evalharness.statistics.bounds import binomial_p, fixed_sequence

RATIOS = np.linspace(0, 1, 21)


def near_the_limit(ratio: np.ndarray, limit: float) -> np.ndarray:
    """Over the limit by a hundredth of it, whatever the ratio: every certificate is a false one."""
    return np.full_like(ratio, 1.01 * limit, dtype=np.float64)


@pytest.mark.slow
def test_at_most_a_twentieth_of_200_sweeps_certify_what_breaks_the_limit() -> None:
    """The worst case, all ratios just over the limit; each is looked at after every 20 prompts."""
    draw, runs = np.random.default_rng(0), 200
    adaptive = Adaptive(start=3, most_ratios=5, resolution=0.1, batch=20)
    wrong = sum(play(world(0.2, seed=run), adaptive, 150, draw, near_the_limit).broken for run in range(runs))
    assert wrong / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
def test_an_adaptive_sweep_takes_under_two_fifths_of_the_grids_answers_at_the_same_error() -> None:
    """60 sweeps of up to 500 prompts, limit 10 %, against a grid of 21 ratios that each answer all prompts."""
    draw, runs, prompts, limit = np.random.default_rng(1), 60, 500, 0.1
    shares, same, chosen, broken = [], [], [], 0
    for run in range(runs):
        found = play(world(limit, seed=run), Adaptive(batch=50), prompts, draw)
        shares.append(found.spent / (21 * prompts))
        same.append(found.spent / (len(found.names) * prompts))
        chosen.append(1.0 if found.ratio is None else found.ratio)
        broken += found.broken
    assert broken / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert np.mean(shares) < 0.4
    # Also under two fifths of what the very ratios that it measured would take in full.
    assert np.mean(same) < 0.4
    # The full grid, with the exact test on all prompts but the held-out fifth.
    true = limit * (0.2 + 2.8 / (1 + np.exp(12 * (RATIOS - 0.4))))
    full, full_broken = [], 0
    for _ in range(runs):
        events = draw.binomial(round(0.8 * prompts), true)
        passes = [binomial_p(int(count), round(0.8 * prompts), limit) <= 0.05 for count in events[::-1]]
        place = min(20, 21 - sum(fixed_sequence(passes)))
        full.append(RATIOS[place])
        full_broken += true[place] > limit
    # The same error: that promised, and no more than the grid's but for chance.
    assert full_broken / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert (broken - full_broken) / runs <= 2 * np.sqrt(2 * 0.05 * 0.95 / runs)
    # What it gives up: 0.076 in 300 runs, half of it the power of tests that may be looked at, half that of fewer prompts
    # in them; the bound is that and chance, as the choices of 60 runs have a standard error of a hundredth.
    chance = 2 * np.sqrt((np.var(chosen) + np.var(full)) / runs)
    print(np.mean(shares), np.mean(same), np.mean(chosen), np.mean(full), chance, broken, full_broken)
    assert np.mean(chosen) - np.mean(full) < 0.08 + chance
