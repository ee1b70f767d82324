"""Points of a sweep over more than two adapters: vectors of weights that sum to 1, their names and their order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from psacpo.config import Strict

Weights = dict[str, float]
MOST_POINTS = 1001
"""More points than that are no sweep; a ratio grid has the same limit."""
# How far the weights of a point may be from 1 in sum: what decimal fractions leave.
_SUM_TOLERANCE = 1e-6
_DIGITS = 4
_STEPS = 4
_NAME = re.compile(r"[\w.@-]{1,64}")


class Grid(Strict):
    """All vectors of weights in multiples of 1/steps that sum to 1; read from `grid`, `grid:8`, or a mapping.

    Attributes:
        steps: Of each weight from 0 to 1; None is 4, or a coarser start where a sweep is adaptive.
        of: The adapters that are weighed; None is all of `adapters`.
    """

    steps: int | None = Field(None, ge=1, le=1000)
    of: list[str] | None = Field(None, min_length=2)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"grid(?::(\d{1,4}))?", value.strip())
        if found is None:
            raise ValueError(
                f"{value!r} cannot be read; allowed: grid, or grid:STEPS such as grid:8, or a list of weights"
            )
        return {"steps": int(found[1])} if found[1] else {}


WeightSweep = Annotated[
    Annotated[Grid, Tag("grid")] | Annotated[list[Weights], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "grid"),
]
"""`weights` of a recipe: a grid, or a list of vectors; an adapter that a vector does not name has weight 0."""


def grid(names: Sequence[str], steps: int) -> list[Weights]:
    """All vectors of weights in multiples of 1/steps that sum to 1, C(steps + K - 1, K - 1) of them for K names.

    Each names every adapter. One that splits `steps` steps among K names is a choice of K - 1 bars among stars.
    """
    found = []
    for bars in combinations(range(steps + len(names) - 1), len(names) - 1):
        edges = (-1, *bars, steps + len(names) - 1)
        counts = [after - before - 1 for before, after in pairwise(edges)]
        found.append({name: count / steps for name, count in zip(names, counts, strict=True)})
    return found


def weight_points(sweep: Grid | Sequence[Weights], adapters: Iterable[str]) -> list[Weights]:
    """The vectors of a sweep in `place_of`'s order, without the adapters of weight 0.

    Raises:
        ValueError: As pydantic's validators raise it: an adapter is unknown, a vector does not sum to 1 or is there
            twice, or there are too many.
    """
    names = list(adapters)
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"adapter name {name!r} is not letters, digits and _ . @ - (at most 64), so no point can be named"
            )
    if isinstance(sweep, Grid):
        own = sweep.of or names
        _require_known("weights: of", own, names)
        if len(set(own)) < len(own):
            raise ValueError(f"weights: of names an adapter twice: {', '.join(own)}")
        steps = sweep.steps or _STEPS
        count = math.comb(steps + len(own) - 1, len(own) - 1)
        if count > MOST_POINTS:
            raise ValueError(f"weights: a grid of {steps} steps over {len(own)} adapters has {count} points; "
                             f"allowed: at most {MOST_POINTS}")  # fmt: skip
        vectors = grid(own, steps)
    else:
        vectors = [dict(vector) for vector in sweep]
        if not 1 <= len(vectors) <= MOST_POINTS:
            raise ValueError(f"weights: {len(vectors)} points; allowed: 1 to {MOST_POINTS}")
        for vector in vectors:
            _require_known("weights: adapter", vector, names)
            small = next((value for value in vector.values() if 0 < value < 10**-_DIGITS), None)
            if small is not None:
                raise ValueError(
                    f"weights: {small:g} is too small to be named; allowed: 0, or at least {10**-_DIGITS:g}"
                )
            if min(vector.values(), default=0) < 0 or not abs(math.fsum(vector.values()) - 1) <= _SUM_TOLERANCE:
                raise ValueError(f"weights: {vector}; allowed: numbers from 0 to 1 that sum to 1")
    found = [{name: vector[name] for name in names if vector.get(name)} for vector in vectors]
    called = [weights_name(vector) for vector in found]
    for name in called:
        if called.count(name) > 1:
            raise ValueError(f"weights: two points are the same to four digits: {name}")
    return sorted(found, key=lambda vector: place_of(vector, names))


def place_of(weights: Mapping[str, float], adapters: Iterable[str]) -> tuple[float, ...]:
    """Where a vector stands among the points of a sweep, by rising weight of `safety`.

    Of equal weight of safety, that with less of `reward` stands later, nearer the safe end; then that with less of each
    other adapter in their order. Certification walks from the last point, or the first, in this order, which is fixed
    before anything is measured.
    """
    rest = [name for name in adapters if name not in ("safety", "reward")]
    return weights.get("safety", 0.0), *(-weights.get(name, 0.0) for name in ("reward", *rest))


def weights_name(weights: Mapping[str, float]) -> str:
    """`policy@reward_0.50+safety_0.25+honesty_0.25`: the policy at a vector of weights, those of 0 left out.

    A weight has two to four digits after the point: `frontier.json` has all of them.
    """
    return "policy@" + "+".join(f"{name}_{_written(value)}" for name, value in weights.items() if value)


def read_weights_name(name: str) -> Weights | None:
    """The weights that a policy's name says, as written there; None for a name of another kind."""
    parts = [part.rpartition("_") for part in name.removeprefix("policy@").split("+")]
    if not name.startswith("policy@") or not all(
        adapter and re.fullmatch(r"[01]\.\d{2,4}", value) for adapter, _, value in parts
    ):
        return None
    return {adapter: float(value) for adapter, _, value in parts}


def weights_text(weights: Mapping[str, float]) -> str:
    """`reward 0.5, safety 0.25`: for people."""
    return ", ".join(f"{name} {round(value, _DIGITS):g}" for name, value in weights.items() if value)


def percents(weights: Mapping[str, float], adapters: Iterable[str]) -> str:
    """`50/25/25`: of each adapter in their order, for tables and plots."""
    return "/".join(f"{100 * weights.get(name, 0.0):.3g}" for name in adapters)


def adapters_of(points: Iterable[Mapping[str, float]]) -> list[str]:
    """The adapters that points weigh: reward, safety, then the others as they come."""
    found = list(dict.fromkeys(name for weights in points for name in weights))
    return sorted(found, key=lambda name: {"reward": 0, "safety": 1}.get(name, 2))


def _written(value: float) -> str:
    text = f"{value:.{_DIGITS}f}".rstrip("0")
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))


def _require_known(what: str, given: Iterable[str], valid: Sequence[str]) -> None:
    for name in given:
        if name not in valid:
            raise ValueError(f"{what} '{name}' which is unknown; allowed: {', '.join(valid)}")
