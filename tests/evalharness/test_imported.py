"""Scores from files: rows, lm-eval's samples, inspect's log; each keyed by prompt, policy and sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psacpo.errors import InputError
from psacpo.evalharness.judges import Item, make_judge
from psacpo.evalharness.judges.base import Verdict
from psacpo.evalharness.judges.rule_settings import ImportJudge


def verdicts(path: Path, *whose: tuple[str, str, int], **settings: Any) -> list[Verdict]:
    judge = make_judge("people", ImportJudge(kind="import", path=path, **settings), device="cpu", allow_code=False)
    return judge.judge([Item("p", "c", prompt_id=prompt, policy=policy, sample=n) for prompt, policy, n in whose])


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_found_by_prompt_policy_and_sample(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(
        "prompt_id,ratio,sample,score,kind\na,0.5,0,2,x\na,0.5,1,3.5,x\na,1,0,,x\n7,1,0,-1,x\n"
    )
    whose = [("a", "policy@0.50", 0), ("a", "policy@0.50", 1), ("7", "policy@1.00", 0)]
    found = verdicts(tmp_path / "s.csv", *whose, ("a", "policy@1.00", 0), ("b", "policy@0.50", 0))
    assert [verdict.score for verdict in found] == [2.0, 3.5, -1.0, None, None]
    assert found[3].raw == "the row holds no score"
    assert found[4].raw == "no row for prompt 'b', policy 'policy@0.50', sample 0"
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": ["a", "b"], "policy": ["base", "base"], "safety": [True, False]})
    parquet.write_table(table, tmp_path / "s.parquet")
    found = verdicts(tmp_path / "s.parquet", ("a", "base", 0), ("b", "base", 0), score="safety")
    assert [verdict.score for verdict in found] == [1.0, 0.0]


def test_lm_eval_samples(tmp_path: Path) -> None:
    """Fields as lm-eval 0.4's `--log_samples` writes them."""
    common = {"arguments": [], "resps": [["x"]], "filtered_resps": ["x"], "filter": "none", "metrics": ["acc"]}
    path = write(
        tmp_path / "samples_task_2026.jsonl",
        {"doc_id": 0, "doc": {"id": "q-1"}, "target": "x", "doc_hash": "h", "acc": 1.0} | common,
        {"doc_id": 1, "doc": {"question": "?"}, "target": "x", "doc_hash": "h", "acc": 0.0} | common,
    )
    found = verdicts(path, ("q-1", "base", 0), ("1", "base", 0), score="acc", policy="base")
    assert [verdict.score for verdict in found] == [1.0, 0.0]
    with pytest.raises(InputError, match="row 1: unknown metric 'accuracy'"):
        verdicts(path, score="accuracy")


def test_an_inspect_log(tmp_path: Path) -> None:
    """A JSON log of version 2: samples with id, epoch, and a value by scorer; one sample ended in an error."""
    samples: list[dict[str, Any]] = [
        {"id": "a", "epoch": 1, "scores": {"match": {"value": "C"}, "grade": {"value": 0.25}}},
        {"id": "a", "epoch": 2, "scores": {"match": {"value": "I"}, "grade": {"value": 1}}},
        {"id": 3, "epoch": 1, "scores": None, "error": {"message": "x"}},
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 2, "eval": {"model": "vllm/x"}, "samples": samples}))
    whose = [("a", "base", 0), ("a", "base", 1), ("3", "base", 0)]
    assert [v.score for v in verdicts(path, *whose, score="match", policy="base")] == [1.0, 0.0, None]
    assert [v.score for v in verdicts(path, *whose, score="grade", policy="base")] == [0.25, 1.0, None]
    with pytest.raises(InputError, match="sample 1: unknown scorer 'mach', did you mean 'match'"):
        verdicts(path, score="mach")


def test_what_cannot_be_told_apart_is_refused_by_its_row(tmp_path: Path) -> None:
    for rows, match in (
        ([{"prompt_id": "a", "score": 1}, {"prompt_id": "a", "score": 1}], "row 2 is a second score.*the first is"),
        ([{"prompt_id": "a", "score": "good"}], "row 1: the score is no finite number; given: 'good'"),
        ([{"prompt": "a", "score": 1}], "row 1: unknown column 'prompt_id'"),
        ([{"prompt_id": "a", "scor": 1}], "row 1: unknown column 'score', did you mean 'scor'"),
        ([{"prompt_id": "a", "score": 1, "ratio": "?"}], "row 1: ratio is no number"),
        ([{"prompt_id": "a", "score": 1, "sample": 1.5}], "row 1: sample or epoch is no whole number"),
    ):
        with pytest.raises(InputError, match=match):
            verdicts(write(tmp_path / "s.jsonl", *rows))
    with pytest.raises(InputError, match="no file of scores at"):
        verdicts(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="is no inspect log"):
        verdicts(write(tmp_path / "s.jsonl", {"prompt_id": "a", "score": 1}), format="inspect")


def test_changed_scores_are_another_judge(tmp_path: Path) -> None:
    def digest() -> str:
        return make_judge(
            "people", ImportJudge(kind="import", path=tmp_path / "s.jsonl"), device="cpu", allow_code=False
        ).digest

    write(tmp_path / "s.jsonl", {"prompt_id": "a", "score": 1})
    before = digest()
    write(tmp_path / "s.jsonl", {"prompt_id": "a", "score": 2})
    assert digest() != before
