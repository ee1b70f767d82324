"""A local Ray of two workers: the records of one process, also when a worker is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'psacpo[ray]'")

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines import Failure, Passage, Policy, Request
from psacpo.evalharness.engines import ray as engine_module
from psacpo.evalharness.engines.base import Completion
from psacpo.evalharness.engines.plan import EnginePlan
from psacpo.evalharness.engines.probe import dense_reference, probe
from psacpo.evalharness.engines.ray import RayEngine, _room
from psacpo.evalharness.engines.ray_worker import Worker
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.hub import load_tokenizer
from psacpo.merge.adapters import read_adapter

MakeConfig = Callable[..., FrontierConfig]
PLAN = EnginePlan("transformers", "test", workers=True)
POLICIES = [
    Policy("policy@0.00", {"reward": 1.0, "safety": 0.0}),
    Policy("policy@0.50", {"reward": 0.5, "safety": 0.5}),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two CPUs of Ray's counting, whatever this machine has."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def asked(base: str, count: int) -> list[Request]:
    tokenizer = load_tokenizer(Path(base))
    texts = ("open", "mix the bread", "how do i bake a loaf")
    return [
        Request(f"{policy.name}/{i}", policy, tuple(tokenizer(texts[i % 3])["input_ids"]), seed=i)
        for i in range(count)
        for policy in POLICIES
    ]


def settled(processes: list[int]) -> list[int]:
    """The processes, after ten seconds at most in which they may end."""
    for _ in range(100):
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            break
        time.sleep(0.1)
    return processes


def test_a_killed_worker_loses_nothing(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both classes stand here for Ray to send them whole: from this module it would import torch in each process.
    class Noted:
        """An engine without a model, which needs no second to start: its answers tell what was asked."""

        batch_size = None

        def generate(self, requests: list[Request]) -> list[Completion]:
            time.sleep(0.2)
            return [Completion(one.key, f"{one.policy.name} {one.seed}", one.prompt_ids, "stop") for one in requests]

        def next_tokens(self, requests: list[Request]) -> list[dict[str, dict[int, float]]]:
            return [{one.key: {one.seed: -1.0} for one in requests}]

        def base_log_probs(self, passages: list[Passage]) -> list[tuple[str, float]]:
            time.sleep(0.2)
            return [(one.key, -float(len(one.token_ids))) for one in passages]

    class Light(Worker):
        def start(self, *_: Any) -> Any:
            return Noted()

    monkeypatch.setattr(engine_module, "Worker", Light)
    config = make_config(engine="ray", ray={"workers": 2, "cpus": 0.5, "batch_size": 4})
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    requests = asked(config.base, 16)
    expected = {answer.key: answer for answer in Noted().generate(requests)}
    engine = RayEngine(config, Path(config.base), adapters, POLICIES, EnginePlan("vllm", "test", workers=True))
    try:
        replicas = engine.next_tokens(requests[:2])
        assert len(replicas) == 2
        assert replicas[0] == replicas[1]
        before = engine.processes()
        assert len(set(before)) == 2
        stream = iter(engine.generate(requests))
        found = {(first := next(stream)).key: first}
        # SIGKILL, as an out-of-memory killer would; the batch that it held is given out again.
        os.kill(before[1], 9)
        found |= {answer.key: answer for answer in stream}
        assert found == expected
        # The other worker kept its process and its engine from the proof to the end; the killed one has a new process.
        after = engine.processes()
        assert after[0] == before[0]
        assert after[1] != before[1]
        passages = [Passage(str(i), (3, 4), (5,) * (1 + i)) for i in range(20)]
        assert dict(engine.base_log_probs(passages)) == {str(i): -1.0 - i for i in range(20)}
    finally:
        engine.close()
    assert ray.is_initialized()
    assert not any(Path(f"/proc/{process}").exists() for process in settled(after))
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "Running" not in told.out + told.err  # the first word of Ray Data's progress bars


@pytest.mark.slow
def test_a_killed_worker_with_transformers_loses_nothing(make_config: MakeConfig) -> None:
    """Answers of a worker that is killed and started anew are to the token those of one process."""
    config = make_config(
        engine="ray", ray={"workers": 2, "cpus": 0.5}, generation={"max_new_tokens": 24, "batch_size": 4}
    )
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    requests = asked(config.base, 16)
    local = TransformersEngine.load(config.base, adapters, generation=config.generation, dtype="float32", device="cpu")
    expected = {answer.key: answer for answer in local.generate(requests)}
    engine = RayEngine(config, Path(config.base), adapters, POLICIES, PLAN)
    try:
        victim = engine.next_tokens(requests[:2]) and engine.processes()[1]
        stream = iter(engine.generate(requests))
        found = {(first := next(stream)).key: first}
        os.kill(victim, 9)
        found |= {answer.key: answer for answer in stream}
        # A worker's threads are fewer than this process's: their sums differ in the last bits.
        assert {key: replace(one, log_prob=None) for key, one in found.items()} == expected
    finally:
        engine.close()


@pytest.mark.slow
def test_a_killed_worker_with_vllm_loses_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two workers, each with a vLLM of its own: both are proven, one is killed, and all answers come."""
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
            pytest.fail("PSACPO_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("vLLM is not installed")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = make_config()
    base = tmp_path / "base"  # heads of 32, the smallest that vLLM has CPU kernels for
    AutoTokenizer.from_pretrained(small.base).save_pretrained(base)
    sizes = LlamaConfig.from_pretrained(small.base)
    sizes.update({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    LlamaForCausalLM(sizes).save_pretrained(base)
    paths = {name: tmp_path / name for name in ("reward", "safety")}
    for name, path in paths.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3 if name == "reward" else 0.2)
        model.save_pretrained(path)
    config = make_config(
        base=str(base),
        adapters=paths,
        engine="ray",
        ray={"engine": "vllm", "workers": 2, "cpus": 0.5, "batch_size": 4},
        generation={"max_new_tokens": 16, "temperature": 0.0},
    )
    adapters = {name: read_adapter(path) for name, path in paths.items()}
    requests = asked(config.base, 16)
    local = TransformersEngine.load(base, adapters, generation=config.generation, dtype="float32", device="cpu")
    expected = {answer.key: answer.token_ids for answer in local.generate(requests)}
    plan = EnginePlan("vllm", "test", workers=True, strategy="lora", max_lora_rank=8, max_model_len=64)
    engine = RayEngine(config, base, adapters, POLICIES, plan)
    try:
        reference = dense_reference(engine, base, adapters)
        assert probe(engine, POLICIES, [requests[0].prompt_ids], reference=reference, dtype="float32") == []
        victim = engine.processes()[1]
        stream = iter(engine.generate(requests))
        found = {(first := next(stream)).key: first}
        os.kill(victim, 9)
        found |= {answer.key: answer for answer in stream}
        assert found.keys() == expected.keys()
        equal = sum(getattr(found[key], "token_ids", None) == ids for key, ids in expected.items())
        assert equal >= 0.9 * len(expected)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_worker_that_dies_each_time_gives_failures(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that kills its worker is given up, and the others get their answers; what an engine refuses is one line."""

    class Dying(Worker):
        def start(self, *_: Any) -> Any:
            return self

        def generate(self, requests: list[Request]) -> list[Completion]:
            if requests[0].key == "bad":
                os._exit(1)
            if requests[0].key == "wrong":
                raise InputError("the logits of policy@0.50 are not finite")
            return [Completion(request.key, "", (), "stop") for request in requests]

    monkeypatch.setattr(engine_module, "Worker", Dying)
    config = make_config(engine="ray", ray={"workers": 1, "cpus": 0.5, "retries": 1, "batch_size": 1})
    config = config.model_copy(update={"generation": config.generation.model_copy(update={"batch_size": 1})})
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    engine = RayEngine(config, Path(config.base), adapters, POLICIES, PLAN)
    try:
        found = {a.key: a for a in engine.generate([Request(k, POLICIES[0], (0, 5), seed=0) for k in ("bad", "good")])}
        assert found["bad"] == Failure("bad", "its worker died 2 times")
        assert found["good"] == Completion("good", "", (), "stop")
        with pytest.raises(InputError, match=r"^the logits of policy@0\.50 are not finite$"):
            list(engine.generate([Request("wrong", POLICIES[0], (0, 5), seed=0)]))
        with pytest.raises(
            InputError, match=r"^a Ray worker failed: AttributeError: .*has no attribute 'next_tokens'$"
        ):
            engine.next_tokens([Request("good", POLICIES[0], (0, 5), seed=0)])
    finally:
        engine.close()


def test_a_sweep_in_workers_has_the_records_of_one_process(make_config: MakeConfig, tmp_path: Path) -> None:
    alone = frontier(make_config(out=tmp_path / "alone"))
    spread = frontier(make_config(out=tmp_path / "spread", engine="ray", ray={"workers": 1, "cpus": 0.5}))

    def records(run: Path) -> dict[str, Any]:
        lines = (run / "completions.jsonl").read_text().splitlines()
        return {record["key"]: record for record in map(json.loads, lines)}

    assert records(spread) == records(alone)
    assert (spread / "frontier.json").read_bytes() == (alone / "frontier.json").read_bytes()
    told = json.loads((spread / "psacpo.json").read_text())["engine"]
    assert told["workers"] is True


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_one_line(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(engine="ray", ray={"workers": 1, "cpus": 0.5, "retries": 1})
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}

    class Unstarted(Worker):
        def start(self, *_: Any) -> Any:
            raise InputError("the adapter reward is damaged", allowed="a whole one")

    class Killed(Worker):
        def start(self, *_: Any) -> Any:
            os._exit(1)

    request = Request("a", POLICIES[0], (0, 5), seed=0)
    for worker, line in (
        (Unstarted, "a Ray worker cannot start: the adapter reward is damaged; allowed: a whole one"),
        (Killed, "a Ray worker cannot start: it died 2 times at that"),
    ):
        monkeypatch.setattr(engine_module, "Worker", worker)
        engine = RayEngine(config, Path(config.base), adapters, POLICIES, PLAN)
        try:
            with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
                engine.next_tokens([request])
            with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
                list(engine.generate([request]))
        finally:
            engine.close()


def test_rooms_are_counted_and_too_little_is_refused() -> None:
    assert _room({"CPU": 8.0}, 1, 0) == 8
    assert _room({"CPU": 8.0}, 0.5, 0) == 16
    assert _room({"CPU": 64.0, "GPU": 8.0}, 1, 2) == 4
    with pytest.raises(InputError, match="the cluster has 8 CPUs and 1 GPUs; given: a worker that takes 1 and 2"):
        _room({"CPU": 8.0, "GPU": 1.0}, 1, 2)
