"""Log-probabilities and risks of N given tokens out of hidden states, in chunks: never all N x V logits. Pure tensors.

D is the size of a hidden state, V of the vocabulary. What is wanted of each token are one or two numbers, and the
derivative of a number with respect to the token's hidden state is one vector of size D. Under a frozen output layer
these vectors are computed while the chunk's logits are there, and kept: N x D numbers. The backward pass is then one
multiplication and needs no weight. Under a trained output layer the chunk's logits are computed again in the backward
pass. Either way at most a few arrays of `chunk` x V exist at any time, and none outlives its chunk.

Under autocast the products are in autocast's dtype. Normalising is in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from psacpo.align.risk import (
    RISKS,
    Tilt,
    kl,
    log_ratios,
    mean_under,
    require_one_vocabulary,
    risk_level,
    tilted_risk,
    widened,
)
from psacpo.align.scratch import Scratch

# Bytes of one array of the rows that stay in a CPU's cache while passes are made over them.
_BLOCK_BYTES = 1 << 21


class Head(NamedTuple):
    """An output layer: logits = softcap * tanh(scale * (W h + b) / softcap), and without the last step where it is None.

    Attributes:
        weight: W. Shape (V, D).
        bias: b. Shape (V,).
        scale: What some models multiply the logits by (`logit_scale`, or 1 / `logits_scaling`).
        softcap: `final_logit_softcapping`, above 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def trained(self) -> bool:
        """Whether a gradient is wanted for the layer itself."""
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (n, V), at least float32, from hidden states of shape (n, D).

        Args:
            out: Where the matrix product goes, of its dtype; not where a gradient is wanted.
        """
        if out is None:
            found = widened(F.linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            found = widened(torch.mm(hidden, self.weight.T, out=out))
        else:
            found = widened(torch.addmm(self.bias, hidden, self.weight.T, out=out))
        if self.scale != 1:
            found = found * self.scale
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap

    def slopes(self, logits: Tensor) -> Tensor | float:
        """d logits / d (W h + b), out of the logits."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap).square_()).mul_(self.scale)

    def frozen(self, dtype: torch.dtype) -> Head:
        """The same numbers without gradient, in another dtype."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)


class TokenRisks(NamedTuple):
    """What `token_risks_from_hidden` gives for N tokens, each of shape (N,), at least float32, in nats.

    Attributes:
        log_probs: log q(token), differentiable.
        reference_log_probs: log p(token), without gradient.
        risks: The drift of q from p where the token is predicted; see the function for its gradient.
        divergences: KL(p, q) where the token is predicted, without gradient.
    """

    log_probs: Tensor
    reference_log_probs: Tensor
    risks: Tensor
    divergences: Tensor


def token_log_probs_from_hidden(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(logits)[target] of each token.

    Two matrix products under a frozen head, four under a trained one.

    Args:
        hidden: Shape (N, D).
        head: Frozen where neither weight nor bias requires a gradient.
        targets: Shape (N,).
        chunk: Rows of logits held at a time, at least 1.

    Returns:
        Shape (N,), at least float32, in nats.
    """
    if head.trained:

        def score(rows: Tensor, wanted: Tensor) -> Tensor:
            return -F.cross_entropy(head.logits(rows), wanted, reduction="none")

        return _recomputed(score, chunk, hidden, targets)
    hidden, head = _frozen_operands(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = _FrozenLogProbs.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return found


def token_risks_from_hidden(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    targets: Tensor,
    risk: str,
    level: float | None,
    chunk: int,
    *,
    reference_head: Head | None = None,
    slopes: Tensor | None = None,
) -> TokenRisks:
    """Log-probabilities of tokens under policy and reference, and the risk of the policy's drift at each.

    By default both `log_probs` and `risks` are differentiable: four matrix products under a frozen head. The losses of
    `losses.LOSSES` see a sequence only through log q + c risk with a constant c that is known beforehand
    (`Loss.risk_slopes`), and then one product fewer is enough. With `slopes` given, `log_probs` has its own value and
    the gradient of log q + c risk, and `risks` has none: the gradient of any function whose derivative with respect
    to the risk of a token is c times that with respect to its log-probability comes out the same.

    Args:
        hidden: The policy's. Shape (N, D).
        head: The policy's output layer.
        reference_hidden: The reference's hidden states, without gradient. Shape (N, D).
        targets: Shape (N,).
        risk: A name in `risk.RISKS`.
        level: None for the measure's default.
        chunk: Rows of logits held at a time, at least 1. Two or three arrays of `chunk` x V exist at once; on a GPU, and
            under a trained head, some eight.
        reference_head: The reference's output layer; None where it is the policy's.
        slopes: c of each token. Shape (N,).

    Raises:
        InputError: Unknown risk or level, or two vocabularies of different size.
    """
    level, tilt = risk_level(risk, level), RISKS[risk].tilt
    if reference_head is None:
        reference_head = head
    require_one_vocabulary(len(head.weight), len(reference_head.weight))
    reference_hidden, reference_head = _frozen_operands(reference_hidden.detach(), reference_head)
    if head.trained:
        return _recomputed_risks(hidden, head, reference_hidden, reference_head, targets, tilt, level, chunk, slopes)
    hidden, head = _frozen_operands(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _FrozenRisks.apply(  # type: ignore[no-untyped-call]
            hidden, head, reference_hidden, reference_head, targets, tilt, level, chunk, slopes
        )
    return TokenRisks(*found)


def _frozen_operands(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both in the dtype in which they are to be multiplied."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    return hidden.to(dtype), head.frozen(dtype)


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def _block_rows(vocabulary: int, chunk: int, device: str) -> int:
    """How many rows to take through the arithmetic between the matrix products at a time.

    On a CPU a dozen passes over few rows that stay in its cache take half the time of as many over a whole chunk.
    """
    return max(8, _BLOCK_BYTES // (4 * vocabulary)) if device == "cpu" else chunk


def _pulled_back(head: Head, logits: Tensor, targets: Tensor | None, mixture: Tensor) -> Tensor:
    """(e - mixture) through d logits / d hidden, with e the unit vector of the target, or 0. Shape (n, D).

    Args:
        logits: Shape (n, V).
        targets: Shape (n,), or None for no unit vector.
        mixture: Overwritten. Shape (n, V).
    """
    slopes = head.slopes(logits)
    if isinstance(slopes, Tensor) or slopes != 1:
        mixture.mul_(slopes)
    product = widened(mixture.to(head.weight.dtype) @ head.weight)
    if targets is None:
        return product.neg_()
    at_target = slopes.gather(1, targets[:, None]) if isinstance(slopes, Tensor) else slopes
    return at_target * head.weight[targets] - product


class _FrozenLogProbs(torch.autograd.Function):
    """`token_log_probs_from_hidden` in one dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = widened(hidden.new_empty(0)).new_empty(len(hidden))
        for part in _chunks(len(hidden), chunk):
            logits = head.logits(hidden[part])
            policy = logits.log_softmax(dim=1)
            found[part] = policy.gather(1, targets[part, None]).squeeze(1)
            if jacobian is not None:
                jacobian[part] = _pulled_back(head, logits, targets[part], policy.exp_())
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return (gradients[0][:, None] * jacobian).to(jacobian.dtype), None, None, None


class _FrozenRisks(torch.autograd.Function):
    """`token_risks_from_hidden` in one dtype under a frozen head.

    With e the unit vector of the target, w the tilted reference and S its mass, d log q / d logits = e - q and
    d risk / d logits = S q - w; so that of log q + c risk is e - ((1 - c S) q + c w).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        reference_hidden: Tensor,
        reference_head: Head,
        targets: Tensor,
        tilt: Tilt,
        level: float,
        chunk: int,
        slopes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        jacobians = [torch.empty_like(hidden) for _ in range(2 if slopes is None else 1)] if wanted else []
        outputs = widened(hidden.new_empty(0)).new_empty(4, len(hidden)).unbind()
        log_probs, reference_log_probs, risks, divergences = outputs
        scratch = Scratch()
        block = _block_rows(len(head.weight), chunk, hidden.device.type)
        for part in _chunks(len(hidden), chunk):
            target = targets[part]
            shape = len(target), len(head.weight), hidden.dtype, hidden.device
            logits = head.logits(hidden[part], scratch.rows("logits", *shape))
            # In each block the reference's logits give way to what they were needed for: the mixture.
            mixture = reference_head.logits(reference_hidden[part], scratch.rows("mixture", *shape))
            second = scratch.like("second", mixture) if len(jacobians) == 2 else None
            for rows in _chunks(len(target), block):
                here = slice(part.start + rows.start, min(part.start + rows.stop, part.start + len(target)))
                policy, reference = (
                    torch.log_softmax(all_[rows], 1, out=scratch.like(name, all_[rows]))
                    for name, all_ in (("policy", logits), ("reference", mixture))
                )
                log_probs[here] = policy.gather(1, target[rows, None]).squeeze(1)
                reference_log_probs[here] = reference.gather(1, target[rows, None]).squeeze(1)
                ratios = log_ratios(reference, policy, scratch)
                found = tilt(reference, ratios, level, scratch)
                risks[here] = found.risk
                divergences[here] = found.risk if tilt is kl else mean_under(reference.exp_(), ratios, scratch)
                if not wanted:
                    continue
                mass = 1.0 if found.mass is None else found.mass
                given = torch.exp(policy, out=mixture[rows])
                if second is not None:
                    torch.sub(found.weights, given * mass, out=second[rows])
                elif slopes is not None and bool(slopes[here].any()):
                    slope = slopes[here, None].to(given.dtype)
                    given.mul_(1 - slope * mass).addcmul_(found.weights, slope)
            if wanted:
                jacobians[0][part] = _pulled_back(head, logits, target, mixture)
            if second is not None:
                jacobians[1][part] = _pulled_back(head, logits, None, second)
        ctx.save_for_backward(*jacobians)
        fixed = [reference_log_probs, divergences]
        ctx.mark_non_differentiable(*fixed if slopes is None else [*fixed, risks])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        jacobians = ctx.saved_tensors
        total = gradients[0][:, None] * jacobians[0]
        if len(jacobians) == 2:
            total = total.addcmul_(gradients[2][:, None], jacobians[1])
        return total.to(jacobians[0].dtype), *[None] * 8


def _recomputed_risks(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    reference_head: Head,
    targets: Tensor,
    tilt: Tilt,
    level: float,
    chunk: int,
    slopes: Tensor | None,
) -> TokenRisks:
    """`token_risks_from_hidden` for a head that is trained."""

    def score(rows: Tensor, reference_rows: Tensor, wanted: Tensor, *slope: Tensor) -> Tensor:
        logits = head.logits(rows)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            reference = reference_head.logits(reference_rows)
        log_probs = -F.cross_entropy(logits, wanted, reduction="none")
        risks = tilted_risk(logits, reference, tilt, level)
        if slope:
            # The value of log q and the gradient of log q + c risk.
            carried = slope[0] * risks
            log_probs, risks = log_probs + carried - carried.detach(), risks.detach()
        with torch.no_grad():
            reference_log_probs = -F.cross_entropy(reference, wanted, reduction="none")
            divergences = risks if tilt is kl else tilted_risk(logits.detach(), reference, kl, 1.0)
        return torch.stack([log_probs, reference_log_probs, risks, divergences.detach()])

    tensors = (hidden, reference_hidden, targets) if slopes is None else (hidden, reference_hidden, targets, slopes)
    log_probs, reference_log_probs, risks, divergences = _recomputed(score, chunk, *tensors).unbind()
    risks = risks if slopes is None else risks.detach()
    return TokenRisks(log_probs, reference_log_probs.detach(), risks, divergences.detach())


def _recomputed(score: Callable[..., Tensor], chunk: int, *tensors: Tensor) -> Tensor:
    """A function of N rows applied to `chunk` of them at a time, and once more in the backward pass."""
    parts = [[tensor[part] for tensor in tensors] for part in _chunks(max(1, len(tensors[0])), chunk)]
    found = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(found, dim=-1)
