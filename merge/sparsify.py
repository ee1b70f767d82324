"""Dropping elements of a delta, by size or by chance: tensors in, tensors out.

The rules are those of mergekit 0.1.5: TIES (arXiv 2306.01708, section 4.1), DARE (arXiv 2311.03099), Model Breadcrumbs
(arXiv 2312.06795), DELLA's MagPrune (arXiv 2406.11617). Elements of equal size count as in order of their flat index;
mergekit leaves that to an unstable sort. What mergekit draws from torch's global generator is drawn here by place (see
`draws`), so equal seeds of the two give different masks of the same distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

Draw = Callable[[int, int], torch.Tensor]
"""(first element, count) -> uniform numbers in [0, 1), shape [count], float64."""

# Elements worked on at once, also the unit of sums: a sum over fixed parts is the same with any number of threads.
_PART = 1 << 20
_ROW = 1 << 12


def draws(seed: int, name: str, source: int) -> Draw:
    """Uniform numbers by place: element i of a tensor has one number, whoever asks, in whatever blocks and order.

    Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based generator, keyed by
    SHA-256 of (seed, name, source); the counter is the element's flat index in the whole tensor.
    """
    text = f"{seed}\0{name}\0{source}".encode("utf-8", "surrogatepass")
    key = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<u8")

    def draw(start: int, count: int) -> torch.Tensor:
        # One step of the counter gives four numbers.
        skipped = start % 4
        raw = np.random.Philox(key=key, counter=start // 4).random_raw(skipped + count)[skipped:]
        return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    return draw


def trim(delta: torch.Tensor, *, density: float, rescale: bool = False) -> torch.Tensor:
    """Keep the share `density` of the elements that is largest in size, one at least (TIES)."""
    if density >= 1:
        return delta
    if density <= 0 or delta.numel() == 0:
        return torch.zeros_like(delta)
    size = delta.abs().reshape(-1)
    return _masked(delta, _first(-size, max(1, int(density * size.numel()))), rescale)


def trim_outliers(delta: torch.Tensor, *, density: float, gamma: float = 0.01, rescale: bool = False) -> torch.Tensor:
    """Drop the share `gamma` that is largest in size, then keep the share `density` that is largest (Breadcrumbs).

    Where density + gamma > 1 fewer of the largest are dropped, so that the density is kept.
    """
    if density >= 1:
        return delta
    size = delta.abs().reshape(-1)
    kept = int(density * size.numel())
    below = max(0, size.numel() - kept - int(gamma * size.numel()))
    return _masked(delta, _first(size, below + kept) & ~_first(size, below), rescale)


def drop(delta: torch.Tensor, *, density: float, draw: Draw, rescale: bool = True) -> torch.Tensor:
    """Keep each element with probability `density` (DARE).

    The rescaling is not DARE's 1 / density but mergekit's: to the sum of absolute values that there was before.
    """
    if density >= 1:
        return delta
    mask = torch.empty(delta.numel(), dtype=torch.bool)
    for start, stop in _parts(delta.numel()):
        mask[start:stop] = draw(start, stop - start) < density
    return _masked(delta, mask, rescale)


def magprune(
    delta: torch.Tensor, *, density: float, draw: Draw, epsilon: float = 0.15, rescale: bool = True
) -> torch.Tensor:
    """Keep each element with a probability that grows with its rank in size along the second axis (DELLA).

    The smallest is kept with density - epsilon, the largest with density + epsilon, evenly in between; a vector is one
    row. A row of one element, whose rank mergekit divides by zero, is kept with `density`.
    """
    if density >= 1:
        return delta
    if density <= 0 or delta.numel() == 0:
        return torch.zeros_like(delta)
    size = (delta if delta.dim() > 1 else delta.reshape(1, -1)).abs()
    rank = size.argsort(dim=1, stable=True).argsort(dim=1)
    last = size.shape[1] - 1
    # float64, so that a probability is never rounded to another one
    share = rank.reshape(-1).double() / last if last else torch.full((size.numel(),), 0.5, dtype=torch.float64)
    mask = torch.empty(delta.numel(), dtype=torch.bool)
    for start, stop in _parts(delta.numel()):
        mask[start:stop] = draw(start, stop - start) < (density - epsilon) + share[start:stop] * 2 * epsilon
    return _masked(delta, mask, rescale)


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """Sum of the products of two tensors of one shape, in float64, the same with any number of threads."""
    a, b = one.reshape(-1), other.reshape(-1)
    return _total(a[start:stop].double() * b[start:stop].double() for start, stop in _parts(a.numel()))


def _first(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Mask, shape [n], of the `count` smallest of `keys`; equal ones in order. Selection, not a sort: O(n)."""
    if count <= 0:
        return torch.zeros(keys.numel(), dtype=torch.bool)
    if count >= keys.numel():
        return torch.ones(keys.numel(), dtype=torch.bool)
    edge = keys.kthvalue(count).values
    mask = keys < edge
    at_edge = (keys == edge).nonzero().reshape(-1)
    mask[at_edge[: count - int(mask.sum())]] = True
    return mask


def _masked(delta: torch.Tensor, mask: torch.Tensor, rescale: bool) -> torch.Tensor:
    """`delta` where `mask` [n] says so, else 0; with `rescale` as large as before in sum of absolute values."""
    masked = torch.where(mask.reshape(delta.shape), delta, torch.zeros((), dtype=delta.dtype))
    if rescale:
        before, after = _absolute_sum(delta), _absolute_sum(masked)
        if before >= 1e-7 and after >= 1e-7:
            masked *= before / after
    return masked


def _absolute_sum(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return _total(flat[start:stop].double().abs() for start, stop in _parts(flat.numel()))


def _total(parts: Iterator[torch.Tensor]) -> float:
    """Sum of all elements of parts of fixed length; torch splits only sums of many elements among its threads."""
    total = 0.0
    for part in parts:
        whole = part.numel() // _ROW * _ROW
        total += float(part[:whole].reshape(-1, _ROW).sum(dim=1).sum() + part[whole:].sum())
    return total


def _parts(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _PART):
        yield start, min(count, start + _PART)
