"""Log-probabilities of answers out of logits, over answer tokens only and in float32. Pure tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def predicting_positions(completion_mask: Tensor) -> Tensor:
    """The positions whose logits are needed: those that predict an answer token in at least one row.

    The token at position t is predicted at position t - 1, so position 0 is never a target and the last position
    never predicts.

    Args:
        completion_mask: True on answer tokens. Shape (B, T).

    Returns:
        Ascending positions, shape (U,), U < T. Logits of all other positions need not be computed.
    """
    return completion_mask[:, 1:].any(dim=0).nonzero().squeeze(1)


def token_log_probs(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """log pi(target) at each masked position, 0 elsewhere.

    Only masked rows are brought to float32 and normalised, so the largest extra tensor is (N, V) with N = mask.sum().

    Args:
        logits: Any floating dtype. Shape (B, U, V).
        targets: Token ids that those positions predict. Shape (B, U).
        mask: True where the target is an answer token. Shape (B, U).

    Returns:
        Shape (B, U), float32, in nats.
    """
    kept = mask.flatten().nonzero().squeeze(1)
    selected = logits.flatten(0, 1).index_select(0, kept).float()
    found = -F.cross_entropy(selected, targets.flatten().index_select(0, kept), reduction="none")
    return torch.zeros(mask.shape, dtype=torch.float32, device=logits.device).masked_scatter(mask, found)


def sequence_log_probs(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """log pi(answer | prompt) per row: the sum (never the mean) of `token_log_probs`. Shape (B,), float32, in nats."""
    return token_log_probs(logits, targets, mask).sum(dim=1)
