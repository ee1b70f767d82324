"""vLLM itself, on whatever device it runs here, against transformers and against dense merges.

Without vLLM these tests are skipped; PSACPO_REQUIRE_VLLM=1 turns the skip into a failure.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig, Generation, Vllm
from psacpo.evalharness.engines import Completion, Passage, Policy, Request
from psacpo.evalharness.engines.plan import EnginePlan
from psacpo.evalharness.engines.probe import dense_reference, probe
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.engines.vllm import VllmEngine
from psacpo.evalharness.engines.vllm_worker import merged_weights
from psacpo.evalharness.engines.whole import read_policy
from psacpo.merge.adapters import Adapter, read_adapter
from psacpo.merge.models import read_model

MakeAdapter = Callable[..., Path]
RATIOS = (0.0, 0.3, 0.7, 1.0)
POLICIES = [*(Policy(f"policy@{q:.2f}", {"reward": 1 - q, "safety": q}, q) for q in RATIOS), Policy("base")]
TOKENS = 20
TIE = 1e-4

# One worker has the module's engines; on two each would be started twice.
pytestmark = pytest.mark.xdist_group("engine-vllm")


@pytest.fixture(scope="module", autouse=True)
def real_vllm() -> None:
    """vLLM imports here, or the module is skipped with the reason."""
    try:
        import vllm  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever keeps it from importing
        reason = f"vLLM cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
        if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
            pytest.fail(f"PSACPO_REQUIRE_VLLM=1, but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 32, the smallest that vLLM has CPU kernels for."""
    path = tmp_path_factory.mktemp("wide") / "model"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(base: Path, make_adapter: MakeAdapter) -> dict[str, Adapter]:
    """Of rank 4 and 6, with patterns and rsLoRA: together rank 10."""
    reward = make_adapter(base, seed=1, r=4, lora_alpha=8)
    safety = make_adapter(base, seed=2, r=6, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 3})
    return {"reward": read_adapter(reward), "safety": read_adapter(safety)}


@pytest.fixture(scope="module")
def requests(base: Path) -> list[Request]:
    """Prompts of several lengths, all policies of a prompt side by side."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ("how do i bake a loaf", "open", "break the lock of that bike then help", "mix the bread and heat it")
    return [
        Request(f"{policy.name}/{i}", policy, tuple(tokenizer(text)["input_ids"]), seed=i)
        for i, text in enumerate(texts)
        for policy in POLICIES
    ]


@dataclass
class Ran:
    """What one started engine gave."""

    greedy: dict[str, Completion]
    sampled: dict[str, Completion]
    sampled_again: dict[str, Completion]
    stopped: dict[str, Completion]
    lines: list[str]
    first: str
    checkpoint: dict[str, Completion]
    base_said: dict[str, float]


def start(
    base: Path, adapters: dict[str, Adapter], plan: EnginePlan, generation: Generation, **settings: Any
) -> VllmEngine:
    return VllmEngine.load(
        base,
        adapters,
        POLICIES,
        plan=plan,
        settings=Vllm.model_validate(settings),
        generation=generation,
        dtype="float32",
        seed=0,
    )


def answers(engine: VllmEngine, requests: Sequence[Request]) -> dict[str, Completion]:
    found = {}
    for answer in engine.generate(requests):
        assert isinstance(answer, Completion)
        found[answer.key] = answer
    return found


def passages(requests: Sequence[Request], answers: dict[str, Completion]) -> list[Passage]:
    """Each answer as it was drawn; to the first prompt also the end token alone, the shortest there is."""
    ends = {key: () if one.end_id is None else (one.end_id,) for key, one in answers.items()}
    found = [Passage(r.key, r.prompt_ids, answers[r.key].token_ids + ends[r.key]) for r in requests]
    return [*found, Passage("end", requests[0].prompt_ids, (1,))]


GREEDY = Generation(max_new_tokens=TOKENS, temperature=0.0, logprobs=True)
SAMPLED = Generation(max_new_tokens=TOKENS, temperature=1.0, top_p=0.95, top_k=50)


@pytest.fixture(scope="module")
def runs(
    base: Path, adapters: dict[str, Adapter], requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ran]:
    """Both strategies: one engine start each, for everything that is asked of it."""
    found = {}
    whole = tmp_path_factory.mktemp("checkpoint") / "policy"
    shutil.copytree(base, whole)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(dict(merged_weights(read_model(base), list(adapters.values()), [0.7, 0.3])))
    model.save_pretrained(whole)
    for strategy in ("lora", "reload"):
        plan = EnginePlan("vllm", "test", strategy=strategy, max_lora_rank=16, max_model_len=64)
        engine = start(base, adapters, plan, GREEDY, max_num_seqs=8)
        try:
            lines = probe(
                engine,
                POLICIES,
                [request.prompt_ids for request in requests],
                reference=dense_reference(engine, base, adapters),
                dtype="float32",
            )
            engine.log_probs = True
            stream = iter(engine.generate(requests))
            first = next(stream)
            greedy = {answer.key: answer for answer in (first, *stream)}
            engine.log_probs = False
            base_said = dict(engine.base_log_probs(passages(requests, greedy)))
            engine.generation = SAMPLED
            sampled, again = answers(engine, requests), answers(engine, requests[::-1])
            engine.generation = Generation(max_new_tokens=TOKENS, temperature=0.0, stop=["o"])
            stopped = answers(engine, requests)
            checkpoint = {}
            if strategy == "reload":
                engine.generation = GREEDY
                checkpoint = answers(
                    engine, [replace(r, policy=Policy("whole", checkpoint=whole)) for r in requests[:: len(POLICIES)]]
                )
        finally:
            engine.close()
        found[strategy] = Ran(greedy, sampled, again, stopped, lines, first.key, checkpoint, base_said)
    return found


@pytest.fixture(scope="module")
def reference(base: Path, adapters: dict[str, Adapter], requests: list[Request]) -> dict[str, Completion]:
    engine = TransformersEngine.load(base, adapters, generation=GREEDY, dtype="float32", device="cpu")
    return {answer.key: answer for answer in engine.generate(requests)}


def logits_after(base: Path, adapters: dict[str, Adapter], request: Request, tokens: Sequence[int]) -> torch.Tensor:
    """What the dense merge says next after a prompt and some tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = request.policy.adapted
    found = merged_weights(read_model(base), [adapters[name] for name in adapted], list(adapted.values()))
    model.load_state_dict(dict(found))
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[*request.prompt_ids, *tokens]])).logits[0, -1]
    return logits


@pytest.mark.parametrize("strategy", ["lora", "reload"])
def test_greedy_answers_equal_those_of_transformers_but_for_ties(
    runs: dict[str, Ran],
    reference: dict[str, Completion],
    requests: list[Request],
    base: Path,
    adapters: dict[str, Adapter],
    strategy: str,
) -> None:
    equal = 0
    for request in requests:
        ours, theirs = runs[strategy].greedy[request.key], reference[request.key]
        if ours.token_ids == theirs.token_ids:
            equal += 1
            assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
            continue
        pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours.token_ids), len(theirs.token_ids)))
        top = logits_after(base, adapters, request, theirs.token_ids[:same]).topk(2).values
        assert float(top[0] - top[1]) < TIE, (request.key, same)
    assert equal >= 0.9 * len(requests)
    # The policies answer differently, so that agreement is no accident of equal models.
    for place in range(len(requests) // len(POLICIES)):
        assert len({reference[f"{policy.name}/{place}"].token_ids for policy in POLICIES}) == len(POLICIES)


@pytest.mark.parametrize("strategy", ["lora", "reload"])
def test_logprobs_are_those_of_transformers(
    runs: dict[str, Ran], reference: dict[str, Completion], strategy: str
) -> None:
    compared = 0
    for key, theirs in reference.items():
        ours = runs[strategy].greedy[key]
        if ours.token_ids == theirs.token_ids:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
            compared += len(ours.token_ids)
    assert compared > 100


@pytest.mark.parametrize("strategy", ["lora", "reload"])
def test_kl_to_the_base_is_that_of_transformers(
    runs: dict[str, Ran], base: Path, adapters: dict[str, Adapter], requests: list[Request], strategy: str
) -> None:
    ran = runs[strategy]
    theirs = TransformersEngine.load(base, {}, generation=GREEDY, dtype="float32", device="cpu")
    expected = dict(theirs.base_log_probs(passages(requests, ran.greedy)))
    assert ran.base_said == pytest.approx(expected, abs=2e-3)
    for key, answer in ran.greedy.items():
        assert answer.log_prob is not None
        assert answer.logprobs is not None
        if answer.end_id is None:
            assert answer.log_prob == pytest.approx(sum(answer.logprobs))
        else:
            assert answer.log_prob < sum(answer.logprobs)
        if key.startswith("base/"):
            assert answer.log_prob == pytest.approx(ran.base_said[key], abs=2e-3)
        else:
            assert answer.log_prob - ran.base_said[key] > 0.1
    assert all(answer.log_prob is None for answer in ran.sampled.values())


@pytest.mark.parametrize("strategy", ["lora", "reload"])
def test_sampled_answers_hang_on_their_seed_alone(runs: dict[str, Ran], strategy: str) -> None:
    ran = runs[strategy]
    assert {key: answer.token_ids for key, answer in ran.sampled.items()} == {
        key: answer.token_ids for key, answer in ran.sampled_again.items()
    }
    assert ran.sampled != ran.greedy
    assert all(answer.logprobs is None for answer in ran.sampled.values())


def test_more_prompts_than_one_step_takes_are_sampled_too(base: Path, adapters: dict[str, Adapter]) -> None:
    """On a CPU vLLM cannot draw with seeds for a prompt that it reads in parts: no step may leave one half read."""
    plan = EnginePlan("vllm", "test", strategy="reload", max_model_len=40)
    engine = start(base, adapters, plan, Generation(max_new_tokens=2, temperature=1.0), max_num_seqs=256)
    try:
        prompts = [Request(str(i), POLICIES[-1], tuple(range(3, 14 + i % 3)), seed=i) for i in range(300)]
        assert sum(len(request.prompt_ids) for request in prompts[:256]) > 2048 + 13
        assert len(answers(engine, prompts)) == 300
    finally:
        engine.close()


@pytest.mark.parametrize("strategy", ["lora", "reload"])
def test_stop_strings_cut_the_text(
    runs: dict[str, Ran], base: Path, adapters: dict[str, Adapter], requests: list[Request], strategy: str
) -> None:
    settings = Generation(max_new_tokens=TOKENS, temperature=0.0, stop=["o"])
    theirs = TransformersEngine.load(base, adapters, generation=settings, dtype="float32", device="cpu")
    expected = {answer.key: answer for answer in theirs.generate(requests)}
    ours = runs[strategy].stopped
    assert any("o" in runs[strategy].greedy[key].text for key in ours)
    assert not any("o" in answer.text for answer in ours.values())
    for key, answer in ours.items():
        # Where the tokens agree so must the text and the reason; ties are another test's.
        if answer.token_ids == expected[key].token_ids:
            assert (answer.text, answer.finish_reason) == (expected[key].text, expected[key].finish_reason)
    assert sum(answer.token_ids == expected[key].token_ids for key, answer in ours.items()) >= 0.9 * len(ours)


def test_both_strategies_prove_themselves(runs: dict[str, Ran]) -> None:
    assert runs["lora"].lines == runs["reload"].lines == []


def test_all_policies_share_the_batches_of_the_lora_strategy(runs: dict[str, Ran], requests: list[Request]) -> None:
    assert set(runs["lora"].greedy) == {request.key for request in requests}
    # Eight sequences at a time hold more than one prompt's five policies: the second prompt ends among the first's.
    order = [key.rpartition("/")[0] for key in runs["lora"].greedy]
    assert len(set(order[:8])) > 1
    swapped = [key.rpartition("/")[0] for key in runs["reload"].greedy]
    assert len([1 for a, b in pairwise(swapped) if a != b]) == len(POLICIES) - 1


def test_a_whole_checkpoint_is_swapped_in(runs: dict[str, Ran], reference: dict[str, Completion]) -> None:
    """The merge at 0.3 written as full weights gives the answers of that ratio."""
    found = runs["reload"].checkpoint
    assert len(found) == 4
    for key, answer in found.items():
        place = key.rpartition("/")[2]
        assert answer.token_ids == reference[f"policy@0.30/{place}"].token_ids


@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "head", "whole"])
def test_reload_carries_what_adapters_cannot(
    base: Path, make_adapter: MakeAdapter, requests: list[Request], tmp_path: Path, kind: str
) -> None:
    """Each policy says what transformers says with the merged weights in it, and not what the base says."""
    if kind == "whole":
        paths = [tmp_path / "reward", tmp_path / "safety"]
        for seed, path in enumerate(paths):
            shutil.copytree(base, path)
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(path)
    else:
        options = {
            "dora": {"use_dora": True},
            "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
            "head": {"target_modules": ["q_proj", "lm_head"]},
        }
        paths = [make_adapter(base, seed=seed, **options[kind]) for seed in (3, 4)]
    if kind == "modules_to_save":
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            tensors = load_file(path / "adapter_model.safetensors")
            moved = {k: t if "lora_" in k else t + 0.1 * torch.randn_like(t) for k, t in tensors.items()}
            save_file(moved, path / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {name: read_policy(path, base) for name, path in zip(("reward", "safety"), paths, strict=True)}
    plan = EnginePlan("vllm", "test", strategy="reload", max_model_len=64)
    engine = start(base, found, plan, GREEDY, max_num_seqs=8)
    try:
        proof = dense_reference(engine, base, found)
        assert proof is not None
        prompts = [request.prompt_ids for request in requests]
        assert probe(engine, POLICIES, prompts, reference=proof, dtype="float32") == []
        expected = proof(POLICIES[1], prompts[:1])[0]
        [answer] = engine.generate([replace(requests[1], prompt_ids=prompts[0])])
        assert isinstance(answer, Completion)
        assert answer.token_ids[0] == max(range(len(expected)), key=expected.__getitem__)
    finally:
        engine.close()


def test_a_policy_that_does_not_act_is_named(base: Path, adapters: dict[str, Adapter], requests: list[Request]) -> None:
    """The field's common bug, made by hand: an engine that knows the adapters and never applies one."""
    plan = EnginePlan("vllm", "test", strategy="lora", max_lora_rank=16, max_model_len=64)
    engine = start(base, adapters, plan, GREEDY, max_num_seqs=8)
    try:
        engine._lora = dict.fromkeys(engine._lora)
        prompts = [request.prompt_ids for request in requests]
        with pytest.raises(InputError, match=r"policy@0\.00 says what the base says .* do not act"):
            probe(engine, POLICIES, prompts, reference=None, dtype="float32")
    finally:
        engine.close()


def test_bad_settings_are_one_line(base: Path, adapters: dict[str, Adapter]) -> None:
    plan = EnginePlan("vllm", "test", strategy="lora", max_lora_rank=16, max_model_len=64)

    def refused(match: str, plan: EnginePlan = plan, **settings: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            start(base, adapters, plan, GREEDY, **settings)
        assert "\n" not in str(caught.value)

    refused("unknown key in vllm.extra 'max_num_batched_token'", extra={"max_num_batched_token": 8})
    refused("vLLM cannot start: block_size: Input should be a valid integer", extra={"block_size": "x"})
    refused("vllm.extra: trust_remote_code is not taken from a recipe", extra={"trust_remote_code": True})
    refused("vLLM cannot start: .*4096", replace(plan, max_model_len=4096))
    refused("vLLM cannot start: Available memory.*VLLM_CPU_KVCACHE_SPACE", extra={"kv_cache_memory_bytes": 1 << 50})
    refused(
        "vLLM cannot start: .*max_model_len", replace(plan, max_model_len=256), extra={"kv_cache_memory_bytes": 70_000}
    )


@pytest.mark.slow
def test_a_sweep_by_vllm_resumes(base: Path, adapters: dict[str, Adapter], tmp_path: Path, tiny_judge: Path) -> None:
    """The command's own path, killed (as far as its files can tell) and taken up again."""
    from psacpo.evalharness import frontier

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("open", "mix the bread", "heat")))
    config = FrontierConfig.model_validate(
        {
            "base": str(base),
            "adapters": {name: adapter.path for name, adapter in adapters.items()},
            "prompts": prompts,
            "judges": {"reward": {"kind": "scalar", "model": str(tiny_judge)}, "cost": {"kind": "refusal"}},
            "ratios": [0.0, 0.5, 1.0],
            "out": tmp_path / "run",
            "generation": {"max_new_tokens": 8, "temperature": 0.0},
            "engine": "vllm",
            "resamples": 200,
        }
    )
    run = frontier(config)
    told = json.loads((run / "psacpo.json").read_text())["engine"]
    assert told["name"] == "vllm"
    assert told["strategy"] in ("lora", "reload")
    assert "estimated" in told["why"] or "GPU" in told["why"]
    records = (run / "completions.jsonl").read_bytes()
    whole = records.splitlines(keepends=True)
    assert len(whole) == 12
    (run / "completions.jsonl").write_bytes(b"".join(whole[:5]) + whole[5][:20])
    frontier(config)
    again = (run / "completions.jsonl").read_bytes()
    assert again.startswith(b"".join(whole[:5]))
    assert {json.loads(line)["key"]: json.loads(line)["token_ids"] for line in again.splitlines()} == {
        json.loads(line)["key"]: json.loads(line)["token_ids"] for line in whole
    }
