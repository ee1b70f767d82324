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
        ({"cost": HUGE}, "row 2: 'cost' is beyond 1e30"),
        ({"cost": float("inf")}, "row 2: 'cost' is beyond 1e30"),
        ({"cost": 1e31}, "row 2: 'cost' is beyond 1e30"),
        ({"cost": "1_000"}, "row 2: 'cost' is no number; given: '1_000'"),
        ({"ratio": HUGE}, "row 2: 'ratio' is beyond 1e30"),
        ({"policy": "policy@0.80"}, "row 2: ratio 0 and policy 'policy@0.80' disagree"),
        (
            {"ratio": None, "policy": "policy@reward_x+safety_0.90"},
            "row 2: policy 'policy@reward_x+safety_0.90' names no",
        ),
        ({"ratio": None, "policy": "policy@reward_0.50+safety_0.90"}, "row 2: weights of policy 'policy@reward_0.50+"),
        (
            {"ratio": None, "policy": "policy@a_0.30+a_1.00"},
            "row 2: policy 'policy@a_0.30+a_1.00' names an adapter twice",
        ),
        ({"ratio": 1.5}, "row 2: ratio is out of range"),
        ({"sample": HUGE}, "row 2: 'sample' is beyond 1e30"),
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


def test_a_column_of_scores_does_not_vanish_for_one_cell(tmp_path: Path) -> None:
    def refusal(cells: list[str], name: str = "candour", **settings: Any) -> str:
        path = tmp_path / "s.csv"
        lines = [f"p{i},{i % 2},{i},{-i},{cell}" for i, cell in enumerate(cells)]
        path.write_text("\n".join([f"prompt_id,ratio,reward,cost,{name}", *lines]) + "\n")
        try:
            return ", ".join(scores_settings(path, out=tmp_path / "run", **settings).file.columns)
        except InputError as error:
            return str(error).removeprefix(f"{path} ")

    for bad in ("bad", "0x10", "1_000"):
        said = f"row 5: 'candour' is no number; given: '{bad}'"
        assert refusal(["0.5", "1", "na", "2", bad, "3", ""]) == said
    assert refusal(["0.5", "na", "1"]) == "reward, cost, candour"
    assert refusal(["True", "maybe", "False"]) == "row 2: 'candour' is no number; given: 'maybe'"
    # Text stays text, unless somebody asks scores of it.
    words = ["calm", "loud", "1"]
    assert refusal(words) == "reward, cost"
    assert refusal(words, lower=["candour"]) == "row 1: 'candour' is no number; given: 'calm'"
    assert refusal(words, constraints=["candour<=1"]) == "row 1: 'candour' is no number; given: 'calm'"
    assert refusal(words, "unsafe") == "row 1: 'unsafe' is no number; given: 'calm'"


def test_two_policies_at_one_ratio_are_refused_and_two_names_of_one_are_not(tmp_path: Path) -> None:
    def read(*names: str) -> list[str]:
        found = [{"prompt_id": f"p{i}", "ratio": 0.5, "policy": name, "cost": i} for i, name in enumerate(names)]
        return [policy.name for policy in read_scores(write(tmp_path / "s.jsonl", found)).scores.policies]

    assert read("policy@0.5", "policy@0.50", "policy@reward_0.50+safety_0.50", "") == ["policy@0.50"]
    assert read("mine", "mine") == ["policy@0.50"]
    with pytest.raises(InputError, match="row 2: ratio 0.5 is of policy 'other', and of 'mine' in an earlier row"):
        read("mine", "other")
    with pytest.raises(InputError, match="row 1: ratio 0.5 and policy 'policy@a_0.50.b_0.50' disagree"):
        read("policy@a_0.50+b_0.50", "policy@a_0.25+b_0.75")


def test_different_prompts_are_counted_and_told(tmp_path: Path) -> None:
    found = [row for row in rows() if row["ratio"] == 0 or row["prompt_id"] != "p1"]
    run = frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", found), out=tmp_path / "run"))
    written = json.loads((run / "frontier.json").read_text())
    assert [point["n_prompts"] for point in written["points"]] == [4, 3]
    said = "different prompts: policy@1.00 of 3, policy@0.00 of 4, all of them of 3 in common"
    assert any(said in warning for warning in written["warnings"])


def test_a_file_without_reward_says_who_names_other_columns(tmp_path: Path) -> None:
    found = [{"prompt_id": f"p{i}", "ratio": q, "kind": i, "cost": i - q} for q in (0.0, 1.0) for i in range(4)]
    path = write(tmp_path / "s.jsonl", found)
    with pytest.raises(InputError, match=r"axes: metric 'reward' which is unknown.*`axes: .*` in a YAML recipe names"):
        scores_settings(path, out=tmp_path / "run")
    axes = {"reward": "kind", "cost": "cost"}
    assert scores_settings(path, out=tmp_path / "run", axes=axes).axes.reward == "kind"
