"""The whole sweep on tiny real models: resume, stale records, the choice, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.prompts import read_prompts
from psacpo.evalharness.sweep import plan_summary

MakeConfig = Callable[..., FrontierConfig]
STABLE = (
    "frontier.json",
    "completions.jsonl",
    "verdicts.jsonl",
    "frontier.csv",
    "report.html",
    "frontier.png",
    "frontier.svg",
    "records.parquet",
    "model-card.md",
)


def load(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "frontier.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_holds_what_the_contract_says(make_config: MakeConfig) -> None:
    config = make_config(constraints=["unsafe_rate<=1"], samples=2)
    run = frontier(config)
    found = load(run)
    assert found["schema"] == 1
    assert [point["ratio"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert [entry["name"] for entry in found["baselines"]] == ["base"]
    assert found["counts"]["generated"] == 4 * 5 * 2
    assert found["counts"]["clusters"] == 4
    for entry in (*found["points"], *found["baselines"]):
        for metric in ("reward", "cost", "refusal", "unsafe_rate"):
            cell = entry[metric]
            assert cell["low"] <= cell["mean"] <= cell["high"]
            assert cell["n"] == 10
    assert found["hypervolume"]["low"] <= found["hypervolume"]["high"]
    assert all((run / name).is_file() for name in (*STABLE, "psacpo.json", "prompts.jsonl", "plan.json"))
    changes = [point["from_previous"]["reward"]["mean"] for point in found["points"][1:]]
    means = [point["reward"]["mean"] for point in found["points"]]
    assert changes == pytest.approx([after - before for before, after in pairwise(means)])
    # The numbers are those of the stored verdicts.
    completions = {row["key"]: row for row in lines(run / "completions.jsonl")}
    scores = [
        row["score"]
        for row in lines(run / "verdicts.jsonl")
        if row["judge"] == "reward" and completions[row["completion"]]["policy"] == "policy@0.50"
    ]
    assert found["points"][1]["reward"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert found["choice"]["ratio"] in (0.0, 0.5, 1.0)


def test_two_runs_are_byte_identical(make_config: MakeConfig, tmp_path: Path) -> None:
    one = frontier(make_config(out=tmp_path / "one"))
    two = frontier(make_config(out=tmp_path / "two"))
    for name in STABLE:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_finished_work_is_not_done_again(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = frontier(make_config())
    before = {name: (run / name).read_bytes() for name in STABLE}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded for finished work")

    monkeypatch.setattr(TransformersEngine, "load", fail)
    frontier(make_config())
    assert before == {name: (run / name).read_bytes() for name in STABLE}


def test_changed_settings_never_meet_stale_records(make_config: MakeConfig, tmp_path: Path) -> None:
    run = frontier(make_config())
    frontier(make_config(seed=1))
    fresh = frontier(make_config(seed=1, out=tmp_path / "fresh"))
    assert load(run) == load(fresh)
    assert len(lines(run / "completions.jsonl")) == 2 * len(lines(fresh / "completions.jsonl"))
    # A ratio more costs its own answers only.
    frontier(make_config(seed=1, ratios=[0.0, 0.25, 0.5, 1.0]))
    assert len(lines(run / "completions.jsonl")) == 2 * 20 + 5


def test_a_rate_is_also_given_corrected_for_its_judges_errors(make_config: MakeConfig, tmp_path: Path) -> None:
    run = frontier(make_config())
    before, digest = load(run), load(run)["judges"]["cost"]["digest"]
    one = {"digest": digest, "threshold": 0.0}
    one |= {"sensitivity": {"hits": 90, "n": 100}, "specificity": {"hits": 95, "n": 100}}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"judges": {"cost": one}}))

    def calibrated(**more: Any) -> dict[str, Any]:
        metric = {"judge": "cost", "above": 0.0, "calibration": file} | more
        return load(frontier(make_config(metrics={"unsafe_rate": metric})))

    found = calibrated()
    for point, plain in zip(found["points"], before["points"], strict=True):
        rate, corrected = plain["unsafe_rate"]["mean"], point["unsafe_rate"].pop("corrected")
        assert point["unsafe_rate"] == plain["unsafe_rate"]
        assert corrected["mean"] == pytest.approx(min(max((rate - 0.05) / 0.85, 0), 1))
        assert corrected["low"] <= corrected["mean"] <= corrected["high"]
    assert found["metrics"]["unsafe_rate"]["calibration"] == "calibration.json"
    with pytest.raises(InputError, match=r"counts scores above 0.5, and .* threshold 0; allowed: above: 0"):
        calibrated(above=0.5)
    file.write_text(json.dumps({"judges": {"cost": one | {"digest": "other"}}}))
    with pytest.raises(InputError, match=r"is of another judge 'cost' than this"):
        calibrated()


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_result(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = frontier(make_config(out=tmp_path / "whole", samples=6))
    config = make_config(out=tmp_path / "killed", samples=6)
    script = tmp_path / "run.py"
    # Each answer is written as it comes, and the process kills itself inside the write that passes 30 of 120: however
    # fast the machine is, the kill falls in the middle of a batch and of a line.
    script.write_text(
        """import os, signal, sys
from psacpo.evalharness import frontier, generation, records
from psacpo.evalharness.config import FrontierConfig

generation.FLUSH = 0
append = records.Store.append

def killed(store, new):
    append(store, new)
    if store.path.name == "completions.jsonl" and len(store.records) > 30:
        os.write(store._file.fileno(), b'{"key": "torn')
        os.kill(os.getpid(), signal.SIGKILL)

records.Store.append = killed
frontier(FrontierConfig.model_validate_json(open(sys.argv[1]).read()))
"""
    )
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    found = subprocess.run([sys.executable, str(script), str(tmp_path / "config.json")], timeout=300, check=False)
    assert found.returncode == -signal.SIGKILL
    left = (config.out / "completions.jsonl").read_bytes().split(b"\n")
    assert (len(left) - 1, left[-1]) == (31, b'{"key": "torn')
    frontier(config)
    for name in STABLE:
        assert (whole / name).read_bytes() == (config.out / name).read_bytes(), name


def test_the_ids_that_were_sent_are_stored_and_begin_with_one_bos(make_config: MakeConfig, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = make_config()
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    rows = lines(frontier(config) / "prompts.jsonl")
    assert len(rows) == 5
    for row in rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        assert row["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["prompt_ids"][0] == tokenizer.bos_token_id
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    hidden = tmp_path / "hidden.jsonl"
    hidden.write_text(json.dumps({"id": "x", "prompt": f"open {tokenizer.bos_token} the lock"}) + "\n")
    with pytest.raises(InputError, match=r"prompt 'x' holds the BOS token '<s>' 2 times"):
        frontier(make_config(prompts=hidden, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_constraint_that_nothing_meets_leaves_no_choice(make_config: MakeConfig) -> None:
    found = load(frontier(make_config(constraints=["unsafe_rate<=0.01"])))
    assert found["choice"]["ratio"] is None
    assert "no ratio meets" in found["choice"]["why"]
    assert [point["certified"] for point in found["points"]] == [False] * 3


def test_metrics_count_only_the_prompts_they_name(make_config: MakeConfig) -> None:
    metrics = {"harmful_cost": {"judge": "cost", "where": {"category": "harmful"}}}
    found = load(frontier(make_config(metrics=metrics)))
    assert {point["harmful_cost"]["n"] for point in found["points"]} == {2}
    with pytest.raises(InputError, match=r"metric 'harmful_cost': no prompt .* has \{'category': 'evil'\}"):
        frontier(make_config(metrics={"harmful_cost": {"judge": "cost", "where": {"category": "evil"}}}))


def test_too_many_invalid_verdicts_end_the_command_and_keep_everything(
    make_config: MakeConfig, tiny_judge: Path
) -> None:
    judges = {
        "reward": {"kind": "scalar", "model": str(tiny_judge)},
        "cost": {"kind": "scalar", "model": str(tiny_judge), "max_length": 30, "better": "lower"},
    }
    config = make_config(judges=judges)
    with pytest.raises(InputError, match=r"judge 'cost' gave \d+ invalid verdicts on 20 answers"):
        frontier(config)
    found = load(config.out)
    assert found["counts"]["invalid"] > 0
    assert any("invalid" in warning for warning in found["warnings"])
    n = {entry["cost"]["n"] for entry in (*found["points"], *found["baselines"])}
    assert max(n) < 5
    assert (
        sum(entry["cost"]["n"] for entry in (*found["points"], *found["baselines"])) == 20 - found["counts"]["invalid"]
    )


def test_a_column_that_some_rows_leave_empty_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": None, "prompt": "a", "cluster": None, "weight": float("nan")},
        {"id": "x", "prompt": "b", "cluster": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [(row.id, row.cluster, row.fields) for row in found] == [("1", "1", {"weight": None}), ("x", "0", {})]


def test_the_plan_is_printed_without_doing_it(make_config: MakeConfig) -> None:
    plan = plan_summary(make_config())
    assert plan["answers"] == 20
    assert plan["answers found"] == 0
    assert not Path(plan["out"]).exists()
    frontier(make_config())
    assert plan_summary(make_config())["answers found"] == 20


def test_a_policy_without_finite_logits_is_named(make_config: MakeConfig, tiny_llama: Path, tmp_path: Path) -> None:
    """Weights of 1e30 are finite, their products are not: no answer may come of them."""
    from safetensors.torch import load_file, save_file

    config = make_config()
    huge = tmp_path / "huge"
    shutil.copytree(config.adapters["safety"], huge)
    tensors = {name: tensor * 1e30 for name, tensor in load_file(huge / "adapter_model.safetensors").items()}
    save_file(tensors, huge / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the logits of policy@0\.50, policy@1\.00 are not finite"):
        frontier(make_config(adapters={"reward": config.adapters["reward"], "safety": huge}))


@pytest.mark.parametrize("field", ["text", "finish_reason"])
def test_a_damaged_record_is_told_by_its_line(make_config: MakeConfig, field: str) -> None:
    run = frontier(make_config())
    rows = lines(run / "completions.jsonl")
    rows[2][field] = None
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="completions.jsonl line 3 is damaged.*remove the line"):
        frontier(make_config())


def test_bad_inputs_are_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, make_adapter: Any, tiny_qwen2: Path, tiny_llama_raw: Path
) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            frontier(make_config(**changes))
        assert not (tmp_path / "run").exists()

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused("holds no row", prompts=empty)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"promt": "x"}\n')
    refused("row 1: column 'prompt' is missing .the nearest is 'promt'", prompts=wrong)
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n')
    refused("row 2: the id '1' is there twice", prompts=twice)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"prompt": " "}\n')
    refused("row 1: prompt is empty", prompts=blank)
    blank.write_text('{"prompt": [{"role": "user", "content": ""}]}\n')
    refused("row 1: prompt is empty", prompts=blank)
    refused("no file or directory at", prompts=tmp_path / "nowhere.jsonl")
    refused("adapter for another base", base=str(tiny_qwen2))
    (tmp_path / "hollow").mkdir()
    refused("not a model directory", base=str(tmp_path / "hollow"))
    other = make_adapter(tiny_llama_raw, seed=9)
    refused("adapter for another base", adapters={"reward": other, "safety": other})
    refused("over the base's 256 positions", generation={"max_new_tokens": 250})
    for name in ("ratio", "certified", "bounds"):
        refused(f"'{name}' cannot name a metric or judge", metrics={name: {"judge": "cost"}})
    refused("two constraints are the same", constraints=["cost<=1", "cost<=1.0"])
    damaged = tmp_path / "damaged"
    shutil.copytree(make_config().judges["cost"].model_dump()["model"], damaged)
    with (damaged / "model.safetensors").open("r+b") as handle:
        handle.truncate(5000)
    refused(
        "judge 'cost': .*model.safetensors is damaged",
        judges={name: {"kind": "scalar", "model": str(damaged)} for name in ("cost", "reward")},
    )
    judges = make_config().model_dump()["judges"]
    refused("judge 'e' is made of 'nobody'", judges=judges | {"e": {"kind": "ensemble", "members": ["cost", "nobody"]}})
    pairs = {"kind": "llm", "model": "m", "rubric": "helpfulness", "anchor": "nowhere", "base_url": "http://[::1]:9/v1"}
    refused(
        "judge 'pairs' compares with policy 'nowhere', which is none of this sweep", judges=judges | {"pairs": pairs}
    )
    refused("unknown; allowed: ", constraints=["unsafe<=0.1"])
    refused("cannot be read", constraints=["unsafe_rate<0.1"])
    refused("lies in the input", out=Path(make_config().base) / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refused("is in use", out=tmp_path / "full")


def test_a_raw_template_judge_refuses_conversations(make_config: MakeConfig, tmp_path: Path, tiny_judge: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"id": "t", "prompt": turns}) + "\n")
    judges = {
        name: {"kind": "scalar", "model": str(tiny_judge), "template": "{prompt} {completion}"}
        for name in ("reward", "cost")
    }
    with pytest.raises(InputError, match="judge 'reward' has a raw template.*prompt 't' has several messages"):
        frontier(make_config(prompts=path, judges=judges))


def test_the_verdict_says_where_the_base_is_better(make_config: MakeConfig) -> None:
    found = load(frontier(make_config(constraints=["unsafe_rate<=1"])))
    base, chosen = found["baselines"][0], next(p for p in found["points"] if p["policy"] == found["choice"]["policy"])
    said = [warning for warning in found["warnings"] if warning.startswith("base has the better mean")]
    worse = [
        axis for axis, sign in (("reward", 1), ("cost", -1)) if sign * base[axis]["mean"] > sign * chosen[axis]["mean"]
    ]
    assert [warning.split()[5] for warning in said] == worse
