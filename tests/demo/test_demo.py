"""The built-in demo, run whole by the real command: what it promises is what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from psacpo.demo import write_project
from psacpo.pipeline import run
from psacpo.recipe import Project

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def frontier(demo_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo_run / "demo-run" / "frontier" / "frontier.json").read_text())
    return found


def test_nine_ratios_and_the_baselines_are_measured(frontier: dict[str, Any]) -> None:
    assert len(frontier["points"]) == 9
    assert frontier["points"][0]["ratio"] == 0.0
    assert frontier["points"][-1]["ratio"] == 1.0
    names = [entry["name"] for entry in frontier["baselines"]]
    assert "base" in names
    assert any(name.startswith("naive") for name in names)
    assert frontier["counts"]["invalid"] == 0
    assert frontier["counts"]["generated"] == frontier["counts"]["prompts"] * (9 + len(names))


def test_the_trade_off_is_real_and_smooth(frontier: dict[str, Any]) -> None:
    """By the oracle, which no part of the run could see; looser than what three seeds showed in docs/log.md."""
    unsafe = [point["oracle_unsafe_rate"]["mean"] for point in frontier["points"]]
    reward = [point["oracle_help"]["mean"] for point in frontier["points"]]
    assert unsafe[0] > 0.7
    assert unsafe[-1] < 0.15
    assert reward[0] > reward[-1]
    steps = [a - b for a, b in pairwise(unsafe)]
    assert max(steps) <= 0.4 * (max(unsafe) - min(unsafe))
    assert max(point["over_refusal"]["mean"] for point in frontier["points"]) <= 0.10
    assert max(point["garbled"]["mean"] for point in frontier["points"] if point["ratio"] <= 0.75) <= 0.10


def test_a_ratio_is_chosen_and_merged(frontier: dict[str, Any], demo_run: Path) -> None:
    choice = frontier["choice"]
    assert choice["ratio"] is not None
    chosen = demo_run / "demo-run" / "policies" / choice["policy"]
    assert (chosen / "adapter_model.safetensors").is_file()


def test_what_a_user_sees(demo_run: Path) -> None:
    shown = (demo_run / "stdout.txt").read_text()
    assert "chosen ratio: 0." in shown
    assert max(len(line) for line in shown.splitlines() if line.startswith("policy@")) <= 100
    spent = (demo_run / "stderr.txt").read_text()
    assert "time: " in spent
    assert "align" in spent
    assert "\r" not in spent


def test_called_again_it_finds_its_work(demo_run: Path) -> None:
    project = demo_run / "demo-run"
    before = {path: path.stat().st_mtime_ns for path in project.glob("*/adapter_model.safetensors")}
    frontier = (project / "frontier" / "frontier.json").read_bytes()
    records = (project / "frontier" / "completions.jsonl").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "psacpo.cli", "demo", "--out", "demo-run"],
        cwd=demo_run,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in project.glob("*/adapter_model.safetensors")}
    assert (project / "frontier" / "frontier.json").read_bytes() == frontier
    assert (project / "frontier" / "completions.jsonl").read_bytes() == records


def _without_places(path: Path) -> bytes:
    """A file's bytes; a report's without the digests of adapters, whose adapter_config.json names the base's directory."""
    found = path.read_bytes()
    if path.name == "report.html":
        inputs = json.loads((path.parent / "psacpo.json").read_text())["inputs"]
        for name, digest in inputs.items():
            found = found.replace(digest.encode(), b"") if name.startswith("adapter ") else found
    return found


@pytest.mark.slow
def test_one_seed_gives_one_result(tmp_path: Path) -> None:
    """The same recipe cut short, twice: adapters, answers, verdicts and report are equal byte for byte."""
    results = []
    for name in ("one", "two"):
        recipe = write_project(tmp_path / name, seed=3)
        settings = yaml.safe_load(recipe.read_text())
        for stage in settings["stages"]:
            stage["max_steps"] = 3
        settings["ratios"] = [0.0, 0.5, 1.0]
        settings["constraints"] = []
        recipe.write_text(yaml.safe_dump(settings))
        prompts = recipe.parent / "data" / "prompts.jsonl"
        rows = prompts.read_text().splitlines(keepends=True)
        prompts.write_text("".join(rows[:: max(1, len(rows) // 24)]))
        run(Project.find(recipe))
        results.append(
            {
                path.relative_to(tmp_path / name).as_posix(): _without_places(path)
                for path in sorted((tmp_path / name).rglob("*"))
                if path.is_file() and path.name not in ("psacpo.json", ".lock", "README.md", "adapter_config.json")
            }
        )
    assert results[0].keys() == results[1].keys()
    differing = [name for name in results[0] if results[0][name] != results[1][name]]
    assert differing == []
    assert any(name.endswith("adapter_model.safetensors") for name in results[0])


def test_another_seed_has_other_preferences_and_the_same_prompts(tmp_path: Path) -> None:
    one, two = (write_project(tmp_path / str(seed), seed).parent / "data" for seed in (0, 1))
    assert (one / "prompts.jsonl").read_bytes() == (two / "prompts.jsonl").read_bytes()
    assert (one / "reward.jsonl").read_bytes() != (two / "reward.jsonl").read_bytes()


def test_evaluation_prompts_were_seen_in_no_preference(tmp_path: Path) -> None:
    data = write_project(tmp_path / "p", 0).parent / "data"
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    trained = {
        json.loads(line)["prompt"]
        for name in ("reward", "safety")
        for line in (data / f"{name}.jsonl").read_text().splitlines()
    }
    assert not {row["prompt"] for row in rows} & trained
    assert {row["category"] for row in rows} == {"benign", "borderline", "harmful"}
    assert {row["seen_family"] for row in rows} == {True, False}


def test_the_weights_are_small() -> None:
    weights = list((ROOT / "demo" / "weights").rglob("*.safetensors"))
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in weights) <= 6_000_000
