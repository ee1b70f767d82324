"""Scores that somebody else made, from a file: rows of prompt, policy and sample, with a number in each score column."""

from __future__ import annotations

import math
import re
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
# The columns that a frontier is made of by default; they hold scores whatever is in their cells.
_NAMED = ("reward", "cost", "unsafe")
_UNNAMED = ("", "null", "none", "nan")
_EMPTY = (*_UNNAMED, "na", "n/a", "#n/a", "-nan")
_TRUTHS = {"true": 1.0, "false": 0.0}
# Python's float takes more than people mean by a number: 1_000, or digits of other scripts.
_WRITTEN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
_GREATEST = 1e30
# Of a mixture's name each weight is rounded to four digits.
_ROUNDING = 5e-5
_POLICY_NAMES = "policy@RATIO from 0 to 1, or policy@reward_0.50+safety_0.50 with weights that sum to 1"
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


def read_scores(path: Path, named: Iterable[str] = ()) -> ScoreFile:
    """Rows `prompt_id, ratio, sample, reward, cost, ...` as arrays.

    A row is of the policy at its `ratio`, or, where that is empty, of the baseline that `policy` names. `sample`
    (default: the rows of one prompt and policy in their order), `cluster` (default: the prompt), `category` and other
    columns of text are taken as prompts' fields; numbers and truth values are scores, empty cells are missing ones.

    Args:
        named: Columns that somebody asks scores of, beside reward, cost and unsafe: text in them is an error.

    Raises:
        InputError: A column is missing, a cell is not what its column holds, two rows are of one answer, a row's ratio
            and policy disagree, or no ratio is there.
    """
    rows = read_rows(path)
    require_columns(rows[:1], ["prompt_id"], source=path)
    if not {"ratio", "policy"} & set(rows[0]):
        require_columns(rows[:1], ["ratio"], source=path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    asked = {*_NAMED, *named}
    typed = not path.name.lower().endswith((".csv", ".csv.gz"))
    columns = [name for name in names if name not in _KNOWN and _is_score(rows, name, name in asked, typed)]
    if not columns:
        raise InputError(f"{path} has no column of scores", given=", ".join(names), allowed="numbers, such as reward")
    fields = [name for name in names if name not in (*columns, "prompt_id", "ratio", "policy", "sample", "prompt")]
    policies: dict[str, Policy] = {}
    called: dict[str, str] = {}
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
        _require_one_name(row, policy, called, where)
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
        values = {name: _number(row.get(name), f"{where}: '{name}'") for name in columns}
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
    ratio = _number(row.get("ratio"), f"{where}: 'ratio'")
    name = _name(row)
    said = _named_point(name, where) if name.startswith("policy@") else None
    if ratio is None:
        if not name:
            raise InputError(f"{where} names neither a ratio nor a policy")
        return said or Policy(name, {})
    if not 0 <= ratio <= 1:
        raise InputError(f"{where}: ratio is out of range", given=ratio, allowed="0 to 1")
    if said is not None and not _agree(said, name, ratio):
        raise InputError(
            f"{where}: ratio {ratio:g} and policy '{name}' disagree", allowed="one of them, the other empty"
        )
    return Policy(policy_name(ratio), {}, ratio)


def _name(row: Mapping[str, Any]) -> str:
    """What `policy` says, "" for nothing."""
    name = row.get("policy")
    return "" if name is None or str(name).strip().lower() in _UNNAMED else str(name)


def _named_point(name: str, where: str) -> Policy:
    """The point that `policy@...` names: a ratio, or a mixture."""
    text = name.removeprefix("policy@").strip()
    if _WRITTEN.fullmatch(text) and 0 <= float(text) <= 1:
        return Policy(policy_name(float(text)), {}, float(text))
    weights = read_weights_name(name)
    if weights is None:
        raise InputError(f"{where}: policy '{name}' names no point that can be read", allowed=_POLICY_NAMES)
    total = math.fsum(weights.values())
    if len(weights) <= name.count("+"):
        raise InputError(f"{where}: policy '{name}' names an adapter twice", allowed=_POLICY_NAMES)
    if abs(total - 1) > _ROUNDING * len(weights) + 1e-9:
        raise InputError(f"{where}: weights of policy '{name}' sum to {total:g}", allowed=_POLICY_NAMES)
    return Policy(name, weights, point=True)


def _agree(said: Policy, name: str, ratio: float) -> bool:
    """Whether a named point is that of the ratio, to the digits of its name; a mixture is of reward and safety alone."""
    if said.ratio is None:
        return said.weights.keys() <= {"reward", "safety"} and abs(said.weights.get("safety", 0.0) - ratio) <= 1e-4
    digits = len(name.strip().partition(".")[2])
    return abs(said.ratio - ratio) <= 0.5 * 10.0 ** -max(2, digits) + 1e-12


def _require_one_name(row: Mapping[str, Any], policy: Policy, called: dict[str, str], where: str) -> None:
    """Two policies at one ratio would be taken as one that answered twice."""
    name = _name(row)
    if policy.ratio is None or not name:
        return
    own = policy.name if name.startswith("policy@") else name
    before = called.setdefault(policy.name, own)
    if before != own:
        raise InputError(
            f"{where}: ratio {policy.ratio:g} is of policy '{name}', and of '{before}' in an earlier row",
            allowed="one policy at each ratio",
        )


def _prompt(row: Mapping[str, Any], fields: Sequence[str], where: str) -> PromptRow:
    name = row.get("prompt_id")
    if name is None or str(name) == "":
        raise InputError(f"{where}: prompt_id is empty")
    cluster = row.get("cluster")
    text = row.get("prompt")
    values = {key: value for key in fields if (value := row.get(key)) not in (None, "")}
    return PromptRow(str(name), text if text else "", str(name if cluster in (None, "") else cluster), values)


def _sample(row: Mapping[str, Any], taken: set[int], where: str) -> int:
    value = _number(row.get("sample"), f"{where}: 'sample'")
    if value is None:
        return len(taken)
    if value < 0 or value != int(value) or value >= 100_000:
        raise InputError(f"{where}: sample is no number of an answer", given=value, allowed="0, 1, 2, ...")
    return int(value)


def _is_score(rows: Sequence[Mapping[str, Any]], name: str, asked: bool, typed: bool) -> bool:
    """Whether a column holds scores: somebody asks them of it, or most of its cells are numbers.

    A cell that is none is then an error, since a column of scores must not vanish for one slip in it. Where the
    file has types, a column that is text throughout stays text, whatever its texts look like.
    """
    found = [value for row in rows if not _is_empty(value := row.get(name))]
    if asked or not found or all(isinstance(value, bool | int | float | np.number) for value in found):
        return bool(found)
    count = sum(_reads_as_number(value) for value in found)
    return count * 2 >= len(found) and not (typed and all(isinstance(value, str) for value in found))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def _reads_as_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _TRUTHS or bool(_WRITTEN.fullmatch(value.strip()))
    return isinstance(value, bool | int | float | np.number)


def _number(value: Any, where: str) -> float | None:
    """A number up to 1e30 in size, or None for an empty cell.

    Raises:
        InputError: It is something else.
    """
    if _is_empty(value):
        return None
    try:
        # Decimals and the like of Parquet are numbers too.
        number = float(value) if not isinstance(value, str) else _read(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise InputError(f"{where} is no number", given=repr(value)[:40]) from None
    if math.isnan(number):
        return None
    if abs(number) > _GREATEST:
        raise InputError(f"{where} is beyond 1e30 in size, the most that is taken", given=number)
    return number


def _read(text: str) -> float:
    """A number or truth value as people write it; anything else is a ValueError."""
    plain = text.strip().lower()
    if plain in _TRUTHS:
        return _TRUTHS[plain]
    if not _WRITTEN.fullmatch(plain):
        raise ValueError(text)
    return float(plain)
