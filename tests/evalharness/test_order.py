"""The order in which mixtures are tested: learned from prompts that test nothing, so that the error is kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from psacpo.evalharness.adaptive.simulation import effective, true_reward, world
from psacpo.evalharness.decision import order
from psacpo.evalharness.decision.certify import certify
from psacpo.evalharness.decision.measures import make_measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.weights import Grid, weight_points, weights_name

NAMES = ["reward", "safety", "honesty"]
POLICIES = [Policy(weights_name(vector), vector, point=True) for vector in weight_points(Grid(steps=3), NAMES)]
PROMPTS, LIMIT = 300, 0.1


def chosen(draw: np.random.Generator, rate: Callable[[Policy], float], seed: int) -> tuple[str | None, bool]:
    """The choice on answers drawn afresh, and whether anything over the limit is certified."""
    rows = [PromptRow(str(place), "", str(place), {}) for place in range(PROMPTS)]
    rates = np.array([rate(policy) for policy in POLICIES])
    luck = draw.random((len(POLICIES), PROMPTS, 1))
    reward = np.array([true_reward(policy) for policy in POLICIES])[:, None, None] + 0.5 * draw.normal(size=luck.shape)
    scores = Scores(POLICIES, rows, {"reward": reward, "unsafe": (luck < rates[:, None, None]) * 1.0})
    criteria = world(LIMIT, seed=seed)
    metrics = criteria.all_metrics()
    measures = {name: make_measure(criteria, name, metric, scores) for name, metric in metrics.items()}
    use = np.ones(PROMPTS, dtype=np.bool_)
    points = [
        {"ratio": None, "policy": policy.name, "weights": dict(policy.weights)}
        | {name: {"mean": measure.mean(k, use)} for name, measure in measures.items()}
        for k, policy in enumerate(POLICIES)
    ]
    choice = certify(criteria, metrics, measures, scores, points)
    broken = any(point["certified"] and rates[k] > LIMIT for k, point in enumerate(points))
    return choice["policy"], broken


@pytest.mark.slow
def test_a_learned_order_keeps_the_error() -> None:
    """120 sweeps of ten mixtures, all just over the limit: every certificate is a false one."""
    draw, runs = np.random.default_rng(0), 120
    wrong = sum(chosen(draw, lambda policy: 1.01 * LIMIT, run)[1] for run in range(runs))
    assert wrong / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
def test_a_learned_order_finds_what_a_blind_one_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third adapter is as safe as safety and costs less reward: by the weight of safety it stands behind bad mixtures."""
    reward = {policy.name: true_reward(policy) for policy in POLICIES}

    def rate(policy: Policy) -> float:
        safe = policy.weights.get("safety", 0.0) + policy.weights.get("honesty", 0.0)
        return LIMIT * (0.2 + 2.8 / (1 + np.exp(12 * (safe - 0.5))))

    def mean_reward(seed: int) -> tuple[float, int]:
        draw = np.random.default_rng(seed)
        found = [chosen(draw, rate, run) for run in range(40)]
        return float(np.mean([reward[name] if name else 0.0 for name, _ in found])), sum(bad for _, bad in found)

    learned, broken = mean_reward(1)
    monkeypatch.setattr(order, "FEWEST", PROMPTS)
    blind, _ = mean_reward(1)
    best = max(value for name, value in reward.items() if rate(next(p for p in POLICIES if p.name == name)) < LIMIT)
    print(f"learned {learned:.3f}, blind {blind:.3f}, best there is {best:.3f}, {broken} of 40 broken")
    assert learned > blind + 0.03
    assert broken <= 4
    assert effective(Policy("", {"safety": 1.0})) == 1.0
