"""TRL's trainers as the oracle: the same tokens, log-probabilities, loss and gradient from the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.align.data import Preference, Preferences
from psacpo.align.examples import labelled, mismatched
from psacpo.align.forward import Route, answer_log_probs
from psacpo.align.layout import LAYOUTS, Batch
from psacpo.align.losses import LOSSES, AnswerTerms, Options, PairTerms, kl_baseline, kto
from psacpo.align.pairs import encode_rows

trl = pytest.importorskip("trl")
BETA = 0.3


def answers(batch: Batch) -> torch.Tensor:
    """True where `padded_rows` has an answer's token: one place behind the one that predicts it."""
    found = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    found[batch["predictors"][batch["completion_mask"]] + 1] = True
    return found.view(batch["input_ids"].shape)


def two_models(path: Path) -> tuple[Any, Any]:
    """A reference and a policy that has moved from it."""
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return reference, policy


def gradients(policy: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return found


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of the whole gradient's size."""
    size = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    difference = torch.stack([(mine[name] - theirs[name]).norm() for name in theirs]).norm()
    assert size > 1e-3
    assert difference <= 1e-5 * size


ROUTES = [Route("shared", "chunked"), Route("padded", "model")]


@pytest.mark.parametrize(("name", "route"), [("dpo", ROUTES[0]), ("dpo", ROUTES[1]), ("ipo", ROUTES[0])], ids=str)
def test_same_as_trl(name: str, route: Route, tiny_qwen2: Path, tmp_path: Path, rows: Any) -> None:
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    given = [
        {
            "prompt": message("user", row["prompt"]),
            "chosen": message("assistant", row["chosen"]),
            "rejected": message("assistant", row["rejected"]),
        }
        for row in rows(6)
    ]
    reference, policy = two_models(tiny_qwen2)
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        loss_type=["sigmoid" if name == "dpo" else name],
        per_device_train_batch_size=6,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(given),
    )
    theirs = trainer.data_collator([trainer.train_dataset[place] for place in range(6)])

    preferences = Preferences("rows", [Preference(n, **row) for n, row in enumerate(rows(6), start=1)], "0")
    pairs = encode_rows(preferences, tokenizer, None, 512).pairs
    padded = LAYOUTS["padded"](pairs, tokenizer.pad_token_id)
    assert torch.equal(padded["input_ids"], theirs["input_ids"])
    assert torch.equal(padded["attention_mask"], theirs["attention_mask"])
    assert torch.equal(answers(padded), theirs["completion_mask"].bool())
    ours = LAYOUTS[route.layout](pairs, tokenizer.pad_token_id)

    with torch.no_grad():
        frozen = answer_log_probs(reference, reference, ours, route).sum(dim=1).view(2, -1)
        expected = trainer.compute_ref_log_probs(reference, theirs)
    torch.testing.assert_close(frozen, torch.stack(list(expected)), rtol=0, atol=1e-4)

    policy.zero_grad()
    loss = trainer.compute_loss(policy, theirs)
    loss.backward()
    wanted = gradients(policy)
    scores = answer_log_probs(policy, policy, ours, route).sum(dim=1).view(2, -1)
    chosen, rejected = scores - frozen
    lengths = ours["completion_mask"].sum(dim=1).view(2, -1)
    function = LOSSES[name].pairs
    assert function is not None
    found = function(PairTerms(chosen, rejected, *lengths), Options(BETA)).mean()
    found.backward()
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert (chosen - rejected).abs().min() > 0.01
    assert_close(gradients(policy), wanted)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.4)])
def test_kto_is_trls(weights: tuple[float, float], tiny_qwen2: Path, tmp_path: Path, rows: Any) -> None:
    """Its loss and gradient on the same answers, with the same answers behind foreign prompts for the baseline."""
    from datasets import Dataset
    from trl.trainer.kto_trainer import KTOConfig, KTOTrainer

    # This way round the mismatched answers have become likelier, so the baseline is above 0.
    policy, reference = two_models(tiny_qwen2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    preferences = Preferences("rows", [Preference(n, **row) for n, row in enumerate(rows(5), start=1)], "0")
    own = [labelled(pair) for pair in encode_rows(preferences, tokenizer, None, 512).pairs]
    apart = mismatched(own, 0)
    arguments = KTOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        per_device_train_batch_size=10,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    given = [{"prompt": "how", "completion": " help", "label": bool(place % 2)} for place in range(4)]
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(given),
    )
    theirs = trainer.data_collator(
        [
            {"prompt_ids": one.prompt, "completion_ids": answer, "KL_completion_ids": foreign, "label": label}
            for one, other in zip(own, apart, strict=True)
            for answer, foreign, label in zip(one.answers, other.answers, one.desirable, strict=True)
        ]
    )
    policy.zero_grad()
    loss = trainer.compute_loss(policy, theirs)
    loss.backward()
    wanted = gradients(policy)

    def ratios(examples: Any) -> torch.Tensor:
        batch = LAYOUTS["shared"](examples, tokenizer.pad_token_id)
        with torch.no_grad():
            frozen = answer_log_probs(reference, reference, batch, ROUTES[0]).sum(dim=1)
        return answer_log_probs(policy, policy, batch, ROUTES[0]).sum(dim=1) - frozen

    baseline = kl_baseline(ratios(apart))
    labels = torch.tensor([one.desirable[slot] for slot in range(2) for one in own])
    options = Options(BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
    found = kto(AnswerTerms(ratios(own), labels, baseline), options).mean()
    found.backward()
    assert baseline > 0.001
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_close(gradients(policy), wanted)
