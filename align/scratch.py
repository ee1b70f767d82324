"""Memory that is used again. Pure tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Arrays by name, each in the memory of the one that had the name before.

    The system gives a program fresh memory page by page and clears it: on a CPU this takes several times as long as
    one pass of arithmetic over arrays of some megabytes. An array holds until its name is asked for again.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, name: str, shape: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An array with any content, of a tensor's shape, device and, unless another is given, dtype."""
        return self.rows(name, len(shape), shape.shape[1], dtype or shape.dtype, shape.device)

    def rows(self, name: str, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An array with any content. Shape (count, width)."""
        held = self.held.get((name, dtype))
        if held is None or held.numel() < count * width or held.device != device:
            held = self.held[name, dtype] = torch.empty(count * width, dtype=dtype, device=device)
        return held[: count * width].view(count, width)
