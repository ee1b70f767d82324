"""Sweeps over three adapters: the points, their order, the certificate along it, and what the run says of them."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from psacpo import pipeline
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_settings
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.engines.plan import plan_engine
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.summary import summary_lines
from psacpo.evalharness.weights import Grid, grid, place_of, read_weights_name, weight_points, weights_name
from psacpo.merge import merge
from psacpo.merge.adapters import read_adapter
from psacpo.recipe import Project

MakeConfig = Callable[..., FrontierConfig]
NAMES = ["reward", "safety", "honesty"]


@pytest.fixture(scope="module")
def honesty(tiny_llama: Path, make_adapter: Any) -> Path:
    return make_adapter(tiny_llama, seed=3, r=5, lora_alpha=10)


@pytest.fixture
def make_simplex(make_config: MakeConfig, two_adapters: tuple[Path, Path], honesty: Path) -> MakeConfig:
    adapters = dict(zip(NAMES, [*two_adapters, honesty], strict=True))

    def make(**changes: Any) -> FrontierConfig:
        return make_config(**({"adapters": adapters, "weights": "grid:2"} | changes))

    return make


def load(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "frontier.json").read_text())
    return found


@pytest.mark.parametrize(("names", "steps"), [(NAMES, 4), (NAMES, 3), (["a", "b"], 8), (["a", "b", "c", "d"], 5)])
def test_a_grid_is_every_vector_of_multiples_once(names: list[str], steps: int) -> None:
    found = grid(names, steps)
    assert len(found) == math.comb(steps + len(names) - 1, len(names) - 1)
    counts = {tuple(round(vector[name] * steps) for name in names) for vector in found}
    assert len(counts) == len(found)
    assert all(sum(one) == steps and min(one) >= 0 for one in counts)
    assert all(abs(sum(vector.values()) - 1) < 1e-12 for vector in found)


def test_points_stand_by_rising_safety_then_falling_reward() -> None:
    found = weight_points(Grid(steps=2), NAMES)
    assert [weights_name(vector) for vector in found] == [
        "policy@reward_1.00",
        "policy@reward_0.50+honesty_0.50",
        "policy@honesty_1.00",
        "policy@reward_0.50+safety_0.50",
        "policy@safety_0.50+honesty_0.50",
        "policy@safety_1.00",
    ]
    assert [read_weights_name(weights_name(vector)) for vector in found] == found
    # The order does not hang on how the vectors were given.
    assert weight_points(list(reversed(found)), NAMES) == found
    assert place_of({"safety": 0.5, "reward": 0.5}, NAMES) < place_of({"safety": 0.5, "honesty": 0.5}, NAMES)
    assert weights_name({"reward": 1 / 3, "safety": 2 / 3}) == "policy@reward_0.3333+safety_0.6667"
    for other in ("policy@0.30", "base", "policy@reward_0.5", "policy@_0.50"):
        assert read_weights_name(other) is None


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ("grid:0", r"weights.*greater than or equal to 1"),
        ("mesh", "'mesh' cannot be read; allowed: grid, or grid:STEPS"),
        ("grid:100", "5151 points; allowed: at most 1001"),
        (
            {"steps": 2, "of": ["reward", "kindness"]},
            "of 'kindness' which is unknown; allowed: reward, safety, honesty",
        ),
        ({"step": 2}, "did you mean 'steps'"),
        ([{"reward": 0.5, "safety": 0.6}], "allowed: numbers from 0 to 1 that sum to 1"),
        ([{"reward": 1.5, "safety": -0.5}], "allowed: numbers from 0 to 1 that sum to 1"),
        ([{"reward": 1, "truth": 0}], "adapter 'truth' which is unknown"),
        ([{"reward": 0.99999, "safety": 0.00001}], "1e-05 is too small to be named; allowed: 0, or at least 0.0001"),
        (
            [{"reward": 0.5, "safety": 0.5}, {"reward": 0.50001, "safety": 0.49999}],
            r"two points are the same to four digits: policy@reward_0.50\+safety_0.50",
        ),
        ([], "0 points"),
    ],
)
def test_weights_that_are_none_are_refused(make_simplex: MakeConfig, weights: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make_simplex(weights=weights)


def test_a_sweep_of_three_adapters(make_simplex: MakeConfig, tiny_judge: Path) -> None:
    pytest.importorskip("moocore")
    judges = {
        "reward": {"kind": "scalar", "model": str(tiny_judge)},
        "cost": {"kind": "scalar", "model": str(tiny_judge), "better": "lower"},
        "candour": {"kind": "length", "better": "higher"},
    }
    config = make_simplex(
        judges=judges,
        constraints=["unsafe_rate<=1"],
        objectives=["reward", "cost", "candour"],
        baselines={"base": {}, "soup": {"reward": 0.5, "honesty": 0.5}},
    )
    run = frontier(config)
    found = load(run)
    expected = weight_points(Grid(steps=2), NAMES)
    assert [point["weights"] for point in found["points"]] == expected
    assert [point["policy"] for point in found["points"]] == [weights_name(vector) for vector in expected]
    assert {point["ratio"] for point in found["points"]} == {None}
    assert [entry["name"] for entry in found["baselines"]] == ["base", "soup"]
    assert all(point["certified"] for point in found["points"])
    best = max(found["points"], key=lambda point: point["reward"]["mean"])
    choice = found["choice"]
    assert (choice["ratio"], choice["policy"], choice["weights"]) == (None, best["policy"], best["weights"])
    assert "mixtures that meet" in choice["why"]
    assert len(found["hypervolume"]["reference"]) == 3
    assert found["hypervolume"]["relative"]["value"] > 0
    # The point and the baseline of the same weights are one policy: the same answers.
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    texts = {name: {r["prompt_id"]: r["text"] for r in rows if r["policy"] == name} for name in ("soup", "base")}
    point = "policy@reward_0.50+honesty_0.50"
    assert texts["soup"] == {r["prompt_id"]: r["text"] for r in rows if r["policy"] == point} != texts["base"]
    table = list(csv.DictReader((run / "frontier.csv").open()))
    assert [float(row["weight_honesty"] or 0) for row in table[:6]] == [v.get("honesty", 0.0) for v in expected]
    assert summary_lines(run)[0].startswith("chosen weights: ")
    called = "/".join(f"{100 * best['weights'].get(name, 0):g}" for name in NAMES)
    [row] = [line for line in summary_lines(run) if line.endswith(" chosen")]
    assert row.split()[0] == called
    assert any(line.startswith("reward/safety/honesty %") for line in summary_lines(run))
    page = (run / "report.html").read_text()
    assert "reward 0.5, honesty 0.5" in page
    assert "mixtures by rising weight of safety" in page


@pytest.mark.parametrize("prompts", [100, 200])
def test_the_walk_goes_by_what_is_learned_and_by_the_weight_of_safety_where_prompts_are_few(
    tmp_path: Path, prompts: int
) -> None:
    """Six points, of which one is unsafe, which has half safety and half reward: it stands fourth by safety, last by rate."""
    rates = {
        "policy@reward_1.00": 0.0,
        "policy@reward_0.50+honesty_0.50": 0.0,
        "policy@honesty_1.00": 0.0,
        "policy@reward_0.50+safety_0.50": 0.5,
        "policy@safety_0.50+honesty_0.50": 0.0,
        "policy@safety_1.00": 0.0,
    }
    draw = np.random.default_rng(0)
    rows = [
        {"prompt_id": n, "policy": name, "reward": float(draw.normal() - rank), "unsafe": int(draw.random() < rate)}
        for rank, (name, rate) in enumerate(rates.items())
        for n in range(prompts)
    ]
    draw.shuffle(rows)
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = frontier_from_scores(
        scores_settings(path, constraints=["unsafe_rate<=0.05"], out=tmp_path / "run", holdout=0.0)
    )
    found = load(run)
    choice = found["choice"]
    assert [point["policy"] for point in found["points"]] == list(rates)
    certified = [point["certified"] for point in found["points"]]
    assert choice["naive"]["policy"] == "policy@reward_1.00"
    if prompts == 100:  # fifteen of them would tell too little
        assert certified == [False] * 4 + [True] * 2
        assert choice["policy"] == "policy@safety_0.50+honesty_0.50"
        assert choice["weights"] == {"safety": 0.5, "honesty": 0.5}
        assert not choice["naive"]["certified"]
        assert "order" not in choice
    else:
        assert certified == [True] * 3 + [False] + [True] * 2
        assert choice["policy"] == "policy@reward_1.00"
        # Those that order test nothing.
        assert choice["order"]["prompts"] == 30
        assert choice["calibration"]["prompts"] == 170
        assert {point["tests"]["unsafe_rate<=0.05"]["rows"] for point in found["points"]} == {170}
        [walk] = choice["order"]["walks"].values()
        assert (walk[0], walk[-1]) == ("policy@safety_1.00", "policy@reward_0.50+safety_0.50")


def test_none_certified_names_the_nearest_policy(make_simplex: MakeConfig) -> None:
    found = load(frontier(make_simplex(constraints=["unsafe_rate<=0.01"])))
    choice = found["choice"]
    assert (choice["ratio"], choice["policy"]) == (None, None)
    assert "no mixture meets unsafe_rate<=0.01" in choice["why"]
    assert choice["nearest"]["weights"] == read_weights_name(choice["nearest"]["policy"])


def test_the_stacked_rank_of_three_adapters_is_one_that_vllm_takes(
    make_simplex: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_simplex(engine="vllm", strategy="lora")
    monkeypatch.setattr("psacpo.evalharness.engines.plan.vllm_device", lambda: "cuda")
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    policies = [Policy(weights_name(v), v, point=True) for v in config.weight_points()]
    # Ranks 4, 6 and 5: pairs come to 11 at most, and all three would be 15; the next that vLLM takes is 16.
    assert plan_engine(config, Path(config.base), adapters, policies, []).max_lora_rank == 16
    few = [policy for policy in policies if len(policy.weights) == 1]
    assert plan_engine(config, Path(config.base), adapters, few, []).max_lora_rank == 8


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_judge: Path, honesty: Path) -> Path:
    """A recipe that trains two adapters, brings a third, and sweeps three points."""
    root = tmp_path_factory.mktemp("project")
    words = ["loaf", "bread", "lock", "bike", "heat", "first", "second", "then"]
    rows = [{"prompt": f"how do i bake {w}", "chosen": f"mix the {w} help", "rejected": f"sorry {w}"} for w in words]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": w, "prompt": f"how do i bake {w}"} for w in words]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    shutil.copytree(honesty, root / "given")
    stage = {"data": "rows.jsonl", "max_steps": 2, "batch_size": 4, "learning_rate": 0.01}
    recipe = {
        "base": str(tiny_llama),
        "max_length": 64,
        "lora": {"r": 2, "alpha": 4},
        "stages": [{"name": "reward"} | stage, {"name": "safety"} | stage],
        "adapters": {"reward": "reward", "safety": "safety", "honesty": "given"},
        "weights": [{"safety": 1}, {"reward": 0.5, "safety": 0.25, "honesty": 0.25}, {"reward": 1}],
        "baselines": {"base": {}, "other": {"model": str(tiny_llama)}},
        "prompts": "prompts.jsonl",
        "judges": {
            "reward": {"kind": "scalar", "model": str(tiny_judge)},
            "cost": {"kind": "scalar", "model": str(tiny_judge), "better": "lower"},
        },
        "generation": {"max_new_tokens": 8},
        "resamples": 200,
        "constraints": ["unsafe_rate<=1"],
    }
    (root / "psacpo.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_run_ends_in_the_chosen_mixture_and_goes_on_where_it_stopped(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    here = Project.find(None)
    run = pipeline.run(here)
    choice = load(run)["choice"]
    found = pipeline.merged(here, run)
    policy = Path(found["policy"])
    assert policy == Path("policies") / choice["policy"]
    manifest = json.loads((policy / "psacpo.json").read_text())
    sources = {Path(place).name: w for place, w in manifest["config"]["policies"].items()}
    assert sources == {"given" if n == "honesty" else n: w for n, w in choice["weights"].items()}
    assert found["serve"].startswith("vllm serve ")
    assert "dial" not in found  # psacpo serve knows ratios only
    names = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    assert isinstance(eval(found["load"], names), PeftModel)
    # By the names of the recipe's adapters, merge finds the same place and the same work.
    assert merge(here.merge(policies=choice["weights"])) == [policy]
    with pytest.raises(InputError, match="'out' is missing"):
        here.merge(policies={str(project / "given"): 0.5, "somewhere": 0.5})

    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.name != ".lock"}
    shutil.rmtree("policies")
    (run / "frontier.json").unlink()
    monkeypatch.setattr(TransformersEngine, "load", None)  # no answer is made again
    assert pipeline.run(Project.find(None)) == run
    assert before == {path: path.read_bytes() for path in before}


def test_weights_by_flags(project: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.chdir(project)
    here = Project.find(None)
    assert len(here.frontier().point_names()) == 3
    flags = {
        "weights": "grid:2",
        "adapters": {"truth": Path("given")},
        "baselines": {"other": {"model": str(tiny_llama)}},
    }
    config = here.frontier(**flags)
    assert len(config.point_names()) == 10  # of four adapters now
    assert config.policy_names()[10:] == ["base", "other"]
    assert config.command == f"psacpo frontier --adapter truth=given --baseline other={tiny_llama} --weights grid:2"
    assert here.frontier(ratios=[0.0, 1.0]).point_names() == ["policy@0.00", "policy@1.00"]
    with pytest.raises(InputError, match="two kinds of sweep"):
        here.frontier(ratios=[0.5], weights="grid")
    recipe = yaml.safe_load(Path("psacpo.yaml").read_text()) | {"ratios": [0, 1]}
    Path("both.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match="over ratios or over weights"):
        Project.find(Path("both.yaml"))
