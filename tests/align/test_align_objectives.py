"""Every loss through the real trainer: against all logits at once, in parts, over processes, and what it records."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psacpo.align import AlignConfig, align
from psacpo.align import model as models
from psacpo.align.examples import Labelled, Pair, labelled, mismatched, safe_first
from psacpo.align.forward import Route
from psacpo.align.losses import LOSSES, AnswerTerms, PairTerms, kl_baseline
from psacpo.align.objectives import objective_of
from psacpo.align.planning import prepare
from psacpo.align.risk import token_risk
from psacpo.align.stage_config import Stage
from psacpo.align.stages import training_arguments
from psacpo.align.trainer import PairTrainer
from psacpo.errors import InputError

SETTINGS: dict[str, dict[str, Any]] = {name: {"loss": name} for name in LOSSES} | {
    "radpo1-erm": {"loss": "radpo1", "risk": "erm", "risk_level": 2.0},
    "radpo2-cvar": {"loss": "radpo2", "risk": "cvar", "risk_level": 0.3, "risk_per_token": True},
    "radpo2-released": {"loss": "radpo2", "risk": "cvar_released"},
    "kto-weighted": {"loss": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
}


def make_trainer(config: AlignConfig, scratch: Path, pairs: list[Any] | None = None) -> PairTrainer:
    prepared = prepare(config)
    (task,) = prepared.tasks
    policy = models.load_policy(prepared.base, config.lora, config.dtype, None, gradient_checkpointing=False)
    arguments = training_arguments(config, task, "cpu", str(scratch))
    rows = task.drawn if pairs is None else pairs
    return PairTrainer(policy, arguments, rows, task.stage, beta=config.beta_of(task.stage), fresh=False, pad_id=0)


def shake(policy: Any, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=make)


def alone(policy: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """All logits that predict the answer, by a plain forward over one sequence. Shape (T, V)."""
    logits: Tensor = policy(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1]


def log_prob(logits: Tensor, answer: list[int]) -> Tensor:
    return logits.log_softmax(-1)[range(len(answer)), answer].sum()


def by_definition(trainer: PairTrainer, policy: Any, start: dict[tuple[Any, ...], Tensor]) -> Tensor:
    """The mean loss of all examples from full logits, and differentiable all through."""
    stage, objective = trainer.stage, trainer.objective
    loss, options = objective.loss, objective.options

    def ratio(prompt: list[int], answer: list[int]) -> Tensor:
        return log_prob(alone(policy, prompt, answer), answer) - log_prob(start[*prompt, -1, *answer], answer)

    if loss.answers is not None:
        own = [(one.prompt, answer) for one in objective.own for answer in one.answers]  # type: ignore[attr-defined]
        labels = [label for one in objective.own for label in one.desirable]  # type: ignore[attr-defined]
        others = objective.examples[len(objective.own) :]  # type: ignore[attr-defined]
        with torch.no_grad():
            apart = torch.stack([ratio(one.prompt, answer) for one in others for answer in one.answers])
        ratios = torch.stack([ratio(*each) for each in own])
        return loss.answers(AnswerTerms(ratios, torch.tensor(labels), kl_baseline(apart)), options).mean()

    def risk(prompt: list[int], answer: list[int]) -> Tensor:
        measure = stage.risk if loss.risk == "any" else str(loss.risk)
        level = stage.risk_level if loss.risk == "any" else None
        found = token_risk(alone(policy, prompt, answer), start[*prompt, -1, *answer], measure, level)
        return found.mean() if stage.risk_per_token else found.sum()

    terms = [
        torch.stack([ratio(pair.prompt, pair.chosen) for pair in objective.pairs]),
        torch.stack([ratio(pair.prompt, pair.rejected) for pair in objective.pairs]),
        torch.tensor([len(pair.chosen) for pair in objective.pairs]),
        torch.tensor([len(pair.rejected) for pair in objective.pairs]),
        torch.tensor([pair.margin for pair in objective.pairs]),
    ]
    if loss.risk is not None:
        terms.append(torch.stack([risk(pair.prompt, pair.chosen) for pair in objective.pairs]))
        terms.append(torch.stack([risk(pair.prompt, pair.rejected) for pair in objective.pairs]))
    assert loss.pairs is not None
    return loss.pairs(PairTerms(*terms), options).mean()


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory, rows: Any, write_rows: Any) -> Path:
    # The last three columns are read by modpo and safedpo only; the test gives margins of its own.
    known = {"margin": 1.0, "chosen_safe": True, "rejected_safe": False}
    path: Path = write_rows(tmp_path_factory.mktemp("five") / "rows.jsonl", [row | known for row in rows(5)])
    return path


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("route", [Route("shared", "chunked"), Route("padded", "model")], ids=str)
def test_loss_and_gradient_are_the_definitions(
    name: str, route: Route, five: Path, tiny_llama: Path, tmp_path: Path, make_config: Any
) -> None:
    """The fast way and the plain one, over batches of 2 and 3, against one sequence after the other with all logits.

    The start is not the base and the policy is not the start, so each of the three must be the right one.
    """
    stage = {"name": "a", "data": five, "beta": 0.4, "batch_size": 5, "max_steps": 1} | SETTINGS[name]
    config, pairs = make_config(tiny_llama, tmp_path / "out", [stage]), None
    if name in ("modpo", "safedpo"):
        pairs = [replace(pair, margin=float(place % 2)) for place, pair in enumerate(prepare(config).tasks[0].drawn)]
    trainer = make_trainer(config, tmp_path, pairs)
    objective, policy = trainer.objective, trainer.model
    shake(policy, 1)
    with torch.no_grad():
        start = {
            (*one.prompt, -1, *answer): alone(policy, one.prompt, answer)
            for one in objective.examples
            for answer in one.answers
        }
    trainer.scorer.begin(policy, torch.float32)
    assert trainer.scorer.route == Route("shared", "chunked")
    trainer.scorer.route = route
    objective.begin(trainer.scorer)
    shake(policy, 2)
    policy.zero_grad()

    expected = by_definition(trainer, policy, start)
    expected.backward()
    wanted = {key: p.grad.clone() for key, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()

    dealt = [[3, 0], [4, 1, 2]]
    if referred := objective.referred(dealt):
        trainer.scorer.score(referred)
    objective.prepare(policy, dealt)
    count = torch.tensor(objective.count(range(5)))
    total = 0.0
    for part in dealt:
        loss = trainer.compute_loss(policy, trainer.scorer.batch(part), num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    size = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for key, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - wanted[key]).norm() <= 2e-5 * size, key


@pytest.mark.parametrize("name", ["kto", "radpo2-cvar"])
def test_one_batch_is_many(
    name: str, tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Any
) -> None:
    """Eight pairs in one batch and one after the other: the same steps. KTO's baseline is the whole step's."""
    data = write_rows(tmp_path / "rows.jsonl", rows(16))
    found = []
    for shape in ({"batch_size": 8}, {"batch_size": 1, "gradient_accumulation": 8}):
        stage = {"name": "a", "data": data, "max_steps": 3} | SETTINGS[name] | shape
        align(make_config(tiny_llama, tmp_path / str(shape["batch_size"]), [stage]))
        found.append(metrics(tmp_path / str(shape["batch_size"]) / "a"))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=2e-3, abs=2e-5), key


@pytest.mark.parametrize("name", ["kto", "radpo2-cvar", "tdpo1", "ipo"])
def test_losses_learn(
    name: str, tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Any
) -> None:
    """Two stages; the second starts at its reference, whatever the loss; the policy moves towards the chosen answers."""
    data = write_rows(tmp_path / "rows.jsonl", rows(32))
    stages = [{"name": stage, "data": data, "max_steps": 5} | SETTINGS[name] for stage in ("reward", "safety")]
    out = tmp_path / "out"
    align(make_config(tiny_llama, out, stages))
    for stage in ("reward", "safety"):
        lines = metrics(out / stage)
        assert abs(lines[0]["margin"]) < 1e-5
        assert lines[-1]["margin"] > 0.2
        if LOSSES[SETTINGS[name]["loss"]].risk:
            assert list(lines[0])[7:11] == ["kl", "chosen_risk", "rejected_risk", "risk"]
            assert abs(lines[0]["kl"]) < 1e-4
            assert lines[-1]["kl"] > 0.05
            assert math.isfinite(lines[-1]["risk"])
        elif "kto" in name:
            assert lines[0]["kl"] == 0.0
            assert lines[-1]["kl"] >= 0
        else:
            assert "kl" not in lines[0]
    manifest = json.loads((out / "safety" / "psacpo.json").read_text())
    assert manifest["rows"]["scored"] == 32
    assert manifest["loss"] == SETTINGS[name]["loss"]


def test_reference_states_are_kept_where_they_are_small(
    five: Path, tiny_llama: Path, tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair's start is asked once; with no room for it, at every step; with the same numbers."""
    from psacpo.align import scoring

    asked: list[int] = []
    real = scoring.reference_states

    def counted(model: Any, base: Any, batch: Any, route: Route) -> Tensor:
        asked.append(len(batch["index"]))
        return real(model, base, batch, route)

    monkeypatch.setattr(scoring, "reference_states", counted)
    found = []
    for room in (1 << 20, 0):
        monkeypatch.setattr(scoring, "_KEPT_STATES", room)
        stage = {"name": "a", "data": five, "batch_size": 5, "max_steps": 3, "loss": "radpo2"}
        align(make_config(tiny_llama, tmp_path / str(room), [stage]))
        found.append((tmp_path / str(room) / "a" / "metrics.jsonl").read_text())
        assert sum(asked) == (5 if room else 15)
        asked.clear()
    assert found[0] == found[1]


def test_single_answers(tiny_llama: Path, five: Path, tmp_path: Path, make_config: Any) -> None:
    """Rows of one answer with a label, and of two, side by side in one batch; also where a step has one kind only."""
    ids = [[7, 8, 1], [9, 1], [10, 11, 12, 1], [13, 1]]
    rows = [
        Labelled(1, [5, 6], (ids[0],), (True,)),
        Labelled(2, [20], (ids[1], ids[2]), (False, False)),
        Labelled(3, [30, 31, 32], (ids[3],), (True,)),
    ]
    stage = {"name": "a", "data": five, "beta": 0.4, "batch_size": 3, "max_steps": 1, "loss": "kto"}
    trainer = make_trainer(make_config(tiny_llama, tmp_path / "out", [stage]), tmp_path, rows)
    outcome = trainer.fit()
    (line,) = outcome.metrics
    assert line["loss"] == pytest.approx(0.5)
    assert outcome.scored == 3
    shown = trainer.objective.record({"loss": 0.5, "chosen_logratio": 1.0, "rejected_logratio": math.nan, "kl": 0.0})
    assert shown == {"loss": 0.5, "margin": None, "chosen_logratio": 1.0, "rejected_logratio": None, "kl": 0.0}


def test_pairs_want_pairs() -> None:
    stage = Stage.model_validate({"name": "a", "data": "d"})
    with pytest.raises(InputError, match="dpo learns from pairs.*or loss kto"):
        objective_of([Labelled(1, [5], ([6],), (True,))], stage, 0.1, 0)


def test_mismatched_answers() -> None:
    """Every answer is given once, never behind its own prompt; seeded; no longer than the longest example."""
    prompts = [[5], [5], [5], [6, 7], [8], [9]]
    rows = [labelled(Pair(n, prompt, [10 + n, 1], [20 + n])) for n, prompt in enumerate(prompts)]
    found = mismatched(rows, 0)
    assert [one.prompt for one in found] == prompts
    assert sorted(one.answers for one in found) == sorted(one.answers for one in rows)
    giver = {one.answers[1][0]: one for one in rows}
    assert all(giver[one.answers[1][0]].prompt != one.prompt for one in found)
    assert found == mismatched(rows, 0) != mismatched(rows, 1)
    long = mismatched([labelled(Pair(1, [5] * 8, [6], [7])), labelled(Pair(2, [5], [6] * 7, [7] * 5))], 0)
    assert [list(map(len, one.answers)) for one in long] == [[1, 1], [1, 1]]
    with pytest.raises(InputError, match="3 of 4 rows with one prompt"):
        mismatched(rows[:4], 0)


def test_safe_answers_come_first() -> None:
    pairs = [Pair(n, [5], [n], [10 + n]) for n in range(1, 5)]
    safe = {1: (True, True), 2: (True, False), 3: (False, True), 4: (False, False)}
    counts: dict[str, int] = {}
    found = safe_first(pairs, safe, counts)
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in found] == [
        ([1], [11], 0.0),
        ([2], [12], 1.0),
        ([13], [3], 1.0),
    ]
    assert counts == {"swapped": 1, "unsafe": 1}


@pytest.mark.parametrize("loss", ["modpo", "safedpo"])
def test_a_loss_that_goes_by_margins_needs_some(loss: str) -> None:
    stage = Stage.model_validate({"name": "a", "data": "rows.jsonl", "loss": loss})
    pairs = [Pair(n, [5], [6], [7]) for n in (1, 2)]
    with pytest.raises(InputError, match=f"stage 'a': {loss} needs .*(margin column|safe)"):
        objective_of(pairs, stage, 0.1, 0)
    objective_of([*pairs, Pair(3, [5], [6], [7], margin=1.0)], stage, 0.1, 0)


# Imports once and then becomes two processes.
SCRIPT = """
import os, sys, json, torch
from psacpo.align import AlignConfig, align
import psacpo.align.stages, psacpo.align.trainer
torch.set_num_threads(1)
children = []
for rank in "01":
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    align(AlignConfig.model_validate(json.loads(sys.argv[1])))
    sys.exit()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_two_processes_are_one(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Any
) -> None:
    """Real processes over gloo: batches of 2 x 4 against batches of 8, KTO and then RSA on it."""
    data = write_rows(tmp_path / "rows.jsonl", rows(24))
    kinds = [SETTINGS["kto"] | {"name": "kto"}, SETTINGS["radpo2-cvar"] | {"name": "rsa"}]
    configs = {
        name: make_config(
            tiny_llama, tmp_path / name, [{"data": data, "batch_size": size, "max_steps": 2} | kind for kind in kinds]
        )
        for name, size in (("one", 8), ("two", 4))
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, configs["two"].model_dump_json(by_alias=True)]
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(command, env=shared, stderr=subprocess.PIPE, text=True) as running:
        align(configs["one"])
        _, said = running.communicate(timeout=240)
    assert running.returncode == 0, said[-2000:]
    for kind in kinds:
        manifest = json.loads((tmp_path / "two" / kind["name"] / "psacpo.json").read_text())
        assert manifest["rows"]["scored"] == manifest["rows"]["drawn"] == 16
        for one, two in zip(*(metrics(tmp_path / name / kind["name"]) for name in ("one", "two")), strict=True):
            for key, value in one.items():
                assert value == pytest.approx(two[key], rel=2e-3, abs=1e-4), (kind["name"], key)


def test_a_head_that_does_more_is_asked_for_all_logits(tmp_path: Path) -> None:
    """Gemma 2 caps its logits: risks come out of what the model itself gives."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from psacpo.align.drift import answer_risks, plain_head, reference_states
    from psacpo.align.layout import LAYOUTS

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=64, final_logit_softcapping=1.0)
    model: Any = Gemma2ForCausalLM(config).eval()
    route = Route("shared", "model")
    assert plain_head(model, route) is None
    batch = LAYOUTS["shared"]([Pair(1, [5, 6], [7, 8, 1], [9, 1])], 0)
    states = reference_states(model, model, batch, route).detach() + 0.3
    found = answer_risks(model, model, batch, route, states, "erm", 2.0, torch.tensor([1.0, 0.5]))
    whole = torch.cat([alone(model, [5, 6], [7, 8, 1]), alone(model, [5, 6], [9, 1])])
    expected = token_risk(whole, states, "erm", 2.0)
    torch.testing.assert_close(found.risks[batch["completion_mask"]], expected, rtol=0, atol=1e-5)
