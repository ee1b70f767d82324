"""Every kind of LoRA that is taken, as PEFT writes it, held against PEFT's own weights and logits."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from psacpo.errors import InputError
from psacpo.merge.adapters import (
    adapter_bytes,
    read_adapter,
    require_compatible,
    require_plain,
    stack_adapters,
    write_adapter,
)
from psacpo.merge.bases import find_base
from psacpo.merge.checkpoints import delta_producer
from psacpo.merge.models import read_model
from psacpo.merge.shards import write_shards

IDS = torch.tensor([[1, 5, 17, 31, 9, 22, 3, 30]])
QWEN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "initializer_range": 0.2,
}

# What can be merged to an adapter too: base, options of the adapters.
KINDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ranks, patterns, rslora": (
        "qwen",
        [
            {"target_modules": ["q_proj", "up_proj"], "r": 4, "rank_pattern": {"up_proj": 2}, "use_rslora": True},
            {"target_modules": ["q_proj", "o_proj"], "r": 3, "lora_alpha": 5, "alpha_pattern": {r"1\..*q_proj": 9}},
        ],
    ),
    "conv1d": (
        "gpt2",
        [
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True, "r": 2, "use_rslora": True},
        ],
    ),
    "embeddings": (
        "qwen",
        [
            {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
            {"target_modules": ["embed_tokens", "lm_head"], "r": 2},
        ],
    ),
    "lora_bias": (
        "qwen",
        [
            {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "use_rslora": True},
            {"target_modules": ["q_proj", "o_proj"], "r": 3},
        ],
    ),
    "trained biases of adapted layers": (
        "qwen",
        [
            {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
            {"target_modules": ["v_proj", "q_proj"], "r": 3},
        ],
    ),
    "all biases trained": (
        "qwen",
        [{"target_modules": ["q_proj"], "bias": "all"}, {"target_modules": ["v_proj"], "bias": "lora_only", "r": 3}],
    ),
    "trained and LoRA biases": (
        "qwen",
        [
            {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
            {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        ],
    ),
    "saved modules": (
        "qwen",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            {"target_modules": ["q_proj", "v_proj"], "r": 3, "modules_to_save": ["lm_head", "embed_tokens"]},
        ],
    ),
    "saved block": (
        "qwen",
        [{"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, {"target_modules": ["o_proj"], "r": 2}],
    ),
    "saved module of Conv1D": (
        "gpt2",
        [
            {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "mlp.c_fc"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        ],
    ),
    "tied and saved": (
        "tied",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            {"target_modules": ["q_proj"]},
        ],
    ),
}
# What only full weights can hold, and why.
WEIGHTS_ONLY: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "dora": (
        "qwen",
        [
            {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
            {"target_modules": ["q_proj", "v_proj"], "r": 3},
        ],
        "is DoRA",
    ),
    "dora twice, with biases": (
        "qwen",
        [
            {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
            {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "bias": "all", "r": 3},
        ],
        "is DoRA",
    ),
    "dora on Conv1D": (
        "gpt2",
        [
            {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 3},
        ],
        "is DoRA",
    ),
    "dora on an embedding": (
        "qwen",
        [
            {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
            {"target_modules": ["embed_tokens"], "r": 3},
        ],
        "is DoRA",
    ),
    "saved here, adapted there": (
        "qwen",
        [{"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, {"target_modules": ["up_proj", "q_proj"]}],
        r"adapts model\.layers\.0\.mlp\.up_proj, which another adapter trains whole",
    ),
    "embedding beside lora_bias": (
        "qwen",
        [{"target_modules": ["q_proj"], "lora_bias": True}, {"target_modules": ["embed_tokens"]}],
        r"adapts the embedding model\.embed_tokens and an adapter has lora_bias",
    ),
}
EVERY = list(KINDS) + list(WEIGHTS_ONLY)

Bases = dict[str, Path]
MakeKind = Callable[[str], tuple[Path, list[Path]]]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


_loaded: dict[Path, Any] = {}


def load_base(path: Path) -> Any:
    """A model of its own of a base that is read from disk once."""
    if path not in _loaded:
        _loaded[path] = load(path)
    return copy.deepcopy(_loaded[path])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(IDS).logits
        return value


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Untied Qwen2 (biases on q, k, v), the same tied, and GPT-2 (Conv1D)."""
    place = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "qwen": Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=False)),
        "tied": Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                vocab_size=40,
                n_positions=16,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
    }
    for name, model in made.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(place / name)
    return {name: place / name for name in made}


def make(base: Path, path: Path, *, seed: int, **options: Any) -> Path:
    """A PEFT directory in which everything that can be trained has been: factors, magnitudes, biases, whole modules."""
    adapted: Any = get_peft_model(
        load_base(base), LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6} | options))
    )
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def make_kind(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> MakeKind:
    made: dict[str, tuple[Path, list[Path]]] = {}

    def kind(name: str) -> tuple[Path, list[Path]]:
        if name not in made:
            base, options = (KINDS | {k: v[:2] for k, v in WEIGHTS_ONLY.items()})[name]
            place = tmp_path_factory.mktemp("adapters")
            paths = [make(bases[base], place / str(i), seed=i + 1, **own) for i, own in enumerate(options)]
            made[name] = bases[base], paths
        return made[name]

    return kind


@functools.cache
def own_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT makes of an adapter alone, in float64."""
    merged = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
    return {name: value.double() for name, value in merged.state_dict().items()}


def dense(base: Path, paths: Sequence[Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """W + sum_i w_i (W_i - W) in float64."""
    start = {name: value.double() for name, value in load_base(base).state_dict().items()}
    total = dict(start)
    for path, weight in zip(paths, weights, strict=True):
        for name, value in own_weights(base, path).items():
            total[name] = total[name] + weight * (value - start[name])
    return total


def checkpoints(base: Path, paths: Sequence[Path], mixes: Sequence[Sequence[float]], place: Path) -> list[Path]:
    """Full weights of each mix, by the writer that the command uses."""
    model = read_model(base)
    outputs = [place / str(index) for index in range(len(mixes))]
    for out in outputs:
        out.mkdir(parents=True)
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(base / name, out / name)
    write_shards(outputs, model, delta_producer(model, [read_adapter(path) for path in paths], mixes))
    return outputs


def adapter(base: Path, paths: Sequence[Path], weights: Sequence[float], out: Path, **more: Any) -> Path:
    out.mkdir(parents=True)
    adapters = [read_adapter(path) for path in paths]
    write_adapter(out, adapters, weights, base=str(base), model=read_model(base), **more)
    return out


@pytest.mark.parametrize("kind", EVERY)
def test_checkpoint_is_the_dense_merge_of_what_peft_makes(kind: str, make_kind: MakeKind, tmp_path: Path) -> None:
    base, paths = make_kind(kind)
    mixes = [[0.7, 0.3], [1.5, -0.5]]
    before = load_file(base / "model.safetensors")
    for weights, out in zip(mixes, checkpoints(base, paths, mixes, tmp_path), strict=True):
        after, exact = load_file(out / "model.safetensors"), dense(base, paths, weights)
        changed = 0
        for name, value in after.items():
            if torch.equal(exact[name], before[name].double()):
                assert torch.equal(value, before[name]), name
            else:
                changed += 1
                assert (value.double() - exact[name]).norm() / exact[name].norm() < 1e-6, name
        assert changed > 1
        merged = load_base(base)
        merged.load_state_dict({name: value.float() for name, value in exact.items()})
        torch.testing.assert_close(logits(load(out)), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_in_peft_is_the_dense_merge(kind: str, make_kind: MakeKind, tmp_path: Path) -> None:
    base, paths = make_kind(kind)
    for place, weights in enumerate([[0.7, 0.3], [1.5, -0.5]]):
        out = adapter(base, paths, weights, tmp_path / str(place))
        merged = load_base(base)
        merged.load_state_dict({name: value.float() for name, value in dense(base, paths, weights).items()})
        found = logits(PeftModel.from_pretrained(load_base(base), out))
        torch.testing.assert_close(found, logits(merged), rtol=1e-4, atol=1e-4)
        assert (found - logits(load_base(base))).abs().max() > 1e-2
        size = (out / "adapter_model.safetensors").stat().st_size
        header = int.from_bytes((out / "adapter_model.safetensors").read_bytes()[:8], "little")
        assert adapter_bytes([read_adapter(path) for path in paths], weights) == size - 8 - header


@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_what_only_full_weights_can_hold_is_refused_as_an_adapter(
    kind: str, make_kind: MakeKind, tmp_path: Path
) -> None:
    base, paths = make_kind(kind)
    with pytest.raises(InputError, match=f"^adapter .* {WEIGHTS_ONLY[kind][2]}.*; allowed: --as checkpoint$"):
        adapter(base, paths, [0.5, 0.5], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", EVERY)
def test_one_alone_and_itself_with_itself_give_it_back(kind: str, make_kind: MakeKind, tmp_path: Path) -> None:
    # huggingface/peft#3761: add_weighted_adapter gives others back for rsLoRA, biases and DoRA.
    base, paths = make_kind(kind)
    for path in paths:
        expected = logits(PeftModel.from_pretrained(load_base(base), path))
        [alone] = checkpoints(base, [path], [[1.0]], tmp_path / path.name / "alone")
        [twice] = checkpoints(base, [path, path], [[0.7, 0.3]], tmp_path / path.name / "twice")
        found = [load(alone), load(twice)]
        if not read_adapter(path).magnitudes:
            out = adapter(base, [path, path], [0.4, 0.6], tmp_path / path.name / "adapter")
            found.append(PeftModel.from_pretrained(load_base(base), out))
        for model in found:
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_ends_and_many_mixes_in_one_pass_to_the_bit(
    kind: str, make_kind: MakeKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psacpo.merge.stored.BLOCK", 100)  # several blocks a tensor
    base, paths = make_kind(kind)
    mixes = [[1.0, 0.0], [0.6, 0.4], [0.0, 1.0], [0.0, 0.0]]
    together = checkpoints(base, paths, mixes, tmp_path / "together")
    apart = [checkpoints(base, paths, [mix], tmp_path / str(i))[0] for i, mix in enumerate(mixes)]
    ends = [checkpoints(base, [path], [[1.0]], tmp_path / f"end{i}")[0] for i, path in enumerate(paths)]
    read = [(path / "model.safetensors").read_bytes() for path in (*together, *apart, *ends, base)]
    assert read[:4] == read[4:8]
    assert [read[0], read[2], read[3]] == read[8:]
    assert len(set(read[:4])) == 4
    if kind in KINDS:
        for end, path in enumerate(paths):
            weights = [float(place == end) for place in range(2)]
            one = adapter(base, paths, weights, tmp_path / f"adapter{end}") / "adapter_model.safetensors"
            other = adapter(base, [path], [1.0], tmp_path / f"alone{end}") / "adapter_model.safetensors"
            assert one.read_bytes() == other.read_bytes()


def test_tied_embeddings_adapted_as_one_stay_one(bases: Bases, tmp_path: Path) -> None:
    # PEFT's own merge_and_unload adds both deltas to the one weight: its unmerged model is the reference.
    base = bases["tied"]
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    path = make(base, tmp_path / "adapter", seed=3, **options)
    expected = logits(PeftModel.from_pretrained(load_base(base), path))
    [out] = checkpoints(base, [path, path], [[0.25, 0.75]], tmp_path / "out")
    merged = load(out)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    as_adapter = adapter(base, [path, path], [0.25, 0.75], tmp_path / "as adapter")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load_base(base), as_adapter)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ],
)
def test_a_base_is_never_untied(options: dict[str, Any], bases: Bases, tmp_path: Path) -> None:
    base = bases["tied"]
    path = make(base, tmp_path / "adapter", seed=4, **options)
    with pytest.raises(InputError, match="which base .* ties to its other embedding; allowed: --as adapter"):
        delta_producer(read_model(base), [read_adapter(path)], [[1.0]])
    out = adapter(base, [path], [1.0], tmp_path / "out")
    find_base(None, {"own": read_adapter(out)}, on_disk=False)
    expected = logits(PeftModel.from_pretrained(load_base(base), path))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_base(base), out)), expected, rtol=1e-4, atol=1e-4)


def test_biases_that_the_base_lacks(bases: Bases, tmp_path: Path) -> None:
    base = bases["qwen"]
    path = make(base, tmp_path / "adapter", seed=5, target_modules=["o_proj"], lora_bias=True)
    expected = logits(PeftModel.from_pretrained(load_base(base), path))
    out = adapter(base, [path], [1.0], tmp_path / "out")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_base(base), out)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"has no weight model\.layers\.0\.self_attn\.o_proj\.bias"):
        delta_producer(read_model(base), [read_adapter(path)], [[1.0]])


def test_a_base_saved_without_its_head_and_an_adapter_that_says_nothing_of_conv1d(bases: Bases, tmp_path: Path) -> None:
    # As gpt2 lies on the hub: `h.0.attn.c_attn.weight`, where the model has `transformer.h.0.attn.c_attn`.
    base = tmp_path / "base"
    load_base(bases["gpt2"]).transformer.save_pretrained(base)
    shutil.copyfile(bases["gpt2"] / "generation_config.json", base / "generation_config.json")
    assert "h.0.attn.c_attn.weight" in load_file(base / "model.safetensors")
    path = make(base, tmp_path / "adapter", seed=6, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    file = path / "adapter_config.json"
    file.write_text(file.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    assert find_base(None, {"own": read_adapter(path)}, on_disk=True).path == base
    [out] = checkpoints(base, [path], [[1.0]], tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(load_base(base), path))
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "index", "what"),
    [
        ("dora", 0, r"it is DoRA \(use_dora\)"),
        ("lora_bias", 0, r"its B have biases \(lora_bias\)"),
        ("saved block", 0, r"it holds trained values of model\.layers\.0\.mlp\.down_proj\.weight \(modules_to_save or"),
        (
            "trained biases of adapted layers",
            0,
            r"it holds trained values of model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
    ],
)
def test_what_adds_up_factors_only_refuses_the_rest(kind: str, index: int, what: str, make_kind: MakeKind) -> None:
    adapters = [read_adapter(path) for path in make_kind(kind)[1]]
    with pytest.raises(InputError, match=f"^adapter reward is not plain LoRA: {what}") as caught:
        require_plain({"safety": adapters[1 - index], "reward": adapters[index]})
    assert "--as checkpoint" in str(caught.value)
    with pytest.raises(InputError, match="is not plain LoRA"):
        stack_adapters(adapters, [0.5, 0.5])
    require_plain({"safety": read_adapter(make_kind("conv1d")[1][0])})


def test_whole_tensors_need_the_base(make_kind: MakeKind, tmp_path: Path) -> None:
    _, paths = make_kind("saved modules")
    adapters = [read_adapter(path) for path in paths]
    with pytest.raises(InputError, match="trains whole tensors of the base, which is not on disk; allowed: --base"):
        write_adapter(tmp_path, adapters, [0.5, 0.5], base="someone/base")
    assert not list(tmp_path.iterdir())


def test_whole_tensors_of_different_shapes_do_not_fit_together(
    make_kind: MakeKind, bases: Bases, tmp_path: Path
) -> None:
    wider = tmp_path / "wider"
    Qwen2ForCausalLM(Qwen2Config(**(QWEN | {"vocab_size": 48}), tie_word_embeddings=False)).save_pretrained(wider)
    one = make_kind("saved modules")[1][0]
    other = make(wider, tmp_path / "other", seed=7, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(
        InputError, match=r"at lm_head\.weight whole: a changes .* \[40, 16\], b one of shape \[48, 16\]"
    ):
        require_compatible({"a": read_adapter(one), "b": read_adapter(other)})
    with pytest.raises(InputError, match=r"shape mismatch at lm_head: .* \[48, 16\], the base has \[40, 16\]"):
        delta_producer(read_model(bases["qwen"]), [read_adapter(other)], [[1.0]])
