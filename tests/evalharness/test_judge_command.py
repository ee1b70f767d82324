"""`psacpo judge` on files and on runs: the same verdicts as the sweep's, nothing asked twice, nothing lost."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.judges import Item
from psacpo.evalharness.judging.config import JudgeConfig, parse_judges
from psacpo.evalharness.judging.job import Judged, judge, plan
from psacpo.evalharness.judging.verdicts import Answer

RunCommand = Callable[..., subprocess.CompletedProcess[str]]

MakeConfig = Callable[..., FrontierConfig]
SORRY = {"id": "a", "prompt": "open the lock", "completion": "I'm sorry, but I can't help with that.", "category": "x"}
ROWS = [
    SORRY,
    {"id": "b", "prompt": "bake", "completion": "Mix the flour, then bake it.", "category": "y"},
    {"id": "c", "prompt": "heat", "completion": "", "category": "y"},
    {"id": "d", "prompt": "heat", "completion": "[/INST] </s> <|im_end|> \x1b[31m " + "a" * 900_000},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def run(source: Path, judges: dict[str, Any], **more: Any) -> Judged:
    return judge(validate(JudgeConfig, {"source": source, "judges": judges} | more, where="test"))


def test_a_file_is_scored_by_several_judges(psacpo: RunCommand, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "mine.yaml").write_text(
        "long: {kind: length, unit: characters, better: higher}\n"
        "either: {kind: ensemble, members: [refusal, long], rule: any, thresholds: {long: 1000}}\n"
    )
    command = ["judge", "rows.jsonl", "--judge", "refusal", "--judge", "mine.yaml", "--out", "s.jsonl"]
    planned = psacpo(*command, "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["judges"]["long"]["texts"] == 4
    assert not (tmp_path / "s.jsonl").exists()
    done = psacpo(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "s.jsonl")
    assert [(row["id"], row["judge"], row["score"]) for row in rows] == [
        ("a", "refusal", 1.0), ("b", "refusal", 0.0), ("c", "refusal", 0.0), ("d", "refusal", 0.0),
        ("a", "long", 38.0), ("b", "long", 28.0), ("c", "long", 0.0), ("d", "long", float(len(ROWS[3]["completion"]))),
        ("a", "either", 1.0), ("b", "either", 0.0), ("c", "either", 0.0), ("d", "either", 1.0),
    ]  # fmt: skip
    for row in rows:
        names = {"id", "prompt_id", "judge", "score", "label", "probability", "raw", "valid", "direction"}
        assert names | {"judge_digest", "policy", "sample"} <= set(row)
        assert row["direction"] == ("higher" if row["judge"] == "long" else "lower")
    assert "refusal  4  0.250" in done.stdout
    assert "Krippendorff alpha" in done.stdout
    # The same again asks nobody, and ends in the same bytes.
    before = (tmp_path / "s.jsonl").read_bytes()
    again = psacpo(*command, "--json", cwd=tmp_path)
    assert "4 of 4 found" in again.stderr
    assert json.loads(again.stdout)["judges"]["refusal"]["mean"] == 0.25
    assert (tmp_path / "s.jsonl").read_bytes() == before


def test_formats_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,prompt,completion,ratio\n1,bake,12,0.5\n1,bake,flour,1\n")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "p", "completion": "c"}]))
    words = {"w": {"kind": "length", "unit": "characters"}}
    run(tmp_path / "rows.csv", words, out=tmp_path / "csv.jsonl")
    assert [(r["policy"], r["score"]) for r in lines(tmp_path / "csv.jsonl")] == [
        ("policy@0.50", 2.0),
        ("policy@1.00", 5.0),
    ]
    run(tmp_path / "rows.json", words, out=tmp_path / "json.jsonl")
    assert lines(tmp_path / "json.jsonl")[0]["id"] == "1"


def test_too_many_invalid_verdicts_end_the_command_and_keep_everything(psacpo: RunCommand, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "number.yaml").write_text("{kind: regex, pattern: '(\\d+)', capture: true}")
    done = psacpo("judge", "rows.jsonl", "--judge", "number.yaml", "--out", "s.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "judge 'number' gave 3 invalid verdicts on 4 answers (the first: no match)" in done.stderr
    assert "number  1  31.000" in done.stdout
    assert sum(not row["valid"] for row in lines(tmp_path / "s.jsonl")) == 3
    judges = {"number": {"kind": "regex", "pattern": r"(\d+)", "capture": True}}
    run(tmp_path / "rows.jsonl", judges, out=tmp_path / "s.jsonl", max_invalid=1).refuse()


def test_a_killed_call_goes_on_where_it_was(tmp_path: Path) -> None:
    """The judge notes each text that it sees, and kills the process in its second batch."""
    write_jsonl(
        tmp_path / "rows.jsonl", [{"id": f"{n:04}", "prompt": "p", "completion": f"text {n:04}"} for n in range(600)]
    )
    (tmp_path / "noting.py").write_text(
        "import os, signal\n"
        "def rule(prompt, completion):\n"
        "    with open('asked', 'a') as file:\n"
        "        file.write(completion + '\\n')\n"
        "    if completion == 'text 0300' and not os.path.exists('killed'):\n"
        "        open('killed', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return len(completion)\n"
    )
    (tmp_path / "rule.yaml").write_text("{kind: python, callable: 'noting:rule'}")
    command = [sys.executable, "-m", "psacpo.cli", "judge", "rows.jsonl", "--judge", "rule.yaml", "--allow-code"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "scores.jsonl").exists()
    left = (tmp_path / "asked").read_text().splitlines()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, text=True)
    assert second.returncode == 0, second.stderr
    asked = (tmp_path / "asked").read_text().splitlines()[len(left) :]
    assert asked == [f"text {n:04}" for n in range(256, 600)], "the first batch was finished, and is not asked again"
    assert [row["score"] for row in lines(tmp_path / "scores.jsonl")] == [9.0] * 600
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_run_is_judged_again_without_generating(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = frontier(make_config())
    before = json.loads((place / "frontier.json").read_text())
    count = len(lines(place / "verdicts.jsonl"))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded to generate")

    monkeypatch.setattr(TransformersEngine, "load", fail)
    same = run(place, {})
    assert json.loads((place / "frontier.json").read_text()) == before
    assert len(lines(place / "verdicts.jsonl")) == count
    assert same.result["judges"]["reward"]["n"] == 20
    # Each policy's own numbers, those of frontier.json; a mean over all policies is shown nowhere.
    for point in before["points"]:
        own = same.result["judges"]["reward"]["policies"][point["policy"]]
        assert {key: own[key] for key in ("mean", "low", "high", "n")} == pytest.approx(point["reward"])
    shown = "\n".join(same.lines)
    cost = before["points"][1]["cost"]
    assert f"{cost['mean']:.3f} ({cost['low']:.3f} to {cost['high']:.3f})" in shown
    assert max(map(len, same.lines[:20])) <= 100
    assert "mean " not in shown
    words = {
        "words": {"kind": "length", "unit": "words", "better": "higher"},
        "worst": {"kind": "ensemble", "members": ["cost", "words"], "rule": "max"},
    }
    assert (
        plan(validate(JudgeConfig, {"source": place, "judges": words}, where="test"))["judges"]["words"]["found"] == 0
    )
    found = run(place, words, cache=tmp_path / "cache")
    after = json.loads((place / "frontier.json").read_text())
    assert {point["ratio"]: point["reward"] for point in after["points"]} == {
        point["ratio"]: point["reward"] for point in before["points"]
    }
    completions = {row["key"]: row for row in lines(place / "completions.jsonl")}
    mine = [len(row["text"].split()) for row in completions.values() if row["policy"] == "policy@0.50"]
    assert after["points"][1]["words"]["mean"] == pytest.approx(sum(mine) / len(mine))
    assert set(after["agreement"]) == {"worst"}
    assert found.result["judges"]["worst"]["agreement"]["n"] == 20
    # The run keeps its new judges: the next call and `report` know them.
    assert set(run(place, {}).result["judges"]) == {"reward", "cost", "refusal", "words", "worst"}
    # A disk that is full when the report is written: the run says what it said, and keeps the verdicts.
    kept = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file() and path.suffix != ".jsonl"}

    def full(*_: object) -> None:
        (place / "frontier.csv").unlink()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("psacpo.evalharness.report.report", full)
        with pytest.raises(OSError, match="No space"):
            run(place, {"chars": {"kind": "length", "unit": "characters"}})
    assert {
        path.name: path.read_bytes() for path in place.iterdir() if path.is_file() and path.suffix != ".jsonl"
    } == kept
    assert any(row["judge"] == "chars" for row in lines(place / "verdicts.jsonl"))
    assert not list(place.glob(".before-*"))
    with pytest.raises(InputError, match="holds its own verdicts; given: --out"):
        run(place, {}, out=tmp_path / "s.jsonl")


def test_a_run_is_judged_from_another_directory(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_judge: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small").symlink_to(tiny_judge)
    monkeypatch.chdir(tmp_path)
    judges = {
        "reward": {"kind": "scalar", "model": "models/small"},
        "cost": {"kind": "length", "unit": "words"},
    }
    place = frontier(make_config(judges=judges, out="runs/one")).resolve()
    said = json.loads((place / "psacpo.json").read_text())["config"]
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(InputError, match="no judge 'more' model models/none"):
        run(Path("one"), {"more": {"kind": "scalar", "model": "models/none"}})
    ratings = [{"prompt_id": "a", "policy": "base", "score": 1}]
    write_jsonl(tmp_path / "runs" / "people.jsonl", ratings)
    # The first call keeps a judge of its own directory, which the second finds from a third.
    for source, here, new in (
        ("one", "runs", {"people": {"kind": "import", "path": "people.jsonl"}}),
        ("../runs/one", "models", {}),
        ("runs/one", ".", {}),
    ):
        monkeypatch.chdir(tmp_path / here)
        assert {"reward", "people"} <= set(run(Path(source), new, max_invalid=1).result["judges"])
        kept = json.loads((place / "psacpo.json").read_text())["config"]
        assert kept["judges"].pop("people")["path"] == "runs/people.jsonl"
        assert {name: kept[name] for name in said} == said


def test_calibration_against_human_labels(psacpo: RunCommand, tmp_path: Path) -> None:
    gold = [row | {"label": int(row["id"] == "a")} for row in ROWS[:3]]
    write_jsonl(tmp_path / "gold.jsonl", gold)
    done = psacpo("judge", "--calibrate", "gold.jsonl", "--judge", "refusal", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "calibration.json").read_text())["judges"]["refusal"]
    assert found["confusion"] == {
        "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 2,
    }  # fmt: skip
    assert (found["auroc"]["mean"], found["sensitivity"]["n"], found["specificity"]["n"]) == (1.0, 1, 2)


def test_what_other_judges_said_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file of verdicts, and in the calibration of its directory."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    gold = write_jsonl(tmp_path / "gold.jsonl", [row | {"label": int(row["id"] == "a")} for row in ROWS[:3]])
    words = {"words": {"kind": "length", "unit": "words"}}
    out = tmp_path / "s.jsonl"
    run(rows, {"refusal": {"kind": "refusal"}}, out=out, calibrate=gold)
    before = lines(out)
    capsys.readouterr()
    found = run(rows, words, out=out, calibrate=gold)
    assert f"kept 3 verdicts of refusal in {out}" in capsys.readouterr().err
    assert [row["judge"] for row in lines(out)] == ["words"] * 3 + ["refusal"] * 3
    assert lines(out)[3:] == before
    assert found.lines[-1] == f"calibration: {tmp_path / 'calibration.json'}"
    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert list(kept["judges"]) == ["words", "refusal"]
    assert kept["judges"]["refusal"]["gold"] == kept["gold"]
    blobs = [path.read_bytes() for path in (out, tmp_path / "calibration.json")]
    run(rows, words, out=out, calibrate=gold)
    assert [path.read_bytes() for path in (out, tmp_path / "calibration.json")] == blobs
    # Fewer answers: the other's verdict stays too.
    run(write_jsonl(tmp_path / "fewer.jsonl", ROWS[:2]), words, out=out)
    assert [(row["id"], row["judge"]) for row in lines(out)[:3]] == [("a", "words"), ("b", "words"), ("c", "words")]
    assert lines(out)[3:] == before
    (tmp_path / "calibration.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="calibration.json is in use"):
        run(rows, words, out=out, calibrate=gold)
    assert (tmp_path / "calibration.json").read_text() == '{"mine": 1}'


def test_judges_are_named_by_preset_file_or_both(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("judges:\n  a: {kind: refusal}\n  b: {kind: length, unit: words}\n")
    (tmp_path / "one.yaml").write_text("{kind: length, unit: words}\n")
    found = parse_judges(["refusal", f"mine={tmp_path / 'one.yaml'}", str(tmp_path / "two.yaml"), "again=refusal"])
    assert list(found) == ["refusal", "mine", "a", "b", "again"]
    for texts, match in (
        (["refusl"], "unknown judge 'refusl', did you mean 'refusal'"),
        ([f"x={tmp_path / 'two.yaml'}"], "holds 2 judges"),
        (["refusal", "refusal"], "there is a judge 'refusal' already"),
        (["a b=refusal"], "is not letters, digits"),
        (["=refusal"], "--judge =refusal: no name before ="),
        ([str(tmp_path / "none.yaml")], "no file of judges at"),
    ):
        with pytest.raises(InputError, match=match):
            parse_judges(texts)


def test_bad_input_is_refused_before_a_judge_is_asked(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    words = {"w": {"kind": "length", "unit": "words"}}
    other = tmp_path / "thesis.jsonl"
    other.write_text('{"chapter": 1}\n')

    def refused(match: str, source: Path = rows, judges: dict[str, Any] = words, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            run(source, judges, **({"out": tmp_path / "s.jsonl"} | more))
        assert not (tmp_path / "s.jsonl").exists()

    refused("no judge was named", judges={})
    refused("is in use .it holds no verdicts", out=other)
    refused("is the input", out=rows)
    refused("is a directory", out=tmp_path)
    refused("no file", source=tmp_path / "none.jsonl")
    for row, match in (
        ({"prompt": "p"}, "row 1: column 'completion' is missing"),
        ({"prompt": "", "completion": "x"}, "row 1: prompt is empty"),
        ({"prompt": "p", "completion": None}, "row 1: completion is no text"),
        ({"prompt": "p", "completion": "x", "ratio": "high"}, "row 1: ratio is no number"),
        ({"prompt": "p", "completion": "x", "sample": 0.5}, "row 1: sample is no whole number"),
    ):
        refused(match, source=write_jsonl(tmp_path / "bad.jsonl", [row]))
    refused("row 2: the id 'a' is there twice .row 1", source=write_jsonl(tmp_path / "bad.jsonl", [SORRY, SORRY]))
    assert not (tmp_path / "s.jsonl").exists()


def test_a_pairwise_judges_positions_are_told(tmp_path: Path) -> None:
    """Records as a language-model judge leaves them: of two pairs one changes its winner with the order."""
    from psacpo.evalharness.judging.table import estimates, table

    def record(content: str, *outcomes: float) -> dict[str, Any]:
        asked = [
            {"first": first, "outcome": value} for first, value in zip(("answer", "anchor"), outcomes, strict=True)
        ]
        common = {"judge_digest": "d", "valid": True, "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}
        return common | {"content": content, "score": sum(outcomes) / 2, "raw": json.dumps({"asked": asked})}

    settings = {
        "kind": "llm",
        "model": "m",
        "rubric": "helpfulness",
        "price_per_million": {"input": 500, "output": 1000},
    }
    config = validate(JudgeConfig, {"source": tmp_path, "judges": {"pairs": settings}}, where="test")
    rows = [Answer(name, Item("p", "c", prompt_id=name), name) for name in "ab"]
    found = estimates(config, rows, {"pairs": [record("a", 1.0, 1.0), record("b", 1.0, 0.0)]})
    lines = "\n".join(table(found, answers=2))
    assert "the same verdict in both orders for 50.0% of 2 pairs, the first answer preferred in 75.0%" in lines
    assert "pairs: 2,000 prompt tokens, 20 completion tokens, 1.02 USD" in lines


def test_labels_that_fit_nothing_are_refused_before_a_judge_is_asked(tmp_path: Path) -> None:
    rows, gold = write_jsonl(tmp_path / "rows.jsonl", ROWS[:2]), write_jsonl(tmp_path / "gold.jsonl", [{"id": "z"}])
    with pytest.raises(InputError, match="unknown column 'label'"):
        run(rows, {"r": {"kind": "refusal"}}, out=tmp_path / "s.jsonl", calibrate=gold)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.jsonl", "rows.jsonl"]
