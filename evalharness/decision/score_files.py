"""Scores that somebody else made, from a file: rows of prompt, policy and sample, with a number in each score column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.decision.scores import Score, Scores, tabulate
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.weights import place_of, read_weights_name
from psacpo.merge.config import policy_name
from psacpo.rows import read_rows, require_columns

# Columns with a meaning of their own; every other one is a score where it holds numbers, and else a prompt's field.
_KNOWN = ("prompt_id", "ratio", "policy", "sample", "cluster", "category", "role", "prompt", "completion")
_UNNAMED = ("", "null", "none", "nan")
# Arrays of scores have a cell for each policy, prompt and sample: so many, or so many a row, are taken at most.
_MOST_CELLS = 5_000_000
_MOST_EMPTY = 20


@dataclass(frozen=True)
class ScoreFile:
    """What a file of scores holds.

    Attributes:
        columns: The score columns, in the file's order.
        missing: Column -> how many rows have no score there.
        completions: One a row, where the file has a column `completion`: policy, prompt id, sample, text and scores.
        table: Every row as it was understood: policy, ratio, prompt, cluster, sample, fields and scores.
    """

    scores: Scores
    columns: list[str]
    missing: dict[str, int]
    completions: list[dict[str, Any]]
    table: list[dict[str, Any]]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.table)


def read_scores(path: Path) -> ScoreFile:
    """Rows `prompt_id, ratio, sample, reward, cost, ...` as arrays.

    A row is of the policy at its `ratio`, or, where that is empty, of the baseline that `policy` names. `sample`
    (default: the rows of one prompt and policy in their order), `cluster` (default: the prompt), `category` and other
    columns of text are taken as prompts' fields; numbers and truth values are scores, empty cells are missing ones.

    Raises:
        InputError: A column is missing, a cell is not what its column holds, two rows are of one answer, or no ratio is
            there.
    """
    rows = read_rows(path)
    require_columns(rows[:1], ["prompt_id"], source=path)
    if not {"ratio", "policy"} & set(rows[0]):
        require_columns(rows[:1], ["ratio"], source=path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in names if name not in _KNOWN and _is_score(rows, name)]
    if not columns:
        raise InputError(f"{path} has no column of scores", given=", ".join(names), allowed="numbers, such as reward")
    fields = [name for name in names if name not in (*columns, "prompt_id", "ratio", "policy", "sample", "prompt")]
    policies: dict[str, Policy] = {}
    prompts: dict[str, PromptRow] = {}
    scores: list[Score] = []
    completions: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    seen: dict[tuple[str, str], set[int]] = {}
    missing = dict.fromkeys(columns, 0)
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        policy = _policy(row, where)
        policies.setdefault(policy.name, policy)
        prompt = _prompt(row, [name for name in fields if name not in ("cluster", "completion")], where)
        before = prompts.setdefault(prompt.id, prompt)
        if (before.cluster, before.fields) != (prompt.cluster, prompt.fields):
            raise InputError(
                f"{where}: prompt '{prompt.id}' has another cluster or other fields than in an earlier row"
            )
        taken = seen.setdefault((policy.name, prompt.id), set())
        sample = _sample(row, taken, where)
        if sample in taken:
            raise InputError(f"{where}: sample {sample} of {policy.name} to prompt '{prompt.id}' is there twice")
        taken.add(sample)
        values = {name: _number(row.get(name), f"{where}: {name}") for name in columns}
        for name, value in values.items():
            if value is None:
                missing[name] += 1
            else:
                scores.append(Score(policy.name, before, name, value, sample))
        table.append(
            {"prompt_id": prompt.id, "policy": policy.name, "ratio": policy.ratio, "sample": sample}
            | ({"prompt": prompt.prompt} if prompt.prompt else {})
            | {"cluster": prompt.cluster}
            | prompt.fields
            | values
        )
        if isinstance(row.get("completion"), str):
            completions.append(
                {"policy": policy.name, "ratio": policy.ratio, "prompt_id": prompt.id, "sample": sample}
                | {"text": row["completion"], "scores": values}
            )
    ordered = _in_order(policies.values())
    if not ordered[0].swept:
        raise InputError(
            f"{path} has no row with a ratio",
            allowed="a column ratio with numbers from 0 to 1, or policies named as policy@reward_0.50+safety_0.50",
        )
    if len({policy.point for policy in ordered if policy.swept}) > 1:
        raise InputError(f"{path} has both ratios and policies named by weights", allowed="one of these")
    return ScoreFile(
        _tabulate(path, ordered, list(prompts.values()), scores, rows), columns, missing, completions, table
    )


def _tabulate(
    path: Path, policies: Sequence[Policy], prompts: Sequence[PromptRow], scores: Sequence[Score], rows: Sequence[Any]
) -> Scores:
    """The scores as arrays, which are as deep as there are different samples: numbers that nobody uses take no room."""
    place = {sample: index for index, sample in enumerate(sorted({score.sample or 0 for score in scores}))}
    cells = len(policies) * len(prompts) * len(place)
    if cells > max(_MOST_CELLS, _MOST_EMPTY * len(rows)):
        raise InputError(
            f"{path}: `sample` has {len(place)} different numbers for {len(policies)} policies and {len(prompts)} prompts, "
            f"far more than its {len(rows)} rows fill",
            allowed="0, 1, 2, ... for the answers of one policy to one prompt",
        )
    return tabulate(policies, prompts, [replace(score, sample=place[score.sample or 0]) for score in scores])


def _in_order(policies: Iterable[Policy]) -> list[Policy]:
    """The points from the reward end on, then the baselines."""
    found = list(policies)
    adapters = sorted({name for policy in found if policy.point for name in policy.weights})

    def place(policy: Policy) -> tuple[float, ...]:
        return place_of(policy.weights, adapters) if policy.point else (policy.ratio or 0.0,)

    points = sorted((policy for policy in found if policy.swept), key=place)
    return points + [policy for policy in found if not policy.swept]


def _policy(row: Mapping[str, Any], where: str) -> Policy:
    ratio = _number(row.get("ratio"), f"{where}: ratio")
    name = row.get("policy")
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise InputError(f"{where}: ratio is out of range", given=ratio, allowed="0 to 1")
        return Policy(policy_name(ratio), {}, ratio)
    if name is None or str(name).strip().lower() in _UNNAMED:
        raise InputError(f"{where} names neither a ratio nor a policy")
    if str(name).startswith("policy@"):
        try:
            at = float(str(name).removeprefix("policy@"))
        except ValueError:
            at = math.nan
        if 0 <= at <= 1:
            return Policy(policy_name(at), {}, at)
    weights = read_weights_name(str(name))
    return Policy(str(name), {}) if weights is None else Policy(str(name), weights, point=True)


def _prompt(row: Mapping[str, Any], fields: Sequence[str], where: str) -> PromptRow:
    name = row.get("prompt_id")
    if name is None or str(name) == "":
        raise InputError(f"{where}: prompt_id is empty")
    cluster = row.get("cluster")
    text = row.get("prompt")
    values = {key: value for key in fields if (value := row.get(key)) not in (None, "")}
    return PromptRow(str(name), text if text else "", str(name if cluster in (None, "") else cluster), values)


def _sample(row: Mapping[str, Any], taken: set[int], where: str) -> int:
    value = _number(row.get("sample"), f"{where}: sample")
    if value is None:
        return len(taken)
    if value < 0 or value != int(value) or value >= 100_000:
        raise InputError(f"{where}: sample is no number of an answer", given=value, allowed="0, 1, 2, ...")
    return int(value)


def _is_score(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    found = [row[name] for row in rows if row.get(name) is not None]
    return bool(found) and all(isinstance(value, bool | int | float | np.number) for value in found)


def _number(value: Any, where: str) -> float | None:
    """A finite number, or None for an empty cell.

    Raises:
        InputError: It is something else.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNNAMED):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} is no number", given=repr(value)[:40]) from None
    if math.isnan(number):
        return None
    if math.isinf(number) or abs(number) > 1e30:
        raise InputError(f"{where} is no finite number", given=number)
    return number
