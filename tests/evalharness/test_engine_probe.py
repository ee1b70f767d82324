"""The proof that adapters act, on engines that were broken on purpose; and the dense merge that it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig, Generation
from psacpo.evalharness.engines import NextTokens, Policy, Request
from psacpo.evalharness.engines.answers import answer_text, strip_end
from psacpo.evalharness.engines.dense import dense_logprobs
from psacpo.evalharness.engines.probe import dense_reference, probe
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.hub import load_tokenizer
from psacpo.merge.adapters import Adapter, read_adapter

MakeConfig = Callable[..., FrontierConfig]
PROMPTS = [(0, 7, 9), (0, 30), (0, 5, 6, 7, 8), (0, 11, 12, 13, 14, 15)]
POLICIES = [*(Policy(f"policy@{q:.2f}", {"reward": 1 - q, "safety": q}, q) for q in (0.0, 0.4, 1.0)), Policy("base")]


@pytest.fixture
def adapters(two_adapters: tuple[Path, Path]) -> dict[str, Adapter]:
    return {"reward": read_adapter(two_adapters[0]), "safety": read_adapter(two_adapters[1])}


@pytest.fixture
def engine(tiny_llama: Path, adapters: dict[str, Adapter]) -> TransformersEngine:
    settings = Generation(max_new_tokens=8, temperature=0.0, logprobs=True)
    return TransformersEngine.load(tiny_llama, adapters, generation=settings, dtype="float32", device="cpu")


def prove(engine: Any, base: Path, adapters: Mapping[str, Adapter], policies: Sequence[Policy] = POLICIES) -> list[str]:
    reference = dense_reference(engine, base, adapters)
    return probe(engine, policies, PROMPTS, reference=reference, dtype="float32")


def test_the_dense_way_equals_weights_multiplied_out(tiny_llama: Path, adapters: dict[str, Adapter]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {"reward": 0.25, "safety": 0.75}
    found = dense_logprobs(model, adapters, weights, PROMPTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        for module, factors in adapters[name].modules.items():
            parameters[f"{module}.weight"].data += weight * factors.scale * factors.B @ factors.A
    for ids, row in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_an_embedding_and_a_head_are_multiplied_out_too(tiny_llama: Path, make_adapter: Any) -> None:
    path = make_adapter(tiny_llama, seed=8, target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapter = read_adapter(path)
    assert adapter.embeddings
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    [row] = dense_logprobs(model, {"a": adapter}, {"a": 1.0}, PROMPTS[:1])
    peft: Any = PeftModel.from_pretrained(model, path)
    with torch.inference_mode():
        expected = peft(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(dim=-1)
    torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_an_engine_that_is_right_passes(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter]
) -> None:
    assert prove(engine, tiny_llama, adapters) == []


def test_an_adapter_that_does_nothing_is_named(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.mixture, "set_rows", lambda weights: None)
    with pytest.raises(InputError, match=r"^policy@0\.00 says what the base says after each probe prompt"):
        prove(engine, tiny_llama, adapters)


def test_a_ratio_that_is_another_is_named(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the mixed ratio is wrong: 0.39 in the place of 0.40."""
    right = engine.mixture.set_rows

    def set_rows(weights: torch.Tensor | None) -> None:
        if weights is not None:
            weights = torch.where(weights == 0.4, 0.39, weights)
        right(weights)

    monkeypatch.setattr(engine.mixture, "set_rows", set_rows)
    with pytest.raises(
        InputError, match=r"^policy@0\.40 is not the merged model in this engine: .* \(tolerance 0\.005\)"
    ):
        prove(engine, tiny_llama, adapters)


def test_noise_is_no_effect(engine: TransformersEngine) -> None:
    """Where there is no dense merge to go by, a policy has to move more than the base does from one place to another."""

    class Noisy:
        batch_size = None

        def __init__(self, effect: float) -> None:
            self.effect = effect

        def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
            return [
                {
                    request.key: {3: -1.0 + 1e-3 * (place // 2 % 2) + self.effect * bool(request.policy.adapted)}
                    for place, request in enumerate(requests)
                }
            ]

    def prove_blind(effect: float) -> list[str]:
        blind: Any = Noisy(effect)
        return probe(blind, [POLICIES[1], POLICIES[-1]], PROMPTS, reference=None, dtype="bfloat16")

    assert prove_blind(0.01) == []
    with pytest.raises(InputError, match=r"^policy@0\.40 says what the base says .* to 0\.001, which is how well"):
        prove_blind(0.0)


def test_one_wrong_worker_of_two_is_enough(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter]
) -> None:
    class Pair:
        batch_size = None

        def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
            [good] = engine.next_tokens(requests)
            bad = dict(good)
            last = next(request.key for request in requests if request.policy.name == "policy@1.00")
            bad[last] = {token: value - 0.1 for token, value in good[last].items()}
            return [good, bad]

    reference = dense_reference(engine, tiny_llama, adapters)
    pair: Any = Pair()
    with pytest.raises(InputError, match=r"policy@1\.00 is not the merged model"):
        probe(pair, POLICIES, PROMPTS, reference=reference, dtype="float32")


def test_numbers_that_are_none_are_named(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_tokens(requests: Sequence[Request]) -> list[dict[str, NextTokens]]:
        return [{r.key: {3: float("nan") if r.policy.ratio == 1.0 else -1.0} for r in requests}]

    monkeypatch.setattr(engine, "next_tokens", next_tokens)
    with pytest.raises(InputError, match=r"^the logits of policy@1\.00 are not finite"):
        prove(engine, tiny_llama, adapters)


def test_a_policy_too_weak_to_tell_is_said(tiny_llama: Path, make_adapter: Any) -> None:
    faint = {
        name: read_adapter(make_adapter(tiny_llama, seed=seed, scale=1e-3))
        for seed, name in enumerate(("reward", "safety"))
    }
    engine = TransformersEngine.load(tiny_llama, faint, generation=Generation(), dtype="float32", device="cpu")
    lines = prove(engine, tiny_llama, faint)
    assert len(lines) == 3
    assert all("that it acts is not proven" in line for line in lines)


def test_the_sweep_stops_before_its_first_answer(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from psacpo.evalharness.engines.mixture import AdapterMixture

    monkeypatch.setattr(AdapterMixture, "set_rows", lambda self, weights: None)
    config = make_config()
    with pytest.raises(InputError, match=r"policy@0\.00 says what the base says"):
        frontier(config)
    assert (config.out / "completions.jsonl").read_bytes() == b""
    frontier(make_config(probe=False, constraints=[]))


def test_logprobs_are_those_of_the_dense_merge(
    engine: TransformersEngine, tiny_llama: Path, adapters: dict[str, Adapter]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    requests = [Request(policy.name, policy, PROMPTS[0], 0) for policy in POLICIES]
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids) > 0
        grown = [(*PROMPTS[0], *answer.token_ids[:count]) for count in range(len(answer.token_ids))]
        rows = dense_logprobs(model, adapters, request.policy.adapted, grown)
        expected = [float(row[token]) for row, token in zip(rows, answer.token_ids, strict=True)]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_text_and_tokens_of_an_answer(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer("open the lock then help", add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, [*ids, 1], []) == "open the lock then help"
    assert answer_text(tokenizer, ids, ["help", "lock"]) == "open the "
    assert strip_end((5, 6, 1), {1}) == (5, 6)
    assert strip_end((5, 1, 6), {1}) == (5, 1, 6)
    assert strip_end((), {1}) == ()
