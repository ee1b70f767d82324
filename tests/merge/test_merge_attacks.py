"""What an attack on `psacpo merge` once got through: interruptions, overflow, odd names, damaged files, false verdicts."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from psacpo import files
from psacpo.errors import InputError
from psacpo.merge import MergeConfig, merge
from psacpo.merge import run as job
from psacpo.merge.adapters import read_adapter
from psacpo.merge.config import policy_name
from psacpo.merge.run import plan
from psacpo.merge.shards import digest_shard
from psacpo.merge.verify import verify
from psacpo.recipe import merge_settings

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {f"{Q}.weight": (6, 8), "model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8)}
    return {name: numbers(seed + place, *shape, dtype=dtype) for place, (name, shape) in enumerate(shapes.items())}


def lora(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return {
        f"{Q}.lora_A.weight": numbers(seed, 2, 8, dtype=dtype),
        f"{Q}.lora_B.weight": numbers(seed + 1, 6, 2, dtype=dtype),
    }


def model(path: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    path.mkdir(parents=True)
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False} | config
    (path / "config.json").write_text(json.dumps(said))
    save_file(tensors if tensors is not None else weights(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def adapter(path: Path, base: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir(parents=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"}
    said |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    (path / "adapter_config.json").write_text(json.dumps(said))
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """reward, safety and base, as settings."""
    base = model(tmp_path / "base-model")
    return {
        "reward": adapter(tmp_path / "r", base, lora(11)),
        "safety": adapter(tmp_path / "s", base, lora(21)),
        "base": base,
    }


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    return {"reward": model(tmp_path / "m1", weights(1)), "safety": model(tmp_path / "m2", weights(5))}


def run(out: Path, ratios: list[float] | None = None, **more: Any) -> list[Path]:
    if "policies" not in more:
        more["ratios"] = ratios or [0.3]
    return merge(MergeConfig(out=out, **more))


def contents(directory: Path) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def stop_at(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException, *, after: bool = False
) -> None:
    """Have the `call`-th call of a function of `run` or `files` end in an error."""
    home: Any = job if hasattr(job, name) else files
    real, count = getattr(home, name), [0]

    def stopped(*args: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == call and not after:
            raise error
        found = real(*args, **more)
        if count[0] == call:
            raise error
        return found

    monkeypatch.setattr(home, name, stopped)


def test_resume_takes_no_output_of_another_merge(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios, out = [0.0, 0.5, 1.0], tmp_path / "g"
    wanted = [contents(place) for place in run(tmp_path / "wanted", ratios, **pair)]
    other = adapter(tmp_path / "x", pair["base"], lora(31))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "_describe", 2, KeyboardInterrupt())
        run(out, ratios, **pair)
    assert sum(entry.name.startswith("policy") for entry in out.iterdir()) == 1
    run(out, ratios, overwrite=True, **(pair | {"reward": other}))
    assert [contents(place) for place in run(out, ratios, overwrite=True, **pair)] == wanted
    assert {entry.name for entry in out.iterdir()} == {policy_name(ratio) for ratio in ratios}


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
@pytest.mark.parametrize("stopped", [1, 3])
def test_death_right_after_an_output_appears_loses_nothing(
    kind: str, stopped: int, pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios, out = [0.0, 0.5, 1.0], tmp_path / "g"
    wanted = [contents(place) for place in run(tmp_path / "wanted", ratios, **pair, **{"as": kind})]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "_replace_directory", stopped, KeyboardInterrupt(), after=True)
        run(out, ratios, **pair, **{"as": kind})
    assert [contents(place) for place in run(out, ratios, **pair, **{"as": kind})] == wanted


def test_a_full_disk_at_the_second_output_keeps_the_first(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left"):
        stop_at(patch, "_describe", 2, OSError(28, "No space left on device"))
        run(tmp_path / "g", [0.0, 0.5], **pair)
    assert len(run(tmp_path / "g", [0.0, 0.5], **pair)) == 2


def test_what_a_killed_merge_of_adapters_leaves_is_mended(pair: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    [out] = run(home / "o", **pair)
    before = contents(out)
    (home / ".o.partial-abcd_123").mkdir()
    (home / ".o.old-abcd_123").mkdir()
    out.rename(home / ".o.old-abcd_123" / "o")
    stranger = home / ".o.old-v1.partial-0123456789abcdef"
    stranger.mkdir()
    with pytest.raises(InputError, match="in use"):
        run(out, [0.6], **pair)
    assert contents(out) == before
    run(out, [0.6], overwrite=True, **pair)
    assert {entry.name for entry in home.iterdir()} == {"o", stranger.name}
    with files.atomic_directory(home / "p") as partial, files.atomic_directory(home / "p", overwrite=True):
        assert partial.is_dir()  # in use, so not abandoned
        (partial / files.MANIFEST).write_text("{}")


def test_the_second_of_two_merges_to_one_place_is_refused(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = job._describe, tmp_path / "o"

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(job, "_describe", real)
        run(out, [0.9], **pair)
        real(*args)

    monkeypatch.setattr(job, "_describe", meanwhile)
    with pytest.raises(InputError, match="in use"):
        run(out, [0.1], **pair)
    assert json.loads((out / "psacpo.json").read_text())["ratio"] == 0.9
    assert not list(tmp_path.glob(".o.*"))


def test_a_changed_side_file_is_another_merge(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair["base"] / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "_replace_directory", 2, KeyboardInterrupt())
        run(tmp_path / "g", [0.0, 0.5], **pair, **{"as": "checkpoint"})
    (pair["base"] / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="in use"):
        run(tmp_path / "g", [0.0, 0.5], **pair, **{"as": "checkpoint"})


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("what", ["scale", "weight", "F64 factors", "F64 saved"])
def test_no_adapter_holds_infinity(what: str, rank: int | None, pair: dict[str, Any], tmp_path: Path) -> None:
    made: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "scale": ({name: t * 1e30 for name, t in lora(1).items()}, {"lora_alpha": 1e20}),
        "weight": (lora(1), {}),
        "F64 factors": ({name: t * 1e200 for name, t in lora(1, torch.float64).items()}, {}),
        "F64 saved": (
            lora(1) | {"lm_head.weight": torch.full((10, 8), 1e200, dtype=torch.float64)},
            {"modules_to_save": ["lm_head"]},
        ),
    }
    tensors, config = made[what]
    big = adapter(tmp_path / "big", pair["base"], tensors, **config)
    policies = {str(big): 1e39 if what == "weight" else 0.5, str(pair["safety"]): 0.5}
    with pytest.raises(InputError, match=r"the merged .* is not finite in F32"):
        run(tmp_path / "o", policies=policies, unnormalised=True, base=pair["base"], rank=rank)
    assert not (tmp_path / "o").exists()


def test_float64_adapters_on_a_float64_base_are_computed_in_float64(tmp_path: Path) -> None:
    base = model(tmp_path / "b", weights(dtype=torch.float64))
    tensors = [lora(seed, torch.float64) for seed in (3, 7)]
    reward, safety = (adapter(tmp_path / f"a{n}", base, one) for n, one in enumerate(tensors))
    [out] = run(tmp_path / "o", reward=reward, safety=safety, base=base, **{"as": "checkpoint"})
    deltas = [2 * one[f"{Q}.lora_B.weight"] @ one[f"{Q}.lora_A.weight"] for one in tensors]
    exact = weights(dtype=torch.float64)[f"{Q}.weight"] + 0.7 * deltas[0] + 0.3 * deltas[1]
    assert float((load_file(out / "model.safetensors")[f"{Q}.weight"] - exact).abs().max()) < 1e-13


def test_an_output_that_cannot_be_renamed_is_refused_at_once(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setattr(job, "prepare", lambda *_: pytest.fail("it was not refused at once"))
    for out in (Path("."), tmp_path / "x", Path("y/.."), Path("/proc")):
        with pytest.raises(InputError, match="cannot be replaced by a new directory"):
            run(out, **pair)
    with pytest.raises(InputError, match="zero byte"):
        run(Path("a\0b"), **pair)


def test_an_output_with_too_long_a_name_is_one_line(pair: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the path is too long"):
        run(tmp_path / ("x" * 300), **pair)


def test_a_symbolic_link_to_itself_is_no_output(pair: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / "loop" / "o"):
        with pytest.raises(InputError, match=r"loop"):
            run(out, **pair)


def test_a_failed_rename_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o"
    out.mkdir()

    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(InputError, match="mount point"), files.atomic_directory(out):
        pass
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_the_space_that_is_asked_for_is_that_of_the_dtype(
    dtype: str | None, tmp_path: Path, pair: dict[str, Any]
) -> None:
    big = {"w": torch.zeros(300_000, dtype=torch.bfloat16)}
    sources = {"reward": model(tmp_path / "m1", big), "safety": model(tmp_path / "m2", big)}
    adapters = {"reward": pair["reward"], "safety": pair["safety"], "base": pair["base"], "as": "checkpoint"}
    for n, (given, size) in enumerate(((sources, 0.6), (adapters, 0.0))):
        config = MergeConfig(out=tmp_path / f"o{n}", ratios=[0.5], dtype=dtype, **given)
        wanted = float(plan(config)["writes"].split()[0])
        assert 0 <= wanted - (size * (4 if dtype else 1)) < 0.3
        [out] = merge(config)
        assert sum(map(len, contents(out).values())) <= wanted * 1e6


def test_each_source_has_a_name_of_its_own(tmp_path: Path, pair: dict[str, Any]) -> None:
    paths = [tmp_path / name for name in ("x/a", "y/a", "z/a-1", "v/base", "v/layout")]
    for seed, path in enumerate(paths):
        adapter(path, pair["base"], lora(40 + 2 * seed))
    config = MergeConfig(out=tmp_path / "o", policies={str(path): 0.2 for path in paths}, base=pair["base"])
    assert len(config.sources) == 5
    assert not {"base", "layout"} & set(config.sources)
    [out] = merge(config)
    inputs = json.loads((out / "psacpo.json").read_text())["inputs"]
    assert inputs["base"] == files.digest_model(pair["base"])
    assert len(set(inputs.values())) == 6
    assert verify(out)["modules"] == 1


def refreshed(out: Path) -> None:
    """Make the manifest say of the weights what they are now."""
    said = json.loads((out / "psacpo.json").read_text())
    said["outputs"] = {name: digest_shard(out / name) for name in said["outputs"]}
    (out / "psacpo.json").write_text(json.dumps(said))


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


TAMPERED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "config.json": ("checkpoint", lambda out: edit(out / "config.json", rope_theta=5), "not what was written"),
    "adapter_config.json": (
        "adapter",
        lambda out: edit(out / "adapter_config.json", base_model_name_or_path="x/y", fan_in_fan_out=True),
        "not what was written",
    ),
    "other weights": (
        "checkpoint",
        lambda out: save_file({"a": torch.ones(1)}, out / "extra.safetensors"),
        "was not written by",
    ),
    "no outputs": ("checkpoint", lambda out: edit(out / "psacpo.json", outputs={}), "names no weights"),
    "outputs a list": ("checkpoint", lambda out: edit(out / "psacpo.json", outputs=["x"]), "damaged"),
    "no config": ("adapter", lambda out: edit(out / "psacpo.json", config=None), "damaged"),
    "no sources": ("adapter", lambda out: edit(out / "psacpo.json", sources=None), "damaged"),
    "empty sources": ("adapter", lambda out: edit(out / "psacpo.json", sources={}), "damaged"),
    "inputs a list": ("adapter", lambda out: edit(out / "psacpo.json", inputs=[1]), "damaged"),
    "truncation a list": ("adapter", lambda out: edit(out / "psacpo.json", truncation=[1]), "damaged"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_finds(what: str, pair: dict[str, Any], tmp_path: Path) -> None:
    kind, tamper, said = TAMPERED[what]
    [out] = run(tmp_path / "o", **pair, **{"as": kind})
    verify(out)
    tamper(out)
    with pytest.raises(InputError, match=said):
        verify(out)


def test_verify_finds_two_ratios_in_one_manifest(pair: dict[str, Any], tmp_path: Path) -> None:
    [out] = run(tmp_path / "o", **pair)
    said = json.loads((out / "psacpo.json").read_text())
    edit(out / "psacpo.json", config=said["config"] | {"ratios": [0.1, 0.2]})
    with pytest.raises(InputError, match="2 ratios"):
        verify(out)


@pytest.mark.parametrize("part", ["lm_head.weight", f"{Q}.lora_B.bias", f"{Q}.lora_B.weight"])
def test_verify_computes_all_that_an_adapter_holds(part: str, pair: dict[str, Any], tmp_path: Path) -> None:
    more = {"lm_head.weight": numbers(3, 10, 8), f"{Q}.lora_B.bias": numbers(4, 6)}
    reward = adapter(tmp_path / "whole", pair["base"], lora(1) | more, modules_to_save=["lm_head"], lora_bias=True)
    [out] = run(tmp_path / "o", **(pair | {"reward": reward}))
    assert verify(out)["modules"] == 1
    tensors = load_file(out / "adapter_model.safetensors")
    tensors[PREFIX + part] *= 1.001
    save_file(tensors, out / "adapter_model.safetensors")
    refreshed(out)
    with pytest.raises(InputError, match="not the merge of its sources"):
        verify(out)


def test_verify_of_an_adapter_finds_another_base(pair: dict[str, Any], tmp_path: Path) -> None:
    [out] = run(tmp_path / "o", **pair)
    save_file(weights(9), pair["base"] / "model.safetensors")
    with pytest.raises(InputError, match="the base is not what it was"):
        verify(out)


def test_verify_takes_what_cancels(pair: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(pair["reward"], tmp_path / "copy")
    for n, weight in enumerate((1.0, 1000.1)):
        policies = {str(pair["reward"]): weight, str(tmp_path / "copy"): -weight + n / 10}
        [out] = run(tmp_path / f"o{n}", policies=policies, base=pair["base"], unnormalised=True)
        assert verify(out)["modules"] == 1


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_verify_finds_sources_from_anywhere(
    kind: str, pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pair["reward"].rename(tmp_path / "reward")
    policies = {"reward": 0.5, "~/s": 0.5}
    [out] = run(tmp_path / "o", policies=policies, base="~/base-model", **{"as": kind})
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    verify(out)


def test_verify_of_full_models_that_moved(models: dict[str, Any], tmp_path: Path) -> None:
    [out] = run(tmp_path / "o", **models)
    for path in models.values():
        path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(InputError, match="m1"):
        verify(out)
    verify(out, reward=str(tmp_path / "new-m1"), safety=str(tmp_path / "new-m2"))


def test_verify_of_full_models_with_a_base_at_home(
    models: dict[str, Any], pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    [out] = run(tmp_path / "o", **models, method="task_arithmetic", base="~/base-model")
    verify(out)


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_tensors_without_elements_are_verified(method: str, tmp_path: Path) -> None:
    tensors = [{"z": torch.zeros(0, 4), "s": torch.tensor(2.0 + n), "w": numbers(n, 3, 4)} for n in range(2)]
    reward, safety = (model(tmp_path / f"m{n}", one) for n, one in enumerate(tensors))
    [out] = run(tmp_path / "o", reward=reward, safety=safety, method=method)
    assert verify(out)["tensors"] == 3


def raw(path: Path, header: Any) -> Path:
    """A model whose file has this header, and 8 float32 numbers."""
    model(path)
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(32))
    return path


ENTRY = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
HEADERS = {
    "metadata a number": {"__metadata__": 5, "a": ENTRY},
    "metadata a text": {"__metadata__": "abc", "a": ENTRY},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": ENTRY},
    "half a surrogate pair": json.dumps({"a\ud800": ENTRY}).encode(),
    "UTF-16": json.dumps({"a": ENTRY}).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": ENTRY}).encode(),
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_odd_headers_are_refused(what: str, dtype: str | None, tmp_path: Path) -> None:
    one, other = (raw(tmp_path / name, HEADERS[what]) for name in "ab")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        run(tmp_path / "o", reward=one, safety=other, dtype=dtype)


@pytest.mark.parametrize("metadata", [[1], "x", None, {"a": "b"}])
def test_odd_metadata_of_an_index_does_not_stop_a_merge(metadata: Any, tmp_path: Path) -> None:
    for name in "ab":
        made = model(tmp_path / name)
        (made / "model.safetensors").rename(made / "model-1.safetensors")
        index = {"metadata": metadata, "weight_map": dict.fromkeys(weights(), "model-1.safetensors")}
        (made / "model.safetensors.index.json").write_text(json.dumps(index))
    [out] = run(tmp_path / "o", reward=tmp_path / "a", safety=tmp_path / "b", dtype="bfloat16")
    found = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert found["total_size"] == 2 * sum(tensor.numel() for tensor in weights().values())


def test_a_configuration_that_is_nested_deep_is_one_line(tmp_path: Path, models: dict[str, Any]) -> None:
    (models["reward"] / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match="nested too deep"):
        run(tmp_path / "o", **models)


def test_a_configuration_that_transformers_refuses_is_no_traceback(tmp_path: Path) -> None:
    # 8 is no multiple of the 32 heads that are the default.
    base = model(tmp_path / "b", hidden_size=8, tie_word_embeddings=None)
    lost = {name.replace("layers.0", "layers.9"): tensor for name, tensor in lora(1).items()}
    with pytest.raises(InputError, match="it would do nothing"):
        run(tmp_path / "o", reward=adapter(tmp_path / "r", base, lost), safety=adapter(tmp_path / "s", base, lora(2)))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-this-name/x", os.fsdecode(b"/tmp/\xff")])
@pytest.mark.parametrize("key", ["reward", "base"])
def test_names_that_no_directory_can_have(key: str, name: str, pair: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run(tmp_path / "o", **(pair | {key: name}))
    assert "\n" not in str(refused.value)
    str(refused.value).encode()


def test_a_manifest_of_another_form_is_refused_in_one_line(pair: dict[str, Any], tmp_path: Path) -> None:
    (pair["safety"] / "psacpo.json").write_text('{"inputs": [1], "lambda": 1}')
    with pytest.raises(InputError, match="psacpo.json is damaged: not a JSON object, or with no such in"):
        run(tmp_path / "o", **pair)
    (pair["safety"] / "psacpo.json").write_text('{"inputs": {}, "lambda": 1}')
    assert run(tmp_path / "o", **pair), "one that says nothing of a dial is no reason to stop"


def test_what_would_be_ignored_is_refused(pair: dict[str, Any], models: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rank is of adapters"):
        run(tmp_path / "o", **models, rank=2)
    with pytest.raises(InputError, match="dtype is of full weights"):
        run(tmp_path / "o", **pair, dtype="bfloat16")


def test_factors_whose_product_is_zero_are_warned_of(pair: dict[str, Any], tmp_path: Path) -> None:
    tensors = lora(1)
    tensors[f"{Q}.lora_A.weight"][0] = 0
    assert not read_adapter(adapter(tmp_path / "some", pair["base"], tensors)).zero
    tensors[f"{Q}.lora_B.weight"][:, 1] = 0
    assert read_adapter(adapter(tmp_path / "none", pair["base"], tensors)).zero


def test_minus_zero_is_zero(pair: dict[str, Any], tmp_path: Path) -> None:
    [out] = run(tmp_path / "o", [-0.0], **pair)
    said = json.loads((out / "psacpo.json").read_text())
    assert (said["policy"], str(said["ratio"])) == ("policy@0.00", "0.0")


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [("1e308", "1.7e308", "too large to be summed"), ("1", "-1", "the weights of all tensors sum to zero")],
)
def test_weights_that_have_no_sum(one: str, other: str, said: str, models: dict[str, Any], tmp_path: Path) -> None:
    listed = [f"  - {{model: {m}, parameters: {{weight: {w}}}}}" for m, w in (("m1", one), ("m2", other))]
    (tmp_path / "f.yaml").write_text("\n".join(["models:", *listed, "merge_method: linear"]))
    with pytest.raises(InputError, match=said):
        merge(merge_settings(tmp_path / "f.yaml", out=tmp_path / "o"))


def test_tiny_weights_are_normalised(models: dict[str, Any], tmp_path: Path) -> None:
    listed = [f"  - {{model: {m}, parameters: {{weight: {w}}}}}" for m, w in (("m1", "1.0e-9"), ("m2", "3.0e-9"))]
    (tmp_path / "f.yaml").write_text("\n".join(["models:", *listed, "merge_method: linear"]))
    [out] = merge(merge_settings(tmp_path / "f.yaml", out=tmp_path / "o"))
    wanted = 0.25 * weights(1)["lm_head.weight"] + 0.75 * weights(5)["lm_head.weight"]
    torch.testing.assert_close(load_file(out / "model.safetensors")["lm_head.weight"], wanted)


def test_an_empty_name_is_no_model(models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("models: [{model: ''}, {model: m1}]\nmerge_method: linear\n")
    with pytest.raises(InputError, match="names no model"):
        merge_settings(tmp_path / "f.yaml", out=tmp_path / "o")
