"""The adaptive sweep on tiny real models: what it asks, its budget, and that a killed run ends in the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from psacpo.cli import app
from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.adaptive.settings import Budget
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.compare import compare
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.rejudge import rejudge
from psacpo.evalharness.summary import summary_lines
from psacpo.evalharness.sweep import plan_summary

MakeConfig = Callable[..., FrontierConfig]
WORDS = ["how", "do", "i", "bake", "break", "a", "loaf", "lock", "of", "bread", "bike", "the", "mix", "open", "heat"]
STABLE = ("frontier.json", "completions.jsonl", "verdicts.jsonl", "plan.json", "report.html")
# A third of the answers at the reward end holds an n, a fifth of the others does.
JUDGES = {
    "reward": {"kind": "regex", "pattern": "r", "better": "lower"},
    "cost": {"kind": "regex", "pattern": "n", "better": "lower"},
}
LIMIT = "unsafe_rate<=0.3"


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path, tiny_llama: Path, make_adapter: Any) -> MakeConfig:
    """An adaptive sweep over 160 prompts with a dial that acts on the letters of the answers."""
    prompts = tmp_path / "many.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"{WORDS[i % 15]} {WORDS[(i * 7 + 3) % 15]} {WORDS[i // 15]} {i}", "category": "ab"[i % 2]}
        for i in range(160)
    ]  # fmt: skip
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = make_adapter(tiny_llama, seed=1, scale=0.05)
    safety = make_adapter(tiny_llama, seed=4, scale=0.4, target_modules=["down_proj"])

    def config(**changes: Any) -> FrontierConfig:
        values: dict[str, Any] = {
            "prompts": prompts,
            "adapters": {"reward": reward, "safety": safety},
            "judges": JUDGES,
            "generation": {"max_new_tokens": 8, "temperature": 0.5, "batch_size": 16},
            "constraints": [LIMIT],
            "resamples": 100,
            "holdout": 0.15,
            "adaptive": {"start": 3, "most_ratios": 5, "resolution": 0.1, "design": 0.2},
        }
        return make_config(**values | changes)

    return config


def load(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "frontier.json").read_text())
    return found


def asked(run: Path) -> dict[str, set[str]]:
    """Policy -> ids of the prompts that it answered."""
    found: dict[str, set[str]] = {}
    for line in (run / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["policy"], set()).add(row["prompt_id"])
    return found


def test_prompts_go_where_something_is_undecided(make: MakeConfig) -> None:
    config = make()
    run = frontier(config)
    found, prompts = load(run), asked(run)
    account, choice = found["adaptive"], found["choice"]
    points = {point["policy"]: point for point in found["points"]}
    assert account["generations"]["spent"] == sum(map(len, prompts.values())) == found["counts"]["generated"]
    # What is set side by side is of the prompts that all answered; each one's own numbers are there beside it.
    entries = [*found["points"], *found["baselines"]]
    assert {entry["n_prompts"] for entry in entries} == {account["prompts"]["design"]}
    assert {entry["cost"]["n"] for entry in entries} == {account["prompts"]["design"]}
    assert all(point["answered"] == len(prompts[name]) for name, point in points.items())
    assert all(point["own"]["cost"]["n"] == len(prompts[name]) for name, point in points.items())
    lines = summary_lines(run)
    [head] = [line.split() for line in lines if line.startswith("policy ")]
    assert head[:2] == ["policy", "answered"]
    assert any(line.startswith(f"adaptive: {account['generations']['spent']} answers in ") for line in lines)
    assert "that every one of them answered" in (run / "report.html").read_text()
    assert choice["ratio"] not in (None, 0.0)
    assert choice["method"].startswith("fixed-sequence test; bounds: anytime-valid betting")
    # The base and every ratio answer the design's prompts, which nothing is tested on.
    design = prompts["base"]
    assert len(design) == account["prompts"]["design"]
    assert all(design <= own for own in prompts.values())
    tested = {name: point["tests"][LIMIT]["rows"] for name, point in points.items()}
    # The chosen ratio alone answers the held-out prompts.
    held = len(prompts[choice["policy"]]) - len(design) - tested[choice["policy"]]
    assert held == account["prompts"]["held_out"] == choice["holdout"]["prompts"]
    for entry in account["points"]:
        name = entry["policy"]
        assert entry["prompts"] == len(prompts[name])
        assert points[name]["certified"] == (entry["outcome"] == "passed")
        if entry["outcome"].startswith("not asked"):
            assert prompts[name] == design
    # The walk begins at the safe end and stops at the first failure.
    outcomes = [entry["outcome"] for entry in reversed(account["points"])]
    first = next(place for place, outcome in enumerate(outcomes) if outcome != "passed")
    assert all(outcome.startswith("not asked") for outcome in outcomes[first + 1 :])
    assert account["generations"]["spent"] < 0.75 * account["generations"]["full_grid"]
    assert (run / "report.html").is_file()
    # Two such runs are compared on what all points of both answered.
    both = compare(run, run)
    assert both["prompts"] == len(set.intersection(*(prompts[name] for name in points)))
    assert (both["hypervolume"]["mean"], both["hypervolume"]["low"]) == (0, 0)


@pytest.mark.slow
def test_a_killed_adaptive_run_ends_in_the_same_bytes(make: MakeConfig, tmp_path: Path) -> None:
    whole = frontier(make(out=tmp_path / "whole"))
    config = make(out=tmp_path / "killed")
    total = len((whole / "completions.jsonl").read_text().splitlines())
    design = load(whole)["adaptive"]["generations"]["design"]
    # In the middle of the walk, of a batch and of a line.
    (tmp_path / "run.py").write_text(
        """import os, signal, sys
from psacpo.evalharness import frontier, generation, records
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.compare import compare

generation.FLUSH = 0
append = records.Store.append

def killed(store, new):
    append(store, new)
    if store.path.name == "completions.jsonl" and len(store.records) > int(sys.argv[2]):
        os.write(store._file.fileno(), b'{"key": "torn')
        os.kill(os.getpid(), signal.SIGKILL)

records.Store.append = killed
frontier(FrontierConfig.model_validate_json(open(sys.argv[1]).read()))
"""
    )
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    after = (design + total) // 2
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.json"), str(after)]
    killed = subprocess.run(command, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (config.out / "frontier.json").exists()
    frontier(config)
    for name in STABLE:
        assert (whole / name).read_bytes() == (config.out / name).read_bytes(), name
    # Once more finds everything, and starts no engine.
    before = (config.out / "frontier.json").read_bytes()
    frontier(config)
    assert (config.out / "frontier.json").read_bytes() == before


@pytest.mark.parametrize("unit", ["generations", "tokens"])
def test_a_budget_is_never_passed(make: MakeConfig, unit: str) -> None:
    free = plan_summary(make())
    least = free["adaptive"]["start"]["generations"]
    amount = least + 60 if unit == "generations" else 20 * (least + 60)
    config = make(adaptive={"start": 3, "most_ratios": 5, "resolution": 0.1, "budget": f"{amount} {unit}"})
    account = load(frontier(config))["adaptive"]
    spent = account["generations"]["spent"] if unit == "generations" else sum(account["tokens"].values())
    assert account["over_budget"] in ("design", "walk", "compare")
    assert spent <= amount
    with pytest.raises(InputError, match=rf"the budget of 100 {unit} is under what the start takes"):
        frontier(make(adaptive={"budget": f"100{unit}"}))


def test_what_cannot_be_raced_is_refused_before_anything_is_written(make: MakeConfig, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            frontier(make(**changes))
        assert not (tmp_path / "run").exists()

    lengths = {"judges": JUDGES | {"words": {"kind": "length"}}, "constraints": ["words<=7"]}
    refused(r"cannot test 'words<=7' as the answers come: the range .* is not known; allowed: .*range", **lengths)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS[:2]))
    refused("2 clusters of prompts are too few", prompts=few)
    refused("two or more", ratios=[0.5])
    refused("most_ratios 3 is under start 5", adaptive={"most_ratios": 3})
    refused("budget 'much' cannot be read; allowed: a whole number of generations", adaptive={"budget": "much"})
    refused(r"versus 'policy@0\.10' which is unknown", metrics={"win": {"judge": "reward", "versus": "policy@0.10"}})


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [(20000, 20000, "generations"), ("20k", 20000, "generations"), ("1.5M tokens", 1_500_000, "tokens"),
     ("300 generations", 300, "generations"), ("2Mtokens", 2_000_000, "tokens")],
)  # fmt: skip
def test_a_budget_is_read_as_it_is_typed(text: str | int, amount: int, unit: str) -> None:
    found = Budget.model_validate(text)
    assert (found.amount, found.unit) == (amount, unit)


@pytest.mark.parametrize("text", ["1" * 400, "1.5", "0.0001k", "\uff12\uff10", "-3", "1e3"])
def test_a_budget_that_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget '.{1,50}' cannot be read; allowed: a whole number of"):
        Budget.model_validate(text)


def test_without_a_constraint_ratios_are_added_and_all_answer_everything(make: MakeConfig) -> None:
    config = make(constraints=[], adaptive={"start": 3, "most_ratios": 4, "resolution": 0.05})
    run = frontier(config)
    found = load(run)
    assert {len(own) for own in asked(run).values()} == {160}
    assert found["choice"]["ratio"] is None
    assert [entry["why"] for entry in found["adaptive"]["points"]].count("gap") == len(found["points"]) - 3


def test_the_plan_tells_what_it_takes_and_a_new_judge_sees_the_same_answers(make: MakeConfig, tmp_path: Path) -> None:
    config = make(samples=2)
    plan = plan_summary(config)
    told = plan["adaptive"]
    assert told["start"]["generations"] == 2 * 4 * 27
    assert told["start"]["generations"] < told["likely, by simulation"]["generations"] <= told["at most"]["generations"]
    assert told["at most"]["new tokens at most"] == 8 * told["at most"]["generations"]
    assert told["full grid"] | {"prompt tokens": 0} == {
        "ratios": 5, "generations": 6 * 160 * 2, "prompt tokens": 0, "new tokens at most": 8 * 6 * 160 * 2
    }  # fmt: skip
    assert plan["judges"] == {"reward": told["at most"]["generations"], "cost": told["at most"]["generations"]}
    assert not config.out.exists()
    run = frontier(config)
    before = load(run)
    assert before["adaptive"]["generations"]["spent"] <= told["at most"]["generations"]
    # Judged again by the same judges it is the same; a stricter one moves the tests, on the answers that there are.
    assert load(judged_again(run, {})) == before
    strict = judged_again(run, {"cost": {"kind": "regex", "pattern": "[a-z]", "better": "lower"}})
    after = load(strict)
    assert after["counts"]["generated"] == before["counts"]["generated"]
    assert after["choice"]["ratio"] is None
    assert {point["certified"] for point in after["points"]} == {False}


def judged_again(run: Path, judges: dict[str, Any]) -> Path:
    rejudge(validate(JudgeConfig, {"source": run, "judges": judges}, where="test"))
    return run


@pytest.mark.slow
def test_the_command_takes_a_budget(make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    monkeypatch.chdir(tmp_path)

    def typed(*words: str) -> Any:
        return CliRunner().invoke(app, words)

    recipe = {
        "base": config.base,
        "adapters": {name: str(path) for name, path in config.adapters.items()},
        "prompts": "many.jsonl",
        "judges": JUDGES,
        "generation": {"max_new_tokens": 8, "temperature": 0.5, "batch_size": 16},
        "resamples": 100,
        "adaptive": {"start": 3, "most_ratios": 4, "resolution": 0.1},
    }
    (tmp_path / "psacpo.yaml").write_text(json.dumps(recipe))
    arguments = ["frontier", "--adaptive", "--budget", "400", "--constraint", LIMIT, "--json"]
    planned = json.loads(typed(*arguments, "--dry-run").stdout)
    assert planned["adaptive"]["budget"] == "400 generations"
    assert planned["answers at most"] == 400
    lines = typed(*arguments[:-1], "--dry-run").stdout.splitlines()
    table = lines[lines.index("adaptive:") + 1 :]
    assert table[0].split("  ")[-1].strip() == "new tokens at most"
    assert [line.split("  ")[1] for line in table[1:5]] == ["start", "likely, by simulation", "at most", "full grid"]
    assert max(map(len, table)) <= 100
    done = typed(*arguments)
    assert done.exit_code in (0, 3), done.output
    found = load(tmp_path / "frontier")
    assert found["command"] == f"psacpo frontier --constraint '{LIMIT}' --adaptive --budget 400"
    assert found["adaptive"]["settings"]["start"] == 3
    assert found["adaptive"]["generations"]["spent"] <= 400
    refused = typed("frontier", "--from-scores", "x.csv", "--budget", "400")
    assert isinstance(refused.exception, InputError)
    assert "asks no model" in str(refused.exception)
