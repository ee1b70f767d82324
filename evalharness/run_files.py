"""The files of a run directory, and what their records must hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from psacpo.evalharness.records import Record
from psacpo.files import read_manifest

FRONTIER, COMPLETIONS, VERDICTS, PROMPTS, PLAN, FAILURES, BASE_LOG_PROBS = (
    "frontier.json",
    "completions.jsonl",
    "verdicts.jsonl",
    "prompts.jsonl",
    "plan.json",
    "failures.jsonl",
    "base_log_probs.jsonl",
)


# Of a sum of log-probabilities, which is 0 at most but for rounding.
_ROUNDING = 1e-3


def is_completion(record: Record) -> bool:
    """Whether a record is an answer: a text, how it ended, and its tokens and their log-probability if it has them."""
    tokens, end, log_prob = record.get("token_ids", []), record.get("end_id"), record.get("log_prob")
    return (
        isinstance(record.get("text"), str)
        and record.get("finish_reason") in ("stop", "length")
        and isinstance(tokens, list)
        and all(map(_is_token, tokens))
        and (end is None or _is_token(end))
        and (log_prob is None or is_log_prob(log_prob))
    )


def is_log_prob(value: Any) -> bool:
    """Whether a value is the log-probability of an answer, in nats: a finite float, not above 0 but for rounding."""
    return isinstance(value, float) and math.isfinite(value) and value <= _ROUNDING


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_answer(record: Record) -> bool:
    """Whether a record says whose answer it is."""
    tokens = record.get("n_tokens")
    return (
        all(isinstance(record.get(name), str) for name in ("key", "policy", "prompt_id"))
        and type(record.get("sample")) is int
        and 0 <= record["sample"] < 100_000
        and (tokens is None or type(tokens) is int)
    )


def is_prompt_row(record: Record) -> bool:
    """Whether a record is a prompt as a run stores it; scores may come without its text."""
    return all(isinstance(record.get(name), str) for name in ("id", "cluster")) and isinstance(
        record.get("prompt"), str | list
    )


def is_run(source: Path) -> bool:
    """Whether a place is the directory of a `psacpo frontier`."""
    manifest = read_manifest(source) if source.is_dir() else None
    return manifest is not None and manifest.get("kind") == "frontier"
