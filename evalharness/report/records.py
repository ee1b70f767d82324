"""A run directory's records, read back: only what belongs to the run's present settings, every string harmless.

A run that was made from a user's own scores may have no completions: its points are then all there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.intrinsic import INTRINSIC
from psacpo.evalharness.judges import make_judge
from psacpo.evalharness.report.schema import Frontier, harmless, parse_frontier

FRONTIER = "frontier.json"
PLAN = "plan.json"
PROMPTS = "prompts.jsonl"
COMPLETIONS = "completions.jsonl"
VERDICTS = "verdicts.jsonl"
MANIFEST = "psacpo.json"


@dataclass(frozen=True)
class Verdict:
    """One judge's view of one completion; `score` is None where the verdict is invalid.

    Attributes:
        failed: The judge could not be asked.
        usage: What asking took, such as {"prompt_tokens": 812}.
        content: Digest of all that the judge read; equal for answers that were judged once for all.
    """

    score: float | None
    label: str | None = None
    raw: str | None = None
    probability: float | None = None
    failed: bool = False
    usage: Mapping[str, Any] = field(default_factory=dict)
    content: str | None = None


@dataclass(frozen=True)
class Completion:
    """One answer of one policy, with the verdict of each judge that gave one."""

    policy: str
    prompt_id: str
    sample: int
    text: str
    n_tokens: int | None
    truncated: bool
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    key: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True)
class Run:
    """What the report is made of.

    Attributes:
        prompts: Prompt id -> its row, in the file's order.
        completions: (policy, prompt id) -> its samples in order.
        notes: What the files lack or hold beyond the frontier, one sentence each.
        manifest: psacpo.json, empty where there is none.
        texts: Whether the run has completions at all; a run made from scores has none.
    """

    frontier: Frontier
    prompts: dict[str, dict[str, Any]]
    completions: dict[tuple[str, str], list[Completion]]
    notes: list[str]
    manifest: dict[str, Any] = field(default_factory=dict)
    texts: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run was made with, empty where nobody knows."""
        found = self.manifest.get("config")
        return found if isinstance(found, dict) else {}


def read_run(run: Path) -> Run:
    """Read the records of a run.

    completions.jsonl and verdicts.jsonl are logs that also hold what earlier settings made; plan.json names the
    completions of the present ones, and frontier.json the digest of each judge.

    Raises:
        InputError: `run` is not a finished run, or a file is missing or damaged.
    """
    if not (run / FRONTIER).is_file():
        raise InputError(f"{run} holds no {FRONTIER}", allowed="the output directory of a finished psacpo frontier")
    frontier = parse_frontier(_read_json(run / FRONTIER), where=str(run / FRONTIER))
    manifest = _read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
    if not isinstance(manifest, dict):
        raise InputError(f"{run / MANIFEST} is damaged: not a JSON object")
    if not any((run / name).exists() for name in (PLAN, COMPLETIONS)):
        return Run(frontier, {}, {}, [], manifest, texts=False)
    planned = _planned(run / PLAN)
    prompts = {_get(row, "id", str, where): row for where, row in _read_lines(run / PROMPTS)}
    for key, row in prompts.items():
        row["messages"] = _messages(row.get("prompt"), f"{run / PROMPTS}: prompt '{key}'")
    verdicts = _verdicts(run / VERDICTS, frontier, planned)
    found = _completions(run / COMPLETIONS, planned, verdicts)

    names = {policy.name for policy in frontier.policies()}
    kept = [item for item in found.values() if item.policy in names and item.prompt_id in prompts]
    grouped: dict[tuple[str, str], list[Completion]] = {}
    for item in sorted(kept, key=lambda item: item.sample):
        grouped.setdefault((item.policy, item.prompt_id), []).append(item)
    notes = []
    if missing := len(planned) - len(found):
        notes.append(f"{missing} of {len(planned)} planned completions have no record in {COMPLETIONS}.")
    if strange := len(found) - len(kept):
        notes.append(f"{strange} completions are of policies or prompts that {FRONTIER} and {PROMPTS} do not hold.")
    return Run(frontier, prompts, grouped, notes, manifest, texts=bool(planned))


def _planned(path: Path) -> frozenset[str]:
    plan = _read_json(path)
    keys = plan.get("completions") if isinstance(plan, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path} is damaged: it holds no list 'completions' of keys")
    return frozenset(keys)


def _completions(
    path: Path, planned: frozenset[str], verdicts: Mapping[str, dict[str, Verdict]]
) -> dict[str, Completion]:
    """The planned completions by key; of two records of one key the later counts."""
    found = {}
    for where, row in _read_lines(path):
        key = _get(row, "key", str, where)
        if key not in planned:
            continue
        tokens = row.get("n_tokens")
        found[key] = Completion(
            policy=_get(row, "policy", str, where),
            prompt_id=_get(row, "prompt_id", str, where),
            sample=_get(row, "sample", int, where),
            text=_get(row, "text", str, where),
            n_tokens=tokens if isinstance(tokens, int) else None,
            truncated=row.get("finish_reason") == "length",
            verdicts=verdicts.get(key, {}),
            key=key,
            finish_reason=_text(row.get("finish_reason")),
        )
    return found


def _verdicts(path: Path, frontier: Frontier, planned: frozenset[str]) -> dict[str, dict[str, Verdict]]:
    """Completion key -> judge -> verdict, of the judges as this run used them; the later of two records counts."""
    # Two judges with equal settings have one digest, and share their verdicts; so does one with a rule that is always there.
    names: dict[str, list[str]] = {}
    for name, judge in frontier.judges.items():
        names.setdefault(judge.digest, []).append(name)
    for rule in frontier.intrinsic:
        own = make_judge(rule, INTRINSIC[rule], device="cpu", allow_code=False).digest if rule in INTRINSIC else None
        if own in names:
            names[own].append(rule)
    found: dict[str, dict[str, Verdict]] = {}
    for where, row in _read_lines(path):
        key = _get(row, "completion", str, where)
        judges = names.get(_get(row, "judge_digest", str, where), [])
        if not judges and row.get("judge") in frontier.intrinsic:
            # The rules that are always there have no entry among the judges.
            judges = [str(row["judge"])]
        if key not in planned or not judges:
            continue
        score = row.get("score")
        if isinstance(score, bool) or not (score is None or isinstance(score, int | float)):
            raise InputError(f"{where} is damaged: 'score' is not a number", given=score)
        usable = score is not None and row.get("valid") is True and math.isfinite(score)
        probability, usage = row.get("probability"), row.get("usage")
        verdict = Verdict(
            score=score if usable else None,
            label=_text(row.get("label")),
            raw=_text(row.get("raw")),
            probability=probability if isinstance(probability, float) and math.isfinite(probability) else None,
            failed=row.get("failed") is True,
            usage=usage if isinstance(usage, dict) else {},
            content=_text(row.get("content")),
        )
        found.setdefault(key, {}).update(dict.fromkeys(judges, verdict))
    return found


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _messages(prompt: object, where: str) -> list[tuple[str, str]]:
    """A prompt as (role, content) pairs; a plain string is the user's. Scores may come without prompts."""
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [("user", prompt)]
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [(str(message.get("role", "user")), str(message.get("content", ""))) for message in prompt]
    raise InputError(f"{where} is damaged", allowed="a string, or a list of {role, content}")


def _read_json(path: Path) -> Any:
    try:
        return harmless(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no {path.name}", allowed="a finished psacpo frontier") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place for messages.

    A last line without its end is a record that an interruption cut short: it was never finished, so it is not read.
    """
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                where = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = harmless(json.loads(line))
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        return
                    raise InputError(f"{where} is damaged: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{where} is damaged: not a JSON object")
                yield where, row
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no {path.name}", allowed="a finished psacpo frontier") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _get(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise InputError(f"{where} is damaged: '{name}' is {'missing' if value is None else 'of the wrong kind'}")
    return value
