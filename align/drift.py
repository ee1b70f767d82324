"""Log-probabilities and risks of answers through a model's forward, against what its start gave for the same batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psacpo.align.forward import Route, head_replaced, logits_at, model_inputs
from psacpo.align.head import chunk_rows
from psacpo.align.layout import Batch
from psacpo.align.logprobs import in_place, token_log_probs
from psacpo.align.risk import RISKS, kl, risk_level, tilted_risk
from psacpo.align.token_losses import Head, TokenRisks, token_risks_from_hidden

# A chunk of a risk holds more arrays of logits' size than one of a log-probability: two on a CPU, eight elsewhere.
_SHARE = {"cpu": 2}
_SHARE_ELSEWHERE = 4


def plain_head(base: Any, route: Route) -> nn.Linear | None:
    """The model's output layer where logits are W h + b and nothing else, so that hidden states are enough; else None."""
    head = base.get_output_embeddings()
    plain = route.head == "chunked" and isinstance(head, nn.Linear) and head.weight.is_floating_point()
    return head if plain else None


def reference_states(model: Any, base: Any, batch: Batch, route: Route) -> Tensor:
    """What the reference has to be known by, of each token of the batch's answers, when the model is the reference.

    Returns:
        The output layer's inputs, of shape (N, D), under a plain head; else logits, of shape (N, V).
    """
    places = batch["predictors"][batch["completion_mask"]]
    inputs = model_inputs(base, batch)
    if plain_head(base, route) is None:
        return logits_at(model, base, inputs, places)
    with head_replaced(base, places, lambda rows: rows):
        found: Tensor = model(**inputs, use_cache=False).logits[0]
    return found


def answer_risks(
    model: Any,
    base: Any,
    batch: Batch,
    route: Route,
    states: Tensor,
    risk: str,
    level: float | None,
    slopes: Tensor,
    reference_head: Head | None = None,
) -> TokenRisks:
    """Log-probabilities under policy and reference and the policy's drift, at every token of every answer.

    Under a plain head at most some rows of logits exist at a time. A head with something behind it gives all of the
    answers' logits at once.

    Args:
        states: Of `reference_states` for the same batch.
        risk: A name in `risk.RISKS`.
        level: None for the measure's default.
        slopes: c of each answer: `log_probs` has the gradient of log q + c risk, and `risks` none. Shape (A,).
        reference_head: The reference's output layer where that is trained; None where it is the policy's.

    Returns:
        Each of shape (A, L), at least float32, in nats, 0 behind an answer's end.
    """
    mask = batch["completion_mask"]
    places, targets = batch["predictors"][mask], batch["targets"][mask]
    token_slopes = slopes[:, None].expand(mask.shape)[mask]
    inputs = model_inputs(base, batch)
    head = plain_head(base, route)
    if head is None:
        logits = logits_at(model, base, inputs, places)
        found = _whole(logits, states, targets, risk, risk_level(risk, level), token_slopes)
    else:
        plain = head
        chunk = max(
            16, chunk_rows(len(head.weight), states.device.type) // _SHARE.get(states.device.type, _SHARE_ELSEWHERE)
        )

        def score(rows: Tensor) -> Tensor:
            now = Head(plain.weight, plain.bias)
            return torch.stack(
                token_risks_from_hidden(
                    rows, now, states, targets, risk, level, chunk, reference_head=reference_head, slopes=token_slopes
                ),
                dim=1,
            )

        with head_replaced(base, places, score):
            found = model(**inputs, use_cache=False).logits[0]
    return TokenRisks(*(in_place(part, mask) for part in found.unbind(dim=1)))


def _whole(logits: Tensor, reference: Tensor, targets: Tensor, risk: str, level: float, slopes: Tensor) -> Tensor:
    """The four numbers of each token out of all logits. Shape (N, 4)."""
    log_probs, fixed = token_log_probs(logits, targets), token_log_probs(reference, targets)
    risks = tilted_risk(logits, reference, RISKS[risk].tilt, level)
    with torch.no_grad():
        divergences = risks if RISKS[risk].tilt is kl else tilted_risk(logits, reference, kl, 1.0)
    carried = slopes * risks
    log_probs = log_probs + carried - carried.detach()
    return torch.stack([log_probs, fixed.detach(), risks.detach(), divergences.detach()], dim=1)
