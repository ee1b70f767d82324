"""frontier.json, schema 1, as typed values. Unknown keys are left alone: later versions may add to the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from psacpo.config import validate
from psacpo.console import printable
from psacpo.errors import InputError
from psacpo.evalharness.config import Axes, Better, Constraint

SCHEMA = 1
_LARGEST = 1e30


def _finite(value: Any) -> Any:
    """NaN and the infinities are undefined values: None. No score is as large as to make a figure overflow."""
    if isinstance(value, int | float) and abs(value) > _LARGEST and math.isfinite(value):
        raise ValueError(f"{value:g} is out of range; allowed: -{_LARGEST:g} to {_LARGEST:g}")
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Loose(BaseModel):
    """Values of a file that others wrote: unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, protected_namespaces=())


class Estimate(Loose):
    """A mean and its interval; a mean of None is undefined (no valid verdicts)."""

    mean: Number = None
    low: Number = None
    high: Number = None
    n: int | None = None


class Policy(Loose):
    """One measured policy: a point of the sweep (`ratio` is set) or a baseline.

    Attributes:
        name: What completions.jsonl calls the policy.
        p_on_frontier: Share of bootstrap draws in which no other point dominates it.
        nondominated: Whether its means are dominated by no other point's.
        certified: Whether it meets every constraint at the stated confidence.
        bounds: Constraint text -> confidence bound on that constraint's metric.
    """

    name: str
    ratio: Number = None
    n_prompts: int | None = None
    metrics: dict[str, Estimate]
    p_on_frontier: Number = None
    nondominated: bool | None = None
    certified: bool | None = None
    bounds: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_metrics(cls, value: Any) -> Any:
        # In the file every metric is a key of the point itself; it is known by its "mean".
        if not isinstance(value, Mapping):
            return value
        found = {key: item for key, item in value.items() if isinstance(item, Mapping) and "mean" in item}
        rest = {key: item for key, item in value.items() if key not in found}
        return {"name": value.get("policy"), **rest, "metrics": found}

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics.get(metric, Estimate())


class MetricSpec(Loose):
    """How a metric comes out of a judge's scores; see `psacpo.evalharness.config.Metric`."""

    judge: str
    better: Better
    above: Number = None
    where: dict[str, Any] = Field(default_factory=dict)


class JudgeSpec(Loose):
    """A judge as the run used it."""

    kind: str
    model: str | None = None
    callable: str | None = None
    better: Better
    digest: str


class Hypervolume(Loose):
    """Area that the frontier dominates, up to the reference point."""

    value: Number = None
    low: Number = None
    high: Number = None
    reference: dict[str, Number] = Field(default_factory=dict)


class Choice(Loose):
    """The chosen ratio, or None where no ratio meets the constraints."""

    ratio: Number = None
    constraints: list[str] = Field(default_factory=list)
    confidence: float = Field(0.95, gt=0, lt=1)
    method: str = ""
    why: str = ""

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

    @field_validator("points")
    @classmethod
    def _sorted(cls, points: list[Policy]) -> list[Policy]:
        for point in points:
            if point.ratio is None:
                raise ValueError(f"the point '{point.name}' has no ratio")
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
        if self.choice.ratio is not None and self.chosen is None:
            raise ValueError(f"the chosen ratio {self.choice.ratio:g} is not among the points")
        return self

    @property
    def chosen(self) -> Policy | None:
        """The point at the chosen ratio."""
        return next((point for point in self.points if point.ratio == self.choice.ratio), None)

    def policies(self) -> list[Policy]:
        """The points, then the baselines."""
        return [*self.points, *self.baselines]

    def spans(self) -> list[Axes]:
        """The pairs of metrics that are drawn: the frontier's own, and the audit's if there is one."""
        return [self.axes, self.audit] if self.audit else [self.axes]

    def rates(self) -> list[str]:
        """Metrics that are shares from 0 to 1: rates above a threshold, and means of the refusal rule."""
        return [
            name
            for name, metric in self.metrics.items()
            if metric.above is not None or (metric.judge in self.judges and self.judges[metric.judge].kind == "refusal")
        ]


def harmless(value: Any) -> Any:
    """`value` with every string in it free of terminal codes, bidirectional overrides and lone surrogates."""
    if isinstance(value, str):
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
