"""The probability of given answers: what a forward pass over a prompt and its answer says of the answer's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from psacpo.evalharness.engines.base import Passage

# Logits of one forward pass; with them in float32 and their softmax, 1 GiB.
_MOST_LOGITS = 2**27


def answer_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each answer: sum over its tokens of log p(token | what stands before it).

    Args:
        logits: [rows, length, vocabulary], any float type; at each place those that say what comes there.
        tokens: [rows, length], int64.
        mask: [rows, length]; 0 where a row's answer has ended.

    Returns:
        [rows], float64: sums over long answers keep their last digits.
    """
    found = torch.stack(
        [
            row.float().log_softmax(dim=-1).gather(-1, own[:, None])[:, 0]
            for row, own in zip(logits, tokens, strict=True)  # one row at a time: a copy of all logits is large
        ]
    )
    return torch.where(mask.bool(), found, 0.0).double().sum(dim=-1)


def by_memory(passages: Sequence[Passage], vocabulary: int) -> Iterator[Sequence[Passage]]:
    """Runs of passages, in their order, whose logits fit into memory together; one that never fits goes alone."""
    start, longest = 0, 0
    for place, passage in enumerate(passages):
        longest = max(longest, len(passage.token_ids) + 1)
        if place > start and (place + 1 - start) * longest * vocabulary > _MOST_LOGITS:
            yield passages[start:place]
            start, longest = place, len(passage.token_ids) + 1
    if start < len(passages):
        yield passages[start:]
