"""What an adaptive sweep may spend, has spent, and has saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.adaptive.procedure import Procedure
from psacpo.evalharness.adaptive.settings import account_lines
from psacpo.evalharness.adaptive.split import Split
from psacpo.evalharness.baseline_settings import mixtures, outsiders
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.generation import Plan
from psacpo.evalharness.prompts import Job
from psacpo.evalharness.records import Record
from psacpo.evalharness.statistics.bootstrap import Mask


class Books:
    """The account of one sweep, in generations and in tokens of prompts and answers.

    The budget is never passed: a request counts with `max_new_tokens` until its answer is there, and what the held-out
    prompts and the baselines that are models of their own will take is kept back.
    """

    def __init__(self, config: FrontierConfig, plan: Plan, parts: Split, shadows: Sequence[str]) -> None:
        assert config.adaptive is not None
        self.config, self.plan, self.adaptive = config, plan, config.adaptive
        self.budget = config.adaptive.budget
        self.generations: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.rounds = 0
        self.owner = Scores([], plan.prompts, {}).owner
        self.lengths = {job.row.id: len(job.request.prompt_ids) for job in plan.jobs}
        self.parts, self.shadows = parts, list(shadows)
        mixed = [name for name in mixtures(config.baselines) if name not in self.shadows]
        first = {*config.point_names(), *mixed, *self.shadows}
        self.design = self._cost(parts.design, len(first))
        held = self._cost(parts.held, 1 + len(self.shadows))
        others = self._cost(parts.design, len(outsiders(config.baselines)))
        self.reserve = held + others

    def prompts(self, clusters: Mask) -> int:
        """Prompts in some clusters, [C]."""
        return int(clusters[self.owner].sum())

    def _cost(self, clusters: Mask, policies: int) -> int:
        """At most, in the budget's unit."""
        rows = [row for row, owner in zip(self.plan.prompts, self.owner, strict=True) if clusters[owner]]
        one = sum(self._request(self.lengths[row.id]) for row in rows)
        return policies * self.config.samples * one

    def _request(self, length: int) -> int:
        if self.budget is None or self.budget.unit == "generations":
            return 1
        return length + self.config.generation.max_new_tokens

    @property
    def spent(self) -> int:
        """In the budget's unit."""
        if self.budget is None or self.budget.unit == "generations":
            return sum(self.generations.values())
        return sum(self.tokens.values())

    def allow(self, what: str, jobs: Sequence[Job]) -> bool:
        """Whether a round is within the budget."""
        if self.budget is None:
            return True
        kept = 0 if what == "held out" else self.reserve
        return self.spent + kept + sum(self._request(len(job.request.prompt_ids)) for job in jobs) <= self.budget.amount

    def enter(self, what: str, answers: Sequence[tuple[Job, Record]]) -> None:
        """Put a round on the account."""
        self.rounds += 1
        self.generations[what] += len(answers)
        self.tokens["prompts"] += sum(len(job.request.prompt_ids) for job, _ in answers)
        self.tokens["answers"] += sum(record["n_tokens"] for _, record in answers)

    def most(self) -> int:
        """Generations that the sweep cannot pass."""
        everything = np.ones_like(self.parts.design)
        one = self.prompts(everything) * self.config.samples
        fixed = {*mixtures(self.config.baselines), *self.shadows} - set(self.config.point_names())
        shadowed = [name for name in fixed if name in self.shadows]
        design = self.prompts(self.parts.design) * self.config.samples
        found = self.adaptive.most_ratios * (one - self.prompts(self.parts.held) * self.config.samples)
        found += self.prompts(self.parts.held) * self.config.samples
        found += len(shadowed) * one + (len(fixed) - len(shadowed) + len(outsiders(self.config.baselines))) * design
        if self.budget is not None and self.budget.unit == "generations":
            found = min(found, self.budget.amount)
        return found

    def full_grid(self, points: int) -> int:
        """Generations that as many points and the baselines would take, each on every prompt."""
        return (points + len(self.config.baselines)) * len(self.plan.prompts) * self.config.samples

    def record(self, procedure: Procedure) -> dict[str, Any]:
        """`adaptive` of frontier.json."""
        points = []
        for name in procedure.space.names:
            asked = np.zeros_like(self.parts.design)
            asked[list(procedure.asked.get(name, ()))] = True
            entry = procedure.space.entry(name) | procedure.reasons[name] | {"prompts": self.prompts(asked)}
            if self.config.constraints:
                entry["outcome"] = procedure.outcomes.get(name, "not asked: the walk ended before it")
            points.append(entry)
        spent, full = sum(self.generations.values()), self.full_grid(len(points))
        return {
            "settings": self.adaptive.model_dump(mode="json"),
            "prompts": {
                "design": self.prompts(self.parts.design),
                "test": self.prompts(self.parts.test),
                "held_out": self.prompts(self.parts.held),
            },
            "points": points,
            "rounds": self.rounds,
            "generations": dict(self.generations) | {"spent": spent, "full_grid": full, "saved": 1 - spent / full},
            "tokens": dict(self.tokens),
            "over_budget": procedure.refused,
        }

    def line(self, procedure: Procedure) -> str:
        """The account for a person."""
        return account_lines(self.record(procedure))[0]


def require_affordable(config: FrontierConfig, books: Books) -> None:
    """Refuse a budget that is spent before anything is decided.

    Raises:
        InputError: With what it takes.
    """
    least = books.design + books.reserve
    if books.budget is not None and least > books.budget.amount:
        unit = books.budget.unit
        raise InputError(
            f"the budget of {books.budget} is under what the start takes: {books.design:,} {unit} for the design's "
            f"prompts, {books.reserve:,} kept back for held-out prompts and other baselines",
            allowed=f"a budget of {least:,} {unit} or more, fewer ratios to start, a smaller share `design` or holdout",
        )
