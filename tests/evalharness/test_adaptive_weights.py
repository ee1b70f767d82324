"""An adaptive sweep over weights of three adapters: where it starts, what it adds, and in which order it tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.adaptive.space import Dial, Simplex, first_points
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.rejudge import rejudge
from psacpo.evalharness.statistics.mixing import apart, coarse, neighbours, next_mixture
from psacpo.evalharness.summary import summary_lines
from psacpo.evalharness.sweep import plan_summary
from psacpo.evalharness.weights import weights_name

MakeConfig = Callable[..., FrontierConfig]
WORDS = ["how", "do", "i", "bake", "break", "a", "loaf", "lock", "of", "bread", "bike", "the", "mix", "open", "heat"]
LIMIT = "unsafe_rate<=0.35"


def test_the_coarse_simplex_is_vertices_midpoints_and_centroid() -> None:
    found = coarse(3)
    assert found.tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0.5, 0.5, 0],
        [0.5, 0, 0.5],
        [0, 0.5, 0.5],
        [0.3334, 0.3333, 0.3333],
    ]
    assert len(coarse(4)) == 4 + 6 + 1
    assert coarse(2).tolist() == [[1, 0], [0, 1], [0.5, 0.5]]
    assert apart(np.array([0.25, 0.75]), np.array([0.6, 0.4])) == pytest.approx(0.35)
    # Each vertex has the two middles beside it, and the centroid the three middles.
    assert neighbours(found) == [(0, 3), (0, 4), (1, 3), (1, 5), (2, 4), (2, 5), (3, 6), (4, 6), (5, 6)]


def test_the_next_mixture_is_at_the_best_crossing_then_in_the_widest_gap() -> None:
    vectors = coarse(3)
    # Reward falls and safety rises from the first to the second adapter; the third is worse than the second in both.
    points = np.array([[1.0, 0.0], [0.0, 1.0], [-0.2, 0.9], [0.8, 0.1], [0.4, 0.4], [0.1, 0.8], [0.3, 0.6]])
    passed = [False, True, True, False, False, True, True]
    found = next_mixture(vectors, points, passed=passed)
    assert found is not None
    # Of the crossings 3-1, 4-2, 3-6 and 4-6 the middle of 3-6 promises 0.55, over the 0.3 that the best passing one has.
    assert found.why == "crossing"
    assert found.weights == pytest.approx([5 / 12, 5 / 12, 1 / 6], abs=2e-4)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    assert found.gain == pytest.approx((0.55 - 0.3) / 1.2)
    # Nothing passes, or all does: the gap. On the frontier .8 and .4 follow each other: .4 by .3, of a box of 1.2 by 1.
    found = next_mixture(vectors, points, passed=[True] * 7)
    assert found is not None
    assert (found.why, found.gain) == ("gap", pytest.approx(0.4 * 0.3 / 1.2))
    assert found.weights == pytest.approx([0.5, 0.25, 0.25])
    assert next_mixture(vectors, points, noise=0.11) is None
    # Neither is too close to what is there.
    assert next_mixture(vectors, points, resolution=0.25, noise=0.05) is None
    # A crossing that promises nothing over what passes is not worth a measurement.
    poor = points.copy()
    poor[6] = [0.79, 0.05]
    found = next_mixture(vectors, poor, passed=passed)
    assert found is None or found.why == "gap"


def test_names_tell_the_points() -> None:
    simplex = Simplex(["reward", "safety", "honesty"], [{"reward": 1.0}, {"safety": 1.0}])
    name = "policy@reward_0.4167+safety_0.4166+honesty_0.1667"
    policy = simplex.policy(name)
    assert weights_name(policy.weights) == policy.name == name
    assert policy.point
    assert policy.ratio is None
    simplex.add(name)
    assert simplex.names == ["policy@reward_1.00", name, "policy@safety_1.00"]
    assert simplex.settings()["weights"][1] == policy.weights
    dial = Dial([1.0, 0.0])
    dial.add("policy@0.375")
    assert dial.settings() == {"ratios": [0.0, 0.375, 1.0]}


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path, tiny_llama: Path, make_adapter: Any) -> MakeConfig:
    """An adaptive sweep over 160 prompts and three adapters; a third of the answers at the reward end hold an n."""
    prompts = tmp_path / "many.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"{WORDS[i % 15]} {WORDS[(i * 7 + 3) % 15]} {WORDS[i // 15]} {i}"} for i in range(160)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = {
        "reward": make_adapter(tiny_llama, seed=1, scale=0.05),
        "safety": make_adapter(tiny_llama, seed=4, scale=0.4, target_modules=["down_proj"]),
        "honesty": make_adapter(tiny_llama, seed=6, r=3, scale=0.3),
    }

    def config(**changes: Any) -> FrontierConfig:
        values: dict[str, Any] = {
            "prompts": prompts,
            "adapters": adapters,
            "weights": "grid",
            "judges": {
                "reward": {"kind": "regex", "pattern": "r", "better": "lower"},
                "cost": {"kind": "regex", "pattern": "n", "better": "lower"},
            },
            "generation": {"max_new_tokens": 8, "temperature": 0.5, "batch_size": 32},
            "constraints": [LIMIT],
            "resamples": 100,
            "holdout": 0.15,
            "adaptive": {"most_ratios": 9, "resolution": 0.05, "design": 0.3},
        }
        return make_config(**values | changes)

    return config


def test_mixtures_are_added_and_tested_in_the_order_that_the_design_tells(make: MakeConfig) -> None:
    config = make()
    told = plan_summary(config)
    assert told["adaptive"]["full grid"]["mixtures"] == 9
    run = frontier(config)
    found = json.loads((run / "frontier.json").read_text())
    account, choice = found["adaptive"], found["choice"]
    start = [entry for entry in account["points"] if entry["why"] == "start"]
    assert len(start) == 7
    added = [entry for entry in account["points"] if entry["why"] != "start"]
    assert added
    for entry in added:
        assert sum(entry["weights"].values()) == pytest.approx(1)
        assert weights_name(entry["weights"]) == entry["policy"]
    names = [point["policy"] for point in found["points"]]
    assert names == [entry["policy"] for entry in account["points"]]
    assert all(point["ratio"] is None and point["weights"] for point in found["points"])
    # Tests see none of the prompts that chose the mixtures and their order.
    assert choice["order"]["prompts"] == account["prompts"]["design"] == found["points"][0]["n_prompts"]
    assert choice["calibration"]["prompts"] == account["prompts"]["test"]
    [walk] = choice["order"]["walks"].values()
    assert sorted(walk) == sorted(names)
    outcome = {entry["policy"]: entry["outcome"] for entry in account["points"]}
    first = next((k for k, name in enumerate(walk) if outcome[name] != "passed"), len(walk))
    assert all(outcome[name].startswith("not asked") for name in walk[first + 1 :])
    assert [p["policy"] for p in found["points"] if p["certified"]] == [n for n in names if n in walk[:first]]
    assert account["generations"]["spent"] < account["generations"]["full_grid"]
    assert any(line.startswith("adaptive: ") and "mixtures" in line for line in summary_lines(run))
    page = (run / "report.html").read_text()
    assert "these 9 mixtures" in page or f"these {len(names)} mixtures" in page
    # Found again, byte for byte, and judged again by the same judges.
    before = (run / "frontier.json").read_bytes()
    frontier(config)
    assert (run / "frontier.json").read_bytes() == before
    rejudge(validate(JudgeConfig, {"source": run, "judges": {}}, where="test"))
    assert json.loads((run / "frontier.json").read_text()) == found


def test_where_it_starts(make: MakeConfig) -> None:
    assert len(first_points(make())["weights"]) == 7
    assert len(first_points(make(weights={"of": ["reward", "honesty"]}))["weights"]) == 3
    assert len(first_points(make(weights="grid:2"))["weights"]) == 6
    again = make(weights=make().model_dump()["weights"])  # as a recipe hands it on
    assert len(first_points(again)["weights"]) == 7
    assert len(make(adaptive=False).point_names()) == 15
    listed = [{"safety": 1.0}, {"reward": 0.5, "honesty": 0.5}]
    assert first_points(make(weights=listed))["weights"] == listed[::-1]
    assert plan_summary(make(adaptive=True))["adaptive"]["full grid"]["mixtures"] == 15
    with pytest.raises(InputError, match="most_ratios 5 is under the 7 mixtures to start from"):
        frontier(make(adaptive={"start": 3, "most_ratios": 5}))
