"""The whole job on tiny models: what it writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from psacpo.errors import InputError
from psacpo.files import digest_model, write_manifest
from psacpo.merge import MergeConfig, merge, policy_name
from psacpo.merge.adapters import read_adapter
from psacpo.merge.arithmetic import dense_delta

MakeAdapter = Callable[..., Path]
IDS = torch.tensor([[0, 5, 17, 42, 9, 100, 3, 77]])
RATIO = 0.3


def run(pair: tuple[Path, Path], out: Path, ratios: list[float] | None = None, **more: Any) -> list[Path]:
    return merge(MergeConfig(reward=pair[0], safety=pair[1], ratios=ratios or [RATIO], out=out, **more))


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(IDS).logits
        return value


def exact_weights(base: Path, pair: tuple[Path, Path], ratio: float) -> dict[str, torch.Tensor]:
    """Weight name -> base + (1-q) delta_r + q delta_s in float64, for the weights that change."""
    weights = {name: w for file in sorted(base.glob("*.safetensors")) for name, w in load_file(file).items()}
    found: dict[str, torch.Tensor] = {}
    for path, factor in zip(pair, (1 - ratio, ratio), strict=True):
        adapter = read_adapter(path)
        for module, factors in adapter.modules.items():
            name = f"{module}.weight"
            delta = dense_delta(factors.transposed() if module in adapter.embeddings else factors)
            found[name] = found.get(name, weights[name].double()) + factor * delta
    return found


def dense(base: Path, pair: tuple[Path, Path], ratio: float) -> Any:
    model = load(base)
    model.load_state_dict({name: w.float() for name, w in exact_weights(base, pair, ratio).items()}, strict=False)
    return model


def contents(directory: Path) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.fixture(scope="session")
def qwen2_pair(tiny_qwen2: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    return make_adapter(tiny_qwen2, seed=51, r=3), make_adapter(tiny_qwen2, seed=52, r=5, use_rslora=True)


@pytest.fixture(params=["llama", "qwen2"])
def family(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tiny_qwen2: Path,
    two_adapters: tuple[Path, Path],
    qwen2_pair: tuple[Path, Path],
) -> tuple[Path, tuple[Path, Path]]:
    """A base and two adapters on it: Llama, and Qwen2 with biases and tied embeddings."""
    return (tiny_llama, two_adapters) if request.param == "llama" else (tiny_qwen2, qwen2_pair)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_adapter_and_checkpoint_are_the_dense_merge(
    family: tuple[Path, tuple[Path, Path]], ratio: float, tmp_path: Path
) -> None:
    base, pair = family
    [adapter] = run(pair, tmp_path / "adapter", [ratio])
    [full] = run(pair, tmp_path / "full", [ratio], as_="checkpoint")
    expected = logits(dense(base, pair, ratio))
    assert (expected - logits(load(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), adapter)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load(full)), expected, rtol=1e-5, atol=1e-5)
    # transformers opens an adapter directory by itself.
    torch.testing.assert_close(logits(load(adapter)), expected, rtol=1e-5, atol=1e-5)
    if ratio in (0.0, 1.0):
        single = PeftModel.from_pretrained(load(base), pair[int(ratio)])
        torch.testing.assert_close(logits(single), expected, rtol=1e-5, atol=1e-5)


def test_one_ratio_is_the_directory_and_several_are_in_it(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(two_adapters, tmp_path / "one") == [tmp_path / "one"]
    many = run(two_adapters, tmp_path / "many", [0.5, 0.125, 1.0])
    assert [path.name for path in many] == ["policy@0.50", "policy@0.125", "policy@1.00"]
    assert all(path.parent == tmp_path / "many" and (path / "adapter_config.json").is_file() for path in many)
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == sorted(path.name for path in many)
    [alone] = run(two_adapters, tmp_path / "alone", [0.125])
    assert contents(alone) == contents(many[1])


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_two_runs_give_the_same_bytes(kind: str, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    [one] = run(two_adapters, tmp_path / "a" / "one", as_=kind)
    [two] = run(two_adapters, tmp_path / "two", as_=kind)
    assert contents(one) == contents(two)


def test_adapters_on_a_tied_head_merge_as_adapters(tiny_qwen2: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    pair = (
        make_adapter(tiny_qwen2, seed=55, target_modules=["lm_head"]),
        make_adapter(tiny_qwen2, seed=56, target_modules=["lm_head"]),
    )
    [out] = run(pair, tmp_path / "out")
    peft = PeftModel.from_pretrained(load(tiny_qwen2), pair[0], adapter_name="one")
    peft.load_adapter(pair[1], adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], [1 - RATIO, RATIO], "cat", combination_type="cat")
    peft.set_adapter("cat")
    merged = logits(PeftModel.from_pretrained(load(tiny_qwen2), out))
    torch.testing.assert_close(merged, logits(peft), rtol=1e-5, atol=1e-5)


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """A bfloat16 Llama in several shards, with all that lies beside weights."""
    path = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    (path / "LICENSE").write_text("the base's licence\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("the base's card")
    (path / "psacpo.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "training_args.bin").write_bytes(b"pickle")
    (path / ".cache").mkdir()
    (path / ".cache" / "junk").write_text("junk")
    return path


def test_checkpoint_keeps_layout_and_side_files_and_rounds_once(
    sharded: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    pair = (
        make_adapter(sharded, seed=61, r=4, target_modules=["q_proj", "embed_tokens", "down_proj"]),
        make_adapter(sharded, seed=62, r=6, target_modules=["v_proj", "q_proj", "lm_head"]),
    )
    [out] = run(pair, tmp_path / "out", as_="checkpoint")
    left_behind = {"README.md", "psacpo.json", "pytorch_model.bin", "training_args.bin", ".cache/junk"}
    before, after = contents(sharded), contents(out)
    assert set(after) == (set(before) - left_behind) | {"README.md", "psacpo.json"}
    shards = sorted(name for name in before if name.endswith(".safetensors"))
    assert len(shards) > 3
    for name in set(before) - left_behind - set(shards):
        assert after[name] == before[name], name
    exact = exact_weights(sharded, pair, RATIO)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(exact)
    wrong = total = 0
    for shard in shards:
        begin = 8 + int.from_bytes(before[shard][:8], "little")
        assert after[shard][:begin] == before[shard][:begin]
        old, new = load_file(sharded / shard), load_file(out / shard)
        for name, weight in new.items():
            assert weight.dtype == torch.bfloat16
            if name not in exact:
                assert torch.equal(weight, old[name])
                continue
            total += weight.numel()
            wrong += int((weight != exact[name].to(torch.bfloat16)).sum())
            assert not torch.equal(weight, old[name])
    # Float32 sums fall on the other side of a rounding boundary now and then; a second rounding would do so in 5 %.
    assert wrong <= total * 1e-3
    assert (out / "README.md").read_text() != "the base's card"
    assert (
        AutoTokenizer.from_pretrained(out)("help").input_ids == AutoTokenizer.from_pretrained(sharded)("help").input_ids
    )


def test_conv1d_weights_are_the_other_way_round(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    base = tmp_path / "gpt2"
    pair = tuple(
        make_adapter(base, seed=i, r=i - 68, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True) for i in (70, 71)
    )
    peft = PeftModel.from_pretrained(load(base), pair[0], adapter_name="one")
    peft.load_adapter(pair[1], adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], [0.7, 0.3], "cat", combination_type="cat")
    peft.set_adapter("cat")
    expected = logits(peft)
    [full] = run((pair[0], pair[1]), tmp_path / "full", as_="checkpoint")
    [adapter] = run((pair[0], pair[1]), tmp_path / "adapter")
    torch.testing.assert_close(logits(load(full)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), adapter)), expected, rtol=1e-5, atol=1e-5)


def test_card_and_manifest(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    reward, safety = tmp_path / "reward", tmp_path / "safety"
    shutil.copytree(two_adapters[0], reward)
    shutil.copytree(two_adapters[1], safety)
    base_digest = digest_model(tiny_llama)
    common: dict[str, Any] = {"kind": "adapter", "config": {}, "seeds": {}, "base_digest": base_digest}
    write_manifest(reward, inputs={}, beta=0.1, start="base", **common, **{"lambda": None})
    start = digest_model(reward)
    write_manifest(safety, inputs={"start": start}, beta=0.01, start="reward", **common, **{"lambda": 10.0})
    [out] = run((reward, safety), tmp_path / "out", [0.25])
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == str(tiny_llama)
    assert head["library_name"] == "peft"
    assert {"psacpo", "merge"} <= set(head["tags"])
    assert head["ratio"] == 0.25
    # lambda = q * 10 and beta_2 = 0.1 / 10 / q (SACPO Theorem 1)
    assert "lambda = 2.5, that is a KL weight of the safety stage of 0.04." in card
    assert str(tmp_path) not in card.replace(str(tiny_llama), "")
    for digest in (digest_model(reward), digest_model(safety), base_digest):
        assert digest in card
    assert "--max-lora-rank 16" in card  # rank 4 + 6
    manifest = json.loads((out / "psacpo.json").read_text())
    assert manifest["kind"] == "policy"
    assert manifest["ratio"] == 0.25
    assert manifest["policy"] == "policy@0.25"
    assert manifest["base_digest"] == base_digest
    assert manifest["inputs"] == {"base": base_digest, "reward": start, "safety": digest_model(safety)}
    assert (manifest["lambda"], manifest["safety_beta"]) == (2.5, 0.04)
    assert manifest["config"]["as"] == "adapter"
    # A safety adapter that did not start at this reward adapter is no stage 2.
    write_manifest(safety, inputs={"start": "0" * 64}, beta=0.01, start="x", **common, **{"lambda": 10.0})
    [out] = run((reward, safety), tmp_path / "other", [0.25])
    assert "lambda" not in (out / "README.md").read_text()
    [out] = run((reward, safety), tmp_path / "full", [0.25], as_="checkpoint")
    assert yaml.safe_load((out / "README.md").read_text().split("---\n")[1])["library_name"] == "transformers"


def test_overwrite_and_in_use(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is in use"):
        run(two_adapters, out)
    with pytest.raises(InputError, match="not by psacpo"):
        run(two_adapters, out, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    (out / "psacpo.json").write_text("{}")
    run(two_adapters, out, overwrite=True)
    assert not (out / "notes.txt").exists()
    # The second of two outputs is in use: the first is not begun.
    (tmp_path / "many" / "policy@0.50").mkdir(parents=True)
    (tmp_path / "many" / "policy@0.50" / "x").write_text("")
    with pytest.raises(InputError, match=r"policy@0\.50 is in use"):
        run(two_adapters, tmp_path / "many", [0.25, 0.5])
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["policy@0.50"]
    (tmp_path / "notes").write_text("")
    with pytest.raises(InputError, match="notes is a file, not a directory"):
        run(two_adapters, tmp_path / "notes" / "out")


def test_inputs_are_never_replaced(two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    pair = (project / "reward", project / "safety")
    for source, target in zip(two_adapters, pair, strict=True):
        shutil.copytree(source, target)
    before = contents(project)
    for out in (pair[1], project, pair[0] / "merged", tiny_llama / "merged"):
        with pytest.raises(InputError, match="lies in the input|holds the input|not by psacpo"):
            run(pair, out, overwrite=True)
    assert contents(project) == before


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_no_space_is_told_before_anything_is_written(
    kind: str, two_adapters: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(ratios: list[float]) -> float:
        with pytest.raises(InputError, match=r"^no space for .*: [\d.]+ GB needed, 0\.00 GB free$"):
            run(two_adapters, tmp_path / "out", ratios, as_=kind)
        assert not list(tmp_path.iterdir())
        return float(asked[-1])

    asked: list[int] = []
    import psacpo.merge.run as job

    real = job.require_free_space
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10, 10, 0))
    monkeypatch.setattr(job, "require_free_space", lambda path, size: (asked.append(size), real(path, size)))
    one, two = needed([0.5]), needed([0.25, 0.5])
    assert two == 2 * one
    monkeypatch.undo()
    [out] = run(two_adapters, tmp_path / "out", as_=kind)
    size = sum(len(data) for data in contents(out).values())
    assert size <= one <= size + 600_000


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_in_the_middle_leaves_nothing(
    kind: str, existed: bool, two_adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    parent = tmp_path / "parent"
    if existed:
        parent.mkdir()
    # The card comes last: weights and configuration are written by then.
    with monkeypatch.context() as patched:
        patched.setattr("psacpo.merge.run.render_card", full)
        for ratios in ([0.5], [0.25, 0.5]):
            with pytest.raises(InputError, match=r"^cannot write .*: no space left on the device$"):
                run(two_adapters, parent / "out", ratios, as_=kind)
    assert parent.exists() == existed
    assert not list(tmp_path.rglob("*")) or list(tmp_path.rglob("*")) == [parent]
    run(two_adapters, parent / "out", as_=kind)


def test_a_failure_at_the_second_output_keeps_the_first_whole(
    two_adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psacpo.merge.run as job

    real, calls = job.render_card, []

    def second_fails(**named: Any) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(**named)

    monkeypatch.setattr(job, "render_card", second_fails)
    with pytest.raises(KeyboardInterrupt):
        run(two_adapters, tmp_path / "out", [0.25, 0.5])
    found = [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert found == ["policy@0.25"]
    read_adapter(tmp_path / "out" / "policy@0.25")
    # The same merge goes on behind what is finished, and leaves nothing but the outputs.
    run(two_adapters, tmp_path / "out", [0.25, 0.5])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["policy@0.25", "policy@0.50"]


def test_checkpoints_that_cannot_be(
    two_adapters: tuple[Path, Path],
    tiny_llama: Path,
    tiny_qwen2: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    def refused(base: Path, pair: tuple[Path, Path], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            run(pair, tmp_path / "out", base=str(base), as_="checkpoint")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    head = make_adapter(tiny_qwen2, seed=81, target_modules=["lm_head"])
    refused(
        tiny_qwen2, (head, head), "change lm_head, which base .* ties to its other embedding; allowed: --as adapter"
    )
    embedding = make_adapter(tiny_qwen2, seed=82, target_modules=["embed_tokens"])
    refused(tiny_qwen2, (embedding, embedding), "change model.embed_tokens, which base .* ties")

    def edited(name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        base = tmp_path / name
        shutil.copytree(tiny_llama, base)
        tensors = load_file(base / "model.safetensors")
        edit(tensors)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        for adapter in pair:
            file = adapter / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
        return base

    pair = (tmp_path / "reward", tmp_path / "safety")
    for source, target in zip(two_adapters, pair, strict=True):
        shutil.copytree(source, target)
    key = "model.layers.1.mlp.up_proj.weight"
    refused(edited("a", lambda t: t.pop(key)), pair, f"change model.layers.1.mlp.up_proj, but base .* no weight {key}")
    refused(
        edited("b", lambda t: t.__setitem__(key, torch.zeros(8, 32))),
        pair,
        r"shape mismatch at model.layers.1.mlp.up_proj: .* shape \[64, 32\], the base has \[8, 32\]",
    )
    refused(
        edited("c", lambda t: t.__setitem__(key, torch.zeros(64, 32, dtype=torch.int8))),
        pair,
        "no float weights at model.layers.1.mlp.up_proj; given: I8; allowed: F64, F32, F16, BF16",
    )
    refused(
        edited("d", lambda t: t.__setitem__(key, torch.full((64, 32), 65504.0).half() * torch.inf)),
        pair,
        rf"d/model.safetensors: {key} holds inf at index \[0, 0\]",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "reward", "safety"]


def test_import_stays_light() -> None:
    code = (
        "import sys, psacpo.merge as m; m.MergeConfig; m.policy_name(0.3); assert 'torch' not in sys.modules;"
        "m.read_adapter; assert set(dir(m)) >= {'merge'}; assert all(hasattr(m, n) for n in m.__all__);"
        "assert not any(n.startswith(('psacpo.align', 'psacpo.evalharness')) for n in sys.modules);"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_policy_names() -> None:
    assert [policy_name(q) for q in (0, 0.3, 0.125, 1)] == ["policy@0.00", "policy@0.30", "policy@0.125", "policy@1.00"]
