"""Log-probabilities of answers out of logits, over answer tokens only and in float32. Pure tensors.

The token at position t is predicted by the logits at position t - 1. N is the number of answer tokens in a batch of
B rows and T positions, taken row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def predicting_mask(completion_mask: Tensor) -> Tensor:
    """Where an answer token is predicted: one position before it. The last position never predicts.

    Args:
        completion_mask: True on answer tokens, never on the first position. Shape (B, T).

    Returns:
        Shape (B, T), with N positions True.
    """
    return F.pad(completion_mask[:, 1:], (0, 1))


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) of each answer token.

    Args:
        logits: Any floating dtype; brought to float32 before they are normalised. Shape (N, V).
        targets: The answer tokens. Shape (N,).

    Returns:
        Shape (N,), float32, in nats.
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sequence_log_probs(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(answer | prompt) per row: the sum, never the mean, over its answer tokens.

    Args:
        logits: At the N positions of `predicting_mask`, row by row; no others need to be computed. Shape (N, V).
        input_ids: Shape (B, T).
        completion_mask: True on answer tokens, never on the first position. Shape (B, T).

    Returns:
        Shape (B,), float32, in nats.
    """
    found = token_log_probs(logits, input_ids[completion_mask])
    placed = torch.zeros(completion_mask.shape, dtype=torch.float32, device=logits.device)
    return placed.masked_scatter(completion_mask, found).sum(dim=1)
