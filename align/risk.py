"""How far a policy's next-token distribution has drifted from its reference, by four measures of risk. Pure tensors.

p is the reference's and q the policy's distribution over V tokens, d = log p - log q, and E is the mean under p. All
measures are means of d under a tilted reference w, with more of w where d is large, at the tokens which the policy
suppresses. All have the same derivative with respect to the policy's logits, with w held fixed:

    d risk / d logits = (sum w) q - w

| name            | risk                              | w                                  | level                   |
|-----------------|-----------------------------------|------------------------------------|-------------------------|
| `kl`            | E[d] = KL(p, q)                   | p                                  | none                    |
| `cvar`          | mean of d over its upper tail     | p in the tail, over its mass       | mass of the tail        |
| `erm`           | log E[exp(mu d)] / mu             | p exp(mu d), normalised            | mu, above 0             |
| `cvar_released` | E[d; d above a quantile]          | p above the quantile, else 0       | 1 - the quantile's rank |

TDPO (arXiv 2404.11999) uses `kl`, Ra-DPO (arXiv 2505.20359) and RSA (arXiv 2512.24263) the others. The measure acts
on how the policy drifts; it does not bound the tail of the cost of what the policy writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psacpo.align.scratch import Scratch
from psacpo.align.tilt import tail_weights
from psacpo.errors import InputError, unknown_name


class Tilted(NamedTuple):
    """A risk and its tilted reference.

    Attributes:
        risk: Shape (n,), in nats.
        weights: w. Shape (n, V).
        mass: The sums of w, of shape (n, 1); None where w is a distribution.
    """

    risk: Tensor
    weights: Tensor
    mass: Tensor | None = None


# From log p, d, a level and memory to use; what is found may lie in that memory.
Tilt: TypeAlias = Callable[[Tensor, Tensor, float, Scratch], Tilted]


def mean_under(weights: Tensor, ratios: Tensor, scratch: Scratch) -> Tensor:
    """The weighted sum of each row. Shape (n,) of two of shape (n, V)."""
    # Not a matrix product: on a GPU those may round their factors to 10 bits (TF32).
    return torch.mul(weights, ratios, out=scratch.like("product", weights)).sum(dim=1)


def kl(reference: Tensor, ratios: Tensor, level: float, scratch: Scratch) -> Tilted:
    """Kullback-Leibler divergence of the reference from the policy, the "forward" one of TDPO.

    Args:
        reference: log p, at least as wide as float32. Shape (n, V).
        ratios: d = log p - log q, 0 where p is 0. Shape (n, V).
        level: Not used.
    """
    weights = torch.exp(reference, out=scratch.like("weights", reference))
    return Tilted(mean_under(weights, ratios, scratch), weights)


def cvar(reference: Tensor, ratios: Tensor, level: float, scratch: Scratch) -> Tilted:
    """Conditional value at risk: the mean of d over the part of p, `level` in all, where d is largest.

    Ra-DPO defines the lower tail of a reward; with the sign that its advantage gives to the divergence this is the
    upper tail of d. At level 1 it is the KL divergence; below, it is at least that, the more the smaller the level.

    Args:
        reference: log p. Shape (n, V).
        ratios: d. Shape (n, V).
        level: Mass of the tail, in (0, 1].
    """
    if level == 1:
        return kl(reference, ratios, level, scratch)
    masses = torch.exp(reference, out=scratch.like("masses", reference))
    weights = tail_weights(ratios, masses, level, scratch)
    return Tilted(mean_under(weights, ratios, scratch), weights)


def erm(reference: Tensor, ratios: Tensor, level: float, scratch: Scratch) -> Tilted:
    """Entropic risk: log E[exp(mu d)] / mu, which is the Renyi divergence of p from q of order 1 + mu.

    It grows from the KL divergence at mu -> 0 to the largest d at mu -> infinity; rounding adds 1e-7/mu in float32.
    With d in the place of the paper's argument and its sign, (1/mu) log E[exp(-mu d)], the measure would be 0 for
    every policy at mu = 1.

    Args:
        reference: log p. Shape (n, V).
        ratios: d. Shape (n, V).
        level: mu, above 0.
    """
    exponents = torch.add(reference, ratios, alpha=level, out=scratch.like("weights", reference))
    peak = exponents.amax(dim=1, keepdim=True)
    weights = exponents.sub_(peak).exp_()
    total = weights.sum(dim=1, keepdim=True)
    return Tilted(((peak + total.log()) / level).squeeze(1), weights.div_(total))


def cvar_released(reference: Tensor, ratios: Tensor, level: float, scratch: Scratch) -> Tilted:
    """What the code that was released with Ra-DPO computes by default under the name of CVaR, for comparison with it.

    In each half of the vocabulary, E[d] over the tokens whose d is above a quantile that counts tokens and not their
    probability; the sum is not divided by the mass that is left. It is no mean and falls to 0 with the level.

    Args:
        reference: log p. Shape (n, V).
        ratios: d. Shape (n, V).
        level: Its `confidence_level`, in (0, 1).
    """
    weights = reference.exp()
    half = ratios.shape[1] // 2
    for part in (slice(None, half), slice(half, None)):
        edge = torch.quantile(ratios[:, part], 1 - level, dim=1, keepdim=True)
        weights[:, part].masked_fill_(ratios[:, part] <= edge, 0)
    return Tilted(mean_under(weights, ratios, scratch), weights, weights.sum(dim=1, keepdim=True))


@dataclass(frozen=True, slots=True)
class Risk:
    """A measure of risk: its function and the levels that it has.

    Attributes:
        tilt: To the risk and its tilted reference.
        default: The level where none is given; None where the measure has no level.
        low, high: The levels allowed lie between, without the ends.
        closed: Whether `high` itself is allowed.
    """

    tilt: Tilt
    default: float | None = None
    low: float = 0.0
    high: float = float("inf")
    closed: bool = False

    def allowed(self) -> str:
        """The levels in words."""
        if self.default is None:
            return "none"
        if self.high == float("inf"):
            return f"above {self.low:g}"
        return f"above {self.low:g} and {'at most' if self.closed else 'below'} {self.high:g}"


RISKS: dict[str, Risk] = {
    "kl": Risk(kl),
    "cvar": Risk(cvar, default=0.97, high=1.0, closed=True),
    "erm": Risk(erm, default=1.0),
    "cvar_released": Risk(cvar_released, default=0.95, high=1.0),
}


def risk_level(risk: str, level: float | None = None) -> float:
    """The level to use with a measure: the one given, checked, or the measure's default.

    Raises:
        InputError: There is no such measure, or it has no such level.
    """
    if risk not in RISKS:
        raise unknown_name("risk", risk, RISKS)
    known = RISKS[risk]
    if level is None:
        return 1.0 if known.default is None else known.default
    inside = known.low < level < known.high or (known.closed and level == known.high)
    if known.default is None or not inside:
        raise InputError(f"level of the risk '{risk}'", given=level, allowed=known.allowed())
    return level


def log_ratios(reference: Tensor, policy: Tensor, scratch: Scratch) -> Tensor:
    """d = log p - log q, and 0 at tokens which the reference cannot give: they have no weight in any measure.

    Args:
        reference: log p. Shape (n, V).
        policy: log q. Shape (n, V).
    """
    ratios = torch.sub(reference, policy, out=scratch.like("ratios", reference))
    if bool(reference.amin() == float("-inf")):
        ratios.masked_fill_(reference == float("-inf"), 0)
    return ratios


def token_risk(logits: Tensor, reference_logits: Tensor, risk: str, level: float | None = None) -> Tensor:
    """The risk of each of n positions, differentiable once with respect to the policy's logits.

    Args:
        logits: The policy's. Shape (n, V); float64, or brought to float32.
        reference_logits: Without gradient. Shape (n, V).
        risk: A name in `RISKS`.
        level: None for the measure's default.

    Returns:
        Shape (n,), float32 or float64, in nats.

    Raises:
        InputError: Unknown risk or level, or two vocabularies of different size.
    """
    level = risk_level(risk, level)
    require_one_vocabulary(logits.shape[-1], reference_logits.shape[-1])
    return tilted_risk(logits, reference_logits, RISKS[risk].tilt, level)


def tilted_risk(logits: Tensor, reference_logits: Tensor, tilt: Tilt, level: float) -> Tensor:
    """`token_risk` by the measure's function, unchecked."""
    found: Tensor = _TokenRisk.apply(logits, reference_logits.detach(), tilt, level)  # type: ignore[no-untyped-call]
    return found


def require_one_vocabulary(policy: int, reference: int) -> None:
    """
    Raises:
        InputError: Policy and reference have logits for different numbers of tokens.
    """
    if policy != reference:
        raise InputError(
            "policy and reference have vocabularies of different size",
            given=f"{policy} and {reference}",
            allowed="a reference with the policy's vocabulary",
        )


class _TokenRisk(torch.autograd.Function):
    """`tilted_risk` with its derivative in closed form: what autograd would make of a sort is neither stable nor small."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, tilt: Tilt, level: float) -> Tensor:
        policy = widened(logits).log_softmax(dim=1)
        reference = widened(reference_logits).log_softmax(dim=1)
        scratch = Scratch()
        found = tilt(reference, log_ratios(reference, policy, scratch), level, scratch)
        if ctx.needs_input_grad[0]:
            given = policy.exp_() if found.mass is None else policy.exp_().mul_(found.mass)
            ctx.save_for_backward(given.sub_(found.weights).to(logits.dtype))
        return found.risk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return (gradients[0][:, None] * derivative).to(derivative.dtype), None, None, None


def widened(tensor: Tensor) -> Tensor:
    """At least float32: half precision is not enough to normalise a vocabulary."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
