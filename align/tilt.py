"""The upper tail of discrete distributions, exactly and without sorting all of their atoms. Pure tensors.

n distributions stand in rows of V atoms each: an atom has the value x and the probability p. The tail of mass a is the
part of a row's mass, a in all, that lies on the largest values; an atom that reaches across its edge belongs to it in
part. The value at that edge is the value at risk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from psacpo.align.scratch import Scratch

# Bins of a histogram, and as many halvings of the range of values as narrow it down as far.
_BINS = 1024
_HALVINGS = 10
# Up to how many atoms are looked at without narrowing their range first.
_FEW = 512
# How often the range is narrowed at most: with one far outlier the first time leaves nearly all atoms.
_ROUNDS = 4


class Edge(NamedTuple):
    """Where a tail ends, each of shape (n,).

    Attributes:
        value: The value at risk.
        above: The mass of all atoms of larger value.
        atom: The mass of all atoms of this value.
    """

    value: Tensor
    above: Tensor
    atom: Tensor


# From values and masses of shape (n, V), their least and largest values of shape (n, 1), and tails of shape (n,), to
# the atoms that can be the edge, shape (n, V), and the mass of all atoms above these, shape (n,).
Narrow: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Scratch], tuple[Tensor, Tensor]]
Search: TypeAlias = Callable[[Tensor, Tensor, Tensor], Edge]


def tail_weights(values: Tensor, masses: Tensor, tail: float, scratch: Scratch | None = None) -> Tensor:
    """Each atom's share of the upper tail: the weights of the mean that is the conditional value at risk.

    Atoms above the value at risk weigh p/a. Those at it share what is left in proportion to p, so the weights sum to
    1 also where a single atom holds more than the tail.

    Args:
        values: x, finite. Shape (n, V).
        masses: p, at least 0, each row of sum 1 up to rounding. Shape (n, V).
        tail: a, in (0, 1].
        scratch: Memory for what is found and on the way.

    Returns:
        Shape (n, V).
    """
    scratch = scratch or Scratch()
    edge = tail_edge(values, masses, masses.new_full((len(masses),), tail), scratch)
    # Rounding may put the edge one atom off; the share is then 0 or 1, and dividing by what is there mends the sum.
    share = ((tail - edge.above) / edge.atom.clamp(min=torch.finfo(masses.dtype).tiny)).clamp_(0, 1)
    # As numbers and not as truth values, which costs a CPU a tenth of the time.
    level = edge.value[:, None]
    at_edge = torch.eq(values, level, out=scratch.like("product", values)).mul_(share[:, None])
    weights = torch.gt(values, level, out=scratch.like("weights", values)).add_(at_edge).mul_(masses)
    return weights.div_((edge.above + share * edge.atom)[:, None])


def tail_edge(values: Tensor, masses: Tensor, tails: Tensor, scratch: Scratch | None = None) -> Edge:
    """The largest value whose atoms, together with those of larger values, hold at least the tail's mass.

    On a CPU it is found with histograms and a sort of the one bin that holds it. Elsewhere it is found by halving:
    floating-point scatters and running sums are not reproducible on a GPU, sums are.

    Args:
        values: Finite. Shape (n, V).
        masses: At least 0. Shape (n, V).
        tails: Above 0, at most the row's mass up to rounding. Shape (n,).
    """
    scratch = scratch or Scratch()
    if values.device.type == "cpu":
        return narrowed(values, masses, tails, inside_bin, by_sorting, scratch)
    return narrowed(values, masses, tails, inside_halves, by_halving, scratch)


def narrowed(
    values: Tensor,
    masses: Tensor,
    tails: Tensor,
    narrow: Narrow,
    search: Search,
    scratch: Scratch,
    rounds: int = _ROUNDS,
) -> Edge:
    """`tail_edge` by looking again and again at fewer atoms, then at each of those that are left.

    Args:
        narrow: Gives the atoms that can be the edge.
        search: `tail_edge` of few atoms.
        rounds: How often to narrow at most.
    """
    if rounds == 0 or values.shape[1] <= _FEW:
        return search(values, masses, tails)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    inside, above = narrow(values, masses, tails, low, high, scratch)
    # Rows of one value (a policy that still is its reference has no others) are their own answer.
    several = high > low
    if not bool(several.all()):
        inside &= several
    rows, columns = places_of(inside)
    counts = torch.bincount(rows, minlength=len(values))
    alone = Edge(low.squeeze(1), torch.zeros_like(tails), masses.sum(dim=1))
    if len(rows) == 0:
        return alone
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    few_values = values.new_full((len(values), int(counts.max())), float("inf"))
    few_masses = torch.zeros_like(few_values)
    few_values[rows, slots] = values[rows, columns]
    few_masses[rows, slots] = masses[rows, columns]
    # What fills the shorter rows has no mass, and a value that does not widen their range.
    lowest = torch.where(several, few_values.amin(dim=1, keepdim=True), low)
    few_values = torch.where(few_values < float("inf"), few_values, lowest)
    found = narrowed(few_values, few_masses, tails - above, narrow, search, scratch, rounds - 1)
    found = found._replace(above=found.above + above)
    return Edge(*(torch.where(counts > 0, one, other) for one, other in zip(found, alone, strict=True)))


def inside_bin(
    values: Tensor, masses: Tensor, tails: Tensor, low: Tensor, high: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """`narrow` by a histogram of mass over value: the atoms of the bin that holds the edge."""
    scale = (_BINS - 1) / (high - low)
    scale.masked_fill_(~torch.isfinite(scale), 0)
    # All rows' bins in one histogram, each row's behind the one before.
    first = torch.arange(0, _BINS * len(values), _BINS, dtype=torch.int32, device=values.device)[:, None]
    scaled = torch.sub(values, low, out=scratch.like("product", values)).mul_(scale)
    bins = scratch.like("bins", values, torch.int32).copy_(scaled).add_(first)
    held = torch.bincount(bins.flatten(), masses.flatten(), minlength=_BINS * len(values)).view(len(values), _BINS)
    total = held.flip(1).cumsum(dim=1).to(masses.dtype)
    # Rounding may leave the sum of all short of the tail: then the edge is the lowest value.
    place = (total < tails[:, None]).sum(dim=1, keepdim=True).clamp_(max=_BINS - 1)
    above = torch.where(place > 0, total.gather(1, (place - 1).clamp(min=0)), 0)
    held_by = (first + (_BINS - 1) - place).to(torch.int32)
    return torch.eq(bins, held_by, out=scratch.like("inside", values, torch.bool)), above.squeeze(1)


def places_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns where a sparse mask is true, in order.

    Args:
        mask: Shape (n, V).
    """
    if mask.numel() % 8 or not mask.is_contiguous():
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    # Eight at a time: most words are zero.
    words = mask.view(-1).view(torch.int64).nonzero().squeeze(1)
    which, offset = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    flat = words[which] * 8 + offset
    return flat // mask.shape[1], flat % mask.shape[1]


def inside_halves(
    values: Tensor, masses: Tensor, tails: Tensor, low: Tensor, high: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """`narrow` by halving the range of values a fixed number of times."""
    start, end = _halved(values, masses, tails, low, high, _HALVINGS)
    inside = (values <= end) & ((values > start) | (start == low))
    return inside, torch.where(values > end, masses, 0).sum(dim=1)


def by_sorting(values: Tensor, masses: Tensor, tails: Tensor) -> Edge:
    """`tail_edge` by a sort of every row."""
    ordered, places = values.sort(dim=1, descending=True)
    arranged = masses.gather(1, places)
    reached = arranged.cumsum(dim=1) >= tails[:, None]
    # Where rounding leaves the sum short, the edge is the last atom that has any mass.
    last = (arranged > 0).to(torch.int64).cumsum(dim=1).argmax(dim=1)
    first = torch.where(reached.any(dim=1), reached.to(torch.uint8).argmax(dim=1), last)
    return _edge_at(ordered.gather(1, first[:, None]), values, masses)


def by_halving(values: Tensor, masses: Tensor, tails: Tensor) -> Edge:
    """`tail_edge` by halving the range of values down to the precision of its type."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    _, end = _halved(values, masses, tails, low, high, 2 * torch.finfo(values.dtype).bits)
    return _edge_at(torch.where(values <= end, values, low).amax(dim=1, keepdim=True), values, masses)


def _edge_at(value: Tensor, values: Tensor, masses: Tensor) -> Edge:
    above, atom = (torch.where(mask, masses, 0).sum(dim=1) for mask in (values > value, values == value))
    return Edge(value.squeeze(1), above, atom)


def _halved(
    values: Tensor, masses: Tensor, tails: Tensor, low: Tensor, high: Tensor, times: int
) -> tuple[Tensor, Tensor]:
    """An interval (low, high] that holds the edge; its lower end belongs to it where that is the smallest value."""
    for _ in range(times):
        middle = 0.5 * low + 0.5 * high
        enough = torch.where(values > middle, masses, 0).sum(dim=1, keepdim=True) >= tails[:, None]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low, high
