"""Criteria over scores that are there already: as arrays, or as a file makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, PrivateAttr

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness.decision.criteria import Axes, Column, Criteria, Metric
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.judges.settings import Better

# Columns whose name says that lower is better; any other is better high, unless it is said otherwise.
_LOWER = ("cost", "unsafe", "unsafe_rate", "refusal", "refused", "over_refusal", "truncated")


class GivenScores(Criteria):
    """What is asked of scores in memory; `trace(criteria, scores)` answers it.

    Attributes:
        lower: Columns that are better low, beside cost, unsafe, refusal and those with a constraint `<=`.
    """

    lower: list[str] = Field(default_factory=list)
    _given: Scores = PrivateAttr()

    @classmethod
    def of(cls, scores: Scores, settings: Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """Criteria over these scores.

        Raises:
            InputError: A setting is wrong, or does not fit the scores' columns.
        """
        found = validate(cls, {**(settings or {}), **more}, where="criteria")
        try:
            found.take(scores)
        except ValueError as error:
            raise InputError(f"criteria: {error}") from error
        return found

    def take(self, scores: Scores) -> None:
        """Ask of these scores from now on.

        Raises:
            ValueError: A name fits no column.
        """
        self._given = scores
        for name in self.lower:
            if name not in scores.values:
                raise ValueError(f"no column '{name}' of scores; allowed: {', '.join(scores.values)}")
        if "axes" not in self.model_fields_set and "cost" not in scores.values:
            # Scores of safety alone may be labels.
            object.__setattr__(self, "axes", Axes(cost=next(iter(self.default_metrics()), "unsafe_rate")))
        self.check_names()

    @property
    def given(self) -> Scores:
        """The scores that are asked."""
        return self._given

    def columns(self) -> dict[str, Column]:
        """One a judge of the scores."""
        return {name: Column(self._way(name), refuses="refus" in name) for name in self.given.values}

    def _way(self, name: str) -> Better:
        capped = any(one.metric == name and one.sense == "<=" for one in self.constraints)
        return "lower" if name in self.lower or name in _LOWER or capped else "higher"

    def default_metrics(self) -> dict[str, Metric]:
        """`unsafe_rate`, from the column `unsafe` where there is one, else the share of costs above 0."""
        if "unsafe_rate" in {*self.metrics, *self.given.values}:
            return {}
        if "unsafe" in self.given.values:
            return {"unsafe_rate": Metric(judge="unsafe", above=0.5)}
        return super().default_metrics()

    def samples_per_prompt(self) -> int:
        """The most answers of any policy to one prompt."""
        return max(int(values.shape[2]) for values in self.given.values.values())

    def policy_names(self) -> list[str]:
        """Those of the scores."""
        return [policy.name for policy in self.given.policies]

    def anchors(self) -> list[str]:
        """A policy called base, and the least ratio."""
        swept = [self.given.policies[k].name for k in self.given.swept[:1]]
        return [*(name for name in self.policy_names() if name == "base"), *swept]
