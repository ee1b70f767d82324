"""Log-probabilities of answers: by hand, without prompt and padding, and however the logits are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from psacpo.align import forward
from psacpo.align.examples import Pair
from psacpo.align.forward import PLAIN, Route, Selection, answer_log_probs, logits_selection
from psacpo.align.head import chunk_rows, frozen_head_log_probs, recomputed_log_probs
from psacpo.align.layout import LAYOUTS, Layout
from psacpo.align.logprobs import in_place, token_log_probs

PAIRS = [Pair(1, [5, 6, 7], [8, 9, 1], [10, 1]), Pair(2, [11], [12, 13, 14, 15, 16, 1], [17, 1])]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    path = request.getfixturevalue(f"tiny_{request.param}")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_by_hand() -> None:
    """Two answers of 2 and 1 tokens, V = 4. Logits that are log-probabilities up to a constant:

    answer 1: p = (.1, .2, .3, .4), token 2 -> log .3;  uniform -> log .25
    answer 2: p = (.7, .1, .1, .1), token 0 -> log .7
    """
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]).log() + 3
    targets, mask = torch.tensor([2, 3, 0]), torch.tensor([[True, True], [True, False]])
    found = in_place(token_log_probs(logits, targets), mask)
    assert found.sum(dim=1).exp().tolist() == pytest.approx([0.3 * 0.25, 0.7], rel=1e-6)
    # The same through a head that is the identity: the hidden states are the logits.
    assert frozen_head_log_probs(logits, torch.eye(4), None, targets, 2).tolist() == pytest.approx(
        [-1.2039728, -1.3862944, -0.3566749], abs=1e-6
    )


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([1, 2, 3])
    exact = logits.double().log_softmax(1)[torch.arange(3), targets]
    for found in (
        token_log_probs(logits, targets),
        frozen_head_log_probs(logits, torch.eye(1000).bfloat16(), None, targets, 2),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@given(
    count=st.integers(1, 9),
    size=st.integers(1, 5),
    vocabulary=st.integers(2, 11),
    chunk=st.integers(1, 10),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_chunks_are_the_whole(count: int, size: int, vocabulary: int, chunk: int, bias: bool, seed: int) -> None:
    """Values and gradients of both heads against autograd through all logits at once."""
    make = torch.Generator().manual_seed(seed)
    head = nn.Linear(size, vocabulary, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=make))
    hidden = torch.randn(count, size, generator=make).requires_grad_()
    targets = torch.randint(vocabulary, (count,), generator=make)
    upstream = torch.randn(count, generator=make)

    whole = head(hidden).log_softmax(1)[torch.arange(count), targets]
    whole.backward(upstream)
    expected = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
    hidden.grad = None
    head.zero_grad()

    found = recomputed_log_probs(head, hidden, targets, chunk)
    found.backward(upstream)
    torch.testing.assert_close(found, whole)
    for mine, theirs in zip([hidden.grad, *(p.grad for p in head.parameters())], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    hidden.grad = None
    found = frozen_head_log_probs(hidden, head.weight, head.bias, targets, chunk)
    found.backward(upstream)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    found = frozen_head_log_probs(torch.tensor([[300.0, -300.0]]), torch.eye(2), None, torch.tensor([1]), 1)
    assert found.tolist() == [-600.0]


def test_frozen_head_under_autocast() -> None:
    """In bfloat16 as the model's own head would be, and close to float32."""
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 32, generator=make), torch.randn(50, 32, generator=make) / 8
    targets = torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = frozen_head_log_probs(hidden.requires_grad_(), weight, None, targets, 4)
        own = token_log_probs(nn.functional.linear(hidden, weight), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, own)
    exact = token_log_probs(hidden @ weight.T, targets)
    assert 0 < (found - exact).abs().max() < 0.05
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_chunks_hold_few_logits() -> None:
    assert chunk_rows(32000, "cpu") * 32000 * 4 <= 2**25
    assert chunk_rows(2**30, "cpu") == 16


def naive_log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """One sequence by itself, no padding, all logits, one token after the other."""
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(prompt) + place - 1, token]) for place, token in enumerate(answer))


SELECTIONS: list[tuple[Route, Selection]] = [
    (Route("padded", "chunked"), "mask"),
    (Route("shared", "chunked"), "mask"),
    *((Route(layout, "model"), selection) for layout in LAYOUTS for selection in ("mask", "positions", "all")),
]


@pytest.mark.parametrize(("route", "selection"), SELECTIONS, ids=str)
def test_batch_gives_what_each_answer_gives_alone(
    model: Any, route: Route, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    if selection == "mask" and logits_selection(model) != "mask":
        pytest.skip("this transformers' models take no mask of logits to keep")
    monkeypatch.setattr(forward, "logits_selection", lambda _: selection)
    with torch.no_grad():
        found = answer_log_probs(model, model, LAYOUTS[route.layout](PAIRS, 2), route)
    alone = [naive_log_prob(model, pair.prompt, pair.chosen) for pair in PAIRS]
    alone += [naive_log_prob(model, pair.prompt, pair.rejected) for pair in PAIRS]
    assert found.sum(dim=1).tolist() == pytest.approx(alone, abs=2e-5)
    assert (found != 0).sum(dim=1).tolist() == [3, 6, 2, 2]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_what_padding_holds_does_not_matter(model: Any, layout: Layout) -> None:
    route = Route(layout, "chunked")
    with torch.no_grad():
        one, other = (answer_log_probs(model, model, LAYOUTS[layout](PAIRS, pad), route) for pad in (2, 99))
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_no_more_logits_than_needed(model: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own head is asked for the places that predict, the one in chunks for the answers' tokens."""
    batch = LAYOUTS[layout](PAIRS, 2)
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in PAIRS)
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    answer_log_probs(model, model, batch, Route(layout, "model"))
    hook.remove()
    if logits_selection(model) == "mask":
        # In a shared row one place predicts the first token of both answers.
        assert seen == [answers - 2 if layout == "shared" else answers]
    assert seen[0] < batch["input_ids"].numel()

    def spy(hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(len(hidden))
        return frozen_head_log_probs(hidden, *rest)

    model.requires_grad_(False)
    monkeypatch.setattr(forward, "frozen_head_log_probs", spy)
    answer_log_probs(model, model, batch, Route(layout, "chunked"))
    model.requires_grad_(True)
    assert seen[1:] == [answers]


def test_head_that_is_trained_gets_its_gradient(model: Any) -> None:
    gradients = []
    for route in (PLAIN, Route("padded", "chunked")):
        model.zero_grad()
        answer_log_probs(model, model, LAYOUTS["padded"](PAIRS, 2), route).sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_model_is_as_before_afterwards(model: Any) -> None:
    """Also when a forward fails inside."""
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    batch = LAYOUTS["padded"](PAIRS, 2)
    answer_log_probs(model, model, batch, Route("padded", "chunked"))
    with pytest.raises(IndexError):
        answer_log_probs(model, model, batch | {"input_ids": batch["input_ids"] + 9999}, Route("padded", "chunked"))
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in model.lm_head.__dict__


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


def test_naive_reference_is_right(tiny_llama: Path) -> None:
    """The oracle above against the model's own loss: the mean over answer tokens of -log p."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    labels = torch.tensor([[-100, -100, -100, 8, 9, 1]])
    with torch.no_grad():
        loss = model(torch.tensor([[5, 6, 7, 8, 9, 1]]), labels=labels).loss
    assert naive_log_prob(model, [5, 6, 7], [8, 9, 1]) == pytest.approx(-3 * loss.item(), abs=1e-4)
