"""The next token of each row, by inverse transform: one uniform number a token, so rows never share randomness."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) that depend on `seed` alone, from the counter-based generator Philox."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def next_tokens(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Sample one token a row.

    Args:
        logits: [rows, vocabulary], any float type.
        uniform: [rows], in [0, 1): the quantile of each row's distribution to take.
        temperature: 0 takes the most likely token.
        top_p: Keep the smallest set of most likely tokens whose mass reaches it (Holtzman et al. 2020).
        top_k: Keep this many most likely tokens; 0 keeps all.

    Returns:
        [rows], int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        threshold = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays if the mass before it is short of top_p; the first one always stays.
        keep = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * keep)
    # float64: 128k float32 additions lose the tail that the last quantiles ask for.
    mass = probabilities.double().cumsum(dim=-1)
    target = uniform.to(mass)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=mass.shape[-1] - 1)
