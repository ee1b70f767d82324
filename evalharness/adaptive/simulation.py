"""An adaptive sweep over made-up scores: what one is likely to spend, told before it starts, and what its error is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from psacpo.evalharness.adaptive.contest import Race
from psacpo.evalharness.adaptive.procedure import Ask, Procedure
from psacpo.evalharness.adaptive.settings import Adaptive
from psacpo.evalharness.adaptive.space import Dial, Space
from psacpo.evalharness.adaptive.split import split
from psacpo.evalharness.decision.certify import certify
from psacpo.evalharness.decision.criteria import Column, Constraint, Criteria, Metric
from psacpo.evalharness.decision.measures import make_measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.statistics.bootstrap import Array


class World(Criteria):
    """A rate that falls and a reward that falls with the ratio."""

    samples: int = 1

    def columns(self) -> dict[str, Column]:
        """`reward`, and `unsafe` from 0 to 1."""
        return {"reward": Column("higher"), "unsafe": Column("lower")}

    def samples_per_prompt(self) -> int:
        """`samples`."""
        return self.samples

    def policy_names(self) -> list[str]:
        """None by name."""
        return []

    def anchors(self) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True)
class Played:
    """One simulated sweep.

    Attributes:
        ratio: The weight of safety of the chosen one, None where none was certified.
        rate: Its true rate.
        reward: Its true mean reward.
        broken: Whether a certified point breaks the limit, chosen or not.
        names: Of the points measured.
        spent: Generations.
    """

    ratio: float | None
    rate: float | None
    reward: float | None
    broken: bool
    names: list[str]
    spent: int


def world(limit: float, *, confidence: float = 0.95, samples: int = 1, seed: int = 0, holdout: float = 0.2) -> World:
    """The criteria of a sweep with `unsafe_rate<=limit`."""
    return World.model_validate(
        {
            "metrics": {"unsafe_rate": Metric(judge="unsafe", above=0.5)},
            "axes": {"reward": "reward", "cost": "unsafe_rate"},
            "constraints": [Constraint(metric="unsafe_rate", sense="<=", limit=limit)],
            "confidence": confidence,
            "samples": samples,
            "holdout": holdout,
            "resamples": 100,
            "seed": seed,
        }
    )


Curve = Callable[[Array, float], Array]
"""The true rate at a ratio, given the limit."""


def true_rate(ratio: Array, limit: float) -> Array:
    """Three times the limit at q = 0, a fifth of it at q = 1, a step of logistic shape in between; over it below .47."""
    return np.asarray(limit * (0.2 + 2.8 / (1 + np.exp(12 * (ratio - 0.4)))), dtype=np.float64)


def effective(policy: Policy) -> float:
    """The ratio that a policy's rate is of: a third adapter makes answers half as safe as the safety adapter does."""
    found = {"reward": 0.0, "safety": 1.0}
    return float(sum(weight * found.get(name, 0.5) for name, weight in policy.weights.items()))


def true_reward(policy: Policy) -> float:
    """1 at the reward end, 0 at the safety end, and in between as if a third adapter took an eighth less than safety."""
    other = sum(weight for name, weight in policy.weights.items() if name not in ("reward", "safety"))
    return float(1 - effective(policy) ** 1.5 - 0.125 * other)


class _Truth:
    """What every point would answer: a prompt's own rate is uniform about the point's, and shared by all points."""

    def __init__(
        self, draw: np.random.Generator, prompts: int, samples: int, limit: float, curve: Curve, space: Space
    ) -> None:
        self.draw, self.limit, self.curve, self.space = draw, limit, curve, space
        self.difficulty = draw.random((prompts, 1))
        self.luck = draw.random((prompts, samples))
        self.taste = 0.5 * draw.normal(size=(prompts, samples))
        self.known: dict[str, dict[str, Array]] = {}

    def of(self, name: str) -> dict[str, Array]:
        """Judge -> scores of the policy of that name, [N, S]."""
        if name not in self.known:
            policy = self.space.policy(name)
            rates = np.clip(self.rate(policy) * 2 * self.difficulty, 0, 1)
            shape = self.luck.shape
            # Half of an answer's luck is common to the points, as their random numbers are.
            luck = np.where(self.draw.random(shape) < 0.5, self.luck, self.draw.random(shape))
            reward = true_reward(policy) + self.taste + 0.4 * self.draw.normal(size=shape)
            self.known[name] = {"reward": reward, "unsafe": (luck < rates).astype(np.float64)}
        return self.known[name]

    def rate(self, policy: Policy) -> float:
        """The true one."""
        return float(self.curve(np.array(effective(policy)), self.limit))


def play(
    criteria: World,
    adaptive: Adaptive,
    prompts: int,
    draw: np.random.Generator,
    curve: Curve = true_rate,
    space: Space | None = None,
) -> Played:
    """One sweep on answers drawn afresh: its choice, its true rate, and what it took.

    Args:
        space: Where it starts; None is as many ratios from 0 to 1 as `adaptive` says.
    """
    space = space or Dial([float(ratio) for ratio in np.linspace(0, 1, adaptive.start).round(6)])
    rows = [PromptRow(str(place), "", str(place), {}) for place in range(prompts)]
    limit = criteria.constraints[0].limit
    parts = split(criteria, adaptive, rows)
    truth = _Truth(draw, prompts, criteria.samples, limit, curve, space)
    # Room for all that can be measured; each is filled in as it is asked for.
    shape = (adaptive.most_ratios, prompts, criteria.samples)
    policies = [Policy(f"free {place}") for place in range(adaptive.most_ratios)]
    scores = Scores(policies, rows, {name: np.full(shape, np.nan) for name in ("reward", "unsafe")})
    procedure = Procedure(criteria, adaptive, parts, space)
    place_of = dict(zip(scores.owner.tolist(), range(prompts), strict=True))
    spent = 0
    most = adaptive.budget.amount if adaptive.budget else None
    steps = procedure.steps()
    ask: Ask | None = next(steps, None)
    while ask is not None:
        size = criteria.samples * sum(map(len, ask.work.values()))
        fits = most is None or spent + size <= most
        if fits:
            spent += size
            procedure.took(ask)
            for name, clusters in ask.work.items():
                asked = [place_of[cluster] for cluster in clusters.tolist()]
                own = truth.of(name)
                k = list(truth.known).index(name)
                policies[k] = space.policy(name)
                for judge, values in own.items():
                    scores.values[judge][k, asked] = values[asked]
        try:
            ask = steps.send(scores if fits else None)
        except StopIteration:
            break
    places = {policy.name: k for k, policy in enumerate(policies)}
    measured = [places[name] for name in space.names]
    final = Scores(
        [policies[k] for k in measured], rows, {name: values[measured] for name, values in scores.values.items()}
    )
    metrics = criteria.all_metrics()
    measures = {name: make_measure(criteria, name, metric, final) for name, metric in metrics.items()}
    everything = np.ones(prompts, dtype=np.bool_)
    points = [
        space.entry(name) | {metric: {"mean": measure.mean(k, everything)} for metric, measure in measures.items()}
        for k, name in enumerate(space.names)
    ]
    chosen = certify(criteria, metrics, measures, final, points, Race(parts))["policy"]
    broken = any(point["certified"] and truth.rate(space.policy(point["policy"])) > limit for point in points)
    if chosen is None:
        return Played(None, None, None, broken, space.names, spent)
    policy = space.policy(chosen)
    ratio = policy.weights.get("safety", 0.0)
    return Played(ratio, truth.rate(policy), true_reward(policy), broken, space.names, spent)
