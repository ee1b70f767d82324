"""Low-rank updates of a lower rank: tensors in, tensors out."""

from __future__ import annotations

import torch

from psacpo.merge.arithmetic import Factors


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of scale * B @ A of a rank (Eckart and Young 1936), and its relative error.

    With B = Q_b R_b and A^T = Q_a R_a the singular values of the update are those of the small core R_b R_a^T, so that
    nothing of the size [outputs, inputs] is made. Computed in float64, rounded once.

    Args:
        factors: Of any rank, B [outputs, r] and A [r, inputs].
        rank: At least 1; above the update's own rank nothing is lost.

    Returns:
        Factors of rank min(rank, r, outputs, inputs) and scale 1, float32, the singular values shared evenly between
        the two; and the Frobenius norm of what is left out over that of the whole, 0 for an update that is zero.

    Raises:
        ValueError: A rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}")
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.A.double().T)
    u, s, v = torch.linalg.svd(factors.scale * (r_b @ r_a.T), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    compressed = Factors(
        A=(root[:, None] * (v[:kept] @ q_a.T)).float().contiguous(),
        B=((q_b @ u[:, :kept]) * root).float().contiguous(),
    )
    # By the largest singular value, so that no square is too small or too large to be held.
    sizes = s / s[0] if s[0] > 0 else s
    whole = float(sizes.norm())
    return compressed, float(sizes[kept:].norm()) / whole if whole else 0.0
