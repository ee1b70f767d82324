"""Log-probabilities of given tokens out of hidden states, without ever holding all logits. Pure tensors.

N tokens are predicted out of hidden states of size D over a vocabulary of V. All logits would be N * V numbers, and
training holds several such arrays at once. Here at most `chunk` rows of logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from psacpo.align.logprobs import token_log_probs
from psacpo.align.scratch import Scratch

# Bytes of one chunk's float32 logits: large enough for full speed of the matrix products, small beside activations.
_CHUNK_BYTES = {"cpu": 1 << 25}
_CHUNK_BYTES_ELSEWHERE = 1 << 28


def chunk_rows(vocabulary: int, device: str) -> int:
    """How many rows of logits to hold at a time, at least 16: a matter of speed and memory, not of results."""
    return max(16, _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary))


def frozen_head_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(hidden W^T + b)[target] of each token, under a head that is not trained.

    The derivative of a token's log-probability with respect to its hidden state is one vector, W[target] - p W with
    p the softmax. It is computed beside the log-probability while the chunk's logits are there and kept (N * D
    numbers), so that the backward pass is one multiplication: two matrix products in all, where recomputing the
    logits takes three. The backward pass reads no weight, so a sharded head need not be gathered for it.

    Under autocast the products are in autocast's dtype. The softmax is in float32 always.

    Args:
        hidden: Shape (N, D).
        weight: Shape (V, D), without gradient.
        bias: Shape (V,), without gradient, or None.
        targets: Shape (N,).
        chunk: Rows of logits held at a time.

    Returns:
        Shape (N,), float32, in nats.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        bias = None if bias is None else bias.detach().to(dtype)
        found: Tensor = _FrozenHead.apply(hidden.to(dtype), weight.detach().to(dtype), bias, targets, chunk)  # type: ignore[no-untyped-call]
        return found


class _FrozenHead(torch.autograd.Function):
    """`frozen_head_log_probs` in one dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        differentiable = ctx.needs_input_grad[0]
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        jacobian = torch.empty_like(hidden) if differentiable else None
        scratch = Scratch()
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            out = scratch.rows("logits", len(rows), len(weight), weight.dtype, weight.device)
            products = torch.mm(rows, weight.T, out=out) if bias is None else torch.addmm(bias, rows, weight.T, out=out)
            logits = products.float()
            peak = logits.amax(dim=1, keepdim=True)
            picked = logits.gather(1, wanted) - peak
            scaled = logits.sub_(peak).exp_()
            total = scaled.sum(dim=1, keepdim=True)
            found[start : start + chunk] = (picked - total.log()).squeeze(1)
            if jacobian is not None:
                expected = (scaled.to(weight.dtype) @ weight).float() / total
                jacobian[start : start + chunk] = weight[wanted.squeeze(1)] - expected
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return (gradients[0][:, None] * jacobian).to(jacobian.dtype), None, None, None, None


def recomputed_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(head(hidden))[target] of each token, for a head that may be trained itself or is more than a matrix.

    Each chunk's logits are computed again in the backward pass.

    Args:
        head: From hidden states (n, D) to logits (n, V).
        hidden: Shape (N, D).
        targets: Shape (N,).
        chunk: Rows of logits held at a time.

    Returns:
        Shape (N,), float32, in nats.
    """

    def score(rows: Tensor, wanted: Tensor) -> Tensor:
        return token_log_probs(head(rows), wanted)

    parts = [(hidden[at : at + chunk], targets[at : at + chunk]) for at in range(0, len(hidden), chunk)]
    return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])
