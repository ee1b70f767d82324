"""TRL's DPO trainer as the oracle: the same tokens, log-probabilities, loss and gradient from the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.align.data import Preference, Preferences
from psacpo.align.forward import batch_log_probs
from psacpo.align.losses import dpo_loss
from psacpo.align.pairs import collate, encode_rows

trl = pytest.importorskip("trl")
BETA = 0.3


def test_same_as_trl(tiny_qwen2: Path, tmp_path: Path, rows: Any) -> None:
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
    reference: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
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
    ours = collate(encode_rows(preferences, tokenizer, None, 512).pairs, tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["completion_mask"], theirs["completion_mask"].bool())

    with torch.no_grad():
        frozen = batch_log_probs(reference, ours, "mask").view(2, -1)
        expected = trainer.compute_ref_log_probs(reference, theirs)
    torch.testing.assert_close(frozen, torch.stack(list(expected)), rtol=0, atol=1e-4)

    policy.zero_grad()
    loss = trainer.compute_loss(policy, theirs)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    chosen, rejected = batch_log_probs(policy, ours, "mask").view(2, -1)
    found = dpo_loss(chosen, rejected, frozen[0], frozen[1], BETA)
    found.losses.mean().backward()
    assert found.losses.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    assert found.margins.abs().min() > 0.01
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
