"""What is trained: adapters of other kinds, and all weights."""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.align import AlignConfig, align
from psacpo.align.data import read_preferences
from psacpo.align.forward import PLAIN, answer_log_probs
from psacpo.align.full import load_whole, save_whole
from psacpo.align.layout import padded_rows
from psacpo.align.model import Base, load_causal, load_tokenizer, quantised
from psacpo.align.pairs import encode_rows
from psacpo.align.trainer import PairTrainer
from psacpo.errors import InputError
from psacpo.files import read_manifest
from psacpo.merge import merge
from psacpo.merge.config import MergeConfig
from psacpo.recipe import Project


def load(config: AlignConfig, name: str) -> Any:
    """A stage's policy as PEFT or transformers opens it, or the base."""
    if config.tuning == "full" and name != "base":
        return AutoModelForCausalLM.from_pretrained(config.out / name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    return base if name == "base" else PeftModel.from_pretrained(base, config.out / name)


def margin(config: AlignConfig, policy: str, reference: str, data: Path) -> float:
    """The mean margin in nats on all rows, from the directories alone."""
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    pairs = encode_rows(read_preferences(str(data), {}), tokenizer, None, config.max_length).pairs
    scores = []
    for name in (policy, reference):
        model = load(config, name).eval()
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        with torch.no_grad():
            scores.append(answer_log_probs(model, inner, padded_rows(pairs, 0), PLAIN).sum(dim=1).view(2, -1))
    ratios = scores[0] - scores[1]
    return float((ratios[0] - ratios[1]).mean())


@pytest.fixture
def data(tmp_path: Path, rows: Any, write_rows: Any) -> Path:
    return Path(write_rows(tmp_path / "rows.jsonl", rows(16)))


@pytest.mark.parametrize("option", ["use_rslora", "use_dora"])
def test_lora_options(
    option: str, tiny_llama: Path, tmp_path: Path, data: Path, make_config: Any, metrics: Any
) -> None:
    """What training says of the policy after step 1 is what PEFT makes of the directory."""
    for steps in (1, 2):
        stages = [{"data": data, "max_steps": 2}, {"data": data, "max_steps": steps, "batch_size": 16}]
        lora = {"r": 4, "alpha": 8, option: True}
        config = make_config(tiny_llama, tmp_path / str(steps), stages, lora=lora)
        align(config)
        if steps == 1:
            found = margin(config, "b", "a", data)
    assert json.loads((config.out / "b" / "adapter_config.json").read_text())[option] is True
    first, second = metrics(config.out / "b")
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert second["margin"] == pytest.approx(found, abs=1e-3)
    assert found > 0.01


@pytest.mark.parametrize("loss", ["dpo", "radpo2", "kto"])
def test_full(
    loss: str,
    tiny_llama: Path,
    tmp_path: Path,
    data: Path,
    make_config: Any,
    metrics: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for steps in (1, 2):
        own = {"data": data, "learning_rate": 1e-3}
        stages = [own | {"max_steps": 2}, own | {"loss": loss, "max_steps": steps, "batch_size": 16}]
        config = make_config(tiny_llama, tmp_path / str(steps), stages, tuning="full", save_steps=1)
        if steps == 2:
            real = PairTrainer.log

            def log(self: PairTrainer, logs: Any, start_time: Any = None, real: Any = real) -> None:
                real(self, logs, start_time)
                if self.stage.name == "b" and self.state.global_step == 2 and self.resumed is None:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(PairTrainer, "log", log)
                align(config)
            # It goes on from a checkpoint of the whole model, after step 1.
            assert (config.out / ".b.checkpoints" / "checkpoint-1" / "model.safetensors").is_file()
        align(config)
        if steps == 1:
            found = margin(config, "b", "a", data)
    first, second = metrics(config.out / "b")
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert second["margin"] == pytest.approx(found, abs=1e-3)
    assert found > 0.01
    before, after = load(config, "a").state_dict(), load(config, "b").state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert load(config, "b").config.use_cache
    manifest = read_manifest(config.out / "b") or {}
    assert (manifest["kind"], manifest["config"]["lora"]) == ("checkpoint", None)
    if loss == "dpo":
        again = AlignConfig.model_validate(config.model_dump(by_alias=True) | {"out": tmp_path / "again"})
        align(again)
        assert (again.out / "b" / "model.safetensors").read_bytes() == (
            config.out / "b" / "model.safetensors"
        ).read_bytes()


def test_full_goes_through_merge_and_frontier(
    tiny_qwen2: Path, tiny_judge: Path, tmp_path: Path, data: Path, make_config: Any, write_rows: Any
) -> None:
    """In bfloat16, with tied embeddings: stored once, cast once."""
    stages = [
        {"name": "reward", "data": data, "learning_rate": 1e-3},
        {"name": "safety", "data": data, "learning_rate": 1e-3},
    ]
    config = make_config(tiny_qwen2, tmp_path / "out", stages, tuning="full", dtype="bfloat16")
    align(config)
    for name in ("reward", "safety"):
        settings = json.loads((config.out / name / "config.json").read_text())
        assert (settings["dtype"], settings["tie_word_embeddings"]) == ("bfloat16", True)
    ends = {"reward": config.out / "reward", "safety": config.out / "safety"}
    merge(MergeConfig.model_validate(ends | {"ratios": [0.25], "out": tmp_path / "policy"}))
    reward, safety = (load(config, name).state_dict() for name in ends)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).state_dict()
    for name, tensor in whole.items():
        mean = 0.75 * reward[name] + 0.25 * safety[name]
        assert torch.allclose(tensor, mean, rtol=2**-8, atol=1e-6), name

    # The sweep takes them for what they are; only vLLM can hold whole policies one after another.
    from psacpo.evalharness.sweep import plan_summary

    Project.find(None).leave(config)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "how do i bake"}])
    judges = {name: {"kind": "scalar", "model": str(tiny_judge)} for name in ("reward", "cost")}
    sweep = Project.find(config.out).frontier(
        prompts=prompts, judges=judges, engine="transformers", generation={"max_new_tokens": 8}
    )
    with pytest.raises(InputError, match="reward is a whole model, not an adapter; allowed: .*engine vllm"):
        plan_summary(sweep)


def test_quantisation_needs_what_it_needs(
    tiny_llama: Path, tmp_path: Path, data: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        return "0.45.5" if name == "bitsandbytes" else real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InputError, match="needs bitsandbytes 0.46 or later, here is 0.45.5; allowed: pip install"):
        align(make_config(tiny_llama, tmp_path / "out", [{"data": data}], quantization="4bit"))
    with pytest.raises(ValueError, match="allowed: null with tuning full"):
        make_config(tiny_llama, tmp_path / "out", [{"data": data}], quantization="4bit", tuning="full")


def test_4bit(tiny_llama: Path, tmp_path: Path, data: Path, rows: Any, make_config: Any, metrics: Any) -> None:
    """Both stages on NF4 weights are those on a 32-bit base that holds the numbers which NF4 stands for."""
    bitsandbytes = pytest.importorskip("bitsandbytes", "0.46.0", reason="needs bitsandbytes with NF4 on CPUs")
    base = Base(tiny_llama, str(tiny_llama))
    options: Any = quantised("4bit", "float32", "cpu")
    packed = load_causal(base, "float32", **options)
    plain = load_causal(base, "float32")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14
    with torch.no_grad():
        for name, layer in layers.items():
            whole = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            own = plain.get_submodule(name).weight
            assert 0.01 < float((whole - own).norm() / own.norm()) < 0.5
            own.copy_(whole)
    plain.save_pretrained(tmp_path / "base")
    load_tokenizer(base).save_pretrained(tmp_path / "base")
    stages = [{"data": data}, {"data": data, "loss": "radpo2"}]
    found = align(make_config(tiny_llama, tmp_path / "packed", stages, quantization="4bit"))
    expected = align(make_config(tmp_path / "base", tmp_path / "plain", stages))
    for stage in ("a", "b"):
        for one, two in zip(metrics(found / stage), metrics(expected / stage), strict=True):
            assert one == pytest.approx(two, rel=2e-3, abs=1e-4), stage
    manifest = json.loads((found / "b" / "psacpo.json").read_text())
    assert manifest["config"]["quantization"] == "4bit"


def test_tied_weights_are_written_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Gathered from shards, one weight under two names is two tensors."""
    base = Base(tiny_qwen2, str(tiny_qwen2))
    model = load_whole(base, None, gradient_checkpointing=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(state)
    (tmp_path / "out").mkdir()
    save_whole(model, state, tmp_path / "out", load_tokenizer(base), dtype="float32", stage="a")
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "out", tiny_qwen2))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_default_learning_rates(tiny_llama: Path, tmp_path: Path, data: Path, make_config: Any) -> None:
    stages = [{"data": data, "learning_rate": None}, {"data": data, "learning_rate": 3e-4}]
    for tuning, default in (("lora", 5e-5), ("full", 1e-6)):
        config = make_config(tiny_llama, tmp_path / "out", stages, tuning=tuning)
        assert [config.learning_rate_of(stage) for stage in config.runs] == [default, 3e-4]


@pytest.mark.parametrize(("rate", "said"), [(1e-7, True), (1e-2, False)])
def test_standstill_is_said(
    rate: float,
    said: bool,
    tiny_llama: Path,
    tmp_path: Path,
    data: Path,
    make_config: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    align(make_config(tiny_llama, tmp_path / "out", [{"data": data, "learning_rate": rate}]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "moved nothing" in line]
    assert len(lines) == said
    if said:
        assert "raise learning_rate (now 1e-07) or the steps (now 3)" in lines[0]


def test_progress_note() -> None:
    from psacpo.align.trainer import note

    record: dict[str, Any] = {"step": 3, "loss": 0.61234, "margin": 0.1, "margin_smoothed": 0.05, "accuracy": 0.75}
    assert note(record) == "loss 0.612 acc 0.75 margin 0.05"
    assert (
        note(record | {"kl": 1.25, "risk": -0.5, "loss": math.pi}) == "loss 3.14 acc 0.75 margin 0.05 kl 1.25 risk -0.5"
    )
