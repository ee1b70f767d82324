"""Settings of align that are refused before anything is loaded, and which stages they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from psacpo.align.config import AlignConfig
from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.recipe import Project, stages_from_flags

TWO = [{"name": "reward", "data": "r"}, {"name": "safety", "data": "s"}]
THREE = [*TWO, {"name": "privacy", "data": "p"}]


def config(stages: list[dict[str, Any]], **settings: Any) -> AlignConfig:
    return validate(AlignConfig, {"base": "b", "out": "o", "stages": stages} | settings, where="psacpo.yaml")


def runs(found: AlignConfig) -> list[tuple[str, str, float]]:
    return [(stage.name, found.start_of(stage), round(found.beta_of(stage), 9)) for stage in found.runs]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a", "data": "d", "start": "b"}], "starts at 'b'; allowed: base$"),
        ([{"name": "a", "data": "d"}, {"name": "b", "data": "d", "start": "c"}], "starts at 'c'; allowed: base, a$"),
        ([{"name": "a", "data": "d", "adam_betas": [1, 1]}], r"adam_betas \[1.0, 1.0\] are out of range"),
        ([{"name": "a", "data": "d", "learning_rate": 1e10}], "learning_rate"),
        ([{"name": "../a", "data": "d"}], "not a plain directory name"),
        ([{"name": "frontier", "data": "d"}], "not a plain directory name, or is taken: base, frontier"),
        ([{"name": "a", "data": "d"}, {"name": "a", "data": "e"}], "two stages are called 'a'"),
        ([{"name": "a", "data": "d", "beta": 0}], r"stages.0.beta: Input should be greater than 0; given: 0"),
        ([{"name": "a", "data": "d", "beta": -0.1}], "stages.0.beta: Input should be greater than 0"),
    ],
)
def test_bad_stages_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(stages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "psacpo.yaml: beta: Input should be greater than 0"),
        ({"lambda": -1}, "psacpo.yaml: lambda: Input should be greater than 0"),
        ({"lambdas": "1,0"}, "lambdas are 1, 0; allowed: above 0"),
        ({"order": "safety"}, "order is safety; allowed: each of reward, safety once"),
        ({"order": "safety,reward,safety"}, "allowed: each of reward, safety once"),
        ({"order": ["safety", "rewards"]}, "order is safety, rewards; allowed: each of reward, safety once"),
        ({"template": "USER: ASSISTANT:"}, "template holds no {prompt}"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        config(TWO, **settings)
    assert "\n" not in str(error.value)


def test_each_stage_starts_at_the_one_before() -> None:
    assert runs(config(THREE)) == [("reward", "base", 0.1), ("safety", "reward", 0.01), ("privacy", "safety", 0.01)]


def test_order() -> None:
    expected = [("safety", "base", 0.1), ("reward", "safety", 0.01)]
    assert runs(config(TWO, order="safety, reward")) == runs(config(TWO, order=["safety", "reward"])) == expected
    # A stage that says its own start needs no place in the order.
    naive = {"name": "naive", "data": "s", "start": "base", "beta": 0.03}
    assert runs(config([TWO[0], naive, TWO[1]], order="safety,reward")) == [*expected, ("naive", "base", 0.03)]
    # In the other order its start is not there yet.
    with pytest.raises(InputError, match="stage 'safety' starts at 'reward'; allowed: base$"):
        config([TWO[0], TWO[1] | {"start": "reward"}, THREE[2]], order="safety,reward,privacy")


def test_naive_and_lambdas() -> None:
    found = config(THREE, naive=True, lambdas="1,2,4,10", beta=0.2)
    assert runs(found) == [
        ("reward", "base", 0.2),
        ("safety", "reward", 0.02),
        ("privacy", "safety", 0.02),
        # The one of lambda 10 is `safety`.
        ("safety-lambda1", "reward", 0.2),
        ("safety-lambda2", "reward", 0.1),
        ("safety-lambda4", "reward", 0.05),
        ("safety-naive", "base", 0.02),
        ("privacy-naive", "base", 0.02),
    ]
    assert [stage.data for stage in found.runs[3:]] == ["s", "s", "s", "s", "p"]
    # What one reads back from the settings asks for the same.
    assert AlignConfig.model_validate(found.model_dump(by_alias=True)).runs == found.runs


def test_naive_and_lambdas_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="lambdas need a stage that starts at another one"):
        config(TWO[:1], lambdas=[1])
    with pytest.raises(InputError, match="'safety-naive' is what naive or lambdas call one of theirs"):
        config([*TWO, {"name": "safety-naive", "data": "s", "start": "base"}], naive=True)


def test_recipe_that_is_left_says_what_users_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of flags alone, and of a recipe, whose own words stay."""
    monkeypatch.chdir(tmp_path)
    source = Project.find(None)
    stages = stages_from_flags(source, "r.jsonl", "s.jsonl")
    found = source.align(base="org/model", stages=stages, out=tmp_path / "out", lambdas="2,5", naive=True)
    (tmp_path / "out").mkdir()
    source.leave(found)
    left = yaml.safe_load((tmp_path / "out" / "psacpo.yaml").read_text())
    common = {"loss": "dpo", "learning_rate": 5e-5, "batch_size": 8, "epochs": 1.0}
    assert left == {
        "base": "org/model",
        "beta": 0.1,
        "lambda": 10.0,
        "lora": {
            "r": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "use_rslora": False,
            "use_dora": False,
        },
        "max_length": 512,
        "stages": [{"name": "reward", "data": "r.jsonl"} | common, {"name": "safety", "data": "s.jsonl"} | common],
        "seed": 0,
        "naive": True,
        "lambdas": [2.0, 5.0],
        "adapters": {name: name for name in ("reward", "safety", "safety-lambda2", "safety-lambda5", "safety-naive")},
    }
    again = Project.find(tmp_path / "out").align()
    assert again.model_copy(update={"out": found.out}) == found
    (tmp_path / "out" / "psacpo.yaml").write_text(yaml.safe_dump(left | {"beta": 0.3, "order": "safety,reward"}))
    other = Project.find(tmp_path / "out")
    (tmp_path / "two").mkdir()
    other.leave(other.align(out=tmp_path / "two", lambdas="3"))
    third = yaml.safe_load((tmp_path / "two" / "psacpo.yaml").read_text())
    assert (third["beta"], third["order"], third["lambdas"]) == (0.3, ["safety", "reward"], [3.0])
    assert list(third["adapters"]) == ["safety", "reward", "reward-lambda3", "reward-naive"]
