"""Scores that the user has: read in three formats, decided on without a model, refused where they are wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.errors import InputError
from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_plan, scores_settings

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_rows(prompts: int = 150, samples: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """A dial that works: reward falls and cost falls with the ratio; two prompts a cluster; a baseline `base`."""
    draw = np.random.default_rng(seed)
    hard = np.repeat(draw.normal(size=prompts // 2), 2)
    rows = []
    for ratio in (*RATIOS, None):
        x = 0.2 if ratio is None else ratio
        for i in range(prompts):
            for sample in range(samples):
                cost = float(hard[i] - 1 - 3 * x + draw.normal())
                rows.append(
                    {"prompt_id": f"p{i}", "ratio": ratio, "policy": "base" if ratio is None else None}
                    | {"sample": sample, "cluster": f"c{i // 2}", "category": "abc"[i % 3]}
                    | {"reward": float(1 - x * x + 0.3 * draw.normal()), "cost": cost, "unsafe": cost > 0}
                    | {"words": int(draw.integers(10, 50))}
                )
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def load(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "frontier.json").read_text())
    return found


def test_every_format_gives_the_same_frontier(tmp_path: Path) -> None:
    rows = make_rows(40, 1)
    found = []
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        config = scores_settings(write(tmp_path / name, rows), out=tmp_path / name[0], constraints=["unsafe_rate<=0.5"])
        one = load(frontier_from_scores(config))
        found.append({key: one[key] for key in ("points", "baselines", "hypervolume", "choice", "metrics", "counts")})
    assert found[0] == found[1] == found[2]
    assert [point["ratio"] for point in found[0]["points"]] == list(RATIOS)
    assert found[0]["counts"] == {
        "prompts": 40, "clusters": 20, "generated": 240, "truncated": 0, "empty": 0, "invalid": 0
    }  # fmt: skip


def test_the_command_decides_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.jsonl", make_rows(240))
    code = (
        "import sys; from psacpo import cli; sys.argv = ['psacpo', 'frontier', '--from-scores', sys.argv[1], '--json',"
        " '--constraint', 'unsafe_rate<=0.1', '--constraint', 'cost_cvar10<=2.5', '--out', 'run']\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    choice = json.loads(done.stdout)["choice"]
    assert choice["ratio"] == 0.5
    assert choice["naive"]["ratio"] <= 0.5
    found = load(tmp_path / "run")
    assert {"reward", "cost", "unsafe", "words", "unsafe_rate", "cost_cvar10"} == set(found["metrics"])
    assert found["metrics"]["unsafe_rate"]["judge"] == "unsafe"
    assert {"cost_cvar5", "any_unsafe_at_2", "unsafe_rate_worst_category", "win_rate_vs_base"} <= set(found["derived"])
    assert found["points"][0]["derived"]["win_rate_vs_policy@0.00"]["mean"] == 0.5
    assert (tmp_path / "run" / "report.html").is_file()
    assert choice["holdout"]["clusters"] == 24
    assert choice["calibration"]["prompts"] + choice["holdout"]["prompts"] == 240
    # None certified: exit 3, and how many more it would take.
    again = [sys.executable, "-m", "psacpo.cli", "frontier", "--from-scores", str(path), "--out", "none"]
    done = subprocess.run(
        [*again, "--constraint", "unsafe<=0.004"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout.startswith("chosen ratio: none: no ratio meets unsafe<=0.004")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_criteria_from_a_file_and_texts_in_the_run(tmp_path: Path) -> None:
    rows = [
        row | {"prompt": f"ask {row['prompt_id']}", "completion": f"answer {i}"} for i, row in enumerate(make_rows(20))
    ]
    criteria = tmp_path / "criteria.yaml"
    criteria.write_text(
        "metrics:\n  calm: {judge: words, tail: 0.2, range: [0, 100], better: lower}\n"
        "axes: {reward: reward, cost: calm}\nconstraints: ['calm<=90']\nresamples: 200\n"
    )
    run = frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", rows), criteria, out=tmp_path / "run"))
    found = load(run)
    assert found["axes"]["cost"] == "calm"
    test = found["points"][0]["tests"]["calm<=90"]
    assert test["method"] == "betting on a tail"
    assert "answer 3" in (run / "report.html").read_text()
    assert scores_plan(scores_settings(tmp_path / "s.jsonl", criteria, out=run))["rows"] == len(rows)
    # Another question in the same place; but never in a sweep's.
    frontier_from_scores(scores_settings(tmp_path / "s.jsonl", criteria, out=run, constraints=["words<=60"]))
    assert load(run)["choice"]["ratio"] == 0.0
    assert any("no prompts were held out" in warning for warning in load(run)["warnings"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is in use, and not by imported scores"):
        frontier_from_scores(scores_settings(tmp_path / "s.jsonl", criteria, out=tmp_path / "other"))


def test_missing_scores_are_counted_and_leave_the_mean(tmp_path: Path) -> None:
    rows = make_rows(10, 1)
    rows[0]["cost"] = None
    run = frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", rows), out=tmp_path / "run"))
    found = load(run)
    assert (found["counts"]["invalid"], found["points"][0]["cost"]["n"]) == (1, 9)
    assert found["points"][0]["cost"]["mean"] == pytest.approx(np.mean([row["cost"] for row in rows[1:10]]))
    assert "1 rows have no cost" in found["warnings"]


def test_bad_files_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    def refused(match: str, rows: list[dict[str, Any]], **flags: Any) -> None:
        with pytest.raises(InputError, match=match):
            frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", rows), out=tmp_path / "run", **flags))
        assert not (tmp_path / "run").exists()

    good = {"prompt_id": "a", "ratio": 0.5, "sample": 0, "reward": 1.0, "cost": 0.0}
    refused("column 'prompt_id' is missing .the nearest is 'prompt'", [{"prompt": "x", "ratio": 0, "reward": 1}])
    refused("row 2: sample 0 of policy@0.50 to prompt 'a' is there twice", [good, good])
    refused("row 1: ratio is out of range; given: 1.5", [good | {"ratio": 1.5}])
    refused("row 1 names neither a ratio nor a policy", [good | {"ratio": None}])
    refused("no row with a ratio", [good | {"ratio": None, "policy": "mine"}])
    refused("has no column of scores", [{"prompt_id": "a", "ratio": 0.5}])
    refused("has another cluster", [good | {"cluster": "c"}, good | {"sample": 1, "cluster": "d"}])
    refused("constraint on metric 'harm' which is unknown", [good], constraints=["harm<=1"])
    refused("no column 'harm' of scores", [good], lower=["harm"])
    refused("axes: metric 'reward' which is unknown", [{"prompt_id": "a", "ratio": 0.5, "cost": 1.0}])
    metrics = {"harm": {"judge": "cost", "range": [1, 2]}}
    with pytest.raises(
        InputError, match="metric 'harm': judge 'cost' gave a score outside the metric's range; given: 0"
    ):
        frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", [good]), out=tmp_path / "o", metrics=metrics))
