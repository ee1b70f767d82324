"""Log-probabilities and risks out of hidden states in chunks: what all logits at once give, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psacpo.align.risk import token_risk
from psacpo.align.token_losses import Head, token_log_probs_from_hidden, token_risks_from_hidden

N, D, V = 11, 6, 40
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled and capped": {"scale": 0.5, "softcap": 3.0},
}


def inputs(kind: str, *, trained: bool) -> tuple[Head, Head, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    options = dict(HEADS[kind])
    bias = draw(V) if options.pop("bias", False) else None
    head = Head(2 * draw(V, D), bias, **options)
    other = Head(2 * draw(V, D), bias, **options)
    if trained:
        head = head._replace(weight=head.weight.requires_grad_())
    return head, other, draw(N, D).requires_grad_(), draw(N, D), torch.randint(V, (N,), generator=make)


def results(found: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Values, and the gradient of a fixed combination of those that have one."""
    make = torch.Generator().manual_seed(6)
    total = sum(
        (part * torch.randn(N, generator=make, dtype=torch.float64)).sum() for part in found if part.requires_grad
    )
    return [part.detach() for part in found] + list(torch.autograd.grad(total, leaves, retain_graph=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_log_probs_in_chunks_are_the_whole(kind: str, trained: bool, chunk: int) -> None:
    head, _, hidden, _, targets = inputs(kind, trained=trained)
    leaves = [hidden, head.weight] if trained else [hidden]
    whole = head.logits(hidden).log_softmax(1)[torch.arange(N), targets]
    found = token_log_probs_from_hidden(hidden, head, targets, chunk)
    for mine, theirs in zip(results((found,), leaves), results((whole,), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("risk", "level"), [("kl", None), ("cvar", 0.3), ("erm", 2.0), ("cvar_released", 0.9)])
def test_risks_in_chunks_are_the_whole(kind: str, trained: bool, risk: str, level: float | None) -> None:
    """Also against a reference with a head of its own."""
    head, other, hidden, reference, targets = inputs(kind, trained=trained)
    leaves = [hidden, head.weight] if trained else [hidden]
    rows = torch.arange(N)
    logits, fixed = head.logits(hidden), other.logits(reference)
    whole = (
        logits.log_softmax(1)[rows, targets],
        fixed.log_softmax(1)[rows, targets],
        token_risk(logits, fixed, risk, level),
        token_risk(logits.detach(), fixed, "kl"),
    )
    for chunk in (3, 64):
        found = token_risks_from_hidden(hidden, head, reference, targets, risk, level, chunk, reference_head=other)
        for mine, theirs in zip(results(found, leaves), results(whole, leaves), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("risk", "level"), [("kl", None), ("cvar", 0.3), ("erm", 2.0), ("cvar_released", 0.9)])
def test_slopes_carry_the_risks_gradient(trained: bool, risk: str, level: float | None) -> None:
    """log_probs keeps its value and has the gradient of log q + c risk."""
    head, _, hidden, reference, targets = inputs("plain", trained=trained)
    leaves = [hidden, head.weight] if trained else [hidden]
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64)
    apart = token_risks_from_hidden(hidden, head, reference, targets, risk, level, 4)
    joined = token_risks_from_hidden(hidden, head, reference, targets, risk, level, 4, slopes=slopes)
    for mine, theirs in zip(joined, apart, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach())
    assert not joined.risks.requires_grad
    weights = torch.linspace(1, -1, N, dtype=torch.float64)
    wanted = torch.autograd.grad(((apart.log_probs + slopes * apart.risks) * weights).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad((joined.log_probs * weights).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_under_autocast() -> None:
    """Products in bfloat16, everything behind them in float32."""
    make = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(N, D, generator=make) for _ in range(2))
    layer = nn.Linear(D, V)
    head, targets = Head(layer.weight.detach(), layer.bias.detach()), torch.arange(N)
    exact = token_risks_from_hidden(hidden, head, reference, targets, "cvar", 0.5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_risks_from_hidden(hidden.requires_grad_(), head, reference, targets, "cvar", 0.5, 4)
    found.log_probs.sum().backward()
    assert hidden.grad is not None
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - theirs).abs().max() < 0.05


def test_no_chunk_outlives_itself() -> None:
    """What the frozen head keeps for its backward pass is one or two N x D arrays, however large the vocabulary."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    head, _, hidden, reference, targets = inputs("plain", trained=False)
    for slopes, arrays in ((None, 2), (torch.ones(N, dtype=torch.float64), 1)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            token_risks_from_hidden(hidden, head, reference, targets, "cvar", 0.5, 4, slopes=slopes)
        assert sum(kept) == arrays * N * D
