"""Which base adapters belong to, and model directories that are not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from psacpo.errors import InputError
from psacpo.files import digest_model, write_manifest
from psacpo.merge.adapters import Adapter, read_adapter
from psacpo.merge.bases import Base, find_base
from psacpo.merge.models import read_model

MakeAdapter = Callable[..., Path]


def with_manifest(adapter: Path, target: Path, *, base_digest: str | None = None, base: str | None = None) -> Adapter:
    """A copy of an adapter that names another base, or knows its base's digest."""
    shutil.copytree(adapter, target)
    if base is not None:
        file = target / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    if base_digest is not None:
        write_manifest(target, kind="adapter", config={}, inputs={}, seeds={}, base_digest=base_digest)
    return read_adapter(target)


def find(name: str | Path | None, reward: Adapter, safety: Adapter, *, on_disk: bool = False) -> Base:
    return find_base(None if name is None else str(name), {"reward": reward, "safety": safety}, on_disk=on_disk)


def test_the_adapters_own_base_is_found(two_adapters: tuple[Path, Path], tiny_llama: Path) -> None:
    pair = [read_adapter(path) for path in two_adapters]
    expected = Base(str(tiny_llama), tiny_llama, digest_model(tiny_llama))
    assert find(None, *pair) == find(tiny_llama, *pair) == expected


def test_a_link_or_relative_path_to_the_same_base_will_do(
    two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    assert find("link", *map(read_adapter, two_adapters)).name == str(tmp_path / "link")


def test_another_base_by_name(
    two_adapters: tuple[Path, Path], tiny_llama: Path, tiny_llama_raw: Path, tmp_path: Path
) -> None:
    pair = [read_adapter(path) for path in two_adapters]
    with pytest.raises(
        InputError, match=r"^adapter for another base: reward adapter .* is for .*; given: base "
    ) as caught:
        find(tiny_llama_raw, *pair)
    assert "\n" not in str(caught.value)
    stranger = with_manifest(two_adapters[1], tmp_path / "b", base="someone/else-7b")
    with pytest.raises(InputError, match=r"^adapter for another base: safety adapter .* is for someone/else-7b"):
        find(tiny_llama, pair[0], stranger)


def test_a_moved_base_is_known_by_its_digest(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    right = digest_model(tiny_llama)
    moved = [
        with_manifest(path, tmp_path / str(i), base="/gone/away/model", base_digest=right)
        for i, path in enumerate(two_adapters)
    ]
    assert find(tiny_llama, moved[0], moved[1]).digest == right
    with pytest.raises(InputError, match="no base model directory at /gone/away/model, which the adapter names"):
        find(None, moved[0], moved[1])
    # Without a digest only the name is left to go by.
    nameless = with_manifest(two_adapters[1], tmp_path / "c", base="/gone/away/model")
    with pytest.raises(InputError, match=r"^adapter for another base: safety"):
        find(tiny_llama, moved[0], nameless)


def test_the_digest_decides_over_the_name(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    right = digest_model(tiny_llama)
    wrong = [with_manifest(path, tmp_path / path.name, base_digest="0" * 64) for path in two_adapters]
    with pytest.raises(
        InputError, match=f"^adapter for another base: reward .* base digest {right}; allowed: {'0' * 64}"
    ):
        find(tiny_llama, wrong[0], wrong[1])
    good = with_manifest(two_adapters[0], tmp_path / "good", base_digest=right)
    with pytest.raises(
        InputError, match=r"^adapter for another base: the adapters were made on different base weights"
    ):
        find(tiny_llama, good, wrong[1])
    with pytest.raises(InputError, match=r"^adapter for another base: safety"):
        find(tiny_llama, read_adapter(two_adapters[0]), wrong[1])


def test_a_hub_base_is_fetched_only_when_it_is_needed(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair = [with_manifest(path, tmp_path / path.name, base="nobody/no-such-model") for path in two_adapters]
    assert find(None, pair[0], pair[1]) == Base("nobody/no-such-model", None, None)
    with pytest.raises(InputError, match="no base model nobody/no-such-model: there is no directory") as caught:
        find(None, pair[0], pair[1], on_disk=True)
    assert "\n" not in str(caught.value)


def test_a_hub_base_is_taken_from_the_cache(
    two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--some--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_llama, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pair = [with_manifest(path, tmp_path / path.name, base="some/tiny") for path in two_adapters]
    assert find("some/tiny", pair[0], pair[1], on_disk=True).path == snapshot
    # The cache's own directory is that model too.
    assert find(snapshot, pair[0], pair[1]).path == snapshot


def test_what_is_not_a_model_directory(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair = [read_adapter(path) for path in two_adapters]
    with pytest.raises(InputError, match=r"is not a model directory: no config\.json in it"):
        find(tmp_path, *pair)
    with pytest.raises(InputError, match="is an adapter directory"):
        find(two_adapters[0], *pair)
    with pytest.raises(InputError, match=r"no base model directory at \./missing; allowed: --base"):
        find("./missing", *pair)


def test_saved_embeddings_must_be_the_bases(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    path = make_adapter(tiny_llama, seed=41, target_modules=["embed_tokens", "lm_head"])
    adapter = read_adapter(path)
    assert adapter.copies == {"lm_head", "model.embed_tokens"}
    assert find_base(None, {"safety": adapter}, on_disk=False).path == tiny_llama
    shutil.copytree(path, tmp_path / "changed")
    file = tmp_path / "changed" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 1
    save_file(tensors, file)
    with pytest.raises(InputError, match="changes the whole weight of lm_head, not only by LoRA factors"):
        find_base(None, {"safety": read_adapter(tmp_path / "changed")}, on_disk=False)


def test_saved_embeddings_in_another_dtype_are_the_bases_too(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    path = make_adapter(tiny_llama, seed=42, target_modules=["embed_tokens"])
    half = tmp_path / "half"
    shutil.copytree(path, half)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(half / "adapter_model.safetensors")
    tensors[key] = tensors[key].to(torch.bfloat16)
    save_file(tensors, half / "adapter_model.safetensors")
    assert find_base(None, {"safety": read_adapter(half)}, on_disk=False).path == tiny_llama


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def test_a_sharded_model_by_its_headers(sharded: Path) -> None:
    model = read_model(sharded)
    assert len(model.shards) > 2
    assert model.index == "model.safetensors.index.json"
    found = model.find("lm_head.weight")
    assert found is not None
    assert found[1].shape == (model.config["vocab_size"], 32)
    assert model.find("lm_head.bias") is None
    assert not model.ties_embeddings


def _drop_shard(path: Path) -> None:
    min(path.glob("model-*.safetensors")).unlink()


def _cut_shard(path: Path) -> None:
    shard = min(path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def _swap_index(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], shards[0]) | {"x": shards[1]}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _climb(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def _pickle(path: Path) -> None:
    for shard in path.glob("model*"):
        shard.unlink()
    (path / "pytorch_model.bin").write_bytes(b"")


def _quantise(path: Path) -> None:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))


def _no_weights(path: Path) -> None:
    for shard in path.glob("model*"):
        shard.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_drop_shard, r"lacks the shard model-00001-of-\d+\.safetensors that model\.safetensors\.index\.json names"),
        (_cut_shard, "is damaged or not a safetensors file: .* bytes long where its header says"),
        (_swap_index, "lacks the tensor .* that model.safetensors.index.json places there"),
        (_climb, r"lacks the shard \.\./model\.safetensors"),
        (_pickle, r"holds pytorch_model\.bin, which is pickle and not read; allowed: safetensors"),
        (_quantise, r"is quantised \(quantization_config in config\.json\)"),
        (_no_weights, r"no model\.safetensors or model\.safetensors\.index\.json in it"),
    ],
)
def test_models_that_are_not_whole(harm: Callable[[Path], None], message: str, sharded: Path) -> None:
    harm(sharded)
    with pytest.raises(InputError, match=message):
        read_model(sharded)


def test_tied_embeddings_are_known_where_the_configuration_is_silent(tiny_qwen2: Path, tmp_path: Path) -> None:
    assert read_model(tiny_qwen2).ties_embeddings
    shutil.copytree(tiny_qwen2, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    from transformers import Qwen2Config

    assert read_model(tmp_path / "model").ties_embeddings is Qwen2Config().tie_word_embeddings
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert read_model(tmp_path / "model").ties_embeddings
