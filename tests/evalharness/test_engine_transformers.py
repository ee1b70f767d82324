"""The embedded engine against dense merged models, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation
from psacpo.evalharness.engines import Policy, Request
from psacpo.evalharness.engines.mixture import AdapterMixture
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.merge.adapters import read_adapter
from psacpo.merge.arithmetic import Factors

RATIOS = (0.0, 0.3, 1.0)
PROMPTS = ("how do i bake a loaf", "open", "break the lock of that bike then help")


def load(base: Path, adapters: dict[str, Path], **generation: Any) -> TransformersEngine:
    settings = Generation.model_validate({"max_new_tokens": 16, "temperature": 0.0} | generation)
    found = {name: read_adapter(path) for name, path in adapters.items()}
    return TransformersEngine.load(base, found, generation=settings, dtype="float32", device="cpu")


def dense(base: Path, engine_adapters: dict[str, Path], weights: dict[str, float]) -> Any:
    """W_base + sum of weighted deltas, multiplied out in float64: the oracle."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        for module, factors in read_adapter(engine_adapters[name]).modules.items():
            target = parameters[f"{module}.weight"]
            delta = factors.B.double() @ factors.A.double() * factors.scale * weight
            target.data.copy_((target.data.double() + delta).float())
    return model.eval()


@pytest.fixture
def adapters(two_adapters: tuple[Path, Path]) -> dict[str, Path]:
    return {"reward": two_adapters[0], "safety": two_adapters[1]}


def policies() -> list[Policy]:
    mixed = [Policy(f"policy@{q:.2f}", {"reward": 1 - q, "safety": q}, q) for q in RATIOS]
    return [*mixed, Policy("base", {})]


def requests(engine: TransformersEngine, policies: list[Policy]) -> list[Request]:
    return [
        Request(f"{policy.name}/{i}", policy, tuple(engine.tokenizer(text)["input_ids"]), seed=i)
        for i, text in enumerate(PROMPTS)
        for policy in policies
    ]


def test_one_mixed_batch_equals_dense_merges(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    engine = load(tiny_llama, adapters)
    answers = {answer.key: answer for answer in engine.generate(requests(engine, policies()))}
    differing = set()
    for policy in policies():
        model = dense(tiny_llama, adapters, dict(policy.weights))
        for i, text in enumerate(PROMPTS):
            ids = engine.tokenizer(text, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=2)[
                0, ids["input_ids"].shape[1] :
            ]
            expected = [token for token in out.tolist() if token not in (1, 2)]
            assert list(answers[f"{policy.name}/{i}"].token_ids) == expected, (policy.name, text)
            differing.add((policy.name, tuple(expected)))
    # Random adapters this large change the answer, so agreement with the merges is no accident of equal models.
    assert len({tokens for _, tokens in differing}) > len(PROMPTS)


def test_logits_of_a_mixed_batch_equal_each_dense_merge(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    engine = load(tiny_llama, adapters)
    ids = engine.tokenizer([PROMPTS[0]] * 4, return_tensors="pt")["input_ids"]
    weights = torch.tensor([[1 - q, q] for q in RATIOS] + [[0.0, 0.0]])
    engine.mixture.set_rows(weights)
    with torch.inference_mode():
        mixed = engine.model(input_ids=ids).logits
    for row, (reward, safety) in enumerate(weights.tolist()):
        expected = dense(tiny_llama, adapters, {"reward": reward, "safety": safety})(input_ids=ids[:1]).logits[0]
        torch.testing.assert_close(mixed[row], expected, atol=2e-5, rtol=1e-4)


def test_sampled_answers_do_not_depend_on_their_company(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    engine = load(tiny_llama, adapters, temperature=1.0, top_p=0.95, top_k=50)
    together = requests(engine, policies())
    batch = {answer.key: answer.token_ids for answer in engine.generate(together)}
    alone = {request.key: next(iter(engine.generate([request]))).token_ids for request in together}
    assert batch == alone
    again = {answer.key: answer.token_ids for answer in engine.generate(together)}
    assert again == batch


def test_the_seed_decides_the_sample(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    engine = load(tiny_llama, adapters, temperature=1.0)
    ids = tuple(engine.tokenizer(PROMPTS[0])["input_ids"])
    answers = engine.generate([Request(str(seed), Policy("base"), ids, seed) for seed in range(6)])
    assert len({answer.token_ids for answer in answers}) == 6


def test_finish_reasons_and_stop_strings(tiny_llama: Path) -> None:
    engine = load(tiny_llama, {}, temperature=1.0, max_new_tokens=200)
    ids = tuple(engine.tokenizer(PROMPTS[0])["input_ids"])
    [free] = engine.generate([Request("x", Policy("base"), ids, 3)])
    word = free.text[4:7]
    stopped = load(tiny_llama, {}, temperature=1.0, max_new_tokens=200, stop=[word])
    [cut] = stopped.generate([Request("x", Policy("base"), ids, 3)])
    assert cut.text == free.text[: free.text.index(word)]
    assert cut.finish_reason == "stop"
    short = load(tiny_llama, {}, temperature=1.0, max_new_tokens=3)
    [limited] = short.generate([Request("x", Policy("base"), ids, 3)])
    assert limited.finish_reason == "length"
    assert len(limited.token_ids) == 3


def test_qwen2_with_biases(tiny_qwen2: Path, make_adapter: Any) -> None:
    adapters = {"reward": make_adapter(tiny_qwen2, seed=3), "safety": make_adapter(tiny_qwen2, seed=4)}
    engine = load(tiny_qwen2, adapters)
    ids = engine.tokenizer([PROMPTS[0]], return_tensors="pt")["input_ids"]
    engine.mixture.set_rows(torch.tensor([[0.3, 0.7]]))
    with torch.inference_mode():
        mixed = engine.model(input_ids=ids).logits
    expected = dense(tiny_qwen2, adapters, {"reward": 0.3, "safety": 0.7})(input_ids=ids).logits
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-4)


def test_memory_that_runs_out_is_one_line(
    tiny_llama: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_llama, adapters, batch_size=2)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engine, "_last_logits", full)
    with pytest.raises(InputError, match=r"^out of memory for a batch of 2 answers; allowed: a smaller .*batch_size"):
        list(engine.generate(requests(engine, policies())))
    monkeypatch.setattr(AdapterMixture, "_attach", full)
    with pytest.raises(InputError, match=r"^out of memory for base .* in float32 on cpu; allowed: a smaller dtype"):
        load(tiny_llama, adapters)

    def wrong(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(AdapterMixture, "_attach", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        load(tiny_llama, adapters)


def test_an_adapter_of_another_shape_is_refused(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    found = read_adapter(adapters["reward"])
    name, factors = next(iter(found.modules.items()))
    narrow = replace(found, modules={name: Factors(factors.A[:, 1:], factors.B, factors.scale)})
    with pytest.raises(InputError, match="another base"):
        AdapterMixture(AutoModelForCausalLM.from_pretrained(tiny_llama), {"reward": narrow})
    astray = replace(found, modules={"model.layers.9.mlp.up_proj": factors})
    with pytest.raises(InputError, match=r"model\.layers\.9\.mlp\.up_proj.*no such layer"):
        AdapterMixture(AutoModelForCausalLM.from_pretrained(tiny_llama), {"reward": astray})
