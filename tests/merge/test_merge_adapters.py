"""PEFT directories in, PEFT directories out, held against PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from psacpo.errors import InputError
from psacpo.merge.adapters import (
    Adapter,
    factors_by_module,
    pattern_value,
    read_adapter,
    require_compatible,
    require_plain,
    stack_adapters,
    write_adapter,
)
from psacpo.merge.arithmetic import dense_delta
from psacpo.merge.lora_config import UNDERSTOOD

MakeAdapter = Callable[..., Path]
IDS = torch.tensor([[0, 5, 17, 42, 9, 100, 3, 77]])
EDITED = "an edited copy"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(IDS).logits
        return value


def dense_reference(base: Path, adapters: list[Path], weights: list[float]) -> Any:
    """The base with each adapter's delta, as PEFT computes it, added in float64 at its weight."""
    merged = load(base)
    changes: dict[str, torch.Tensor] = {}
    for path, weight in zip(adapters, weights, strict=True):
        adapted = PeftModel.from_pretrained(load(base), path)
        for name, module in adapted.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default").detach().double() * weight
                changes[name] = changes.get(name, torch.zeros_like(delta)) + delta
    for name, delta in changes.items():
        module = merged.get_submodule(name)
        module.weight.data = (module.weight.data.double() + delta).float()
    return merged


def edit_config(adapter: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with changes to its configuration."""
    shutil.copytree(adapter, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def edit_tensors(adapter: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(adapter, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return target


# One pair per thing that adapters can differ in.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks and alphas": ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3}),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 9, "lora_alpha": 5}),
    "target modules": ({"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "v_proj"], "r": 2}),
    "patterns": (
        {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1.*up_proj": 7}, "alpha_pattern": {"1.mlp.up_proj": 3}},
        {"r": 3, "lora_alpha": 2, "alpha_pattern": {"model.layers.0.self_attn.k_proj": 11}, "use_rslora": True},
    ),
    "some layers": (
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.0.*(q|k)_proj", "r": 5},
    ),
    "narrowed names": (
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"], "r": 3},
    ),
    "embedding and head": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ),
}


@pytest.fixture(scope="module")
def make_pair(tiny_llama: Path, make_adapter: MakeAdapter) -> Callable[[str], list[Path]]:
    made: dict[str, list[Path]] = {}

    def make(kind: str) -> list[Path]:
        if kind not in made:
            made[kind] = [make_adapter(tiny_llama, seed=i + 1, **options) for i, options in enumerate(PAIRS[kind])]
        return made[kind]

    return make


def write(paths: list[Path], weights: list[float], out: Path, base: Path) -> Path:
    out.mkdir()
    write_adapter(out, [read_adapter(path) for path in paths], weights, base=str(base))
    return out


@pytest.mark.parametrize("kind", PAIRS)
def test_deltas_are_those_of_peft(kind: str, tiny_llama: Path, make_pair: Callable[[str], list[Path]]) -> None:
    for path in make_pair(kind):
        adapter = read_adapter(path)
        layers = {
            name: layer
            for name, layer in PeftModel.from_pretrained(load(tiny_llama), path).base_model.model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        assert set(adapter.modules) == set(layers)
        for name, layer in layers.items():
            factors = adapter.modules[name]
            factors = factors.transposed() if name in adapter.embeddings else factors
            torch.testing.assert_close(
                dense_delta(factors), layer.get_delta_weight("default").detach().double(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
def test_merged_adapter_in_peft_is_the_dense_merge(
    kind: str, weights: list[float], tiny_llama: Path, make_pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    paths = make_pair(kind)
    out = write(paths, weights, tmp_path / "out", tiny_llama)
    adapted = PeftModel.from_pretrained(load(tiny_llama), out)
    # Exactly the modules of the two adapters are adapted, and no other.
    wanted = set(read_adapter(paths[0]).modules) | set(read_adapter(paths[1]).modules)
    found = {name for name, layer in adapted.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert found == wanted
    expected = logits(dense_reference(tiny_llama, paths, weights))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(load(tiny_llama))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PAIRS)
def test_own_output_is_read_back_with_the_same_deltas(
    kind: str, tiny_llama: Path, make_pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    adapters = [read_adapter(path) for path in make_pair(kind)]
    stacked = stack_adapters(adapters, [0.4, 0.6])
    again = read_adapter(write(make_pair(kind), [0.4, 0.6], tmp_path / "out", tiny_llama))
    assert set(again.modules) == set(stacked)
    for name, factors in again.modules.items():
        assert factors.scale == 1.0  # lora_alpha = r, by pattern too
        assert torch.equal(factors.A, stacked[name].A)
        assert torch.equal(factors.B, stacked[name].B)
        rows = zip(factors_by_module(adapters)[name], [0.4, 0.6], strict=True)
        exact = sum(weight * dense_delta(row) for row, weight in rows if row is not None)
        assert isinstance(exact, torch.Tensor)
        assert (dense_delta(factors) - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("end", [0, 1])
def test_weight_zero_takes_no_rank_and_no_modules(
    end: int, tiny_llama: Path, make_pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    paths = make_pair("target modules")
    weights = [0.0, 0.0]
    weights[end] = 1.0
    out = read_adapter(write(paths, weights, tmp_path / "out", tiny_llama))
    single = read_adapter(paths[end])
    assert {n: f.rank for n, f in out.modules.items()} == {n: f.rank for n, f in single.modules.items()}
    for name, factors in single.modules.items():
        torch.testing.assert_close(dense_delta(out.modules[name]), dense_delta(factors), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load(tiny_llama), tmp_path / "out")),
        logits(PeftModel.from_pretrained(load(tiny_llama), paths[end])),
        rtol=1e-5,
        atol=1e-5,
    )


def test_all_weights_zero_is_the_base(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    out = write(list(two_adapters), [0.0, 0.0], tmp_path / "out", tiny_llama)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(tiny_llama), out)), logits(load(tiny_llama)))


def test_peft_cat_agrees_and_peft_linear_does_not(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    paths = [make_adapter(tiny_llama, seed=i, r=4, lora_alpha=8) for i in (21, 22)]
    out = write(paths, [0.7, 0.3], tmp_path / "out", tiny_llama)
    ours = logits(PeftModel.from_pretrained(load(tiny_llama), out))
    peft = PeftModel.from_pretrained(load(tiny_llama), paths[0], adapter_name="one")
    peft.load_adapter(paths[1], adapter_name="two")
    results = {}
    for kind in ("cat", "linear"):
        peft.add_weighted_adapter(["one", "two"], [0.7, 0.3], kind, combination_type=kind)
        peft.set_adapter(kind)
        results[kind] = logits(peft)
    torch.testing.assert_close(ours, results["cat"], rtol=1e-5, atol=1e-5)
    assert (ours - results["linear"]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"use_rslora": True, "r": 9, "lora_alpha": 4}, {"r": 5, "lora_alpha": 16}])
def test_one_adapter_at_weight_one_is_itself(
    options: dict[str, Any], tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    # huggingface/peft#3761: add_weighted_adapter gives a wrong scale back for rsLoRA.
    path = make_adapter(tiny_llama, seed=23, **options)
    out = write([path], [1.0], tmp_path / "out", tiny_llama)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load(tiny_llama), out)),
        logits(PeftModel.from_pretrained(load(tiny_llama), path)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_configuration_is_plain(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    out = write(list(two_adapters), [0.7, 0.3], tmp_path / "out", tiny_llama)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 10
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tiny_llama)
    # PEFT names each layer in full for "all-linear".
    assert config["target_modules"] == sorted(read_adapter(two_adapters[0]).modules)
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}


def test_rank_pattern_names_what_differs(
    tiny_llama: Path, make_pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    out = write(make_pair("target modules"), [0.5, 0.5], tmp_path / "a", tiny_llama)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["r"] == 6  # q_proj: 4 + 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {"down_proj": 4, "v_proj": 2}
    out = write(make_pair("some layers"), [0.5, 0.5], tmp_path / "b", tiny_llama)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert config["r"] == 5
    assert config["rank_pattern"] == {"gate_proj": 4, r"^model\.layers\.1\.self_attn\.q_proj": 4}


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "layers.0.q_proj": 2},
        {"layers.0.q_proj": 2, "q_proj": 1},
        {"proj": 3},
        {r".*0\..*": 4},
        {"0.q": 5},
    ],
)
@pytest.mark.parametrize("module", ["model.layers.0.q_proj", "model.layers.10.q_proj", "q_proj", "xq_proj"])
def test_patterns_match_as_in_peft(patterns: dict[str, int], module: str) -> None:
    assert pattern_value(patterns, module, 8) == patterns.get(get_pattern_key(patterns.keys(), module), 8)


# What is not plain LoRA, by the option of PEFT that makes it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "lacks a magnitude for model.layers.0.mlp.down_proj; given: use_dora true"),
    "lora_bias": ({"lora_bias": True}, "lacks a bias of lora_B for .*; given: lora_bias true"),
    "pissa": ({"init_lora_weights": "pissa"}, 'starts from changed base weights; given: init_lora_weights "pissa"'),
    "replication": ({"layer_replication": [[0, 2]]}, "it sets layer_replication"),
    "unheard of": ({"use_new_thing": True}, "it sets use_new_thing; given: true"),
    "another kind": ({"peft_type": "IA3"}, "of another kind than LoRA; given: peft_type IA3; allowed: LORA"),
    "no base": ({"base_model_name_or_path": None}, "names no base model"),
    "rank": ({"r": 5}, r"do not have the rank that adapter_config.json says; given: A \[4, .*; allowed: rank 5"),
    "alpha": (
        {"lora_alpha": "8"},
        r'lora_alpha in adapter_config.json is wrong; given: "8"; allowed: a number above 0',
    ),
    "targets": ({"target_modules": ["q_proj"]}, "which its target_modules do not name"),
    "target regex": ({"target_modules": ".*q_proj"}, "which its target_modules do not name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_by_name(kind: str, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    changes, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(edit_config(two_adapters[0], tmp_path / EDITED, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, r"adapter a is not plain LoRA: it is DoRA \(use_dora\)"),
        ({"lora_bias": True}, r"adapter a is not plain LoRA: its B have biases \(lora_bias\)"),
        ({"modules_to_save": ["lm_head"]}, "adapter a is not plain LoRA: it holds trained values of lm_head.weight"),
    ],
)
def test_what_is_more_than_factors_is_not_plain(
    options: dict[str, Any], words: str, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    adapter = read_adapter(make_adapter(tiny_llama, seed=31, target_modules=["q_proj"], **options))
    with pytest.raises(InputError, match=words):
        require_plain({"a": adapter})
    with pytest.raises(InputError, match="is not plain LoRA"):
        stack_adapters([adapter], [1.0])


def test_trained_tokens_are_refused(tiny_llama: Path, make_adapter: MakeAdapter) -> None:
    path = make_adapter(tiny_llama, seed=31, target_modules=["q_proj"], trainable_token_indices=[1])
    with pytest.raises(InputError, match="it sets trainable_token_indices"):
        read_adapter(path)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "unconsumed key": (
        lambda t: t.__setitem__("base_model.model.model.norm.weight", torch.ones(3)),
        "holds a tensor that is not a LoRA factor, nor trained by .*: base_model.model.model.norm.weight",
    ),
    "one factor": (lambda t: t.__delitem__(_first(t)), "holds only one of the two factors of model.layers.0.mlp.down"),
    "nan": (lambda t: t[_first(t)].fill_(float("nan")), "lora_A.weight holds nan at index"),
    "convolution": (lambda t: t.__setitem__(_first(t), t[_first(t)][..., None]), "is not a matrix of numbers"),
    "nothing": (lambda t: t.clear(), "holds no LoRA factors"),
}


@pytest.mark.parametrize("kind", TENSOR_EDITS)
def test_tensors_that_are_not_lora_are_refused(kind: str, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    edit, message = TENSOR_EDITS[kind]
    with pytest.raises(InputError, match=message):
        read_adapter(edit_tensors(two_adapters[0], tmp_path / EDITED, edit))


def test_directories_that_are_no_adapters(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter directory at"):
        read_adapter(tmp_path / "missing")
    with pytest.raises(InputError, match=r"is not an adapter directory: no adapter_config\.json"):
        read_adapter(tiny_llama)
    copy = edit_config(two_adapters[0], tmp_path / EDITED)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        read_adapter(copy)
    (copy / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds adapter_model\.bin, which is pickle and not read"):
        read_adapter(copy)
    (copy / "adapter_model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match="is damaged"):
        read_adapter(copy)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*adapter_config\.json"):
        read_adapter(copy)


def test_adapters_of_other_shapes_do_not_fit_together(
    two_adapters: tuple[Path, Path], make_adapter: MakeAdapter, tiny_llama: Path, tmp_path: Path
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        tensors[key] = torch.cat([tensors[key]] * 2, dim=1)

    def compatible(**adapters: Adapter) -> None:
        require_compatible(adapters)

    one, other = read_adapter(two_adapters[0]), read_adapter(edit_tensors(two_adapters[1], tmp_path / "wide", widen))
    with pytest.raises(InputError, match=r"at model.layers.0.self_attn.q_proj: .*shape \[32, 32\].*shape \[32, 64\]"):
        compatible(reward=one, safety=other)
    other = read_adapter(edit_config(two_adapters[1], tmp_path / "task", task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="differ in task_type: reward has CAUSAL_LM, safety has SEQ_CLS"):
        compatible(reward=one, safety=other)
    other = read_adapter(edit_config(two_adapters[1], tmp_path / "revision", revision="v2"))
    with pytest.raises(InputError, match="differ in revision of the base"):
        compatible(reward=one, safety=other)
    compatible(reward=one, safety=read_adapter(two_adapters[1]))


def test_config_defaults_of_peft_are_all_plain() -> None:
    """A setting that PEFT adds with a default that is not off would make every adapter refused: learn of it here."""
    defaults = LoraConfig(target_modules=["q_proj"]).to_dict()
    assert [name for name, value in defaults.items() if value and name not in UNDERSTOOD] == []
