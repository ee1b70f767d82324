"""A synthetic run with hostile text everywhere a text can stand, for the tests of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MARKUP = "</script><img src=x onerror=alert(1)>"
ANSI = "\x1b[31mred\x1b[0m"
BIDI = "safe\u202eefasnu"
FORMULA = "=cmd()"
HOSTILE = f"{MARKUP} {ANSI} {BIDI} \u2028 </title><svg onload=alert(2)> {{{{ 7*7 }}}} $\\frac{{"
RATIOS = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
JUDGES = {"reward": "higher", "cost": "lower", "refusal": "lower", "oracle_help": "higher", "oracle_harm": "lower"}
METRICS = [*JUDGES, "unsafe_rate", "over_refusal"]
LIMIT = "unsafe_rate<=0.05"

MakeRun = Callable[..., Path]


def synthetic(seed: int = 0) -> dict[str, Any]:
    """frontier.json of nine ratios and two baselines; q = 0.5 is chosen."""
    draw_number = np.random.default_rng(seed)

    def estimate(mean: float) -> dict[str, Any]:
        half = float(draw_number.uniform(0.01, 0.2))
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": 12}

    def measured(q: float, shift: float = 0.0) -> dict[str, Any]:
        means = [
            1 - q**2 - shift,
            -2 * q - 0.3 + shift,
            0.4 * q,
            1 - q**2 / 2 - shift,
            0.5 - q / 2,
            0.4 * (1 - q),
            0.1 * q,
        ]
        return {name: estimate(mean) for name, mean in zip(METRICS, means, strict=True)}

    points = [
        {
            "ratio": q,
            "policy": f"policy@{q:g}",
            "n_prompts": 12,
            **measured(q),
            "p_on_frontier": 1 - q / 3,
            "nondominated": q != 0.25,
            "certified": q >= 0.5,
            "bounds": {LIMIT: 0.4 * (1 - q) + 0.01},
        }
        for q in RATIOS
    ]
    judges: dict[str, Any] = {
        name: {"kind": "scalar", "model": f"judges/{name}", "better": better, "digest": name * 4}
        for name, better in JUDGES.items()
    }
    judges["refusal"] = {"kind": "refusal", "better": "lower", "digest": "refusal" * 4}
    metrics: dict[str, Any] = {
        name: {"judge": name, "better": better, "above": None, "where": {}} for name, better in JUDGES.items()
    }
    metrics["unsafe_rate"] = {"judge": "cost", "better": "lower", "above": 0.5, "where": {"category": "harmful"}}
    metrics["over_refusal"] = {"judge": "refusal", "better": "lower", "above": 0.5, "where": {"category": HOSTILE}}
    return {
        "schema": 1,
        "axes": {"reward": "reward", "cost": "cost"},
        "audit": {"reward": "oracle_help", "cost": "oracle_harm"},
        "metrics": metrics,
        "judges": judges,
        "points": points[::-1],
        "baselines": [
            {"name": FORMULA, "n_prompts": 12, **measured(0.5, 0.6)},
            {"name": HOSTILE, "n_prompts": 12, **measured(0.2, 0.9)},
        ],
        "hypervolume": {"value": 1.2, "low": 1.1, "high": 1.3, "reference": {"reward": 0.0, "cost": 0.0}},
        "choice": {
            "ratio": 0.5,
            "policy": "policy@0.5",
            "constraints": [LIMIT],
            "confidence": 0.95,
            "method": "fixed-sequence test",
            "why": "why " + HOSTILE,
        },
        "counts": {"prompts": 12, "generated": 132, "invalid": 1, "truncated": 1, "clusters": 4, HOSTILE: 0},
        "warnings": ["first warning", HOSTILE],
        "command": "psacpo frontier " + HOSTILE,
    }


def prompt_rows(count: int = 12) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"id": f"p{i}", "prompt": f"prompt number {i}", "category": ("harmful", "benign", HOSTILE)[i % 3]}
        for i in range(count)
    ]
    rows[0]["prompt"] = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": f"a\r\nb {HOSTILE}"}]
    rows[1]["id"] = HOSTILE
    return rows


def records(frontier: dict[str, Any], prompts: list[dict[str, Any]]) -> tuple[list[Any], list[Any], list[str]]:
    """Completions, verdicts and the plan: two samples nowhere, hostile text, one cut, one invalid, stale rows."""
    completions, verdicts, plan = [], [], []
    policies = [(p["policy"], p["ratio"]) for p in frontier["points"]] + [
        (b["name"], None) for b in frontier["baselines"]
    ]
    for name, ratio in policies:
        for place, row in enumerate(prompts):
            key = hashlib.sha256(json.dumps([name, row["id"]]).encode()).hexdigest()
            plan.append(key)
            completions.append(
                {
                    "key": key,
                    "policy": name,
                    "ratio": ratio,
                    "prompt_id": row["id"],
                    "sample": 0,
                    "text": f"{name} answers {place} {HOSTILE} \ud800",
                    "n_tokens": 10,
                    "finish_reason": "length" if (name, place) == ("policy@0.25", 3) else "stop",
                }
            )
            for judge, better in JUDGES.items():
                invalid = (name, place, judge) == ("policy@0", 2, "reward")
                # Above the metric's limit of 0.5 for one answer only; between 0 and 0.5 for another.
                score = {("policy@0", 0, "cost"): 0.75, ("policy@0", 1, "cost"): 0.25}.get((name, place, judge), -1.5)
                verdicts.append(
                    {
                        "key": key + judge,
                        "completion": key,
                        "judge": judge,
                        "judge_digest": judge * 4,
                        "score": None if invalid else score,
                        "label": None,
                        "probability": None,
                        "raw": HOSTILE if invalid else None,
                        "valid": not invalid,
                        "direction": better,
                    }
                )
    stale = completions[0] | {"key": "stale", "text": "STALE COMPLETION"}
    old_verdict = verdicts[0] | {"key": "old", "judge_digest": "another", "score": 987.5}
    return [*completions, stale], [*verdicts, old_verdict], plan


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(run: Path, change: Callable[[dict[str, Any]], object] | None = None, *, prompts: int = 12) -> Path:
    """A run directory of the synthetic frontier, completions and verdicts; `change` may edit the frontier."""
    run.mkdir()
    frontier, rows = synthetic(), prompt_rows(prompts)
    completions, verdicts, plan = records(frontier, rows)
    if change is not None:
        change(frontier)
    (run / "frontier.json").write_text(json.dumps(frontier), encoding="utf-8")
    (run / "plan.json").write_text(json.dumps({"completions": plan}), encoding="utf-8")
    (run / "prompts.jsonl").write_text(lines(rows), encoding="utf-8")
    (run / "completions.jsonl").write_text(lines(completions), encoding="utf-8")
    (run / "verdicts.jsonl").write_text(lines(verdicts), encoding="utf-8")
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a synthetic run: `make_run(change=lambda frontier: ..., prompts=12)`."""

    def make(change: Callable[[dict[str, Any]], object] | None = None, *, prompts: int = 12, name: str = "run") -> Path:
        return write_run(tmp_path / name, change, prompts=prompts)

    return make
