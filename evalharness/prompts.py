"""The prompts that every policy answers, and the requests that they become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.engines.base import Policy, Request
from psacpo.evalharness.prompt_sets import Prompts, fields_of, prompt_sets
from psacpo.files import digest
from psacpo.prompting import Prompt, encode_prompt
from psacpo.rows import Row, read_rows, require_columns


@dataclass(frozen=True)
class PromptRow:
    """One prompt: its id, text or messages, the cluster it is resampled with, and its other fields (`category`, ...)."""

    id: str
    prompt: Prompt
    cluster: str
    fields: dict[str, Any]


def read_prompts(prompts: Prompts) -> list[PromptRow]:
    """The prompts of a file, or of several sets of them; with several, an id is its file's name and the row's id.

    Raises:
        InputError: A row has no prompt, an empty one, or another row's id.
    """
    sets = prompt_sets(prompts)
    several = len(sets) > 1
    found: dict[str, PromptRow] = {}
    for one in sets:
        for row in _read(one.path):
            name = f"{one.path.name.split('.')[0]}-{row.id}" if several else row.id
            if name in found:
                raise InputError(
                    f"{one.path}: the id '{name}' is also one of another file", allowed="files of other names"
                )
            # Without a cluster of its own, a prompt is its own cluster.
            cluster = name if row.cluster == row.id else row.cluster
            found[name] = PromptRow(name, row.prompt, cluster, fields_of(one, row.fields))
    return list(found.values())


def _read(path: Path) -> list[PromptRow]:
    """Prompts from rows with a column `prompt`; `id` (else the row's number) and `cluster` (else the id) are optional;
    null is as if the column were not there.
    """
    rows = read_rows(path)
    require_columns(rows, ["prompt"], source=path)
    seen: set[str] = set()
    prompts = []
    for number, row in enumerate(rows, start=1):
        prompt = row["prompt"]
        if not is_prompt(prompt):
            raise InputError(
                f"{path} row {number}: prompt is empty or no prompt",
                given=repr(prompt)[:60],
                allowed='text, or messages [{"role": "user", "content": "..."}] that do not end with the assistant',
            )
        row = without_nan(row)
        name = str(number if row.get("id") is None else row["id"])
        if name in seen:
            raise InputError(f"{path} row {number}: the id '{name}' is there twice")
        seen.add(name)
        fields = {key: value for key, value in row.items() if key not in ("id", "prompt", "cluster")}
        cluster = name if row.get("cluster") is None else str(row["cluster"])
        prompts.append(PromptRow(name, prompt, cluster, fields))
    return prompts


def without_nan(row: Row) -> Row:
    """A row in which what another row's column left empty is null: a table of numbers has NaN there."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def is_prompt(value: object) -> bool:
    """Whether a value is text that is not blank, or messages of which the last is somebody else's than the assistant's."""
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
        and all(m.get("role") in ("system", "user", "assistant", "tool") for m in value)
        and value[-1]["role"] != "assistant"
        and bool(value[-1]["content"].strip())
    )


@dataclass(frozen=True)
class Job:
    """A request and where its answer belongs."""

    request: Request
    row: PromptRow
    sample: int


def plan_jobs(
    tokenizer: Any,
    prompts: Sequence[PromptRow],
    policies: Sequence[Policy],
    *,
    template: str | None,
    samples: int,
    seed: int,
    max_length: int | None,
    max_new_tokens: int,
    identity: dict[str, Any],
    adapter_digests: dict[str, str],
) -> list[Job]:
    """Every (prompt, sample, policy), all policies of a prompt side by side, prompts by length.

    Args:
        max_length: Positions that the base has; a prompt that leaves no room for `max_new_tokens` is refused.
        identity: All else that decides an answer (base digest, sampling, dtype, engine): part of every key.

    Raises:
        InputError: A prompt is too long.
    """
    jobs = []
    for row in prompts:
        ids = tuple(encode_prompt(tokenizer, row.prompt, template))
        if max_length is not None and len(ids) + max_new_tokens > max_length:
            raise InputError(
                f"prompt '{row.id}' is {len(ids)} tokens and max_new_tokens {max_new_tokens}: over the base's "
                f"{max_length} positions",
                allowed="shorter prompts, or a smaller generation.max_new_tokens in psacpo.yaml",
            )
        for sample in range(samples):
            # One seed for all policies: common random numbers make their differences sharper.
            draw = int(digest([seed, row.id, sample])[:16], 16)
            for policy in policies:
                weights = {adapter_digests[name]: w for name, w in policy.weights.items() if w != 0}
                key = digest(identity | {"prompt_ids": ids, "weights": weights, "seed": draw})
                # Two policies with equal weights (q = 0 and a baseline) are two records of one answer.
                key = digest([key, policy.name])
                jobs.append(Job(Request(key, policy, ids, draw, row.prompt), row, sample))
    return sorted(jobs, key=lambda job: len(job.request.prompt_ids))
