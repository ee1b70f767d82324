"""What a terminal shows of a run: the table of policies and the verdict, 100 columns wide."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError


def read_frontier(run: Path) -> dict[str, Any]:
    """frontier.json of a run.

    Raises:
        InputError: There is none, or it is damaged.
    """
    path = run / "frontier.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{run} is no finished run (it holds no frontier.json)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(loaded, dict) or loaded.get("schema") != 1:
        raise InputError(f"{path} is not a frontier of schema 1")
    return loaded


def summary(run: Path) -> dict[str, Any]:
    """The machine's short form: where the run is, its choice and its counts."""
    found = read_frontier(run)
    return {
        "run": str(run),
        "report": str(run / "report.html"),
        "choice": found["choice"],
        "hypervolume": found["hypervolume"],
        "counts": found["counts"],
        "warnings": found["warnings"],
    }


def summary_lines(run: Path) -> list[str]:
    """A table of every policy and baseline with the metrics that matter, then the verdict."""
    found = read_frontier(run)
    columns = _columns(found)
    rows = [["policy", *columns, ""]]
    chosen = found["choice"]["policy"]
    for entry in (*found["points"], *found["baselines"]):
        name = entry.get("policy") or entry["name"]
        marks = ["chosen"] if name == chosen else ["certified"] if entry.get("certified") else []
        rows.append([name, *(_cell(entry.get(column)) for column in columns), " ".join(marks)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    choice, counts = found["choice"], found["counts"]
    verdict = f"chosen ratio: {choice['ratio']}" if choice["ratio"] is not None else "chosen ratio: none"
    lines += ["", f"{verdict}: {choice['why']}"]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines.append(
        f"{counts['generated']} answers to {counts['prompts']} prompts, {counts['truncated']} cut, "
        f"{counts['invalid']} invalid verdicts; report: {run / 'report.html'}"
    )
    return lines


def _columns(found: Mapping[str, Any]) -> list[str]:
    """The axes, the audit's axes, the constraints' metrics, then the rates, as many as fit."""
    names = list(found["axes"].values())
    names += [re.split("<=|>=", text)[0] for text in found["choice"]["constraints"]]
    names += list((found["audit"] or {}).values())
    names += [name for name, metric in found["metrics"].items() if metric["above"] is not None]
    names += list(found["metrics"])
    unique = list(dict.fromkeys(names))
    width, fitting = 14, []
    for name in unique:
        width += max(len(name), 6) + 2
        if width > 90:
            break
        fitting.append(name)
    return fitting


def _cell(value: Mapping[str, Any] | None) -> str:
    return "-" if value is None or value["mean"] is None else f"{value['mean']:.3f}"
