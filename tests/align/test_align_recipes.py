"""The recipes that are for models too large for here: they are read, and say what the papers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from psacpo.align.config import AlignConfig
from psacpo.recipe import Project

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("accelerate", "judges"))


def read(name: str) -> AlignConfig:
    return Project.find(RECIPES / name).align(out="somewhere")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_is_read_and_headed_by_its_command(path: Path) -> None:
    config = Project.find(path).align(out="somewhere")
    assert {"reward", "safety"} <= {stage.name for stage in config.stages}
    head = path.read_text(encoding="utf-8").partition("base:")[0]
    assert "psacpo align" in head
    assert "psacpo frontier" in head
    if path.parent.name != "hh":
        assert f"psacpo align recipes/{path.relative_to(RECIPES)} " in head
        assert "Memory: " in head
        assert " run" in head


@pytest.mark.parametrize("name", ["dpo-dpo", "dpo-kto", "kto-dpo"])
def test_sacpo_has_the_betas_of_table_3(name: str) -> None:
    config = read(f"sacpo-alpaca-7b/{name}.yaml")
    betas = {stage.name: config.beta_of(stage) for stage in config.runs}
    assert betas["reward"] == 0.1
    swept = {beta for stage, beta in betas.items() if stage.startswith("safety") and "naive" not in stage}
    assert sorted(swept) == pytest.approx([0.01, 0.025, 0.05, 0.1])
    if name == "dpo-dpo":
        assert betas["safety-naive"] == pytest.approx(0.01)
    first, second = config.stages
    assert first.loss == name.split("-")[0]
    assert second.loss == name.split("-")[1]
    assert (first.learning_rate, first.epochs, config.max_length, config.tuning) == (2e-5, 3, 512, "full")


def test_safe_first_goes_the_other_way() -> None:
    config = read("sacpo-alpaca-7b/safe-first.yaml")
    safety, reward = config.runs
    assert [safety.name, reward.name] == ["safety", "reward"]
    assert config.start_of(reward) == "safety"
    assert (config.beta_of(safety), config.beta_of(reward)) == (0.01, 0.1)


@pytest.mark.parametrize("name", ["rsa/alpaca-7b.yaml", "rsa/qwen2.5-0.5b-lora.yaml"])
def test_rsa_is_risk_aware_in_both_stages(name: str) -> None:
    config = read(name)
    assert {stage.loss for stage in config.stages} == {"radpo2"}
    assert {stage.risk for stage in config.stages} in ({"cvar"}, {"erm"})
