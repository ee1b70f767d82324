"""The files of a run directory, and what their records must hold."""

from __future__ import annotations

from pathlib import Path

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


def is_completion(record: Record) -> bool:
    """Whether a record is an answer: a text, and how it ended."""
    return isinstance(record.get("text"), str) and record.get("finish_reason") in ("stop", "length")


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
