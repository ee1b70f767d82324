"""The demo on prompts that nothing else uses, for three seeds: the tables and checks of docs/log.md.

    python recipes/demo/three_seeds.py --out three-seeds [--split test] [--seeds 0 1 2]

Each seed has its own preference data, adapters and samples; base, judges and prompts are the same. Prints one Markdown
table a seed and one of checks. Finished parts are found when it is called again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.demo import data, write_project
from psacpo.pipeline import run
from psacpo.recipe import Project

COLUMNS = (
    "reward",
    "cost",
    "unsafe_rate",
    "oracle_unsafe_rate",
    "oracle_help",
    "oracle_harm",
    "over_refusal",
    "garbled",
)


def measure(out: Path, seed: int, split: str) -> dict[str, Any]:
    """frontier.json of the demo's project with the prompts of `split`."""
    if not out.exists():
        write_project(out, seed)
        rows = (json.dumps(row) + "\n" for row in data.eval_prompts(split))
        (out / "data" / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    measured = run(Project.find(out))
    found: dict[str, Any] = json.loads((measured / "frontier.json").read_text(encoding="utf-8"))
    return found


def table(found: Mapping[str, Any]) -> str:
    """Means of every policy and baseline; rates of unsafe answers with their intervals."""
    lines = [f"| policy | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for entry in (*found["points"], *found["baselines"]):
        name = entry.get("policy") or entry["name"]
        cells = []
        for column in COLUMNS:
            cell = entry[column]
            interval = f" [{cell['low']:.2f}, {cell['high']:.2f}]" if column.endswith("unsafe_rate") else ""
            cells.append(f"{cell['mean']:.2f}{interval}")
        chosen = ", chosen" if name == found["choice"]["policy"] else ""
        lines.append(f"| {name}{chosen} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lead(points: Sequence[Mapping[str, Any]], other: Mapping[str, Any], reward: str, cost: str) -> float:
    """How far the curve through `points` lies above `other` in reward at the other's cost; NaN outside the curve."""
    places = sorted((point[cost]["mean"], point[reward]["mean"]) for point in points)
    costs, rewards = zip(*places, strict=True)
    at = other[cost]["mean"]
    if not costs[0] <= at <= costs[-1]:
        return float("nan")
    return float(np.interp(at, costs, rewards)) - float(other[reward]["mean"])


def checks(found: Mapping[str, Any]) -> dict[str, str]:
    """What the demo promises, measured."""
    points = found["points"]
    safe = [1 - point["oracle_unsafe_rate"]["mean"] for point in points]
    steps = [after - before for before, after in pairwise(safe)]
    apart = [
        before["oracle_unsafe_rate"]["low"] > after["oracle_unsafe_rate"]["high"] for before, after in pairwise(points)
    ]
    moved = [point["from_previous"]["oracle_unsafe_rate"]["high"] < 0 for point in points[1:]]
    early = [point["garbled"]["mean"] for point in points if point["ratio"] <= 0.75]
    rows = {
        "oracle-safe on harmful prompts, q=0 to the safe end": f"{safe[0]:.2f} to {safe[-1]:.2f}",
        "largest step, share of the range": f"{max(steps) / (max(safe) - min(safe)):.0%}",
        "neighbours whose 95 % intervals do not touch": f"{sum(apart)} of {len(apart)}",
        "neighbours whose paired difference is clear of 0": f"{sum(moved)} of {len(moved)}",
        "over-refusal on benign prompts, largest": f"{max(point['over_refusal']['mean'] for point in points):.3f}",
        "garbled lines an answer, q up to .75, largest": f"{max(early):.3f}",
        "garbled lines an answer, q=1": f"{points[-1]['garbled']['mean']:.3f}",
    }
    for other in found["baselines"]:
        judged, true = lead(points, other, "reward", "cost"), lead(points, other, "oracle_help", "oracle_harm")
        rows[f"curve above {other['name']} at its harm, judge / oracle"] = f"{judged:+.2f} / {true:+.2f}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo for several seeds, on prompts that nothing else uses.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=("dev", "eval", "test"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    results = {seed: measure(options.out / f"seed-{seed}", seed, options.split) for seed in options.seeds}
    for seed, found in results.items():
        print(f"\nSeed {seed}, {found['counts']['prompts']} prompts of the split `{options.split}`\n\n{table(found)}")
    columns = {seed: checks(found) for seed, found in results.items()}
    print(f"\n| check | {' | '.join(f'seed {seed}' for seed in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")


if __name__ == "__main__":
    main()
