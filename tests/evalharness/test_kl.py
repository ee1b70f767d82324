"""KL to the base: against an exact sum over all short answers, against dense models, and in a sweep and its resumptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig, Generation
from psacpo.evalharness.engines import Completion, Passage, Policy, Request
from psacpo.evalharness.engines.dense import dense_logprobs
from psacpo.evalharness.engines.passages import by_memory
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.rejudge import rejudge
from psacpo.evalharness.kl import log_ratio, meaning
from psacpo.evalharness.sweep import plan_summary
from psacpo.merge.adapters import read_adapter

MakeConfig = Callable[..., FrontierConfig]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_estimate_the_exact_divergence(tiny_llama: Path, two_adapters: tuple[Path, Path]) -> None:
    """Two tokens of a vocabulary of some hundred: every answer is summed over, and 3,000 are drawn."""
    adapters = {"reward": read_adapter(two_adapters[0])}
    policy = Policy("policy@0.00", {"reward": 0.7})
    settings = Generation(max_new_tokens=2, batch_size=1000)
    engine = TransformersEngine.load(
        tiny_llama, adapters, generation=settings, dtype="float32", device="cpu", log_probs=True
    )
    prompt = tuple(engine.tokenizer("how do i bake a loaf")["input_ids"])
    size = len(engine.tokenizer)
    starts = [prompt] + [(*prompt, token) for token in range(size)]
    # log p of the first token, then of the second after each first one; an end token ends the answer.
    pi, base = (
        torch.stack(dense_logprobs(engine.model, adapters, weights, starts)).double()
        for weights in ({"reward": 0.7}, {})
    )
    steps = (pi.exp() * (pi - base)).sum(dim=-1)
    goes_on = pi[0].exp().clone()
    goes_on[list(engine.end_ids)] = 0
    exact = float(steps[0] + (goes_on * steps[1:]).sum())

    requests = [Request(str(seed), policy, prompt, seed) for seed in range(3000)]
    answers = list(engine.generate(requests))
    drawn = [(*one.token_ids, *(() if one.end_id is None else (one.end_id,))) for one in answers]
    for one, tokens in zip(answers, drawn, strict=True):
        assert one.log_prob == pytest.approx(
            float(pi[0, tokens[0]] + (pi[1 + tokens[0], tokens[1]] if len(tokens) == 2 else 0.0)), abs=1e-4
        )
    assert any(one.end_id is not None for one in answers)
    found = dict(engine.base_log_probs([Passage(str(i), prompt, tokens) for i, tokens in enumerate(drawn)]))
    ratios = np.array([one.log_prob - found[str(i)] for i, one in enumerate(answers)])  # type: ignore[operator]
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - exact) < 3 * error < 0.15 * exact
    assert exact > 0.05


def test_each_answer_is_held_against_the_base_whatever_its_company(
    tiny_llama: Path, two_adapters: tuple[Path, Path]
) -> None:
    """Prompts and answers of unlike lengths in one batch, alone, and in batches that memory makes smaller."""
    adapters = {"reward": read_adapter(two_adapters[0])}
    engine = TransformersEngine.load(
        tiny_llama, adapters, generation=Generation(batch_size=8), dtype="float32", device="cpu"
    )
    draw = np.random.default_rng(0)
    passages = [
        Passage(str(i), tuple(map(int, draw.integers(3, 90, a))), tuple(map(int, draw.integers(3, 90, b))))
        for i, (a, b) in enumerate([(1, 1), (9, 2), (3, 14), (12, 12), (2, 1), (5, 7), (20, 3), (1, 20), (4, 4)])
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    together = dict(engine.base_log_probs(passages))
    for passage in passages:
        ids = torch.tensor([[*passage.prompt_ids, *passage.token_ids]])
        with torch.inference_mode():
            said = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        start = len(passage.prompt_ids)
        expected = sum(float(said[start + i - 1, token]) for i, token in enumerate(passage.token_ids))
        assert together[passage.key] == pytest.approx(expected, abs=1e-4)
    parts = list(by_memory(passages, vocabulary=2**27 // 30))
    assert [one for part in parts for one in part] == passages
    assert len(parts) > 3
    assert all(len(part) == 1 or len(part) * (1 + max(len(p.token_ids) for p in part)) <= 30 for part in parts)


def test_a_sweep_measures_it_and_resumes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(constraints=["kl_to_base<=50"])
    run = frontier(config)
    found = json.loads((run / "frontier.json").read_text())
    assert "kl_to_base" in found["intrinsic"]
    assert found["metrics"]["kl_to_base"]["meaning"].startswith("KL divergence from the base")
    [base] = found["baselines"]
    assert base["kl_to_base"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert all(point["kl_to_base"]["mean"] > 0 for point in found["points"])
    assert all(point["kl_to_base"]["low"] < point["kl_to_base"]["high"] for point in found["points"])

    # Of each answer: its tokens and end, by the dense merge and by the base.
    prompts = {row["id"]: row["prompt_ids"] for row in lines(run / "prompts.jsonl")}
    scores = {v["completion"]: v for v in lines(run / "verdicts.jsonl") if v["judge"] == "kl_to_base"}
    model: Any = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32).eval()
    adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
    for answer in lines(run / "completions.jsonl")[::4]:
        tokens = [*answer["token_ids"], *([] if answer["end_id"] is None else [answer["end_id"]])]
        assert (answer["end_id"] is not None) == (answer["finish_reason"] == "stop")
        starts = [[*prompts[answer["prompt_id"]], *tokens[:i]] for i in range(len(tokens))]
        q = answer["ratio"]
        weights = {} if q is None else {name: w for name, w in (("reward", 1 - q), ("safety", q)) if w}
        pi, plain = (dense_logprobs(model, adapters, w, starts) for w in (weights, {}))
        expected = sum(float(a[token] - b[token]) for a, b, token in zip(pi, plain, tokens, strict=True))
        assert scores[answer["key"]]["score"] == pytest.approx(expected, abs=2e-3)
        assert scores[answer["key"]]["raw"].endswith("a token")

    # Killed between answers and base, or in the middle of a line: the rest is asked, nothing is generated.
    path, whole = run / "base_log_probs.jsonl", (run / "frontier.json").read_bytes()
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an answer was made again")

    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "generate", never)
        frontier(config)
    assert {one["key"]: one for one in lines(path)} == {one["key"]: one for one in map(json.loads, kept.splitlines())}
    assert (run / "frontier.json").read_bytes() == whole

    # An answer that is another one under the same key is asked about anew.
    rows = lines(run / "completions.jsonl")
    rows[0] |= {"token_ids": [5, 6, 7], "text": "other"}
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frontier(config)
    assert len(lines(path)) == len(rows) + 1


def test_damaged_tokens_and_log_probabilities_are_refused_by_line(make_config: MakeConfig) -> None:
    config = make_config()
    run = frontier(config)
    base, answers = run / "base_log_probs.jsonl", run / "completions.jsonl"
    again = validate(JudgeConfig, {"source": run, "judges": {"words": {"kind": "length", "unit": "words"}}}, where="t")

    def damaged(path: Path, values: dict[str, Any], word: str, *jobs: Callable[[], object]) -> None:
        whole = path.read_bytes()
        rows = lines(path)
        rows[2] |= values
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for job in jobs:
            with pytest.raises(InputError, match=word):
                job()
        path.write_bytes(whole)

    line = "line 3 is damaged"
    damaged(base, {"base_log_prob": float("nan")}, line, lambda: frontier(config), lambda: rejudge(again))
    for value in (float("-inf"), 0.01, 12, None):
        damaged(base, {"base_log_prob": value}, line, lambda: frontier(config))
    damaged(base, {"key": ["a"]}, line, lambda: rejudge(again))
    other: tuple[dict[str, Any], ...] = (
        {"token_ids": "abc"},
        {"token_ids": None},
        {"token_ids": [1_000_000_000, "x"]},
        {"token_ids": [True]},
        {"token_ids": [-1]},
        {"end_id": "x"},
        {"log_prob": float("nan")},
    )
    for values in other:
        damaged(answers, values, line, lambda: frontier(config))
    damaged(answers, other[0], "damaged|not finished", lambda: rejudge(again))
    rows = lines(answers)
    rows[5] |= {"token_ids": [5, 1_000_000]}
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="line 6 is damaged: it holds the token 1000000; allowed: tokens 0 to"):
        frontier(config)


def test_runs_of_before_still_load(make_config: MakeConfig, tmp_path: Path) -> None:
    run = frontier(make_config())
    rows = [
        {k: v for k, v in row.items() if k not in ("log_prob", "end_id")} for row in lines(run / "completions.jsonl")
    ]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "base_log_probs.jsonl").unlink()
    rejudge(validate(JudgeConfig, {"source": run, "judges": {"words": {"kind": "length", "unit": "words"}}}, where="t"))
    found = json.loads((run / "frontier.json").read_text())
    assert "words" in found["metrics"]
    assert "kl_to_base" not in found["metrics"]
    # The same command finds the answers and measures what can be measured.
    frontier(make_config())
    assert "kl_to_base" not in json.loads((run / "frontier.json").read_text())["metrics"]
    with pytest.raises(InputError, match="^kl_to_base is asked for, and no answer in .*; allowed: answers made anew"):
        frontier(make_config(constraints=["kl_to_base<=1"]))


def test_it_can_be_turned_off_and_costs_no_other_key(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 12, "batch_size": 8}
    plain = frontier(make_config(out=tmp_path / "off", generation=settings | {"kl_to_base": False}))
    assert not (plain / "base_log_probs.jsonl").exists()
    assert "kl_to_base" not in json.loads((plain / "frontier.json").read_text())["metrics"]
    asked = plan_summary(make_config(out=plain, generation=settings))
    assert asked["answers found"] == asked["answers"] == 20
    # What it asks of an endpoint can end one, so that is for its owner to say.
    served = {"engine": "openai", "openai": {"base_url": "http://localhost:1/v1"}}
    assert "kl_to_base" not in make_config(**served).all_judges()
    asked_for = served | {"generation": {"kl_to_base": True}}
    assert "kl_to_base" in make_config(**asked_for).all_judges()
    with pytest.raises(InputError, match=r"needs the base among the policies; allowed: baselines: \{base: \{\}\}"):
        make_config(**asked_for, baselines={})
    with pytest.raises(InputError, match="kl_to_base needs openai.dialect vllm"):
        make_config(**asked_for | {"openai": {"base_url": "http://localhost:1/v1", "dialect": "openai"}})
    with pytest.raises(InputError, match="constraint on metric 'kl_to_base' which is unknown"):
        make_config(**served, constraints=["kl_to_base<=1"])


def test_what_it_estimates_is_said() -> None:
    assert meaning(Generation()).startswith("KL divergence from the base, estimated on own answers: mean of log")
    said = meaning(Generation(temperature=0.7, top_p=0.9))
    assert said.endswith("over answers drawn at temperature 0.7, top_p 0.9, top_k 0: no estimate of a KL divergence")
    record = {"token_ids": [4, 5], "end_id": 1, "log_prob": -2.0, "base_log_prob": -3.5}
    assert log_ratio(record) == (1.5, 3)
    assert log_ratio(record | {"base_log_prob": None}) is None
    assert Completion("a", "", (), "stop").log_prob is None
