"""Files of scores that are wrong: one line that says where, nothing written; and odd ones that are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psacpo.errors import InputError
from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_plan, scores_settings
from psacpo.evalharness.decision.score_files import read_scores
from psacpo.evalharness.report.records import read_run

HUGE = 10**400  # JSON's numbers have no end


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Two ratios, four prompts; `changes` are of the second row."""
    found = [
        {"prompt_id": f"p{i}", "ratio": q, "sample": 0, "reward": 1 - q, "cost": i - q}
        for q in (0.0, 1.0)
        for i in range(4)
    ]
    found[1] |= changes
    return found


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cost": HUGE}, "row 2: cost is no number"),
        ({"cost": float("inf")}, "row 2: cost is no finite number"),
        ({"cost": 1e31}, "row 2: cost is no finite number"),
        ({"ratio": HUGE}, "row 2: ratio is no number"),
        ({"ratio": 1.5}, "row 2: ratio is out of range"),
        ({"sample": HUGE}, "row 2: sample is no number"),
        ({"sample": -1}, "row 2: sample is no number of an answer"),
        ({"prompt_id": "p0"}, "row 2: sample 0 of policy@0.00 to prompt 'p0' is there twice"),
        ({"prompt_id": ""}, "row 2: prompt_id is empty"),
    ],
)
def test_a_wrong_cell_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "s.jsonl", rows(**changes))
    with pytest.raises(InputError) as refused:
        scores_settings(path, out=tmp_path / "run")
    # The file is named once, though both the settings and the reader could.
    assert str(refused.value).startswith(f"{path} {said}")
    assert str(refused.value).count(str(path)) == 1
    assert not (tmp_path / "run").exists()


def test_numbers_of_samples_with_gaps_take_no_room(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", rows(sample=99_999))
    read = read_scores(path)
    assert read.scores.values["cost"].shape == (2, 4, 2)
    assert read.table[1]["sample"] == 99_999
    many = [{"prompt_id": f"p{i}", "ratio": i % 2, "sample": i, "cost": 1} for i in range(3000)]
    with pytest.raises(InputError, match="3000 different numbers for 2 policies and 3000 prompts"):
        read_scores(write(tmp_path / "many.jsonl", many))


def test_scores_at_the_edge_of_what_is_allowed_make_a_run(tmp_path: Path) -> None:
    found = [row | {"cost": row["cost"] * 1e29, "reward": row["reward"] * 1e29} for row in rows()]
    run = frontier_from_scores(
        scores_settings(write(tmp_path / "s.jsonl", found), out=tmp_path / "run", constraints=["cost<=0"])
    )
    assert read_run(run).frontier.hypervolume is not None


def test_a_metric_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    path, run = write(tmp_path / "s.jsonl", rows()), tmp_path / "run"
    frontier_from_scores(scores_settings(path, out=run))
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    for metric in ({"judge": "cost", "range": [0, 1]}, {"judge": "cost", "worst": "topic"}):
        for out in (tmp_path / "new", run):
            wrong = scores_settings(path, out=out, metrics={"m": metric})
            for job in (scores_plan, frontier_from_scores):
                with pytest.raises(InputError, match="metric 'm': "):
                    job(wrong)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_a_csv_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes("prompt_id,ratio,cost\né,0,1\n".encode("latin1"))
    with pytest.raises(InputError, match="column 'prompt_id' holds text that is no UTF-8"):
        read_scores(path)
