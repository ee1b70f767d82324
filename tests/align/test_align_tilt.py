"""The upper tail without sorting everything: both searches against a full sort, over ties, outliers and lone atoms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psacpo.align.scratch import Scratch
from psacpo.align.tilt import Edge, by_halving, by_sorting, inside_bin, inside_halves, narrowed, tail_edge, tail_weights


def in_bins(values: Tensor, masses: Tensor, tails: Tensor) -> Edge:
    return narrowed(values, masses, tails, inside_bin, by_sorting, Scratch())


def in_halves(values: Tensor, masses: Tensor, tails: Tensor) -> Edge:
    return narrowed(values, masses, tails, inside_halves, by_halving, Scratch())


SEARCHES = [tail_edge, in_bins, in_halves]
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: x,
    "few values": lambda x: (2 * x).round(),
    "one outlier": lambda x: x.clone().index_fill_(1, torch.tensor([3]), 1e6),
    "far below": lambda x: x.clone().index_fill_(1, torch.tensor([5]), -1e8),
    "constant": lambda x: torch.zeros_like(x),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [7, 3000])
def test_edge(search: Callable[..., Edge], shape: str, size: int) -> None:
    make = torch.Generator().manual_seed(size)
    values = SHAPES[shape](torch.randn(5, size, generator=make, dtype=torch.float64))
    masses = (3 * torch.randn(5, size, generator=make, dtype=torch.float64)).softmax(1)
    for tail in (0.001, 0.1, 0.5, 0.97):
        found = search(values, masses, torch.full((5,), tail, dtype=torch.float64))
        for row in range(5):
            above = float(masses[row][values[row] > found.value[row]].sum())
            atom = float(masses[row][values[row] == found.value[row]].sum())
            # What defines it: not enough mass above, enough with the edge itself.
            assert above < tail <= above + atom + 1e-12
            assert float(found.above[row]) == pytest.approx(above, abs=1e-12)
            assert float(found.atom[row]) == pytest.approx(atom, abs=1e-12)


def test_weights_by_hand() -> None:
    """Values 3, 1, 1, 0 of mass .1, .2, .4, .3, tail .4: the first whole, half of the two at 1 in their proportion."""
    weights = tail_weights(torch.tensor([[3.0, 1, 1, 0]]), torch.tensor([[0.1, 0.2, 0.4, 0.3]]), 0.4)
    assert weights[0].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.0])


@given(st.integers(0, 99), st.sampled_from([0.01, 0.3, 0.97, 1.0]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_weights_are_a_distribution(seed: int, tail: float, peaked: bool) -> None:
    """In float32, over a vocabulary in which masses do not quite sum to 1; none above p/a."""
    make = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 1500, generator=make)
    masses = ((12.0 if peaked else 1.0) * torch.randn(3, 1500, generator=make)).softmax(1)
    weights = tail_weights(values, masses, tail)
    torch.testing.assert_close(weights.sum(1), torch.ones(3), rtol=1e-5, atol=0)
    assert bool((weights >= 0).all())
    assert bool((weights <= masses / tail * (1 + 1e-4) + 1e-12).all())
