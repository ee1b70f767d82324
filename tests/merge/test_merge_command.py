"""`psacpo merge` as it is typed: full models, several policies, methods, mergekit files, verification, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.merge.verify import verify

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three trainings of one base in bfloat16, in two or more shards."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("helpful", "safe", "third")):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        model.save_pretrained(root / name, max_shard_size="50KB")
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(root / name)
        found[name] = root / name
    assert len(list((root / "safe").glob("*.safetensors"))) > 1
    return found


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in sorted(path.glob("*.safetensors")) for name, w in load_file(file).items()}


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_full_models_at_many_ratios(psacpo: Command, models: dict[str, Path], tmp_path: Path) -> None:
    pair = ("merge", "--reward", models["helpful"], "--safety", models["safe"])
    ok(psacpo(*pair, "--ratios", "0:1:0.25", "--out", tmp_path / "many"))
    one, other = weights(models["helpful"]), weights(models["safe"])
    for ratio in (0, 0.25, 0.5, 0.75, 1):
        out = tmp_path / "many" / f"policy@{ratio:.2f}"
        for name, weight in weights(out).items():
            exact = (1 - ratio) * one[name].double() + ratio * other[name].double()
            assert torch.equal(weight, exact.to(torch.bfloat16)), name
        AutoModelForCausalLM.from_pretrained(out)
        assert files(out)["tokenizer.json"] == files(models["helpful"])["tokenizer.json"]
        verify(out)
    ok(psacpo(*pair, "--ratio", "0.25", "--out", tmp_path / "one"))
    assert files(tmp_path / "one") == files(tmp_path / "many" / "policy@0.25")


def test_three_policies(psacpo: Command, models: dict[str, Path], tmp_path: Path) -> None:
    shares = {"helpful": 0.5, "safe": 0.3, "third": 0.2}
    policies = [part for name, share in shares.items() for part in ("--policy", f"{models[name]}={share}")]
    ok(psacpo("merge", *policies, "--out", tmp_path / "soup"))
    everything = {name: weights(models[name]) for name in shares}
    for name, weight in weights(tmp_path / "soup").items():
        exact = sum(share * everything[model][name].double() for model, share in shares.items())
        assert torch.allclose(weight.double(), exact, rtol=2**-8, atol=0)  # type: ignore[arg-type]
    ok(psacpo("merge", "--verify", tmp_path / "soup"))
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "W = 0.5 * W[helpful] + 0.3 * W[safe] + 0.2 * W[third]" in card
    refused(psacpo("merge", *policies[:4], "--out", tmp_path / "x"), "sum to 0.8")
    ok(psacpo("merge", *policies[:4], "--unnormalised", "--out", tmp_path / "x"))


def test_three_adapters(psacpo: Command, make_adapter: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    from psacpo.merge import dense_delta, read_adapter

    shares = dict(zip([make_adapter(tiny_llama, seed=s) for s in (91, 92, 93)], (0.5, 0.3, 0.2), strict=True))
    policies = [part for path, share in shares.items() for part in ("--policy", f"{path}={share}")]
    ok(psacpo("merge", *policies, "--out", tmp_path / "soup"))
    merged = read_adapter(tmp_path / "soup")
    sources = {path: read_adapter(path) for path in shares}
    for name, factors in merged.modules.items():
        exact = sum(share * dense_delta(sources[path].modules[name]) for path, share in shares.items())
        assert isinstance(exact, torch.Tensor)
        assert torch.linalg.norm(dense_delta(factors) - exact) <= 1e-6 * torch.linalg.norm(exact)
    ok(psacpo("merge", "--verify", tmp_path / "soup"))


@pytest.mark.parametrize("method", ["ties", "slerp", "dare_ties", "della", "nuslerp"])
def test_a_method(psacpo: Command, models: dict[str, Path], tmp_path: Path, method: str) -> None:
    base = ("--base", models["third"]) if method not in ("slerp", "nuslerp") else ()
    pair = ("merge", "--reward", models["helpful"], "--safety", models["safe"], "--method", method, *base)
    ok(psacpo(*pair, "--ratio", "0.3", "--out", tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    verify(tmp_path / "out")
    if method == "della":  # which draws
        ok(psacpo("merge", "--verify", tmp_path / "out"))
        ok(psacpo(*pair, "--ratio", "0.3", "--out", tmp_path / "again"))
        assert files(tmp_path / "out") == files(tmp_path / "again")
    assert f"method: {method}" in (tmp_path / "out" / "README.md").read_text()


def test_a_method_on_adapters(psacpo: Command, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair = ("merge", "--reward", two_adapters[0], "--safety", two_adapters[1], "--ratio", "0.3", "--method", "ties")
    ok(psacpo(*pair, "--as", "checkpoint", "--parameter", "density=0.5", "--out", tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    refused(psacpo(*pair, "--out", tmp_path / "x"), "ties is not written as an adapter; allowed: --as checkpoint")
    refused(psacpo(*pair, "--parameter", "densty=1", "--as", "checkpoint", "--out", tmp_path / "x"), "densty")


def test_a_mergekit_file(psacpo: Command, models: dict[str, Path], tmp_path: Path) -> None:
    text = (
        f"models:\n  - {{model: {models['helpful']}, parameters: {{weight: 0.7}}}}\n"
        f"  - {{model: {models['safe']}, parameters: {{weight: 0.3}}}}\nmerge_method: linear\ndtype: float32\n"
    )
    (tmp_path / "merge.yaml").write_text(text)
    ok(psacpo("merge", "merge.yaml", "--out", "merged", cwd=tmp_path))
    one, other = weights(models["helpful"]), weights(models["safe"])
    for name, weight in weights(tmp_path / "merged").items():
        assert weight.dtype == torch.float32
        assert torch.allclose(weight.double(), 0.7 * one[name].double() + 0.3 * other[name].double(), atol=1e-7)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
    ok(psacpo("merge", "--verify", "merged", cwd=tmp_path))
    refused(psacpo("merge", "merge.yaml", "--ratio", "0.5", "--out", "x", cwd=tmp_path), "is a mergekit file")


def test_verify_finds_what_is_wrong(
    psacpo: Command, models: dict[str, Path], two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    pair = ("merge", "--reward", models["helpful"], "--safety", models["safe"], "--ratio", "0.3")
    ok(psacpo(*pair, "--out", tmp_path / "full"))
    refused(
        psacpo("merge", "--verify", tmp_path / "full", "--reward", models["third"]),
        "the source reward is not what it was",
    )
    shard = min((tmp_path / "full").glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] += 0.01
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(psacpo("merge", "--verify", tmp_path / "full"), "is not what was written")
    # With a digest that fits, the numbers give it away.
    from psacpo.merge.shards import digest_shard

    manifest = json.loads((tmp_path / "full" / "psacpo.json").read_text())
    manifest["outputs"][shard.name] = digest_shard(shard)
    (tmp_path / "full" / "psacpo.json").write_text(json.dumps(manifest))
    refused(psacpo("merge", "--verify", tmp_path / "full"), f"{name} is not the merge of its sources")

    ok(
        psacpo(
            "merge", "--reward", two_adapters[0], "--safety", two_adapters[1], "--ratio", "0.3", "--out", tmp_path / "a"
        )
    )
    ok(psacpo("merge", "--verify", tmp_path / "a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if "lora_B" in key)] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "a" / "psacpo.json").read_text())
    manifest["outputs"][file.name] = digest_shard(file)
    (tmp_path / "a" / "psacpo.json").write_text(json.dumps(manifest))
    refused(psacpo("merge", "--verify", tmp_path / "a"), "is not the merge of its sources")
    refused(psacpo("merge", "--verify", models["safe"]), "is not an output of psacpo merge")


def test_rank_prints_what_is_lost(psacpo: Command, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair = ("merge", "--reward", two_adapters[0], "--safety", two_adapters[1], "--ratio", "0.5")
    done = ok(psacpo(*pair, "--rank", "2", "--out", tmp_path / "small"))
    errors = json.loads((tmp_path / "small" / "psacpo.json").read_text())["truncation"]
    assert len(errors) > 1
    assert all(f"{name}  {error:.2e}" in done.stdout for name, error in errors.items())
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    ok(psacpo("merge", "--verify", tmp_path / "small"))
    refused(psacpo(*pair, "--rank", "2", "--as", "checkpoint", "--out", tmp_path / "x"), "rank is of adapters")


def test_dry_run_writes_nothing(psacpo: Command, models: dict[str, Path], tmp_path: Path) -> None:
    pair = ("merge", "--reward", models["helpful"], "--safety", models["safe"], "--ratios", "0:1:0.5")
    plan = json.loads(ok(psacpo(*pair, "--out", tmp_path / "out", "--dry-run", "--json")).stdout)
    assert plan["tensors"] == len(weights(models["safe"]))
    assert set(plan) >= {"reads", "writes", "free disk", "peak memory", "outputs"}
    assert not list(tmp_path.iterdir())


def test_ratios_outside_need_extrapolate(psacpo: Command, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair = ("merge", "--reward", two_adapters[0], "--safety", two_adapters[1], "--ratio", "1.5")
    refused(psacpo(*pair, "--out", tmp_path / "x"), "ratio 1.5 is out of range")
    ok(psacpo(*pair, "--extrapolate", "--out", tmp_path / "x"))
    ok(psacpo("merge", "--verify", tmp_path / "x"))


def test_another_base_needs_its_flag(
    psacpo: Command, two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    pair = ("merge", "--base", other, "--reward", two_adapters[0], "--safety", two_adapters[1], "--ratio", "0.3")
    refused(psacpo(*pair, "--out", tmp_path / "x"), "adapter for another base")
    ok(psacpo(*pair, "--allow-different-base", "--as", "checkpoint", "--out", tmp_path / "x"))


def test_models_that_do_not_fit(
    psacpo: Command, models: dict[str, Path], two_adapters: tuple[Path, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    def merged(reward: Path, safety: Path, *more: Any) -> subprocess.CompletedProcess[str]:
        return psacpo("merge", "--reward", reward, "--safety", safety, "--ratio", "0.3", "--out", tmp_path / "x", *more)

    refused(merged(models["safe"], two_adapters[0]), "safety is an adapter and reward is a full model")
    refused(merged(models["safe"], tiny_qwen2), "the models do not hold the same tensors")
    refused(merged(models["safe"], models["third"], "--as", "adapter"), "cannot be merged to an adapter")
    refused(merged(models["safe"], models["third"], "--method", "tise"), "ties")
    refused(merged(models["safe"], models["third"], "--method", "model_stock", "--base", models["helpful"]), "no ratio")
    damaged = tmp_path / "damaged"
    shutil.copytree(models["safe"], damaged)
    shard = min(damaged.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    done = merged(models["helpful"], damaged)
    refused(done, f"{name}")
    assert shard.name in done.stderr
    assert "nan" in done.stderr
    shard.unlink()
    refused(merged(models["helpful"], damaged), f"lacks the shard {shard.name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1])
def test_a_killed_merge_goes_on_to_the_same_bytes(
    psacpo: Command, models: dict[str, Path], tmp_path: Path, moment: float
) -> None:
    arguments = ("merge", "--reward", models["helpful"], "--safety", models["safe"], "--ratios", "0:1:0.1")
    ok(psacpo(*arguments, "--out", tmp_path / "whole"))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "psacpo.cli", *map(str, arguments), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit and not (out.is_dir() and any(out.iterdir())):
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ok(psacpo(*arguments, "--out", out)) if process.returncode else None
    assert files(out) == files(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
