"""What an adaptive sweep may spend, and how fine it looks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from psacpo.config import Strict
from psacpo.errors import InputError

_SCALES = {"": 1, "k": 1_000, "m": 1_000_000}
_TEXT = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([km]?)[\s_-]*(generations?|tokens?)?\s*", re.IGNORECASE)
_ALLOWED = "a whole number of generations such as 20000 or 20k, or of tokens such as 2Mtokens"


class Budget(Strict):
    """The most that a sweep may spend, read from a number of generations or from text such as `2M tokens`.

    Attributes:
        unit: `generations` are answers of any policy; `tokens` are those of prompts and answers together.
    """

    amount: int = Field(ge=1, le=10**18)
    unit: Literal["generations", "tokens"] = "generations"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"amount": value}
        if not isinstance(value, str):
            return value
        found = _TEXT.fullmatch(value)
        # 1.5k is a whole number, and a float of it would not always be.
        amount = Decimal(found[1]) * _SCALES[found[2].lower()] if found else Decimal(0)
        if found is None or amount < 1 or amount != int(amount):
            shown = value if len(value) <= 40 else value[:40] + "..."
            raise ValueError(f"budget {shown!r} cannot be read; allowed: {_ALLOWED}")
        return {"amount": int(amount), "unit": "tokens" if (found[3] or "").lower().startswith("t") else "generations"}

    def __str__(self) -> str:
        return f"{self.amount:,} {self.unit}"


class Adaptive(Strict):
    """An adaptive sweep.

    Attributes:
        start: Ratios that are measured first, evenly spaced from the least to the greatest of `ratios`. Weights have a start
            of their own: `space.first_points`.
        most_ratios: No more ratios than these, or mixtures, are ever measured; of mixtures at least twice those at the
            start, where nothing is said.
        resolution: Neighbouring ratios closer than twice this are not split, nor mixtures between which less than that
            weight moves.
        design: Share of the clusters of prompts whose answers choose the ratios and take no part in any test.
        batch: Clusters of prompts between two looks at a ratio.
        budget: What the sweep may spend; None is all it takes.
    """

    start: int = Field(5, ge=3, le=33)
    most_ratios: int = Field(15, ge=3, le=65)
    resolution: float = Field(0.025, gt=0, le=0.25)
    design: float = Field(0.15, gt=0, lt=1)
    batch: int = Field(25, ge=1)
    budget: Budget | None = None

    @model_validator(mode="after")
    def _fits(self) -> Adaptive:
        if self.most_ratios < self.start:
            raise ValueError(f"most_ratios {self.most_ratios} is under start {self.start}; allowed: at least as many")
        return self


def _from_switch(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


AdaptiveSwitch = Annotated[Adaptive | None, BeforeValidator(_from_switch)]
"""`adaptive: true`, or its settings; None and false are the full sweep."""


def adaptive_flags(adaptive: bool, budget: str | None, recipe: Adaptive | None) -> dict[str, Any] | None:
    """What --adaptive and --budget ask for, with the recipe's settings of an adaptive sweep; None where it is neither.

    Raises:
        InputError: A budget for a sweep that is not adaptive.
    """
    if budget is not None and not adaptive and recipe is None:
        raise InputError("--budget goes with --adaptive", given=f"--budget {budget}", allowed="both, or neither")
    if not adaptive and budget is None:
        return None
    said = recipe.model_dump(exclude_unset=True) if recipe else {}
    return said if budget is None else said | {"budget": budget}


def budget_warnings(adaptive: Adaptive, account: dict[str, Any]) -> list[str]:
    """What the budget cut short, from `adaptive` of frontier.json."""
    what = account.get("over_budget")
    if what is None or adaptive.budget is None:
        return []
    lost = {
        "design": "no more points could be added",
        "walk": "the walk over the points ended undecided, and a safer one than need be may be chosen",
        "compare": "the certified points could not be told apart any further",
    }
    return [f"the budget of {adaptive.budget} was spent: {lost[what]}"]


def account_lines(account: Mapping[str, Any]) -> list[str]:
    """`adaptive` of frontier.json in sentences: what was spent, and which prompts the numbers are of."""
    found, points, prompts = account["generations"], account["points"], account["prompts"]
    kind = "mixtures" if points[0]["ratio"] is None else "ratios"
    spent = (
        f"adaptive: {found['spent']:,} answers in {account['rounds']} rounds, {found['spent'] / found['full_grid']:.0%} of "
        f"the {found['full_grid']:,} that these {len(points)} {kind} and the baselines would take in full"
    )
    if not prompts["test"]:
        return [spent]
    shared = (
        f"to be compared with each other, the numbers of all policies are of the {prompts['design']} prompts that every "
        f"one of them answered; the tests are of up to {prompts['test']} others"
    )
    return [spent, shared]
