"""The gate in front of an application that records what reaches it: keys, names, limits, lists. No vLLM here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from psacpo.merge import read_adapter
from psacpo.serve.gate import Gate
from psacpo.serve.plan import VARIABLE, Plan
from psacpo.serve.policies import cache_key, policy_bytes


class Behind:
    """The application behind the gate: answers each request with what it saw, like vLLM lists its models."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.hold: asyncio.Event | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        if scope["method"] == "POST":
            message = await receive()
            body = message["body"]
            headers = dict(scope["headers"])
            assert int(headers[b"content-length"]) == len(body)
            assert Gate.running is not None
            model = None
            with contextlib.suppress(ValueError, TypeError):
                model = json.loads(body)["model"]
            self.seen.append({"body": body, "model": model, "adapter": Gate.running.path(str(model))})
            if self.hold is not None:
                await self.hold.wait()
        answer: Any = {"ok": True}
        if scope["path"] == "/v1/models":
            cards = [{"id": name, "created": 5, "max_model_len": 64} for name in ("base", "policy@0.11")]
            answer = {"object": "list", "data": cards}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


Ask = Callable[..., Any]


@pytest.fixture
def plan(two_adapters: tuple[Path, Path], tmp_path: Path) -> Plan:
    reward, safety = map(read_adapter, two_adapters)
    return Plan(
        base=reward.base,
        reward=reward.path,
        safety=safety.path,
        reward_content=reward.content,
        safety_content=safety.content,
        key=cache_key(reward, safety),
        names=["base"],
        capacity=2,
        policy_bytes=policy_bytes([reward, safety]),
        cache_dir=tmp_path / "cache",
        cache_size=10**8,
        probe="secret",
    )


async def ask(
    gate: Gate,
    path: str = "/v1/completions",
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    state: Any = None,
) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[Any] = []
    parts = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]

    async def receive() -> Any:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(b"content-length", str(len(raw)).encode())]
    given += [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "app": SimpleNamespace(state=state)}
    await gate(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def completion(model: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "é", "max_tokens": 1}


def test_a_ratio_is_built_held_and_passed_on_under_its_one_name(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "")
    for spelt in ("policy@0.37", "policy@.370"):
        assert asyncio.run(ask(gate, body=completion(spelt)))[0] == 200
    assert [seen["model"] for seen in behind.seen] == ["policy@0.37"] * 2
    for seen in behind.seen:
        assert seen["adapter"] == plan.cache_dir / plan.key / "policy@0.37"
        assert json.loads(seen["body"]) == completion("policy@0.37")
    # vLLM asks for no policy that the gate has not let in.
    assert gate.path("policy@0.37") is None
    assert gate.path("policy@0.99") is None


def test_the_built_adapter_is_the_exact_policy(plan: Plan, tiny_llama: Path) -> None:
    import torch

    behind = Behind()
    asyncio.run(ask(Gate(behind, plan, ""), body=completion("policy@0.37")))
    ids = torch.arange(3, 40)[None]

    def logits(path: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
        return PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).double()(ids).logits

    def weight(path: Path, name: str) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
        merged = PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).double().merge_and_unload()
        return merged.state_dict()[name]

    name = "model.layers.1.mlp.down_proj.weight"
    bare = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).state_dict()[name]
    wanted = 0.63 * (weight(plan.reward, name) - bare) + 0.37 * (weight(plan.safety, name) - bare)
    built = weight(behind.seen[0]["adapter"], name) - bare
    torch.testing.assert_close(built, wanted, atol=1e-6, rtol=1e-5)
    assert (logits(behind.seen[0]["adapter"]) - logits(plan.reward)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "status", "line"),
    [
        ("policy@1.5", 400, "out of range; allowed: policy@RATIO with a ratio from 0 to 1"),
        ("policy@nan", 400, "holds no ratio; allowed: policy@RATIO"),
        ("policy@", 400, "holds no ratio"),
        ("nope", 404, "does not exist here; allowed: base, or policy@RATIO"),
    ],
)
def test_errors_are_the_apis_and_never_reach_vllm(plan: Plan, model: str, status: int, line: str) -> None:
    behind = Behind()
    found, answer = asyncio.run(ask(Gate(behind, plan, ""), body=completion(model)))
    assert found == status
    assert set(answer) == {"error"}
    assert line in answer["error"]["message"]
    assert answer["error"]["code"] == status
    assert answer["error"]["param"] == "model"
    assert behind.seen == []


def test_what_is_not_ours_to_judge_passes_unchanged(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "")
    bodies = [
        b"{broken",
        b"[1]",
        json.dumps(completion("base")).encode(),
        json.dumps(completion(7)).encode(),
        b'{"model": null}',
    ]
    for body in bodies:
        assert asyncio.run(ask(gate, body=body))[0] == 200
    assert [seen["body"] for seen in behind.seen] == bodies


def test_pins_let_nothing_else_through(plan: Plan) -> None:
    behind = Behind()
    pinned = plan.model_copy(update={"ratios": [0.3]})
    gate = Gate(behind, pinned, "")
    assert asyncio.run(ask(gate, body=completion("policy@0.3")))[0] == 200
    assert asyncio.run(ask(gate, body={"prompt": "x"}))[0] == 200
    assert [seen["model"] for seen in behind.seen] == ["policy@0.30"] * 2
    assert behind.seen[0]["adapter"] == plan.cache_dir / plan.key / "policy@0.30"
    for model, status in (("policy@0.31", 404), ("policy@0", 404), ("base", 404), (7, 400)):
        assert asyncio.run(ask(gate, body=completion(model)))[0] == status
    assert asyncio.run(ask(gate, body=b"{broken"))[0] == 400
    assert len(behind.seen) == 2
    # The launcher's own question, whether the policy differs from the base, may be asked of the base.
    assert asyncio.run(ask(gate, body=completion("base"), headers={"x-psacpo-probe": "wrong"}))[0] == 404
    assert asyncio.run(ask(gate, body=completion("base"), headers={"x-psacpo-probe": "secret"}))[0] == 200
    assert [card["id"] for card in asyncio.run(ask(gate, "/v1/models", method="GET"))[1]["data"]] == ["policy@0.30"]


def test_the_key_guards_every_path_but_health(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "s3cret")
    for path, method in (
        ("/v1/completions", "POST"),
        ("/invocations", "POST"),
        ("/tokenize", "POST"),
        ("/v1/models", "GET"),
        ("/metrics", "GET"),
        ("/v1/load_lora_adapter", "POST"),
    ):
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"x": "Bearer s3cret"}):
            status, answer = asyncio.run(ask(gate, path, completion("policy@0.3"), method=method, headers=headers))
            assert status == 401
            assert "s3cret" not in json.dumps(answer)
    assert behind.seen == []
    assert sorted(gate.policies.cached()) == ["policy@0.00", "policy@1.00"]
    assert asyncio.run(ask(gate, "/health", method="GET"))[0] == 200
    key = {"Authorization": "bearer s3cret"}
    assert asyncio.run(ask(gate, body=completion("policy@0.3"), headers=key))[0] == 200
    assert len(behind.seen) == 1


def test_clients_cannot_manage_adapters(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "")
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/x"):
        status, answer = asyncio.run(ask(gate, path, {"lora_name": "x", "lora_path": "/etc"}))
        assert status == 404
        assert "adapters are managed by psacpo serve" in answer["error"]["message"]
    assert behind.seen == []


def test_the_list_holds_base_ends_and_cache_and_not_what_vllm_remembers(plan: Plan) -> None:
    gate = Gate(Behind(), plan, "")
    for ratio in ("0.9", "0.25", "0.333"):
        asyncio.run(ask(gate, body=completion(f"policy@{ratio}")))

    def listed(gate: Gate) -> list[str]:
        status, answer = asyncio.run(ask(gate, "/v1/models", method="GET"))
        assert status == 200
        assert answer["object"] == "list"
        assert all(card["parent"] == "base" for card in answer["data"] if card["id"] != "base")
        return [card["id"] for card in answer["data"]]

    assert listed(gate) == ["base", "policy@0.00", "policy@0.25", "policy@0.333", "policy@0.90", "policy@1.00"]
    # Another server on the same directory lists what it would answer under that name.
    snapped = Gate(Behind(), plan.model_copy(update={"steps": 20}), "")
    assert listed(snapped) == ["base", "policy@0.00", "policy@0.25", "policy@0.90", "policy@1.00"]


def test_vllm_forgets_what_is_given_up(plan: Plan) -> None:
    removed: list[int] = []

    async def remove_lora(number: int) -> None:
        removed.append(number)

    models = SimpleNamespace(
        lora_requests={}, lora_resolver_lock={}, engine_client=SimpleNamespace(remove_lora=remove_lora)
    )
    state = SimpleNamespace(openai_serving_models=models)
    gate = Gate(Behind(), plan, "")

    async def scene() -> None:
        for number, name in enumerate(("policy@0.10", "policy@0.20", "policy@0.30", "policy@0.40")):
            assert (await ask(gate, body=completion(name), state=state))[0] == 200
            models.lora_requests[name] = SimpleNamespace(lora_int_id=number)
            models.lora_resolver_lock[name] = object()

    asyncio.run(scene())
    assert removed == [0, 1]
    assert list(models.lora_requests) == list(models.lora_resolver_lock) == ["policy@0.30", "policy@0.40"]


def test_more_ratios_at_once_than_are_held(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "")
    gate.pool._patience = 0.1

    async def scene() -> None:
        behind.hold = asyncio.Event()
        busy = [asyncio.create_task(ask(gate, body=completion(f"policy@0.{n}"))) for n in (1, 2)]
        await asyncio.sleep(0.5)
        status, answer = await ask(gate, body=completion("policy@0.3"))
        assert status == 429
        assert "--max-ratios or with --snap" in answer["error"]["message"]
        # The ends and the base are always at hand.
        behind.hold.set()
        assert [status for status, _ in await asyncio.gather(*busy)] == [200, 200]
        for model in ("policy@0", "policy@1.0", "base", "policy@0.3"):
            assert (await ask(gate, body=completion(model)))[0] == 200

    asyncio.run(scene())


def test_adapters_that_change_under_the_server_are_noticed(plan: Plan) -> None:
    Gate(Behind(), plan, "")  # builds the ends
    gate = Gate(Behind(), plan.model_copy(update={"safety_content": "0" * 64}), "")
    status, answer = asyncio.run(ask(gate, body=completion("policy@0.5")))
    assert status == 503
    assert "has changed since the server started" in answer["error"]["message"]
    assert asyncio.run(ask(gate, body=completion("policy@1")))[0] == 200


def test_a_cache_directory_that_is_cleared_out_is_filled_again(plan: Plan) -> None:
    behind = Behind()
    gate = Gate(behind, plan, "")
    names = ["policy@0.37", "policy@0.00"]

    async def twice() -> None:
        for name in names:
            assert (await ask(gate, body=completion(name)))[0] == 200
        shutil.rmtree(plan.cache_dir)
        for name in [*names, "policy@0.38"]:
            assert (await ask(gate, body=completion(name)))[0] == 200

    asyncio.run(twice())
    for name in [*names, "policy@0.38"]:
        assert (plan.cache_dir / plan.key / name / "adapter_model.safetensors").is_file()


def test_a_cache_that_cannot_be_had_is_a_503_and_not_the_end(plan: Plan) -> None:
    gate = Gate(Behind(), plan, "")
    shutil.rmtree(plan.cache_dir)
    plan.cache_dir.write_text("in the way")
    for name in ("policy@0.37", "policy@1"):
        status, answer = asyncio.run(ask(gate, body=completion(name)))
        assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
        assert "cannot be had now" in answer["error"]["message"]


def test_a_body_without_end_is_refused_before_it_fills_memory(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psacpo.serve.gate._LARGEST_BODY", 1 << 20)
    behind = Behind()
    status, answer = asyncio.run(ask(Gate(behind, plan, ""), body=completion("base") | {"prompt": "x" * (1 << 20)}))
    assert (status, behind.seen) == (413, [])
    assert "larger than 1 MiB" in answer["error"]["message"]


def test_the_plan_travels_by_the_environment(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, plan.model_dump_json())
    assert Plan.find() == plan
    monkeypatch.delenv(VARIABLE)
    assert Plan.find() is None


def test_the_plugin_does_nothing_in_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from psacpo.serve.plugin import register

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "vllm.lora.resolver", None)  # an import would fail
    register()
