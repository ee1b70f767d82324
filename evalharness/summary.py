"""What a terminal shows of a run: the verdict and the table of policies, 100 columns wide."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.adaptive.settings import account_lines
from psacpo.evalharness.weights import adapters_of, percents, weights_text

WIDTH = 100


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
    except (OSError, ValueError, RecursionError) as error:
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
    """The verdict, then a table of every policy and baseline with the metrics that matter, no line over `WIDTH`."""
    found = read_frontier(run)
    choice, counts = found["choice"], found["counts"]
    head = "/".join(adapters_of(one["weights"] for one in found["points"] if "weights" in one))
    entries = [*found["points"], *found["baselines"]]
    # Where an adaptive sweep asked some policies more than others.
    counted = any("answered" in entry for entry in entries)
    columns = _columns(found, counted)
    rows = [[f"{head} %" if head else "policy", *columns, "verdict" if choice["constraints"] else ""]]
    if counted:
        rows[0].insert(1, "answered")
    for entry in entries:
        name = entry.get("policy") or entry["name"]
        mark = "chosen" if name == choice["policy"] else "certified" if entry.get("certified") else ""
        rows.append([_called(entry, head), *(_cell(entry.get(column)) for column in columns), mark])
        if counted:
            rows[-1].insert(1, str(entry.get("answered", "-")))
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table.insert(1, "-" * max(map(len, table)))
    what = "weights" if "weights" in found["points"][0] else "ratio"
    told = account_lines(found["adaptive"]) if "adaptive" in found else []
    chosen = said_of(choice) if choice["policy"] is not None else "none"
    return [
        *_folded(f"chosen {what}: {chosen}: {choice['why']}"),
        "",
        *table,
        "",
        *_folded(_naive(choice)),
        *(line for text in told for line in _folded(text)),
        *(line for warning in found["warnings"] for line in _folded(f"warning: {warning}")),
        (
            f"{counts['generated']} answers to {counts['prompts']} prompts, {counts['truncated']} cut, "
            f"{counts['invalid']} invalid verdicts"
        ),
        f"report: {run / 'report.html'}",
    ]


def _naive(choice: Mapping[str, Any]) -> str:
    """What looks best by its means, where that is not what was chosen; "" where there is nothing to say."""
    naive = choice.get("naive")
    if naive is None or naive["policy"] == choice["policy"]:
        return ""
    sure = "is" if naive["certified"] else "is not"
    return f"by means alone it would be {said_of(naive)}, which {sure} certified"


def said_of(point: Mapping[str, Any]) -> str:
    """A point's ratio, or its weights where it has none."""
    return weights_text(point["weights"]) if point["ratio"] is None else f"{point['ratio']:g}"


def _folded(text: str) -> list[str]:
    """`text` in lines of at most `WIDTH`; a longer word (a path) stays whole, to be copied."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _called(entry: Mapping[str, Any], head: str) -> str:
    """A row's name: its policy's, or its weights in percent under `head`, their adapters."""
    if "weights" in entry:
        return percents(entry["weights"], head.split("/"))
    return _short(entry.get("policy") or entry["name"])


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _columns(found: Mapping[str, Any], counted: bool) -> list[str]:
    """The axes, the audit's axes, the constraints' metrics, then the rates, as many as fit."""
    names = list(found["axes"].values())
    names += [re.split("<=|>=", text)[0] for text in found["choice"]["constraints"]]
    names += list((found["audit"] or {}).values())
    names += [name for name, metric in found["metrics"].items() if metric["above"] is not None]
    names += list(found["metrics"])
    unique = list(dict.fromkeys(names))
    policies = [entry.get("policy") or entry["name"] for entry in (*found["points"], *found["baselines"])]
    width, fitting = max(len(_short(name)) for name in policies) + 2 + len("certified"), []
    width += len("  answered") if counted else 0
    for name in unique:
        width += max(len(name), 6) + 2
        if width > WIDTH:
            break
        fitting.append(name)
    return fitting


def _cell(value: Mapping[str, Any] | None) -> str:
    return "-" if value is None or value["mean"] is None else f"{value['mean']:.3f}"
