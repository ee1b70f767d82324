"""Recipes: YAML in, settings out, and one line with the nearest valid name for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from psacpo.errors import InputError
from psacpo.merge.config import parse_ratios, policy_name
from psacpo.recipe import Project, stages_from_flags

RECIPE: dict[str, Any] = {
    "base": "model",
    "beta": 0.1,
    "lambda": 10,
    "stages": [{"name": "reward", "data": "data/h.jsonl"}, {"name": "safety", "data": "data/s.jsonl"}],
    "prompts": "data/p.jsonl",
    "judges": {
        "reward": {"kind": "scalar", "model": "judges/r"},
        "cost": {"kind": "scalar", "model": "org/cost", "better": "lower"},
    },
    "constraints": ["unsafe_rate<=0.05"],
}


def project(tmp_path: Path, **changes: Any) -> Project:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "judges" / "r").mkdir(parents=True, exist_ok=True)
    path = tmp_path / "psacpo.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False), encoding="utf-8")
    return Project.find(path)


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(tmp_path: Path) -> None:
    found = project(tmp_path).frontier()
    assert found.base == str(tmp_path / "model")
    assert found.adapters == {"reward": tmp_path / "reward", "safety": tmp_path / "safety"}
    assert found.prompts == tmp_path / "data/p.jsonl"
    assert [judge.model_dump()["model"] for judge in found.judges.values()] == [str(tmp_path / "judges/r"), "org/cost"]
    assert found.out == tmp_path / "frontier"


def test_kl_weights_of_the_stages(tmp_path: Path) -> None:
    config = project(tmp_path).align()
    assert [config.start_of(stage) for stage in config.stages] == ["base", "reward"]
    assert [config.beta_of(stage) for stage in config.stages] == pytest.approx([0.1, 0.01])
    stages = [*RECIPE["stages"], {"name": "naive", "data": "data/s.jsonl", "start": "base"}]
    config = project(tmp_path, stages=stages).align(beta=0.2)
    assert [config.beta_of(stage) for stage in config.stages] == pytest.approx([0.2, 0.02, 0.2])


def test_flags_win(tmp_path: Path) -> None:
    found = project(tmp_path).frontier(
        ratios=[0.5], constraints=["cost<=0"], adapters={"safety": Path("x")}, judges={}, seed=None
    )
    assert found.ratios == [0.5]
    assert [str(constraint) for constraint in found.constraints] == ["cost<=0"]
    assert found.adapters == {"reward": tmp_path / "reward", "safety": Path("x")}
    merged = project(tmp_path).merge(ratios=[0.3])
    assert merged.out == tmp_path / "policies" / "policy@0.30"
    assert project(tmp_path).merge(ratios=[0.3, 0.4]).out == tmp_path / "policies"
    stages = stages_from_flags(project(tmp_path), "mine.jsonl", None)
    assert stages is not None
    assert [stage["data"] for stage in stages] == ["mine.jsonl", "data/s.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratioss": [1]}, "unknown key 'ratioss', did you mean 'ratios'?"),
        (
            {"stages": [{"name": "reward", "data": "x", "betta": 1}]},
            "in stages.0: unknown key 'betta', did you mean 'beta'?",
        ),
        (
            {"judges": {"reward": {"kind": "scalar", "modle": "x"}}},
            "in judges.reward: unknown key 'modle', did you mean 'model'?",
        ),
        ({"judges": {"reward": {"kind": "scalr"}}}, "judges.reward: .*'scalar'"),
        ({"judges": {"reward": {"kind": "scalar"}}}, "'judges.reward.model' is missing"),
        ({"generation": {"temperature": -1}}, "generation.temperature: .*greater than or equal to 0; given: -1"),
        ({"constraints": ["unsafe_rate<0.1"]}, "constraints.0: constraint 'unsafe_rate<0.1' cannot be read"),
        ({"constraints": ["unsafe_rate<=lots"]}, "constraints.0: constraint 'unsafe_rate<=lots' cannot be read"),
        (
            {"constraints": ["harm<=0.1"]},
            "constraint on metric 'harm' which is unknown; allowed: reward, cost, .*unsafe_rate",
        ),
        ({"ratios": [0.5, 1.5]}, "ratio 1.5 is out of range"),
        ({"ratios": [0.5, 0.5]}, "two ratios are the same"),
        ({"ratios": [float("nan")]}, "ratios.0: .*finite number; given: nan"),
        (
            {"baselines": {"x": {"nave": 1.0}}},
            "baseline 'x' weighs adapter 'nave' which is unknown; allowed: reward, safety",
        ),
        ({"stages": [{"name": "a", "data": "x"}, {"name": "a", "data": "x"}]}, "two stages are called 'a'"),
        ({"stages": [{"name": "a", "data": "x", "start": "b"}]}, "starts at 'b'; allowed: base"),
        ({"stages": [{"name": "../a", "data": "x"}]}, "not a plain directory name"),
        ({"lambda": float("inf")}, "lambda: .*finite"),
        ({"metrics": {"m": {"judge": "cost", "above": float("nan")}}}, "metrics.m.above: .*finite"),
        ({"baselines": {"policy@0.50": {}}}, "has the name of a swept policy"),
        ({"baselines": {"b": {"reward": 1e30}}}, "has a weight over 100"),
        ({"baselines": {"two\nlines": {}}}, "baseline name .* is not letters"),
        ({"device": "tpu"}, "device: .*'cuda'"),
        ({"stages": [{"name": "frontier", "data": "x"}]}, "or is taken"),
        ({"template": "no field"}, r"template holds no \{prompt\}"),
        ({"metrics": {"m": {"judge": "rewad"}}}, "metrics: judge 'rewad' which is unknown"),
        ({"prompts": None}, "'prompts' is missing"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_way_out(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        found = project(tmp_path, **changes)
        found.align()
        found.frontier()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "line 1 is not YAML|line 2 is not YAML"), ("- 1", "holds no settings"), ("", "holds no settings")],
)
def test_no_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "psacpo.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        Project.find(tmp_path)


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "psacpo.yaml").write_text("base: a\nstages: []\nbase: b\n")
    with pytest.raises(InputError, match="line 3 is not YAML: the key 'base' is there twice"):
        Project.find(tmp_path)
    (tmp_path / "psacpo.yaml").write_text("a: &x {r: 4}\nb: {<<: *x}\n" + "c: " + "[" * 3000)
    with pytest.raises(InputError):
        Project.find(tmp_path)


def test_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no recipe at"):
        Project.find(tmp_path / "nowhere.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="'base' is missing: there is no psacpo.yaml here; allowed: --base"):
        Project.find(None).align()


def test_align_leaves_a_recipe_that_works_where_it_lies(tmp_path: Path) -> None:
    source = project(tmp_path)
    config = source.align(out=tmp_path / "elsewhere")
    config.out.mkdir()
    source.leave(config)
    left = Project.find(config.out)
    merged = left.merge(ratios=[0.5])
    assert (merged.base, merged.reward) == (str(tmp_path / "model"), str(tmp_path / "elsewhere" / "reward"))
    assert left.align().stages == config.stages
    assert left.frontier().judges == source.frontier().judges
    # In its own directory the user's file is left alone, comments and all.
    before = (tmp_path / "psacpo.yaml").read_bytes()
    source.leave(source.align())
    assert (tmp_path / "psacpo.yaml").read_bytes() == before


def test_paths_beside_the_recipe_are_relative_and_others_absolute(tmp_path: Path) -> None:
    source = project(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "h.jsonl").touch()
    config = source.align(out=tmp_path / "one")
    config.out.mkdir(parents=True)
    source.leave(config)
    said = yaml.safe_load((config.out / "psacpo.yaml").read_text())
    assert said["base"] == "../model"
    assert said["stages"][0]["data"] == "../data/h.jsonl"
    assert Project.find(config.out).merge(ratios=[0.5]).base == str(tmp_path / "model")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    source.leave(source.align(out=deep))
    assert yaml.safe_load((deep / "psacpo.yaml").read_text())["base"] == str(tmp_path / "model")


def test_what_flags_say_is_remembered_where_the_recipe_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    home = tmp_path / "project"
    home.mkdir()
    for name in ("model", "my judge"):
        (tmp_path / name).mkdir()
    (tmp_path / "p.jsonl").touch()
    (home / "psacpo.yaml").write_text("base: ../model  # mine\nratios: [0, 1]")
    monkeypatch.chdir(home)
    flags: dict[str, Any] = {
        "prompts": Path("../p.jsonl"),
        "judges": {
            name: {"kind": "scalar", "model": "../my judge", "better": better}
            for name, better in (("reward", "higher"), ("cost", "lower"))
        },
        "constraints": ["unsafe_rate<=0.05"],
        "ratios": [0.0, 0.25, 0.5, 0.75, 1.0],
        "samples": 2,
        "vllm": {"max_num_seqs": 64},
    }
    found = Project.find(None)
    config = found.frontier(**flags)
    assert shlex.split(config.command) == [
        *("psacpo", "frontier", "--reward-model", "../my judge", "--cost-model", "../my judge"),
        *("--prompts", "../p.jsonl", "--samples", "2", "--ratio", "0:1:0.25", "--constraint", "unsafe_rate<=0.05"),
        *("--engine-set", "vllm.max_num_seqs=64"),
    ]
    said = found.remember(config)
    assert said is not None
    assert "psacpo.yaml now says prompts, judges, constraints" in said
    text = (home / "psacpo.yaml").read_text()
    assert text.startswith("base: ../model  # mine\nratios: [0, 1]\n\n# From the flags")
    again = Project.find(None).frontier()
    assert (again.prompts, again.judges, again.constraints) == (config.prompts, config.judges, config.constraints)
    # A flag that is meant for once changes nothing, and what the file says stays.
    assert (again.samples, again.ratios) == (1, [0.0, 1.0])
    later = Project.find(None)
    assert later.remember(later.frontier(constraints=["cost<=3"])) is None
    assert (home / "psacpo.yaml").read_text() == text
    # From elsewhere the same command is told as it works in the project's directory.
    monkeypatch.chdir(tmp_path)
    typed = Project.find(Path("project")).frontier(prompts=Path("p.jsonl"), out=Path("project/run2"), seed=3)
    assert typed.command == "psacpo frontier --prompts ../p.jsonl --out run2 --seed 3"


def test_a_recipe_that_cannot_be_added_to_gets_the_lines_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "p.jsonl").touch()
    home = tmp_path / "psacpo.yaml"
    home.write_text("{base: model}\n")
    found = Project.find(home)
    said = found.remember(found.frontier(prompts=tmp_path / "p.jsonl", judges=RECIPE["judges"]))
    assert said is not None
    assert "add to" in said
    assert "prompts: p.jsonl" in said
    assert home.read_text() == "{base: model}\n"
    # A recipe of another name is no project's.
    other = home.rename(tmp_path / "recipe.yaml")
    found = Project.find(other)
    config = found.frontier(prompts=tmp_path / "p.jsonl", judges=RECIPE["judges"])
    assert found.remember(config) is None
    assert config.command.startswith("psacpo frontier recipe.yaml --reward-model")


def test_ratios_from_text() -> None:
    assert parse_ratios(["0.3"]) == [0.3]
    assert parse_ratios(["0:1:0.25"]) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert parse_ratios(["0:1:0.1"]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert parse_ratios(["0:1:0.4", "1"]) == [0.0, 0.4, 0.8, 1.0]
    for text in (
        "abc",
        "",
        "1.5",
        "-0.1",
        "nan",
        "inf",
        "0:1",
        "0:1:0",
        "1:0:0.1",
        "0:2:0.5",
        "0:1:x",
        "0.3,0.4",
        "0:1:0.0000001",
    ):
        with pytest.raises(InputError, match="ratio"):
            parse_ratios([text])


def test_policy_names() -> None:
    assert [policy_name(q) for q in (0, 0.3, 0.125, 1.0)] == [
        "policy@0.00",
        "policy@0.30",
        "policy@0.125",
        "policy@1.00",
    ]
