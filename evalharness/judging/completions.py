"""Completions that are stored in a file of rows, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.judges.base import Item
from psacpo.evalharness.judging.verdicts import Answer
from psacpo.evalharness.prompts import is_prompt, without_nan
from psacpo.files import digest
from psacpo.merge.config import policy_name
from psacpo.rows import Row, read_rows, require_columns

_OWN = frozenset(
    ["id", "prompt_id", "prompt", "completion", "policy", "ratio", "sample", "finish_reason", "n_tokens", "label"]
)


def read_completions(path: Path) -> list[Answer]:
    """The answers in rows with `prompt` and `completion`.

    `id` is the row's number where it is not there, and `prompt_id` the id; `policy` or `ratio` says whose answer it is,
    `sample` (0) which of several; `finish_reason` and `n_tokens` are known to judges that ask for them; all other
    columns are the prompt's fields.

    Raises:
        InputError: A row lacks a prompt or completion, or stands for the same answer as another.
    """
    rows = read_rows(path, any_text=True)
    require_columns(rows, ["prompt", "completion"], source=path)
    answers = [_answer(without_nan(row), number, path) for number, row in enumerate(rows, start=1)]
    seen: dict[tuple[str, str, int], int] = {}
    for number, answer in enumerate(answers, start=1):
        whose = (answer.id, answer.item.policy, answer.item.sample)
        if whose in seen:
            raise InputError(
                f"{path} row {number}: the id '{answer.id}' is there twice (row {seen[whose]})",
                allowed="one row an answer; several of one prompt have columns policy, ratio or sample",
            )
        seen[whose] = number
    return answers


def _answer(row: Row, number: int, path: Path) -> Answer:
    where = f"{path} row {number}"
    if not is_prompt(row["prompt"]):
        raise InputError(f"{where}: prompt is empty or no prompt", given=repr(row["prompt"])[:60])
    if not isinstance(row["completion"], str):
        raise InputError(f"{where}: completion is no text", given=repr(row["completion"])[:60])
    own = str(number if row.get("id") is None else row["id"])
    prompt_id, policy, sample = whose(row, number, where)
    item = Item(
        prompt=row["prompt"],
        completion=row["completion"],
        prompt_id=prompt_id,
        policy=policy,
        sample=sample,
        fields={key: value for key, value in row.items() if key not in _OWN},
        finish_reason=row.get("finish_reason"),
        n_tokens=_whole(row, "n_tokens", where),
    )
    return Answer(digest([own, item.prompt, item.completion, prompt_id, item.policy, item.sample]), item, own)


def whose(row: Row, number: int, where: str) -> tuple[str, str, int]:
    """Which answer a row is about: the prompt's id, the policy, the sample."""
    own = row.get("prompt_id") if row.get("prompt_id") is not None else row.get("id")
    return str(number if own is None else own), _policy(row, where), _whole(row, "sample", where) or 0


def _policy(row: Row, where: str) -> str:
    if row.get("policy") is not None:
        return str(row["policy"])
    if row.get("ratio") is None:
        return ""
    try:
        return policy_name(float(row["ratio"]))
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: ratio is no number", given=repr(row["ratio"])[:60]) from None


def _whole(row: Row, name: str, where: str) -> int | None:
    value: Any = row.get(name)
    if value is None:
        return None
    try:
        if int(value) == float(value) >= 0:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{where}: {name} is no whole number", given=repr(value)[:60])
