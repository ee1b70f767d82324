"""Two runs' scores, read from their directories and paired by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.decision.score_files import read_scores
from psacpo.evalharness.decision.scores import Score, Scores, tabulate
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.judging.verdicts import is_verdict
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.records import read_records
from psacpo.evalharness.report.schema import parse_frontier
from psacpo.evalharness.run_files import is_answer, is_prompt_row
from psacpo.evalharness.summary import read_frontier
from psacpo.files import digest, read_manifest

NAMES = ("A", "B")


@dataclass(frozen=True)
class Run:
    """One run's scores, and what its frontier.json says."""

    path: Path
    frontier: Mapping[str, Any]
    scores: Scores


def read_run(path: Path) -> Run:
    """A run of a sweep or of imported scores; of a sweep the answers and verdicts of its present settings."""
    frontier = read_frontier(path)
    parse_frontier(frontier, where=str(path / "frontier.json"))
    manifest = read_manifest(path) or {}
    if "scores" in manifest.get("inputs", {}):
        return Run(path, frontier, read_scores(path / "scores.jsonl").scores)
    prompts = {
        str(row["id"]): PromptRow(
            str(row["id"]),
            row["prompt"],
            str(row["cluster"]),
            {key: value for key, value in row.items() if key not in ("id", "prompt", "cluster", "prompt_ids")},
        )
        for row in read_records(path / "prompts.jsonl", is_prompt_row)
    }
    names = {entry.get("policy") or entry["name"]: entry for entry in _entries(frontier)}
    answers = read_records(path / "completions.jsonl", is_answer)
    completions = {row["key"]: row for row in answers if row["policy"] in names}
    judges: dict[str, list[str]] = {}
    for name, judge in frontier["judges"].items():
        judges.setdefault(judge["digest"], []).append(name)
    verdicts: dict[tuple[str, str], float] = {}
    for row in read_records(path / "verdicts.jsonl", is_verdict):
        intrinsic = [row["judge"]] if row["judge"] in frontier.get("intrinsic", []) else []
        for name in judges.get(row["judge_digest"], intrinsic):
            verdicts.pop((row["completion"], name), None)
            if row["valid"] and row["completion"] in completions:
                verdicts[row["completion"], name] = float(row["score"])
    planned = set(_planned(path))
    scores = [
        Score(row["policy"], prompts[row["prompt_id"]], name, value, row["sample"])
        for (key, name), value in verdicts.items()
        if key in planned and (row := completions[key])["prompt_id"] in prompts
    ]
    policies = [
        Policy(name, entry.get("weights", {}), entry.get("ratio"), point="weights" in entry)
        for name, entry in names.items()
    ]
    return Run(path, frontier, tabulate(policies, list(prompts.values()), scores))


def _planned(path: Path) -> list[str]:
    try:
        found = json.loads((path / "plan.json").read_text(encoding="utf-8"))["completions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path / 'plan.json'} is missing or damaged: {error}") from error
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path / 'plan.json'} is damaged: it holds no list of completions")
    return found


def _entries(frontier: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*frontier["points"], *frontier["baselines"]]


def paired(runs: tuple[Run, Run]) -> tuple[Scores, Scores]:
    """Both runs' scores on the prompts that both have, in one order and with the clusters of the first.

    Of an adaptive sweep, on those that all of its points answered: means over other prompts are not to be compared.

    Raises:
        InputError: There is no such prompt.
    """
    keys = [{_identity(run.scores.prompts[place]): place for place in _comparable(run)} for run in runs]
    shared = [key for key in keys[0] if key in keys[1]]
    if not shared:
        raise InputError(
            f"{runs[0].path} and {runs[1].path} have no prompt in common",
            allowed="two runs of the same prompts, or of some of them",
        )
    first = [runs[0].scores.prompts[keys[0][key]] for key in shared]
    found = []
    for run, places in zip(runs, keys, strict=True):
        order = [places[key] for key in shared]
        own = [run.scores.prompts[place] for place in order]
        rows = [replace(row, cluster=mate.cluster) for row, mate in zip(own, first, strict=True)]
        values = {name: values[:, order] for name, values in run.scores.values.items()}
        found.append(Scores(run.scores.policies, rows, values))
    return found[0], found[1]


def _comparable(run: Run) -> list[int]:
    """The places of the prompts that can be set side by side."""
    if "adaptive" not in run.frontier:
        return list(range(len(run.scores.prompts)))
    answered = np.all([run.scores.scored(k) for k in run.scores.swept], axis=0)
    return [int(place) for place in np.flatnonzero(answered)]


def _identity(row: PromptRow) -> str:
    return digest(["text", row.prompt]) if row.prompt else digest(["id", row.id])


def left_out(runs: tuple[Run, Run], shared: Scores) -> list[str]:
    """How many prompts of each run count for nothing, in words."""
    adaptive = any("adaptive" in run.frontier for run in runs)
    why = "are not in the other" + (
        ", or not every point answered them, and are left out" if adaptive else " and are left out"
    )
    return [
        f"{len(run.scores.prompts) - len(shared.prompts)} prompts of run {name} {why}"
        for name, run in zip(NAMES, runs, strict=True)
        if len(run.scores.prompts) > len(shared.prompts)
    ]
