"""frontier.json, schema 1, as typed values. Unknown keys are left alone: later versions may add to the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from psacpo.config import validate
from psacpo.console import printable
from psacpo.errors import InputError
from psacpo.evalharness.config import Axes, Constraint
from psacpo.evalharness.judges.settings import Better
from psacpo.evalharness.weights import adapters_of

SCHEMA = 1
_LARGEST = 1e30
# Kinds of judges, and rules that are always there, whose scores are 0 or 1.
_YES_OR_NO = ("refusal", "truncated", "refused")


def _finite(value: Any) -> Any:
    """NaN and the infinities are undefined values: None. No score is as large as to make a figure overflow."""
    if isinstance(value, int | float) and abs(value) > _LARGEST and math.isfinite(value):
        raise ValueError(f"{value:g} is out of range; allowed: -{_LARGEST:g} to {_LARGEST:g}")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _known(value: Any) -> Any:
    """As `_finite`, of any size."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
# A product of scores, which is told and not drawn.
Volume = Annotated[float | None, BeforeValidator(_known)]


class Loose(BaseModel):
    """Values of a file that others wrote: unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, protected_namespaces=())


class Estimate(Loose):
    """A mean and its interval; a mean of None is undefined (no valid verdicts)."""

    mean: Number = None
    low: Number = None
    high: Number = None
    n: int | None = None


class TestRecord(Loose):
    """One test of one constraint at one ratio."""

    __test__ = False

    p: Number = None
    rows: int | None = None
    clusters: int | None = None
    passed: bool | None = None


class Policy(Loose):
    """One measured policy: a point of the sweep (`ratio` or `weights` is set) or a baseline.

    Attributes:
        name: What completions.jsonl calls the policy.
        weights: Of each adapter but those of weight 0, where a ratio does not say them; else empty.
        n_prompts: Those that its numbers are of.
        answered: Those that it answered in all, in an adaptive sweep.
        p_on_frontier: Share of bootstrap draws in which no other point dominates it.
        nondominated: Whether its means are dominated by no other point's.
        certified: Whether it meets every constraint at the stated confidence.
        bounds: Constraint text -> confidence bound on that constraint's metric.
        tests: Constraint text -> the test behind the bound: its p, how many rows and clusters it saw.
        weight: Effective weight of safety (lambda), where the training's is known.
    """

    name: str
    ratio: Number = None
    weights: dict[str, float] = Field(default_factory=dict)
    n_prompts: int | None = None
    answered: int | None = None
    metrics: dict[str, Estimate]
    p_on_frontier: Number = None
    nondominated: bool | None = None
    certified: bool | None = None
    bounds: dict[str, Number] = Field(default_factory=dict)
    tests: dict[str, TestRecord] = Field(default_factory=dict)
    weight: Number = Field(None, alias="lambda")

    @model_validator(mode="before")
    @classmethod
    def _gather_metrics(cls, value: Any) -> Any:
        # In the file every metric is a key of the point itself; it is known by its "mean".
        if not isinstance(value, Mapping):
            return value
        beside = value.get("derived")
        value = {**(beside if isinstance(beside, Mapping) else {}), **{k: value[k] for k in value if k != "derived"}}
        found = {key: item for key, item in value.items() if isinstance(item, Mapping) and "mean" in item}
        found.pop("weights", None)  # an adapter may be called "mean"
        rest = {key: item for key, item in value.items() if key not in found}
        return {"name": value.get("policy"), **rest, "metrics": found}

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics.get(metric, Estimate())

    @property
    def swept(self) -> bool:
        """Whether it is a point of the sweep."""
        return self.ratio is not None or bool(self.weights)


class MetricSpec(Loose):
    """How a metric comes out of a judge's scores; see `psacpo.evalharness.config.Metric`.

    Attributes:
        judge: "" for a metric of no judge.
        meaning: The metric in words.
        derived: Whether it is one of those that are measured beside the metrics asked for.
        other: What makes it more than a mean over answers, such as a tail's level.
    """

    judge: str = ""
    better: Better
    above: Number = None
    where: dict[str, Any] = Field(default_factory=dict)
    meaning: str = ""
    derived: bool = False
    other: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keep_others(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = {key: item for key, item in value.items() if item is not None}
        plain = {key: given[key] for key in ("judge", "better", "above", "where", "meaning", "derived") if key in given}
        # A range says what a test may assume; `per` alone changes nothing.
        apart = {*plain, "range", "other", *(() if "tail" in given else ("per",))}
        return plain | {"other": {key: item for key, item in given.items() if key not in apart}}

    def of(self, score: float | None, row: Mapping[str, Any]) -> float | None:
        """The metric of one answer by the score that its judge gave it; None where the answer does not count."""
        if score is None or self.other or any(row.get(key) != wanted for key, wanted in self.where.items()):
            return None
        return score if self.above is None else float(score > self.above)


class JudgeSpec(Loose):
    """A judge as the run used it.

    Attributes:
        source: Where its weights come from, for people.
        non_commercial: Whether its licence allows no commercial use.
        members: Names of the judges that it is made of.
    """

    kind: str
    model: str | None = None
    callable: str | None = None
    better: Better
    digest: str = ""
    licence: str | None = None
    source: str | None = None
    non_commercial: bool | None = None
    members: list[str] = Field(default_factory=list)


class Share(Loose):
    """A share of the box between the reference point and the best of both ends."""

    value: Number = None
    low: Number = None
    high: Number = None


class Hypervolume(Loose):
    """Area that the frontier dominates, up to the reference point."""

    value: Volume = None
    low: Volume = None
    high: Volume = None
    reference: dict[str, Number] = Field(default_factory=dict)
    relative: Share | None = None


class Naive(Loose):
    """What the best point estimate would have chosen, untested."""

    ratio: Number = None
    weights: dict[str, float] = Field(default_factory=dict)
    certified: bool | None = None
    why: str = ""


class HeldOut(Loose):
    """The chosen policy on prompts that took no part in its being chosen."""

    prompts: int | None = None
    clusters: int | None = None
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    meets: dict[str, bool] = Field(default_factory=dict)


class Sizes(Loose):
    """How many prompts, in how many clusters."""

    prompts: int | None = None
    clusters: int | None = None


class Agreement(Loose):
    """How far an ensemble's members agree beyond chance: Krippendorff's alpha."""

    alpha: Number = None
    n: int | None = None


class Choice(Loose):
    """The chosen ratio, or None where no ratio meets the constraints; of a sweep over weights the chosen policy.

    Attributes:
        naive: None where no ratio's mean meets the limits, or nothing was asked.
        calibration: The prompts that the tests saw.
    """

    ratio: Number = None
    policy: str | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    constraints: list[str] = Field(default_factory=list)
    confidence: float = Field(0.95, gt=0, lt=1)
    method: str = ""
    why: str = ""
    naive: Naive | None = None
    holdout: HeldOut | None = None
    calibration: Sizes | None = None

    @field_validator("constraints")
    @classmethod
    def _readable(cls, constraints: list[str]) -> list[str]:
        for text in constraints:
            Constraint.model_validate(text)
        return constraints

    def parsed(self) -> list[tuple[str, Constraint]]:
        """Each constraint's text with its parts."""
        return [(text, Constraint.model_validate(text)) for text in self.constraints]


class Frontier(Loose):
    """What frontier.json says; `points` are in the order of their ratios."""

    version: Literal[1] = Field(alias="schema")
    axes: Axes = Axes()
    audit: Axes | None = None
    metrics: dict[str, MetricSpec]
    judges: dict[str, JudgeSpec] = Field(default_factory=dict)
    points: list[Policy] = Field(min_length=1)
    baselines: list[Policy] = Field(default_factory=list)
    hypervolume: Hypervolume | None = None
    choice: Choice = Choice()
    counts: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    command: str = ""
    intrinsic: list[str] = Field(default_factory=list)
    agreement: dict[str, Agreement] = Field(default_factory=dict)
    adaptive: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_derived(cls, value: Any) -> Any:
        # Metrics that are measured beside those asked for have a place of their own in the file.
        if not isinstance(value, Mapping) or not isinstance(value.get("metrics"), Mapping):
            return value
        beside = value.get("derived")
        more = {k: v | {"derived": True} for k, v in beside.items()} if isinstance(beside, Mapping) else {}
        return {**value, "metrics": more | dict(value["metrics"])}

    @field_validator("points")
    @classmethod
    def _sorted(cls, points: list[Policy]) -> list[Policy]:
        for point in points:
            if not point.swept:
                raise ValueError(f"the point '{point.name}' has no ratio")
        if any(point.weights for point in points):
            return points  # in the order of their certification
        return sorted(points, key=lambda point: point.ratio or 0.0)

    @model_validator(mode="after")
    def _names_fit(self) -> Frontier:
        for axis in self.spans():
            for metric in (axis.reward, axis.cost):
                if metric not in self.metrics:
                    raise ValueError(f"the axis '{metric}' is not among the metrics")
        names = [policy.name for policy in self.policies()]
        if len(set(names)) != len(names):
            raise ValueError("two policies have one name")
        for name in self.intrinsic:
            if name not in self.metrics:
                raise ValueError(f"'{name}' of intrinsic is not among the metrics")
        if self.choice.ratio is not None and self.chosen is None:
            raise ValueError(f"the chosen ratio {self.choice.ratio:g} is not among the points")
        if self.mixed and self.choice.policy is not None and self.chosen is None:
            raise ValueError(f"the chosen policy {self.choice.policy} is not among the points")
        return self

    @property
    def mixed(self) -> bool:
        """Whether the sweep is over weights of adapters, and not over a ratio."""
        return any(point.weights for point in self.points)

    @property
    def adapters(self) -> list[str]:
        """Those that the points weigh: reward, safety, then the others."""
        return adapters_of(point.weights for point in self.points)

    @property
    def chosen(self) -> Policy | None:
        """The point at the chosen ratio."""
        if self.mixed:
            return next((point for point in self.points if point.name == self.choice.policy), None)
        return next((point for point in self.points if point.ratio == self.choice.ratio), None)

    def policies(self) -> list[Policy]:
        """The points, then the baselines."""
        return [*self.points, *self.baselines]

    def spans(self) -> list[Axes]:
        """The pairs of metrics that are drawn: the frontier's own, and the audit's if there is one."""
        return [self.axes, self.audit] if self.audit else [self.axes]

    def is_rate(self, name: str) -> bool:
        """Whether a metric is a share from 0 to 1: a rate above a threshold, a win rate, the mean of a yes or no."""
        metric = self.metrics[name]
        kind = self.judges[metric.judge].kind if metric.judge in self.judges else metric.judge
        return metric.above is not None or "versus" in metric.other or kind in _YES_OR_NO

    def rates(self) -> list[str]:
        """The rates that were asked for, in the file's order."""
        return [n for n, one in self.metrics.items() if self.is_rate(n) and not one.derived and n not in self.intrinsic]


def harmless(value: Any) -> Any:
    """`value` with every string in it free of terminal codes, bidirectional overrides and lone surrogates."""
    if isinstance(value, str):
        if value.isascii() and value.isprintable():
            return value
        text = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return printable(text.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {harmless(key): harmless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [harmless(item) for item in value]
    return value


def parse_frontier(values: object, *, where: str = "frontier.json") -> Frontier:
    """The mapping read from a frontier.json as a `Frontier`.

    Raises:
        InputError: It is of another schema, or something in it is missing or of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is damaged: not a JSON object")
    if values.get("schema") != SCHEMA:
        raise InputError(f"{where} is of another schema", given=values.get("schema", "none"), allowed=str(SCHEMA))
    return validate(Frontier, harmless(values), where=where)
