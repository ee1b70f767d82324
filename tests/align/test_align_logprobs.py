"""Log-probabilities of answers: by hand, without prompt and padding, and however the model leaves logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from psacpo.align import forward
from psacpo.align.forward import Selection, batch_log_probs, logits_selection
from psacpo.align.logprobs import predicting_mask, sequence_log_probs, token_log_probs
from psacpo.align.pairs import Pair, collate

PAIRS = [Pair(1, [5, 6, 7], [8, 9, 1], [10, 1]), Pair(2, [11], [12, 13, 14, 15, 16, 1], [17, 1])]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    path = request.getfixturevalue(f"tiny_{request.param}")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_by_hand() -> None:
    """Row 1 is [a, b | c, d], row 2 [a | c], V = 4. Logits that are log-probabilities up to a constant:

    predicting c in row 1: p = (.1, .2, .3, .4), token 2 -> log .3;  d in row 1: uniform -> log .25
    predicting c in row 2: p = (.7, .1, .1, .1), token 0 -> log .7
    """
    ids = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 2]])
    answered = torch.tensor([[False, False, True, True], [False, True, False, False]])
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]).log() + 3
    assert predicting_mask(answered).tolist() == [[False, True, True, False], [True, False, False, False]]
    found = sequence_log_probs(logits, ids, answered)
    assert found.exp().tolist() == pytest.approx([0.3 * 0.25, 0.7], rel=1e-6)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = token_log_probs(logits, torch.tensor([1, 2, 3]))
    exact = logits.double().log_softmax(1)[torch.arange(3), torch.tensor([1, 2, 3])]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def naive_log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """One sequence by itself, no padding, all logits, one token after the other."""
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(prompt) + place - 1, token]) for place, token in enumerate(answer))


@pytest.mark.parametrize("selection", ["mask", "positions", "all"])
def test_padded_batch_gives_what_each_row_gives_alone(model: Any, selection: Selection) -> None:
    if selection == "mask" and logits_selection(model) != "mask":
        pytest.skip("this transformers' models take no mask of logits to keep")
    with torch.no_grad():
        found = batch_log_probs(model, collate(PAIRS, 2), selection)
    alone = [naive_log_prob(model, pair.prompt, pair.chosen) for pair in PAIRS]
    alone += [naive_log_prob(model, pair.prompt, pair.rejected) for pair in PAIRS]
    assert found.tolist() == pytest.approx(alone, abs=2e-5)


def test_what_padding_holds_does_not_matter(model: Any) -> None:
    with torch.no_grad():
        one, other = (batch_log_probs(model, collate(PAIRS, pad), logits_selection(model)) for pad in (2, 99))
    assert one.tolist() == other.tolist()


def test_only_answer_tokens_count(model: Any) -> None:
    """No gradient reaches logits that predict the prompt or padding, and every one that predicts an answer has some."""
    batch = collate(PAIRS, 2)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    logits.requires_grad_()
    mask = predicting_mask(batch["completion_mask"])
    sequence_log_probs(logits[mask], batch["input_ids"], batch["completion_mask"]).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).tolist() == mask.tolist()


def test_selection_asks_for_no_more_logits_than_needed(model: Any) -> None:
    batch = collate(PAIRS, 2)
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    batch_log_probs(model, batch, logits_selection(model))
    hook.remove()
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in PAIRS)
    # Where a model takes no mask, the columns that hold an answer in any row are computed for all rows.
    columns = int(predicting_mask(batch["completion_mask"]).any(dim=0).sum()) * len(batch["input_ids"])
    assert seen == [answers if logits_selection(model) == "mask" else columns]
    assert columns < batch["input_ids"].numel()


def test_selection_of_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None: ...

    class OneList(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> None: ...

    assert logits_selection(Plain()) == "all"
    assert logits_selection(OneList()) == "positions"
    # A release whose helper knows lists of positions only, applied to every row.
    monkeypatch.setitem(OneList.forward.__globals__, "slice_logits_to_keep", lambda hidden, keep: hidden[:, keep])
    assert logits_selection(OneList()) == "positions"
    assert forward.logits_selection is logits_selection


def test_naive_reference_is_right(tiny_llama: Path) -> None:
    """The oracle above against the model's own loss: the mean over answer tokens of -log p."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    labels = torch.tensor([[-100, -100, -100, 8, 9, 1]])
    with torch.no_grad():
        loss = model(torch.tensor([[5, 6, 7, 8, 9, 1]]), labels=labels).loss
    assert naive_log_prob(model, [5, 6, 7], [8, 9, 1]) == pytest.approx(-3 * loss.item(), abs=1e-4)
