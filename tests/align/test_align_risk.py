"""Measures of risk over the vocabulary: by hand, against plain definitions, and their one derivative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psacpo.align.risk import RISKS, log_ratios, risk_level, token_risk
from psacpo.align.scratch import Scratch
from psacpo.errors import InputError

LEVELS = [("kl", None), ("cvar", 0.3), ("cvar", 0.97), ("erm", 0.5), ("erm", 5.0), ("cvar_released", 0.95)]


def logits(seed: int, rows: int = 4, size: int = 40, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(rows, size, generator=make, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def sorted_cvar(values: Tensor, masses: Tensor, tail: float) -> float:
    """The mean of one row over its upper tail, atom by atom."""
    left, total = tail, 0.0
    for place in values.argsort(descending=True).tolist():
        taken = min(left, float(masses[place]))
        total += taken * float(values[place])
        left -= taken
    return total / tail


def test_by_hand() -> None:
    """p = (.5, .3, .2), q = (.25, .25, .5): d = log 2, log 1.2, log .4.

    CVaR .6: the first atom whole, .1 of the second: (.5 log 2 + .1 log 1.2) / .6. ERM 1: log(.5*2 + .3*1.2 + .2*.4).
    Released at .5, V = 3, halves {0} and {1, 2}: no value is above the median of one; of two, the median lies between.
    """
    p, q = torch.tensor([[[0.5, 0.3, 0.2]], [[0.25, 0.25, 0.5]]], dtype=torch.float64)
    expected = {
        ("kl", None): 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4),
        ("cvar", 0.6): (0.5 * math.log(2) + 0.1 * math.log(1.2)) / 0.6,
        ("cvar", 0.4): math.log(2),
        ("erm", 1.0): math.log(0.5 * 2 + 0.3 * 1.2 + 0.2 * 0.4),
        ("cvar_released", 0.5): 0.3 * math.log(1.2),
    }
    for (risk, level), value in expected.items():
        # Logits are log-probabilities up to a constant.
        found = token_risk(q.log() + 1, p.log() - 2, risk, level)
        assert found.item() == pytest.approx(value, rel=1e-12), risk


@given(st.integers(0, 999), st.sampled_from([0.02, 0.1, 0.5, 0.9]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_cvar_is_the_sorted_mean_and_rockafellars_minimum(seed: int, tail: float, peaked: bool) -> None:
    policy, reference = logits(seed, scale=8.0 if peaked else 1.0)
    p = reference.softmax(1)
    d = reference.log_softmax(1) - policy.log_softmax(1)
    found = token_risk(policy, reference, "cvar", tail)
    for row in range(len(d)):
        assert found[row].item() == pytest.approx(sorted_cvar(d[row], p[row], tail), rel=1e-9)
        # min over nu of nu + E[(d - nu)+] / tail; the minimum is at one of the atoms.
        bounds = d[row] + (p[row] * (d[row] - d[row][:, None]).clamp(min=0)).sum(1) / tail
        assert found[row].item() == pytest.approx(bounds.min().item(), rel=1e-9)


def test_measures_meet() -> None:
    """CVaR of everything and ERM at mu -> 0 are the KL divergence; all others are above it and grow with aversion."""
    policy, reference = logits(0)
    kl = token_risk(policy, reference, "kl")
    torch.testing.assert_close(
        kl,
        torch.nn.functional.kl_div(
            policy.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="none"
        ).sum(1),
    )
    torch.testing.assert_close(token_risk(policy, reference, "cvar", 1.0), kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(token_risk(policy, reference, "erm", 1e-7), kl, rtol=1e-5, atol=0)
    for risk, order in (("cvar", [1.0, 0.9, 0.5, 0.1, 0.01]), ("erm", [0.01, 0.5, 1.0, 5.0, 9.0])):
        found = torch.stack([token_risk(policy, reference, risk, level) for level in order])
        assert bool((found.diff(dim=0) >= 0).all()), risk
        assert bool((found >= kl - 1e-12).all())


def test_erm_is_the_renyi_divergence() -> None:
    """Of order 1 + mu: log sum p^(1+mu) q^(-mu) / mu; at mu 1, log(1 + chi squared)."""
    policy, reference = logits(1, scale=1.0)
    p, q = reference.softmax(1), policy.softmax(1)
    for mu in (0.5, 3.0):
        torch.testing.assert_close(
            token_risk(policy, reference, "erm", mu), (p.pow(1 + mu) * q.pow(-mu)).sum(1).log() / mu
        )
    torch.testing.assert_close(token_risk(policy, reference, "erm", 1.0), (1 + ((p - q) ** 2 / q).sum(1)).log())


def test_released_formula() -> None:
    """Parity with the released trainer (Ra-DPO/train/trainers.py L833-866) as its lines compute it, at 0.95: halves of
    the vocabulary, unweighted quantile, strict comparison, no division."""
    policy, reference = logits(2, size=51)
    p, q = reference.softmax(1), policy.softmax(1)
    total = torch.zeros(len(p), dtype=p.dtype)
    for part in (slice(None, 25), slice(25, None)):
        ratio = p[:, part].log() - q[:, part].log()
        edge = torch.quantile(ratio, 1 - 0.95, dim=1, keepdim=True)
        total += (p[:, part] * ratio * (ratio > edge)).sum(1)
    torch.testing.assert_close(token_risk(policy, reference, "cvar_released", 0.95), total)


@pytest.mark.parametrize(("risk", "level"), LEVELS)
def test_gradient_is_q_minus_w(risk: str, level: float | None) -> None:
    """Against autograd through the plain definition with w held fixed, and against differences of the value itself."""
    policy, reference = logits(3)
    policy.requires_grad_()
    token_risk(policy, reference, risk, level).sum().backward()
    assert policy.grad is not None
    lp = reference.log_softmax(1)
    with torch.no_grad():
        d = log_ratios(lp, policy.log_softmax(1), Scratch())
        found = RISKS[risk].tilt(lp, d, risk_level(risk, level), Scratch())
        mass = 1.0 if found.mass is None else found.mass
        torch.testing.assert_close(policy.grad, mass * policy.softmax(1) - found.weights)
        if found.mass is None:
            torch.testing.assert_close(found.weights.sum(1), torch.ones(4).double())
            assert bool((found.weights >= 0).all())
    make = torch.Generator().manual_seed(4)
    for _ in range(5):
        step = 1e-6 * torch.randn(policy.shape, generator=make, dtype=torch.float64)
        with torch.no_grad():
            up, down = (token_risk(policy + sign * step, reference, risk, level) for sign in (1, -1))
        torch.testing.assert_close((up - down) / 2, (policy.grad * step).sum(1), rtol=1e-4, atol=1e-11)


def test_boundary_token_keeps_its_share() -> None:
    """One token holds nearly all mass: it is the boundary, and w must still sum to 1 (dropping it loses the gradient)."""
    reference = torch.tensor([[12.0, 0, 0, 0]]).double()
    policy = torch.tensor([[10.0, 1, 0, -1]]).double().requires_grad_()
    token_risk(policy, reference, "cvar", 0.5).sum().backward()
    assert policy.grad is not None
    assert policy.grad.sum().abs() < 1e-12
    lost = policy.softmax(1) - policy.grad
    assert lost[0, 0] > 0.99


@pytest.mark.parametrize(("risk", "level"), LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan(risk: str, level: float | None, dtype: torch.dtype) -> None:
    """Tokens that the reference cannot give, underflow on both sides, and a policy that is its reference."""
    reference = torch.tensor([[0.0, 1, -torch.inf, -300, 2], [5, 5, 5, 5, 5]], dtype=dtype)
    policy = torch.tensor([[0.5, 1, 3, -90, -200], [5, 5, 5, 5, 5]], dtype=dtype).requires_grad_()
    found = token_risk(policy, reference, risk, level)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert policy.grad is not None
    assert bool(torch.isfinite(policy.grad).all())
    if risk != "cvar_released":
        # At its reference, every measure is at its minimum.
        assert found[1].abs() < 1e-5
        assert policy.grad[1].abs().max() < 1e-2


@pytest.mark.parametrize(
    ("risk", "level", "message"),
    [
        ("cvarr", None, "unknown risk 'cvarr', did you mean 'cvar'"),
        ("cvar", 0.0, "level of the risk 'cvar'; given: 0.0; allowed: above 0 and at most 1"),
        ("cvar", 1.1, "at most 1"),
        ("erm", 0.0, "allowed: above 0"),
        ("cvar_released", 1.0, "below 1"),
        ("kl", 0.5, "allowed: none"),
    ],
)
def test_bad_levels(risk: str, level: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        risk_level(risk, level)


def test_two_vocabularies() -> None:
    with pytest.raises(InputError, match="different size; given: 4 and 5"):
        token_risk(torch.zeros(1, 4), torch.zeros(1, 5), "kl")
