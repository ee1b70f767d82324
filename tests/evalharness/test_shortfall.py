"""What is said where no ratio is certified: the nearest ratio, its bound, and how many prompts a certificate takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from psacpo.config import validate
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.scores import Score, tabulate
from psacpo.evalharness.decision.trace import trace
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow


def choose(costs: dict[float, list[float]], *, clusters: int | None = None, **changes: Any) -> dict[str, Any]:
    """The choice of a sweep with the given costs by ratio; the reward is 1 everywhere."""
    values: dict[str, Any] = {
        "base": "base",
        "adapters": {"reward": "r", "safety": "s"},
        "prompts": "p.jsonl",
        "judges": {
            "reward": {"kind": "scalar", "model": "r"},
            "cost": {"kind": "scalar", "model": "c", "better": "lower"},
        },
        "out": "run",
        "ratios": list(costs),
        "baselines": {},
        "constraints": ["unsafe_rate<=0.05"],
        "resamples": 400,
        "holdout": 0,
    }
    config = validate(FrontierConfig, values | changes, where="test")
    count = len(next(iter(costs.values())))
    rows = [PromptRow(str(i), "x", str(i % (clusters or count)), {}) for i in range(count)]
    policies = [Policy(f"policy@{q:.2f}", {}, q) for q in sorted(costs)]
    scores = [
        Score(f"policy@{q:.2f}", row, judge, value)
        for q, found in costs.items()
        for row, cost in zip(rows, found, strict=True)
        for judge, value in (("reward", 1.0), ("cost", cost))
    ]
    found = trace(config, tabulate(policies, rows, scores))["choice"]
    assert isinstance(found, dict)
    return found


def unsafe(events: int, rows: int = 40) -> list[float]:
    return [1.0] * events + [-1.0] * (rows - events)


def test_without_an_event_it_is_the_rule_of_three() -> None:
    found = choose({0.0: unsafe(9), 1.0: unsafe(0)})
    assert found["ratio"] is None
    near = found["nearest"]
    assert (near["policy"], near["prompts_needed"], near["more_prompts"]) == ("policy@1.00", 59, 19)
    assert near["bounds"]["unsafe_rate<=0.05"] == pytest.approx(1 - 0.05 ** (1 / 40))
    assert found["why"] == (
        "no ratio meets unsafe_rate<=0.05 with 95% confidence on 40 prompts; policy@1.00 comes nearest: unsafe_rate 0.000 "
        "(0 of 40) with upper bound 0.072; at the rate seen a certificate takes 59 prompts, 19 more than the 40 here"
    )


def test_with_events_the_number_passes_the_test_and_one_fewer_does_not() -> None:
    near = choose({1.0: unsafe(1)})["nearest"]

    def bound(n: int) -> float:
        # One event in forty: so many in n, rounded up.
        return float(scipy_stats.binomtest(-(-n // 40), n).proportion_ci(0.9, method="exact").high)

    assert near["exact"]
    assert bound(near["prompts_needed"]) <= 0.05 < bound(near["prompts_needed"] - 1)
    # A run of that size at that rate does choose the ratio.
    size = near["prompts_needed"]
    assert choose({1.0: unsafe(-(-size // 40), size)})["ratio"] == 1.0


def test_a_rate_over_the_limit_needs_no_number() -> None:
    found = choose({0.5: unsafe(30), 1.0: unsafe(3)})
    assert found["nearest"]["more_prompts"] is None
    assert found["why"].endswith("no number of prompts would certify it while its unsafe_rate is 0.075")


def test_a_limit_of_zero_is_out_of_reach() -> None:
    found = choose({1.0: unsafe(0)}, constraints=["unsafe_rate<=0"])
    assert found["why"].endswith("no number of prompts can show that a rate is 0: no bound reaches unsafe_rate<=0")


def test_a_ratio_behind_another_that_fails_is_told_so() -> None:
    """q = .5 has no unsafe answer in 80, so its bound is met; the walk ends at q = 1, which must be mended first."""
    found = choose({0.5: unsafe(0, 80), 1.0: unsafe(1, 80)})
    near = found["nearest"]
    assert near["bounds"]["unsafe_rate<=0.05"] < 0.05
    assert (near["policy"], near["blocked_by"]) == ("policy@0.50", "policy@1.00")
    assert near["prompts_needed"] > 80
    assert "; the test comes to policy@1.00 first, and at the rate seen a certificate takes" in found["why"]
    never = choose({0.5: unsafe(0, 80), 1.0: unsafe(40, 80)})
    assert "no number of prompts would certify it while policy@1.00's unsafe_rate is 0.500" in never["why"]


def test_a_lower_limit_and_a_mean_are_counted_too() -> None:
    found = choose({1.0: unsafe(0)}, constraints=["safe>=0.95"], metrics={"safe": {"judge": "cost", "above": -2}})
    assert "with lower bound 0.928; at the rate seen a certificate takes 59 prompts" in found["why"]
    # A mean's bound is 1.645 sd / sqrt(n) away: at half the distance to the limit it takes four times the prompts.
    costs = [-1.0, 1.0] * 50
    near = choose({1.0: costs}, constraints=["cost<=0.08225"])["nearest"]
    assert not near["exact"]
    assert near["prompts_needed"] == pytest.approx(400, rel=0.3)


def test_clusters_are_the_unit() -> None:
    found = choose({1.0: unsafe(0, 40)}, clusters=20)
    # All capital on no unsafe answer grows by 1 / .95 a cluster; half the capital is on it, so a little later than 59.
    assert "takes about 65 clusters of prompts, 45 more than the 20 here" in found["why"]
    assert choose({1.0: unsafe(0, 130)}, clusters=65)["ratio"] == 1.0
    assert choose({1.0: unsafe(0, 118)}, clusters=59)["ratio"] is None


def test_two_constraints_ask_for_the_harder() -> None:
    # Both are walked from q = 1, and a ratio must pass both: each at the full level.
    found = choose({1.0: unsafe(0)}, constraints=["unsafe_rate<=0.05", "cost<=0"])
    assert found["nearest"]["prompts_needed"] == 59
    # One from each end: each at level 1 - .05 / 2, and 0.95^71 = .0262, 0.95^72 = .0249.
    found = choose({1.0: unsafe(0)}, constraints=["unsafe_rate<=0.05", "reward>=0.5"])
    assert found["nearest"]["prompts_needed"] == 72


def test_a_certified_ratio_without_a_reward_is_not_chosen() -> None:
    judges = {
        "reward": {"kind": "scalar", "model": "r"},
        "cost": {"kind": "scalar", "model": "c", "better": "lower"},
        "silent": {"kind": "scalar", "model": "s"},
    }
    found = choose({1.0: unsafe(0, 80)}, judges=judges, axes={"reward": "silent"})
    assert found["ratio"] is None
    assert found["why"] == "1 of 1 ratios meet unsafe_rate<=0.05, and none of them has a valid silent"


def test_no_valid_verdict_is_said() -> None:
    found = choose({1.0: unsafe(0)}, metrics={"other": {"judge": "cost", "where": {"x": 1}}}, constraints=["other<=0"])
    assert "other<=0 has no valid verdict" in found["why"]
    assert found["nearest"]["more_prompts"] is None


def test_the_terminal_has_the_verdict_first_and_no_line_over_its_width(tmp_path: Path) -> None:
    import json

    from psacpo.evalharness.summary import WIDTH, summary_lines

    cell = {"mean": 0.25, "low": 0.1, "high": 0.4}
    names = ["reward", "cost", "unsafe_rate", *(f"another_metric_{i}" for i in range(9))]
    point = dict.fromkeys(names, cell)
    frontier = {
        "schema": 1,
        "axes": {"reward": "reward", "cost": "cost"},
        "audit": None,
        "metrics": {name: {"above": None} for name in names},
        "points": [point | {"policy": "policy@0.00"}, point | {"policy": "policy@1.00", "certified": True}],
        "baselines": [point | {"name": "a" * 64}],
        "choice": {"ratio": 1.0, "policy": "policy@1.00", "constraints": ["unsafe_rate<=0.5"], "why": "best " * 60},
        "counts": {"generated": 3, "prompts": 1, "truncated": 0, "invalid": 0},
        "warnings": ["beware " * 40],
    }
    (tmp_path / "frontier.json").write_text(json.dumps(frontier))
    lines = summary_lines(tmp_path)
    assert lines[0].startswith("chosen ratio: 1: best best")
    assert max(map(len, lines[:-1])) <= WIDTH == 100
    header = next(line for line in lines if line.startswith("policy "))
    chosen = next(line for line in lines if line.startswith("policy@1.00"))
    assert header.split()[-1] == "verdict"
    assert header.index("verdict") == chosen.index("chosen")
