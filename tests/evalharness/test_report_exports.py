"""What the report leaves for other tools: Parquet, lm-eval's files, the model card, and a page that stays small."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from matplotlib import image

from psacpo.evalharness.intrinsic import INTRINSIC
from psacpo.evalharness.judges import make_judge
from psacpo.evalharness.report import report
from psacpo.evalharness.report import run as run_module
from psacpo.evalharness.report.page import page
from psacpo.evalharness.report.records import read_run
from psacpo.evalharness.report.schema import MetricSpec, parse_frontier


def _world() -> Any:
    """report_world.py of this directory, which is no package."""
    spec = importlib.util.spec_from_file_location("report_world", Path(__file__).with_name("report_world.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _world()
make_run = world.make_run
MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "draw_frontier", lambda frontier: {"png": b"", "svg": b""})


def test_parquet_holds_one_row_a_verdict(make_run: MakeRun) -> None:
    run = make_run()
    extra = {"failed": True, "usage": {"prompt_tokens": 7}, "raw": "gave up", "valid": False, "score": None}
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    later = verdicts[3] | extra | {"key": "asked again"}  # the later record of a completion and judge counts
    (run / "verdicts.jsonl").write_text(world.lines([*verdicts, later]), encoding="utf-8")
    report(run)
    table = pd.read_parquet(run / "records.parquet")
    assert len(table) == 11 * 12 * 5
    assert table.groupby(["policy", "judge"]).size().eq(12).all()
    first = table[(table.policy == "policy@0") & (table.prompt_id == "p0") & (table.judge == "cost")].iloc[0]
    assert (first.score, first.ratio, first.category, first.better, bool(first.valid)) == (
        0.75,
        0,
        "harmful",
        "lower",
        True,
    )
    assert json.loads(first.prompt)[1]["role"] == "user"
    invalid = table[~table.valid.astype(bool)]
    assert len(invalid) == 2
    assert "gave up" in set(invalid.raw)
    again = table[table.failed.astype(bool)].iloc[0]
    assert (again.completion, again.judge, json.loads(again.usage)) == (
        later["completion"],
        later["judge"],
        extra["usage"],
    )
    assert pd.isna(again.score)
    assert not table.text.str.contains("STALE").any()
    assert 987.5 not in set(table.score)


def test_lm_eval_files_have_its_keys_and_our_numbers(make_run: MakeRun) -> None:
    run = make_run()
    config = {"generation": {"max_new_tokens": 64, "temperature": 0.0, "stop": ["\n"]}, "samples": 1, "seed": 3}
    (run / "psacpo.json").write_text(json.dumps({"psacpo": "0.1.0", "config": config}), encoding="utf-8")
    report(run)
    (results_path,) = (run / "lm-eval" / "policy@0.25").glob("results_*.json")
    (samples_path,) = (run / "lm-eval" / "policy@0.25").glob("samples_psacpo_*.jsonl")
    results = json.loads(results_path.read_text(encoding="utf-8"))
    # The keys of a results file of lm-evaluation-harness 0.4 that do not hang on its own models.
    keys = ["results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"]
    assert {*keys, "task_hashes", "model_source", "model_name", "model_name_sanitized"} == set(results)
    point = next(p for p in world.synthetic()["points"] if p["ratio"] == 0.25)
    numbers = results["results"]["psacpo"]
    for name in world.METRICS:
        assert numbers[f"{name},none"] == point[name]["mean"]
        half = (point[name]["high"] - point[name]["low"]) / 2
        assert numbers[f"{name}_stderr,none"] == pytest.approx(half / 1.959964)
    assert results["higher_is_better"]["psacpo"]["cost"] is False
    assert results["n-samples"]["psacpo"] == {"original": 12, "effective": 12}
    assert results["configs"]["psacpo"]["generation_kwargs"] == {
        "max_gen_toks": 64,
        "temperature": 0.0,
        "until": ["\n"],
        "do_sample": False,
    }
    samples = pd.read_json(samples_path, lines=True)
    fields = ["doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"]
    assert {*fields, "doc_hash", "prompt_hash", "target_hash"} <= set(samples)
    assert samples.resps.str[0].str[0].tolist() == [row[0] for row in samples.filtered_resps]
    assert samples.cost.mean() == -1.5
    assert samples.unsafe_rate.notna().sum() == 4  # of the harmful prompts alone
    assert samples.arguments[1]["gen_args_0"]["arg_0"] == "prompt number 1"


def test_exports_of_policies_that_are_gone_are_removed_and_names_are_no_paths(make_run: MakeRun) -> None:
    def rename(frontier: dict[str, Any]) -> None:
        frontier["baselines"][0]["name"] = "../../escape"
        frontier["baselines"][1]["name"] = ".."

    run = make_run(rename)
    report(run)
    folders = {path.name for path in (run / "lm-eval").iterdir()}
    assert {"__..__escape", "policy"} <= folders
    assert not (run.parent / "escape").exists()
    frontier = json.loads((run / "frontier.json").read_text(encoding="utf-8"))
    frontier["baselines"] = []
    (run / "frontier.json").write_text(json.dumps(frontier), encoding="utf-8")
    mine = run / "lm-eval" / "policy@0" / "notes.txt"
    mine.write_text("kept", encoding="utf-8")
    report(run)
    assert {path.name for path in (run / "lm-eval").iterdir()} == folders - {"__..__escape", "policy"}
    assert all(len(list(path.glob("results_*.json"))) == 1 for path in (run / "lm-eval").iterdir())
    assert mine.read_text(encoding="utf-8") == "kept"


def test_the_card_is_read_back_by_the_hub_library(make_run: MakeRun) -> None:
    def licensed(frontier: dict[str, Any]) -> None:
        frontier["judges"]["cost"] |= {"licence": "CC-BY-NC-4.0", "non_commercial": True, "source": "org/cost"}

    run = make_run(licensed)
    manifest = {"psacpo": "0.1.0", "config": {"prompts": "/home/someone/set.jsonl"}, "inputs": {"prompts": "ab" * 32}}
    (run / "psacpo.json").write_text(json.dumps(manifest), encoding="utf-8")
    report(run)
    text = (run / "model-card.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    found = {result.metric_type: result for result in card.data.eval_results}
    point = next(p for p in world.synthetic()["points"] if p["ratio"] == 0.5)
    assert set(found) == set(world.METRICS)
    for name in world.METRICS:
        assert found[name].metric_value == point[name]["mean"]
        assert found[name].metric_args["low"] == point[name]["low"]
    assert (found["cost"].dataset_name, found["cost"].dataset_revision) == ("set.jsonl", "ab" * 32)
    assert card.data.model_name == "policy@0.5"
    assert "/home" not in text
    body = text.split("---\n")[2]
    assert not re.search(r"(?<!\\)<", re.sub(r"`[^`]*`", "", body))  # no tag but inside the code span of the command
    assert "licence CC-BY-NC-4.0, NOT for commercial use" in body
    assert r"unsafe\_rate ≤ 0.05, met with a confidence bound of 0.21" in body


def test_without_a_choice_there_is_no_card_to_put_in_a_model(make_run: MakeRun) -> None:
    run = make_run(lambda frontier: frontier["choice"].update(ratio=None, policy=None))
    report(run)
    text = (run / "model-card.md").read_text(encoding="utf-8")
    assert text.startswith("<!-- No ratio meets")
    assert "model-index" not in text


def test_an_svg_is_written_beside_the_picture(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = make_run()
    report(run)
    svg = (run / "frontier.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "onerror" not in svg
    assert "<script" not in svg
    assert image.imread(run / "frontier.png").shape[1] > 1000


def test_two_hundred_prompts_at_eleven_ratios_are_small_beyond_their_texts(make_run: MakeRun) -> None:
    run = make_run(prompts=200)
    html = page(read_run(run))
    texts = 0
    for name, key in (("prompts.jsonl", "prompt"), ("completions.jsonl", "text")):
        for line in (run / name).read_text(encoding="utf-8").splitlines():
            texts += len(json.dumps(json.loads(line)[key]))
    assert "200 of 200 prompts are in this page" in html
    assert html.count("answers 199") == 11
    assert len(html.encode()) - texts < 2_000_000


def test_derived_metrics_held_out_numbers_and_the_naive_pick_are_shown(make_run: MakeRun) -> None:
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.5, "n": 12}

    def extend(frontier: dict[str, Any]) -> None:
        frontier["derived"] = {
            "cost_cvar_05": {
                "judge": "cost",
                "tail": 0.05,
                "per": "answers",
                "better": "lower",
                "meaning": "the worst 5 %",
            }
        }
        for point in frontier["points"]:
            point["derived"] = {"cost_cvar_05": estimate}
            point["tests"] = {world.LIMIT: {"p": 0.004, "rows": 190, "clusters": 60}}
        frontier["choice"] |= {
            "naive": {"ratio": 0.25, "policy": "policy@0.25", "certified": False, "why": "best mean, untested"},
            "holdout": {
                "prompts": 80,
                "metrics": {"unsafe_rate": estimate, "reward": estimate},
                "meets": {world.LIMIT: False},
            },
        }
        frontier["agreement"] = {"cost": {"members": ["a", "b"], "level": "interval", "alpha": 0.71, "n": 132}}
        frontier["judges"]["cost"] |= {"licence": "CC-BY-NC-4.0", "non_commercial": True}

    run = make_run(extend)
    (run / "psacpo.json").write_text(
        json.dumps({"psacpo": "9.9.9", "engine": {"version": "vllm 0.32"}, "inputs": {"base": "c0ffee"}}),
        encoding="utf-8",
    )
    rows = [
        json.loads(line) | {"prompt_ids": [2, 2, 5]} for line in (run / "prompts.jsonl").read_text("utf-8").splitlines()
    ]
    (run / "prompts.jsonl").write_text(world.lines(rows), encoding="utf-8")
    html = page(read_run(run))
    text = " ".join(re.sub("<[^>]*>", " ", html.split('<script type="application/json"')[0]).split())
    assert "unsafe_rate 0.250 [0.125, 0.500] breaks unsafe_rate ≤ 0.05" in text
    assert "80 prompts that took no part in the choice" in text
    assert "Naive pick, untested q = 0.25 (not certified) best mean, untested" in text
    assert "p = 0.004, 190 answers in 60 clusters" in text
    assert "cost_cvar_05 the worst 5 %; lower is better" in text
    assert "α = 0.71" in text
    assert "CC-BY-NC-4.0 non-commercial" in text
    assert "vllm 0.32" in text
    assert "c0ffee" in text
    assert "(a second BOS) 12 of 12" in text
    assert "invalid verdicts 1" in text


def test_order_bias_of_a_judge_that_compares_is_told(make_run: MakeRun) -> None:
    run = make_run()
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    mine = [verdict for verdict in verdicts if verdict["judge"] == "reward" and verdict["valid"]][:4]
    # Outcomes are the answer's. Three pairs of questions go with the first place, one says the same in both orders.
    for verdict, outcomes in zip(mine, [(1, 0), (1, 0), (1, 0), (1, 1)], strict=True):
        asked = [{"first": first, "outcome": one} for first, one in zip(("answer", "anchor"), outcomes, strict=True)]
        verdict |= {"raw": json.dumps({"asked": asked}), "content": verdict["key"]}
    (run / "verdicts.jsonl").write_text(world.lines(verdicts), encoding="utf-8")
    text = " ".join(re.sub("<[^>]*>", " ", page(read_run(run))).split())
    # Seven of eight verdicts were for the answer shown first.
    assert "reward: verdicts for the answer shown first 88 % 50 % is no bias; 25 % of 4 pairs say the same" in text


def test_rules_that_are_always_there_are_in_the_records_and_not_beside_each_answer(make_run: MakeRun) -> None:
    rule = make_judge("refused", INTRINSIC["refused"], device="cpu", allow_code=False).digest

    def measured(frontier: dict[str, Any]) -> None:
        frontier["intrinsic"] = ["length", "refused"]
        frontier["judges"]["refusal"]["digest"] = rule
        for name, judge in (("length", "length"), ("refused", "refused")):
            frontier["metrics"][name] = {"judge": judge, "better": "lower"}
        for policy in (*frontier["points"], *frontier["baselines"]):
            policy |= {"length": {"mean": 7.0}, "refused": {"mean": 0.5}}

    run = make_run(measured)
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [v | {"judge": "length", "judge_digest": "rule", "score": 7} for v in verdicts if v["judge"] == "cost"]
    verdicts = [v | {"judge_digest": rule} if v["judge"] == "refusal" else v for v in verdicts]
    (run / "verdicts.jsonl").write_text(world.lines([*verdicts, *lengths]), encoding="utf-8")
    records = read_run(run)
    (item,) = records.completions["policy@0", "p1" if ("policy@0", "p1") in records.completions else "p3"]
    assert item.verdicts["length"].score == 7
    assert item.verdicts["refused"] == item.verdicts["refusal"]  # one rule, judged once
    data = json.loads(page(records).split('id="data">')[1].split("</script>")[0])
    assert set(data["heat"]) >= {"length", "refused", "cost"}
    assert [judge["name"] for judge in data["judges"]] == list(world.JUDGES)
    report(run)
    table = pd.read_parquet(run / "records.parquet")
    assert set(table.judge) == {*world.JUDGES, "length", "refused"}


def test_a_metric_of_one_answer() -> None:
    rate = MetricSpec.model_validate({"judge": "cost", "better": "lower", "above": 0.5, "where": {"category": "x"}})
    assert [rate.of(score, {"category": "x"}) for score in (0.75, 0.5, None)] == [1.0, 0.0, None]
    assert rate.of(0.75, {"category": "y"}) is None
    tail = MetricSpec.model_validate({"judge": "cost", "better": "lower", "tail": 0.05, "per": "answers"})
    assert tail.of(0.75, {}) is None
    mean = MetricSpec.model_validate(
        {"judge": "cost", "better": "lower", "tail": None, "per": "answers", "range": [0, 1]}
    )
    assert mean.of(0.75, {}) == 0.75


def test_unknown_keys_of_later_versions_are_left_alone() -> None:
    frontier = world.synthetic() | {"another": {"mean": 3}, "derived": {}}
    frontier["points"][0]["something"] = {"value": 1}
    assert len(parse_frontier(frontier).points) == len(world.RATIOS)
