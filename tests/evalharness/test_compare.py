"""Two runs side by side: paired by prompt, against differences worked out by hand, and refused where nothing is shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.compare import compare
from psacpo.evalharness.decision.compare_lines import compare_lines
from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_settings
from psacpo.evalharness.summary import WIDTH

MakeConfig = Callable[..., FrontierConfig]


def make(
    place: Path, shift: float = 0.0, prompts: range = range(60), seed: int = 0, ratios: tuple[float, ...] = (0, 0.5, 1)
) -> tuple[Path, list[dict[str, Any]]]:
    """A run of imported scores in which each prompt has its own difficulty, the same in every run."""
    place.mkdir()
    draw = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(size=1000)
    rows = [
        {"prompt_id": f"p{i}", "ratio": q, "cluster": f"c{i // 2}"}
        | {"reward": float(hard[i] + 1 - q + shift + 0.1 * draw.normal()), "cost": float(hard[i] - 3 * q)}
        for q in ratios
        for i in prompts
    ]
    (place / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = scores_settings(place / "s.jsonl", out=place / "run", constraints=["cost<=1"], resamples=200)
    return frontier_from_scores(config), rows


def test_differences_are_paired_by_prompt(tmp_path: Path) -> None:
    a, rows_a = make(tmp_path / "a")
    b, rows_b = make(tmp_path / "b", shift=0.1, prompts=range(20, 80), seed=1, ratios=(0, 0.5, 0.75))
    found = compare(a, b)
    assert (found["prompts"], found["clusters"]) == (40, 20)
    assert [one["ratio"] for one in found["ratios"]] == [0, 0.5]
    for one in found["ratios"]:
        own = {row["prompt_id"]: row["reward"] for row in rows_a if row["ratio"] == one["ratio"]}
        other = {row["prompt_id"]: row["reward"] for row in rows_b if row["ratio"] == one["ratio"]}
        differences = [other[name] - own[name] for name in own if name in other]
        cell = one["difference"]["reward"]
        assert cell["mean"] == pytest.approx(np.mean(differences))
        # The prompts' own spread is 1 and is gone: .14 / sqrt(40) is left.
        assert 0.02 < cell["high"] - cell["low"] < 0.12
        assert cell["low"] > 0
        assert one["difference"]["cost"]["mean"] == pytest.approx(0)
    assert any("20 prompts of run A are not in the other" in text for text in found["warnings"])
    volume = found["hypervolume"]
    assert volume["mean"] == pytest.approx(volume["b"] - volume["a"])
    chosen = found["chosen"]
    assert chosen["difference"]["reward"]["a"] is not None
    lines = compare_lines(found)
    assert max(map(len, lines)) <= WIDTH
    assert any("*" in line and line.startswith("0.5") for line in lines)


def test_a_run_against_itself_has_no_difference(tmp_path: Path) -> None:
    a, _ = make(tmp_path / "a")
    found = compare(a, a)
    cells = [cell for one in found["ratios"] for cell in one["difference"].values()]
    assert all(cell["mean"] == cell["low"] == cell["high"] == 0 for cell in cells)
    assert found["hypervolume"]["mean"] == 0
    # Under one's own reference the volume is that of frontier.json.
    own = json.loads((a / "frontier.json").read_text())["hypervolume"]
    assert found["hypervolume"]["a"] == pytest.approx(own["value"])


@pytest.mark.slow
def test_two_sweeps_by_the_command(make_config: MakeConfig, tmp_path: Path, psacpo: Any) -> None:
    one = frontier(make_config(out=tmp_path / "one"))
    two = frontier(make_config(out=tmp_path / "two", seed=1, metrics={"steep": {"judge": "cost", "above": 0.5}}))
    done = psacpo("compare", one, two, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    means = [{p["ratio"]: p["reward"]["mean"] for p in json.loads((run / "frontier.json").read_text())["points"]}
             for run in (one, two)]  # fmt: skip
    for row in found["ratios"]:
        assert row["difference"]["reward"]["mean"] == pytest.approx(means[1][row["ratio"]] - means[0][row["ratio"]])
    assert "steep" not in found["metrics"]
    table = psacpo("compare", one, two).stdout.splitlines()
    assert max(map(len, table)) <= WIDTH or "tmp" in max(table, key=len)


def test_runs_that_share_nothing_are_refused(tmp_path: Path) -> None:
    a, _ = make(tmp_path / "a")
    b, _ = make(tmp_path / "b", prompts=range(100, 120))
    with pytest.raises(InputError, match="have no prompt in common"):
        compare(a, b)
    with pytest.raises(InputError, match="is no finished run"):
        compare(a, tmp_path / "nowhere")
