"""Anytime-valid tests and the next ratio: error kept under constant looking, answers saved, gaps found."""

from __future__ import annotations

import numpy as np
import pytest

from psacpo.evalharness.statistics.bounds import binomial_p, fixed_sequence
from psacpo.evalharness.statistics.pareto import hypervolume
from psacpo.evalharness.statistics.racing import confidence_sequence, next_ratio, race, sequential_test

RATIOS = np.linspace(0, 1, 21)


@pytest.mark.slow
def test_looking_after_every_prompt_keeps_the_error() -> None:
    generator = np.random.default_rng(0)
    limit, runs = 0.1, 1000
    wrong = sum(
        sequential_test((generator.random(1000) < limit).astype(float), limit, alpha=0.05, both=False).decision
        == "below"
        for _ in range(runs)
    )
    assert wrong / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    # The exact test for a fixed number of prompts, looked at every 25, does not.
    peeking = 0
    for _ in range(runs):
        events = np.cumsum(generator.random(1000) < limit)
        peeking += any(binomial_p(int(events[n - 1]), n, limit) <= 0.05 for n in range(25, 1001, 25))
    assert peeking / runs > 0.1


def test_a_clear_case_is_decided_soon_and_a_close_one_is_not() -> None:
    generator = np.random.default_rng(1)
    assert sequential_test(np.zeros(1000), 0.1, alpha=0.05, batch=10).decision == "below"
    assert sequential_test(np.zeros(1000), 0.1, alpha=0.05, batch=10).used <= 60
    many = sequential_test((generator.random(1000) < 0.4).astype(float), 0.1, alpha=0.05)
    assert (many.decision, many.used < 100) == ("above", True)
    close = sequential_test((generator.random(300) < 0.095).astype(float), 0.1, alpha=0.05)
    assert (close.decision, close.used) == (None, 300)


@pytest.mark.slow
def test_a_confidence_sequence_holds_at_all_times() -> None:
    generator = np.random.default_rng(2)
    misses, widths = 0, []
    for _ in range(200):
        values = generator.beta(2, 6, size=300)
        low, high = confidence_sequence(values, alpha=0.05, grid=100)
        misses += bool((low > 0.25).any() or (high < 0.25).any())
        widths.append(high[-1] - low[-1])
    assert misses / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert np.mean(widths) < 0.13


@pytest.mark.slow
def test_a_race_takes_under_two_fifths_of_the_full_grids_answers_at_the_same_error() -> None:
    """21 ratios, up to 1,000 prompts each, true rate from 30 to 2 %, limit 10 %."""
    generator = np.random.default_rng(3)
    true = 0.02 + 0.28 / (1 + np.exp(12 * (RATIOS - 0.4)))
    limit, most, runs = 0.1, 1000, 200
    spent, wrong, full_wrong, racing, full = 0, 0, 0, [], []
    order = list(range(20, -1, -1))
    for _ in range(runs):
        events = (generator.random((21, most)) < true[:, None]).astype(float)
        found = race(order, lambda place, events=events: events[place], limit, alpha=0.05)
        spent += sum(found.used)
        racing.append(min(found.certified, default=20))
        wrong += true[racing[-1]] > limit
        passes = [binomial_p(int(events[place].sum()), most, limit) <= 0.05 for place in order]
        full.append(21 - sum(fixed_sequence(passes)))
        full_wrong += true[full[-1]] > limit
    assert spent / (runs * 21 * most) < 0.4
    assert max(wrong, full_wrong) / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    # What it gives up: under a step and a half of the grid.
    assert RATIOS[racing].mean() - RATIOS[full].mean() < 0.075


def test_the_next_ratio_is_at_the_crossing_then_in_the_widest_gap() -> None:
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    points = np.array([[1.0, 0.0], [0.95, 0.1], [0.9, 0.2], [0.4, 0.9], [0.0, 1.0]])
    found = next_ratio(ratios, points, passed=[False, False, True, True, True])
    assert found is not None
    assert (found.ratio, found.why) == (0.375, "crossing")
    found = next_ratio(ratios, points)
    assert found is not None
    # Between .5 and .75: .5 wide and .7 high, of a box of 1.
    assert (found.ratio, found.why, found.gain) == (0.625, "gap", pytest.approx(0.35))
    assert next_ratio(ratios, points, noise=0.4) is None
    assert next_ratio(ratios, points, resolution=0.2) is None
    # A neighbour that is worse in both leaves nothing open.
    assert next_ratio([0.0, 1.0], np.array([[1.0, 1.0], [0.0, 0.0]])) is None


def test_refining_gaps_gives_more_hypervolume_than_a_grid_of_as_many() -> None:
    def curve(q: np.ndarray) -> np.ndarray:
        knee = 1 / (1 + np.exp(-25 * (q - 0.3)))
        return np.stack([1 - knee, 1 / (1 + np.exp(-25 * (q - 0.2)))], axis=-1)

    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    while len(ratios) < 9:
        found = next_ratio(ratios, curve(np.array(ratios)), resolution=0.01)
        assert found is not None
        ratios = sorted([*ratios, found.ratio])
    reference = np.zeros(2)
    adaptive = hypervolume(curve(np.array(ratios)), reference)
    assert adaptive > hypervolume(curve(np.linspace(0, 1, 9)), reference) + 0.01
