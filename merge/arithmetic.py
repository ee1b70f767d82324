"""The mathematics of merging low-rank updates: tensors in, tensors out.

An adapter changes a weight W [outputs, inputs] by delta = scale * B @ A with A [rank, inputs] and B [outputs, rank]
(LoRA, arXiv 2106.09685, section 4.1). A weighted sum of such deltas is one of them again, of the summed rank:

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] @ [A_1; A_2; ...]

Summing the A and B matrices themselves is not that sum: it adds the cross terms B_1 A_2 and B_2 A_1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Elements of a weight that are held in float32 at once while a delta is added to it: 64 MiB.
_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's low-rank update, delta = scale * B @ A.

    Attributes:
        A: Shape [rank, inputs].
        B: Shape [outputs, rank].
        scale: The factor before the product.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta, [outputs, inputs]."""
        return self.B.shape[0], self.A.shape[1]

    def transposed(self) -> Factors:
        """The factors of delta^T [inputs, outputs], for weights that are stored the other way round."""
        return Factors(A=self.B.T, B=self.A.T, scale=self.scale)


def lora_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def stack(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors of sum_i weights[i] * delta_i with scale 1, of the summed rank, in float32.

    Weight and scale are folded into B in float64 and rounded once, so that the product differs from the float64 sum by
    float32 rounding only.

    Args:
        factors: Updates of one weight, all [outputs, inputs]; ranks may differ.
        weights: One number for each, of any sign; zero keeps its rows.

    Raises:
        ValueError: Nothing to stack, lengths differ, or shapes differ.
    """
    if not factors or len(factors) != len(weights):
        raise ValueError(f"{len(factors)} updates for {len(weights)} weights")
    if len({update.shape for update in factors}) != 1:
        raise ValueError(f"updates of different shapes: {[update.shape for update in factors]}")
    pairs = zip(factors, weights, strict=True)
    return Factors(
        A=torch.cat([update.A.float() for update in factors]),
        B=torch.cat([folded(update, weight).float() for update, weight in pairs], dim=1),
    )


def folded(factors: Factors, weight: float, rows: slice | None = None) -> torch.Tensor:
    """weight * scale * B, some rows of it or all, multiplied in float64 and rounded once: float32, float64 if B is."""
    B = factors.B if rows is None else factors.B[rows]
    wide = torch.promote_types(B.dtype, torch.float32)
    return (B.double() * (weight * factors.scale)).to(wide)


def dense_delta(factors: Factors, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """scale * B @ A, shape [outputs, inputs], computed in `dtype`."""
    return (factors.B.to(dtype) @ factors.A.to(dtype)) * factors.scale


def interpolate(base: torch.Tensor, trained: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """base + sum_i weights[i] * (trained[i] - base), computed in the tensors' own dtype.

    As (1 - sum_i weights[i]) * base + sum_i weights[i] * trained[i], so that a weight of 1 with the rest 0 gives the
    bits of its tensor back; `base` itself where no weight counts. Never changes its arguments.

    Args:
        base: Any shape.
        trained: Same shape each.
        weights: One number for each, of any sign.

    Raises:
        ValueError: Another number of weights than tensors.
    """
    pairs = [pair for pair in zip(trained, weights, strict=True) if pair[1] != 0]
    if not pairs:
        return base
    rest = 1.0 - math.fsum(weight for _, weight in pairs)
    if rest == 0 and len(pairs) == 1:
        return pairs[0][0]
    total = pairs[0][0] * pairs[0][1]
    for tensor, weight in pairs[1:]:
        total.add_(tensor, alpha=weight)
    return total.add_(base, alpha=rest) if rest else total


def dora_weight(
    updated: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    """magnitude * (W + delta) / norm: the weight of a DoRA layer (arXiv 2402.09353, equation 5).

    Args:
        updated: W + delta, [outputs, inputs], or [inputs, outputs] if `transposed`; also some rows of it, with the
            magnitudes and norms of these.
        magnitude: [outputs].
        norm: [outputs], of each output of `updated` over all inputs.
    """
    factor = magnitude / norm
    return updated * (factor if transposed else factor[:, None])


def add_delta(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """weight + scale * B @ A, computed in float32 (float64 weights in theirs), rounded once to the weight's own dtype.

    Args:
        weight: Shape [outputs, inputs], any floating dtype. Worked on in blocks of rows, never widened as a whole.
        factors: Same [outputs, inputs].
    """
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = factors.A.to(wide), factors.B.to(wide) * factors.scale
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        merged[block] = torch.addmm(weight[block].to(wide), B[block], A)
    return merged
