"""Ends of the sweep that are whole models, against the sum of weights that they stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines import plan
from psacpo.evalharness.engines.vllm_worker import merged_weights
from psacpo.evalharness.engines.whole import WholeModel, read_policy
from psacpo.evalharness.sweep import plan_summary
from psacpo.merge.models import read_model

MakeConfig = Callable[..., FrontierConfig]


def trained(base: Path, out: Path, *, seed: int, tied: bool | None = None) -> Path:
    """The base with noise on every weight."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tied is not None:
        model.config.tie_word_embeddings = tied
        model = type(model)(model.config)
        model.tie_weights()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


@pytest.mark.parametrize("tied", [False, True])
def test_a_mix_of_models_is_the_sum_of_their_weights(tiny_llama: Path, tmp_path: Path, tied: bool) -> None:
    base = trained(tiny_llama, tmp_path / "base", seed=0, tied=tied)
    ends = {n: trained(base, tmp_path / n, seed=i + 1) for i, n in enumerate(("reward", "safety"))}
    models = {name: read_policy(path, base) for name, path in ends.items()}
    assert all(isinstance(model, WholeModel) for model in models.values())
    reward, safety = (load_file(path / "model.safetensors") for path in ends.values())
    assert ("lm_head.weight" in reward) is not tied
    for q in (0.0, 0.3, 1.0):
        found = dict(merged_weights(read_model(base), list(models.values()), [1 - q, q]))
        assert found.keys() == reward.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (1 - q) * reward[name] + q * safety[name], atol=1e-6, rtol=1e-6)
            if q in (0.0, 1.0):
                assert torch.equal(tensor, (safety if q else reward)[name])
    # A baseline whose weights do not sum to 1 keeps the rest of the base.
    [half] = [dict(merged_weights(read_model(base), [models["reward"]], [0.5]))]
    first = load_file(base / "model.safetensors")
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, 0.5 * first[name] + 0.5 * reward[name], atol=1e-6, rtol=1e-6)


def test_what_a_model_is_decides_its_content(tiny_llama: Path, tmp_path: Path) -> None:
    one = trained(tiny_llama, tmp_path / "one", seed=1)
    other = trained(tiny_llama, tmp_path / "other", seed=2)
    moved = Path(shutil.copytree(one, tmp_path / "moved"))
    assert read_policy(one, tiny_llama).content == read_policy(moved, tiny_llama).content
    assert read_policy(one, tiny_llama).content != read_policy(other, tiny_llama).content


def test_adapters_are_read_as_before(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    assert not isinstance(read_policy(two_adapters[0], tiny_llama), WholeModel)
    with pytest.raises(InputError, match="no adapter directory"):
        read_policy(tmp_path / "nowhere", tiny_llama)


def test_models_that_do_not_fit_are_refused(
    make_config: MakeConfig, tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny_llama, tmp_path / "whole", seed=1)
    with pytest.raises(
        InputError, match="engine transformers: reward is a whole model, not an adapter; allowed: .*vllm"
    ):
        plan_summary(make_config(adapters={"reward": whole, "safety": whole}, engine="transformers"))
    config = make_config()
    with pytest.raises(InputError, match="both adapters and whole models"):
        plan_summary(make_config(adapters={"reward": whole, "safety": config.adapters["safety"]}))

    monkeypatch.setattr(plan, "installed", lambda module: True)
    monkeypatch.setattr(plan, "vllm_device", lambda: "cpu")
    told = plan_summary(make_config(adapters={"reward": whole, "safety": whole}, engine="vllm"))
    assert told["engine"] == "vllm, strategy reload (reward is a whole model, not an adapter)"
    with pytest.raises(InputError, match="strategy lora: reward is a whole model"):
        plan_summary(make_config(adapters={"reward": whole, "safety": whole}, engine="vllm", strategy="lora"))
    other = trained(tiny_qwen2, tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="has no weight|lacks the weight|shape mismatch"):
        plan_summary(make_config(adapters={"reward": other, "safety": other}, engine="vllm"))
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weight model\.norm\.weight that base"):
        plan_summary(make_config(adapters={"reward": whole, "safety": whole}, engine="vllm"))
