"""The theorem behind stepwise alignment, on policies whose answers can all be counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from psacpo.align.examples import Labelled
from psacpo.align.forward import Route, answer_log_probs
from psacpo.align.layout import LAYOUTS
from psacpo.align.losses import Options, PairTerms, dpo

TOKENS, PROMPT = 4, [5, 6]
ANSWERS = [[first, second] for first in range(TOKENS) for second in range(TOKENS)]
BETA, LAMBDA = 0.5, 2.0


def policy(seed: int = 0) -> Any:
    """A real language model in float64 that can say four words; here it always says two of them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config).double()
    model.config.use_cache = False
    return model


def log_probs(model: Any) -> Tensor:
    """Of all sixteen answers, normalised over them: one row with sixteen answers behind one prompt. Shape (16,)."""
    batch = LAYOUTS["shared"]([Labelled(1, PROMPT, tuple(ANSWERS), (True,) * len(ANSWERS))], 0)
    return answer_log_probs(model, model, batch, Route("shared", "model")).sum(dim=1).log_softmax(0)


def align(model: Any, score: Tensor, beta: float) -> Tensor:
    """Train with DPO against what the model is now, on all pairs, labelled as Bradley and Terry would; its end."""
    with torch.no_grad():
        reference = log_probs(model)
    wins = torch.sigmoid(score[:, None] - score[None, :])
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        ratios = log_probs(model) - reference
        losses = dpo(PairTerms(ratios[:, None].expand(16, 16), ratios[None, :].expand(16, 16)), Options(beta))
        loss = (wins * losses).mean()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return log_probs(model)


@pytest.fixture(scope="module")
def scores() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    reward, safety = torch.rand(2, 16, generator=make, dtype=torch.float64)
    return reward, safety


def test_answers_are_scored_as_if_alone() -> None:
    """Sixteen answers behind one prompt in one row: the chain rule over plain forwards, up to the norm."""
    model = policy()
    with torch.no_grad():
        alone = []
        for first, second in ANSWERS:
            logits = model(torch.tensor([[*PROMPT, first, second]])).logits[0].log_softmax(-1)
            alone.append(logits[1, first] + logits[2, second])
        torch.testing.assert_close(log_probs(model), torch.stack(alone).log_softmax(0), rtol=0, atol=1e-5)


def test_stepwise_is_joint(scores: tuple[Tensor, Tensor]) -> None:
    """SACPO Theorem 1 with trained policies: reward and then safety under beta/lambda, safety and then reward, and both
    at once all end at pi_ref exp((r + lambda g) / beta) / Z."""
    reward, safety = scores
    with torch.no_grad():
        base = log_probs(policy())
    optimum = (base + (reward + LAMBDA * safety) / BETA).log_softmax(0)

    model = policy()
    first = align(model, reward, BETA)
    torch.testing.assert_close(first, (base + reward / BETA).log_softmax(0), rtol=0, atol=1e-3)
    stepwise = align(model, safety, BETA / LAMBDA)
    model = policy()
    align(model, safety, BETA / LAMBDA)
    reverse = align(model, reward, BETA)
    joint = align(policy(), reward + LAMBDA * safety, BETA)
    for found in (stepwise, reverse, joint):
        torch.testing.assert_close(found, optimum, rtol=0, atol=2e-3)
    assert (first - optimum).abs().max() > 0.1


def test_mixtures_are_the_optima_of_smaller_lambdas(scores: tuple[Tensor, Tensor]) -> None:
    """pi_r^(1-q) pi_s^q, normalised, is the exact optimum at q lambda: what merging approximates."""
    reward, safety = scores
    base = torch.zeros(16, dtype=torch.float64).log_softmax(0)
    first = (base + reward / BETA).log_softmax(0)
    last = (first + LAMBDA * safety / BETA).log_softmax(0)
    for q in (0.25, 0.5, 0.9):
        mixed = ((1 - q) * first + q * last).log_softmax(0)
        torch.testing.assert_close(mixed, (base + (reward + q * LAMBDA * safety) / BETA).log_softmax(0))
