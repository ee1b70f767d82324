"""Log-probabilities of tokens out of logits, in float32. Pure tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) of each token.

    Args:
        logits: Any floating dtype; brought to float32 at least before they are normalised. Shape (N, V).
        targets: Shape (N,).

    Returns:
        Shape (N,), float32 or float64, in nats.
    """
    return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def in_place(found: Tensor, completion_mask: Tensor) -> Tensor:
    """N tokens' values put where they belong, with 0 elsewhere, so that a sum over the last dimension is an answer's.

    Args:
        found: Answer by answer, in order. Shape (N,).
        completion_mask: With N places True. Shape (2B, L).

    Returns:
        Shape (2B, L).
    """
    return found.new_zeros(completion_mask.shape).masked_scatter(completion_mask, found)
