"""Preference losses: log-probabilities in, one loss a pair out. No model, no settings, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLosses(NamedTuple):
    """What a loss gives for B pairs.

    Attributes:
        losses: Shape (B,), differentiable. A batch's loss is their mean.
        chosen_logratios: Shape (B,), detached, in nats: log pi(chosen) - log pi_ref(chosen).
        rejected_logratios: Shape (B,), detached, in nats: the same for the rejected answers.
    """

    losses: Tensor
    chosen_logratios: Tensor
    rejected_logratios: Tensor

    @property
    def margins(self) -> Tensor:
        """Shape (B,), in nats: by how much the policy moved towards the chosen answer, seen from the reference.

        beta times this is the difference of the implicit rewards (arXiv 2305.18290, section 4).
        """
        return self.chosen_logratios - self.rejected_logratios


PairLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, float], PairLosses]


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> PairLosses:
    """Direct preference optimisation, arXiv 2305.18290 Eq. 7.

        loss = -log sigmoid(beta * [(log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))])

    The second stage of SACPO (arXiv 2404.11049, Theorem 1) is this loss with the first stage's policy as pi_ref and
    beta/lambda as beta: the optimum of that stage is then the joint optimum of reward and lambda-weighted safety.

    Args:
        policy_chosen: log pi(chosen), summed over the answer's tokens. Shape (B,), in nats.
        policy_rejected: log pi(rejected). Shape (B,).
        reference_chosen: log pi_ref(chosen), without gradient. Shape (B,).
        reference_rejected: log pi_ref(rejected), without gradient. Shape (B,).
        beta: Weight of the KL divergence from the reference, above 0.
    """
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    losses = -F.logsigmoid(beta * (chosen - rejected))
    return PairLosses(losses, chosen.detach(), rejected.detach())


LOSSES: dict[str, PairLoss] = {"dpo": dpo_loss}


def smoothed(previous: float, value: float, step: int, weight: float) -> tuple[float, float]:
    """One step of an exponential moving average that starts at 0 and is corrected for that start (as Adam's is).

    Args:
        previous: The uncorrected average after `step - 1` values; 0 before the first.
        value: The new value.
        step: How many values there are with the new one, from 1.
        weight: Weight of the past, in [0, 1); 0 gives `value` itself.

    Returns:
        The uncorrected average, to be passed in next time, and the corrected one: the mean of all values so far
        with weights that fall by `weight` a step.
    """
    average = weight * previous + (1 - weight) * value
    return average, average / (1 - weight**step)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
