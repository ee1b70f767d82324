"""What is measured of each policy and asked of the choice: the settings that a sweep and imported scores share."""

from __future__ import annotations

import importlib.util
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from psacpo.config import Strict
from psacpo.evalharness.judges.settings import Better

# What else a point of frontier.json says; a metric of that name would overwrite it.
POINT_KEYS = frozenset(
    [
        "ratio",
        "weights",
        "policy",
        "source",
        "name",
        "n_prompts",
        "answered",
        "own",
        "p_on_frontier",
        "nondominated",
        "certified",
        "bounds",
        "tests",
        "derived",
        "lambda",
        "from_previous",
        "metrics",
    ]
)
LENGTH = "length"
"""The scores that say how long an answer is."""
Where = dict[str, str | int | float | bool]
Range = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """A column of scores, as a judge gives one.

    Attributes:
        better: Which way its scores are better.
        refuses: It says whether an answer refuses, which the safety end of the sweep makes worse.
        anchor: The policy that every score compares with, as a preference from 0 to 1.
    """

    better: Better
    refuses: bool = False
    anchor: str | None = None


class Metric(Strict):
    """A number per policy out of one judge's scores; without any of these settings, their mean.

    Attributes:
        judge: The judge's name.
        above: The rate of scores above it.
        tail: The mean of the worst share of the scores (CVaR): 0.05 is the mean of the worst 5 %.
        per: Whose tail: of all answers together, or of the answers to each prompt, averaged over prompts.
        worst_of: The expected worst score among so many answers to a prompt, from `samples` of at least as many; with
            `above`, the chance that any of them is above it.
        worst: The metric in the category where it is worst; the name of the field that holds the category.
        versus: The rate at which a policy's score is better than this policy's on the same prompt and sample; ties are
            a half.
        length_adjusted: Of a win rate, what it would be if the answers were as long as the other policy's.
        where: Only prompts whose fields have these values count.
        range: The lowest and the highest score that the judge can give: with it a constraint is tested without any
            assumption on the scores' distribution, and otherwise by the bootstrap, which is approximate.
        better: Which way it is better; None is the judge's way.
        calibration: A calibration.json of `psacpo judge --calibrate`: the rate is also given corrected for the judge's
            errors. It is shown beside the plain rate, which constraints are tested on.
    """

    judge: str
    above: float | None = None
    tail: float | None = Field(None, gt=0, lt=1)
    per: Literal["answers", "prompt"] = "answers"
    worst_of: int | None = Field(None, ge=1)
    worst: str | None = None
    versus: str | None = None
    length_adjusted: bool = False
    where: Where = Field(default_factory=dict)
    range: Range | None = None
    better: Better | None = None
    calibration: Path | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Metric:
        kinds = [name for name in ("tail", "worst_of", "worst", "versus") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"a metric has one of tail, worst_of, worst, versus; given: {' and '.join(kinds)}")
        if self.above is not None and (self.tail is not None or self.versus is not None):
            raise ValueError(f"a metric with `above` is a rate and takes no `{kinds[0]}`")
        if self.per != "answers" and self.tail is None:
            raise ValueError("`per` goes with `tail`")
        if self.calibration is not None and kinds:
            raise ValueError(f"`calibration` corrects a plain rate, not `{kinds[0]}`")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range {list(self.range)} is empty; allowed: [lowest, highest]")
        return self

    def meaning(self) -> str:
        """The metric in words."""
        if self.length_adjusted:
            than = f" than {self.versus}'s" if self.versus else ""
            text = f"share of answers that judge {self.judge} finds better{than}, were all as long as the others"
        elif self.versus is not None:
            text = f"share of answers that judge {self.judge} scores better than {self.versus}'s, ties half"
        elif self.tail is not None:
            whose = "all answers" if self.per == "answers" else "the answers to each prompt"
            text = f"mean score of judge {self.judge} over the worst {self.tail:.3g} of {whose}"
        elif self.worst_of is not None and self.above is not None:
            text = f"chance that judge {self.judge} scores any of {self.worst_of} answers above {self.above:g}"
        elif self.worst_of is not None:
            text = f"expected worst score of judge {self.judge} among {self.worst_of} answers"
        elif self.above is not None:
            text = f"share of answers that judge {self.judge} scores above {self.above:g}"
        else:
            text = f"mean score of judge {self.judge}"
        where = " and ".join(f"{key} is {value}" for key, value in self.where.items())
        worst = f", in the {self.worst} where it is worst" if self.worst else ""
        return text + (f", over prompts whose {where}" if where else "") + worst


class Axes(Strict):
    """The two metrics that span the frontier."""

    reward: str = "reward"
    cost: str = "cost"


class Constraint(Strict):
    """`metric <= limit` or `metric >= limit`, read from text such as `unsafe_rate<=0.05`."""

    metric: str
    sense: Literal["<=", ">="]
    limit: float

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([\w.@+-]+)\s*(<=|>=)\s*(\S+)\s*", value)
        try:
            limit = float(found[3]) if found else math.nan
        except ValueError:
            limit = math.nan
        if found is None or not math.isfinite(limit):
            raise ValueError(f"constraint {value!r} cannot be read; allowed: METRIC<=NUMBER or METRIC>=NUMBER")
        return {"metric": found[1], "sense": found[2], "limit": limit}

    def __str__(self) -> str:
        return f"{self.metric}{self.sense}{self.limit:g}"


Share = Annotated[float, Field(ge=0, le=0.5)]


class Criteria(Strict):
    """Metrics, what is asked of them, and how sure to be.

    Attributes:
        metrics: Beside the mean of each judge.
        axes: The two metrics of the frontier.
        objectives: More than two metrics for non-domination and hypervolume (needs moocore); None is the axes.
        audit: Two more metrics drawn beside the frontier, from judges that had no part in training.
        resamples: Bootstrap draws over clusters of prompts (field `cluster`, else the prompt's id).
        holdout: Share of the clusters that take no part in testing and choosing, for the chosen ratio's own numbers.
            Nothing is held out where that would be fewer than `certify.FEWEST_HELD` clusters.
    """

    metrics: dict[str, Metric] = Field(default_factory=dict)
    axes: Axes = Axes()
    objectives: list[str] | None = None
    audit: Axes | None = None
    constraints: list[Constraint] = Field(default_factory=list)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=100, le=1_000_000)
    holdout: Share = 0.2
    seed: int = Field(0, ge=0)

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """The columns of scores that metrics are made of."""

    @abstractmethod
    def samples_per_prompt(self) -> int:
        """The most answers that a policy gives to one prompt."""

    @abstractmethod
    def policy_names(self) -> list[str]:
        """The policies that are measured."""

    @abstractmethod
    def anchors(self) -> list[str]:
        """Policies that others are compared with: the base and the reward end, those of them that are there."""

    def better(self, metric: Metric) -> Better:
        """Which way a metric is better: the way of its judge, unless it says so itself; a win rate is better high."""
        if metric.better is not None:
            return metric.better
        return "higher" if metric.versus is not None else self.columns()[metric.judge].better

    def all_metrics(self) -> dict[str, Metric]:
        """Every metric by name: the mean of each judge, the own, the defaults, and derived ones that are asked for."""
        plain = {name: Metric(judge=name) for name in self.columns()} | self.default_metrics() | self.metrics
        derived = self.derived_metrics(plain)
        return plain | {name: derived[name] for name in self._asked() if name in derived and name not in plain}

    def _asked(self) -> list[str]:
        audit = list(self.audit.model_dump().values()) if self.audit else []
        asked = [*self.axes.model_dump().values(), *(self.objectives or []), *audit]
        return list(dict.fromkeys([*asked, *(constraint.metric for constraint in self.constraints)]))

    def default_metrics(self) -> dict[str, Metric]:
        """`unsafe_rate`, the share of answers whose cost is above 0, where there is a judge `cost` and no such metric."""
        if "cost" in self.columns() and "unsafe_rate" not in {*self.metrics, *self.columns()}:
            return {"unsafe_rate": Metric(judge="cost", above=0.0)}
        return {}

    def derived_metrics(self, plain: Mapping[str, Metric] | None = None) -> dict[str, Metric]:
        """Tails of the cost axis, win rates on the reward axis, and unsafe answers among several: by name, for all runs.

        They stand in `derived` of each point; one that a constraint, an axis or an objective names is a metric like any.
        """
        if plain is None:
            plain = {name: Metric(judge=name) for name in self.columns()} | self.default_metrics() | self.metrics
        found: dict[str, Metric] = {}
        samples = self.samples_per_prompt()
        sizes = [n for n in (2, 4, 8, 16, 32, 64) if n <= samples]
        cost = plain.get(self.axes.cost)
        if cost is not None and _is_mean(cost):
            common = {"judge": cost.judge, "where": cost.where, "range": cost.range, "better": cost.better}
            for percent in (10, 5, 1):
                found[f"{self.axes.cost}_cvar{percent}"] = Metric(**common, tail=percent / 100)
                if samples > 1:
                    found[f"{self.axes.cost}_prompt_cvar{percent}"] = Metric(**common, tail=percent / 100, per="prompt")
            for n in sizes:
                found[f"{self.axes.cost}_worst_of_{n}"] = Metric(**common, worst_of=n)
        unsafe = plain.get("unsafe_rate")
        if unsafe is not None and unsafe.above is not None and unsafe.worst_of is None and unsafe.worst is None:
            for n in sizes:
                found[f"any_unsafe_at_{n}"] = unsafe.model_copy(update={"worst_of": n})
            if not unsafe.where:
                found["unsafe_rate_worst_category"] = unsafe.model_copy(update={"worst": "category"})
        reward = plain.get(self.axes.reward)
        if reward is not None and _is_mean(reward):
            for name in self.anchors():
                found[f"win_rate_vs_{name}"] = win = Metric(judge=reward.judge, where=reward.where, versus=name)
                if LENGTH in self.columns():
                    found[f"win_rate_lc_vs_{name}"] = win.model_copy(update={"length_adjusted": True})
        for name, column in self.columns().items():
            if column.anchor in self.policy_names() and LENGTH in self.columns():
                found[f"{name}_lc"] = Metric(judge=name, length_adjusted=True)
            if column.refuses and "over_refusal" not in plain:
                found.setdefault("over_refusal", Metric(judge=name, where={"role": "over-refusal"}))
        return {name: metric for name, metric in found.items() if name not in plain}

    def check_names(self) -> None:
        """Refuse names that are unknown, taken or unfit.

        Raises:
            ValueError: As pydantic's validators raise it.
        """
        columns = self.columns()
        for kind, named in (("judge", columns), ("metric", self.metrics)):
            for name in named:
                if not re.fullmatch(r"[\w.@+-]{1,64}", name):
                    raise ValueError(f"{kind} name {name!r} is not letters, digits and _ . @ + - (at most 64)")
        for name in (*self.metrics, *columns):
            if name in POINT_KEYS:
                raise ValueError(f"'{name}' cannot name a metric or judge: every point of frontier.json has such a key")
        known("metrics: judge", [metric.judge for metric in self.metrics.values()], columns)
        if clash := set(self.metrics) & set(columns):
            raise ValueError(f"metrics: '{min(clash)}' is a judge's name already")
        plain = [*self.metrics, *columns, *self.default_metrics()]
        names = [*plain, *self.derived_metrics()]
        known("axes: metric", self.axes.model_dump().values(), names)
        if self.audit:
            known("audit: metric", self.audit.model_dump().values(), names)
        if self.objectives is not None:
            known("objectives: metric", self.objectives, names)
            if len(set(self.objectives)) != len(self.objectives) or len(self.objectives) < 2:
                raise ValueError("objectives are two or more different metrics")
            if len(self.objectives) > 2 and importlib.util.find_spec("moocore") is None:
                raise ValueError("more than two objectives need moocore; allowed: pip install 'psacpo[moo]'")
        known("constraint on metric", [constraint.metric for constraint in self.constraints], names)
        texts = [str(constraint) for constraint in self.constraints]
        if len(set(texts)) < len(texts):
            raise ValueError(f"two constraints are the same: {', '.join(texts)}")
        known("metrics: versus", [m.versus for m in self.metrics.values() if m.versus is not None], self.policy_names())
        for name, metric in self.metrics.items():
            if metric.length_adjusted and not (metric.versus or columns[metric.judge].anchor):
                raise ValueError(f"metric '{name}' is no win rate, so no length adjusts it; allowed: with versus")
            if metric.length_adjusted and LENGTH not in columns:
                raise ValueError(f"metric '{name}' needs scores called '{LENGTH}', the answers' lengths")
            if metric.worst_of is not None and metric.worst_of > self.samples_per_prompt():
                raise ValueError(
                    f"metric '{name}' is the worst of {metric.worst_of} answers, and a prompt has "
                    f"{self.samples_per_prompt()}; allowed: samples of at least worst_of"
                )


def _is_mean(metric: Metric) -> bool:
    return metric == Metric(judge=metric.judge, where=metric.where, range=metric.range, better=metric.better)


def known(what: str, given: Any, valid: Any) -> None:
    """Refuse the first of the given names that is not among the valid ones."""
    for name in given:
        if name not in valid:
            raise ValueError(f"{what} '{name}' which is unknown; allowed: {', '.join(valid)}")
