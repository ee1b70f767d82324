"""Stages beside the two: in the other order, more than one safety objective, at other lambdas, and from the base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from psacpo.align import AlignConfig, align
from psacpo.files import read_manifest


@pytest.fixture
def stages(tmp_path: Path, rows: Any, write_rows: Any) -> list[dict[str, Any]]:
    words = {"reward": ("help", "sorry"), "safety": ("open", "lock"), "privacy": ("mix", "heat")}
    return [
        {
            "name": name,
            "data": write_rows(tmp_path / f"{name}.jsonl", rows(16, seed=at, chosen=chosen, rejected=rejected)),
            "max_steps": 2,
        }
        for at, (name, (chosen, rejected)) in enumerate(words.items())
    ]


def facts(config: AlignConfig) -> dict[str, tuple[str, float, float | None]]:
    found = {path.name: read_manifest(path) or {} for path in config.out.iterdir()}
    return {name: (one["start"], round(one["beta"], 9), one["lambda"]) for name, one in found.items()}


def test_all_of_them(tiny_llama: Path, tmp_path: Path, stages: Any, make_config: Any, metrics: Any) -> None:
    config = make_config(
        tiny_llama, tmp_path / "out", stages, naive=True, lambdas=[1, 10], order="reward,privacy,safety"
    )
    align(config)
    assert facts(config) == {
        "reward": ("base", 0.1, None),
        "privacy": ("reward", 0.01, pytest.approx(10)),
        "safety": ("privacy", 0.01, pytest.approx(1)),
        "privacy-lambda1": ("reward", 0.1, pytest.approx(1)),
        "privacy-naive": ("base", 0.01, None),
        "safety-naive": ("base", 0.01, None),
    }
    digests = {name: (read_manifest(config.out / name) or {})["digest"] for name in facts(config)}
    for name, (start, _, _) in facts(config).items():
        # Each starts at its reference, and that is the stage that it names.
        assert metrics(config.out / name)[0]["margin"] == pytest.approx(0, abs=1e-5)
        said = (read_manifest(config.out / name) or {})["inputs"].get("start")
        assert said == (None if start == "base" else digests[start])


def test_naive_is_the_stage_alone(tiny_llama: Path, tmp_path: Path, stages: Any, make_config: Any) -> None:
    """What `naive: true` adds is what a stage of that name from the base would be."""
    config = make_config(tiny_llama, tmp_path / "out", stages[:2], naive=True)
    align(config)
    alone = make_config(
        tiny_llama, tmp_path / "alone", [stages[1] | {"name": "safety-naive", "start": "base", "beta": 0.01}]
    )
    align(alone)
    found, expected = (load_file(one.out / "safety-naive" / "adapter_model.safetensors") for one in (config, alone))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_order_by_flag(tiny_llama: Path, tmp_path: Path, stages: Any, psacpo: Any) -> None:
    """The command, its recipe left behind, and a merge of the two ends in it."""
    flags = ["--base", tiny_llama, "--reward-data", stages[0]["data"], "--safety-data", stages[1]["data"]]
    flags += ["--order", "safety,reward", "--naive", "--lambdas", "2"]
    out = tmp_path / "out"
    done = psacpo("align", *flags, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = {name: (read_manifest(out / name) or {})["start"] for name in ("safety", "reward", "reward-lambda2")}
    assert found == {"safety": "base", "reward": "safety", "reward-lambda2": "safety"}
    assert (read_manifest(out / "reward-naive") or {})["beta"] == pytest.approx(0.01)
    done = psacpo("merge", "--ratio", "0.5", cwd=out)
    assert done.returncode == 0, done.stderr
    done = psacpo("align", "--dry-run", cwd=out)
    assert len(re.findall(r"state: +done", done.stdout)) == 4, done.stdout + done.stderr
