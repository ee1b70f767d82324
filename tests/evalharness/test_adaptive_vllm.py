"""An adaptive sweep by vLLM: adapters that come after the engine has started. Skipped without vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from psacpo.evalharness import frontier
from psacpo.evalharness.adaptive import space
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.statistics.racing import Proposal

# One worker has the engines of vLLM's tests.
pytestmark = pytest.mark.xdist_group("engine-vllm")


@pytest.fixture(autouse=True)
def real_vllm() -> None:
    """vLLM imports here, or the test is skipped."""
    try:
        import vllm  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever keeps it from importing
        if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
            pytest.fail(f"PSACPO_REQUIRE_VLLM=1, but vLLM cannot be imported: {error}")
        pytest.skip(f"vLLM cannot be imported: {type(error).__name__}")


@pytest.mark.slow
def test_ratios_that_come_later_are_adapters_too(
    tiny_llama: Path, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "wide"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    torch.manual_seed(0)
    settings = LlamaConfig.from_pretrained(tiny_llama)
    # Heads of 32, the smallest that vLLM has CPU kernels for.
    settings.update({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    LlamaForCausalLM(settings).save_pretrained(base)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("open", "mix the bread", "heat")))
    # Two ratios are added, whatever the scores of a random model say.
    added = iter([Proposal(0.25, "gap", 1.0), Proposal(0.75, "gap", 1.0), None])
    monkeypatch.setattr(space, "next_ratio", lambda *_, **__: next(added))
    config = FrontierConfig.model_validate(
        {
            "base": str(base),
            "adapters": {"reward": make_adapter(base, seed=1), "safety": make_adapter(base, seed=2, r=6)},
            "prompts": prompts,
            "judges": {"reward": {"kind": "length"}, "cost": {"kind": "refusal"}},
            "out": tmp_path / "run",
            "generation": {"max_new_tokens": 8, "temperature": 0.0},
            "engine": "vllm",
            "strategy": "lora",
            "resamples": 200,
            "adaptive": {"start": 3, "most_ratios": 5},
        }
    )
    # The probe holds each of them against its dense merge before its first answer.
    run = frontier(config)
    found = json.loads((run / "frontier.json").read_text())
    assert [point["ratio"] for point in found["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert json.loads((run / "psacpo.json").read_text())["engine"]["spare"] == 2
    texts = {}
    for line in (run / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts.setdefault(row["policy"], []).append(row["token_ids"])
    # Greedy answers of five mixtures and the base are not all the same.
    assert len({str(answers) for answers in texts.values()}) > 3
