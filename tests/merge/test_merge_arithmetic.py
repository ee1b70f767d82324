"""The algebra of stacked factors against hand-worked numbers and float64 dense sums."""

from __future__ import annotations

import pytest
import torch

from psacpo.merge.arithmetic import Factors, add_delta, dense_delta, lora_scale, stack


def random_factors(rank: int, *, seed: int, shape: tuple[int, int] = (48, 40), scale: float = 1.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(
        A=torch.randn(rank, shape[1], generator=draw), B=torch.randn(shape[0], rank, generator=draw), scale=scale
    )


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def test_two_by_two_by_hand() -> None:
    # delta_r = 2 * [1, 3]^T [1, 2] = [[2, 4], [6, 12]];  delta_s = 1/2 * [4, 0]^T [0, 1] = [[0, 2], [0, 0]]
    reward = Factors(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0], [3.0]]), scale=2.0)
    safety = Factors(A=torch.tensor([[0.0, 1.0]]), B=torch.tensor([[4.0], [0.0]]), scale=0.5)
    stacked = stack([reward, safety], [0.75, 0.25])
    assert stacked.A.tolist() == [[1.0, 2.0], [0.0, 1.0]]
    assert stacked.B.tolist() == [[1.5, 0.5], [4.5, 0.0]]
    assert stacked.scale == 1.0
    # 0.75 * delta_r + 0.25 * delta_s
    assert dense_delta(stacked).tolist() == [[1.5, 3.5], [4.5, 9.0]]


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "scale"), [(8, 4, False, 2.0), (8, 16, True, 2.0), (3, 6, False, 0.5)]
)
def test_scale(alpha: float, rank: int, rslora: bool, scale: float) -> None:
    assert lora_scale(alpha, rank, rslora=rslora) == scale


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (0.0, 1.0), (1 / 3, 2 / 3), (-2.5, 0.1)])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 16), (1, 7)])
def test_stacking_is_the_dense_sum(weights: tuple[float, float], ranks: tuple[int, int]) -> None:
    one = random_factors(ranks[0], seed=1, scale=lora_scale(32, ranks[0]))
    two = random_factors(ranks[1], seed=2, scale=lora_scale(5, ranks[1], rslora=True))
    stacked = stack([one, two], weights)
    exact = weights[0] * dense_delta(one) + weights[1] * dense_delta(two)
    assert stacked.A.dtype == stacked.B.dtype == torch.float32
    assert stacked.rank == sum(ranks)
    assert relative_error(dense_delta(stacked), exact) < 1e-6
    assert relative_error(dense_delta(stacked, torch.float32), exact) < 1e-6


def test_half_precision_factors_are_widened_before_they_are_weighed() -> None:
    one = random_factors(4, seed=3, scale=1.7)
    half = Factors(one.A.bfloat16(), one.B.bfloat16(), one.scale)
    assert relative_error(dense_delta(stack([half], [0.3])), 0.3 * dense_delta(half)) < 1e-6


def test_what_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        stack([random_factors(2, seed=0), random_factors(2, seed=0, shape=(48, 41))], [1, 1])
    with pytest.raises(ValueError, match="0 updates"):
        stack([], [])
    with pytest.raises(ValueError, match="1 updates for 2 weights"):
        stack([random_factors(2, seed=0)], [1, 1])


def test_transposed_factors_give_the_transposed_delta() -> None:
    one = random_factors(3, seed=4, scale=1.5)
    torch.testing.assert_close(dense_delta(one.transposed()), dense_delta(one).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_added_delta_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psacpo.merge.arithmetic._BLOCK", 40 * 7)  # seven rows at a time: a last block of six
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    factors = random_factors(4, seed=6, scale=0.01)
    exact = weight.double() + dense_delta(factors)
    merged = add_delta(weight, factors)
    assert merged.dtype == dtype
    if dtype in (torch.bfloat16, torch.float16):
        # Correctly rounded but for near ties that float32 sums can fall on either side of.
        assert (merged != exact.to(dtype)).float().mean() < 1e-3
    else:
        assert relative_error(merged, exact) < (1e-7 if dtype is torch.float32 else 1e-15)
