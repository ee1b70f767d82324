"""Preference losses: log-ratios in, one loss a pair or an answer out. No model, no data, no I/O.

m(y) = log pi(y|x) - log pi_ref(y|x), summed over an answer's tokens, is called its log-ratio; y_w is the chosen and
y_l the rejected answer, h = m(y_w) - m(y_l) the margin, all in nats. pi_ref is the policy that the stage starts from.
With stage 1's policy as pi_ref and beta/lambda as beta, each of these losses is a second stage of stepwise alignment
(SACPO, arXiv 2404.11049, Theorem 1).

| name               | loss                                                                       | source          |
|--------------------|----------------------------------------------------------------------------|-----------------|
| `dpo`              | -log s(beta h)                                                             | 2305.18290 (7)  |
| `cdpo`             | -(1-e) log s(beta h) - e log s(-beta h), e the share of wrong labels       | its note, 2023  |
| `ipo`              | (h' - 1/(2 beta))^2, h' with log-ratios divided by the answers' tokens      | 2310.12036 (17) |
| `modpo`            | -log s((beta h - margin) / weight)                                         | 2310.03708      |
| `safedpo`          | -log s(beta h - Delta (I_l - I_w)), I = 1 for an unsafe answer              | 2505.20065      |
| `tdpo1`, `radpo1`  | -log s(beta (h - (R_l - R_w)))                                             | 2404.11999      |
| `tdpo2`, `radpo2`  | -log s(beta (h - alpha (R_l - sg R_w)))                                    | 2505.20359      |
| `kto`              | w_+ (1 - s(beta (m - nu))) if desirable, w_- (1 - s(beta (nu - m))) if not | 2402.01306 (7)  |

s is the sigmoid, sg stops the gradient, R the risk of the policy's drift summed over an answer's tokens (`risk`): the
KL divergence for TDPO, a measure of choice for Ra-DPO. RSA (arXiv 2512.24263) is `radpo2` in both stages.

A loss is the mean over pairs, or over answers for `kto`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """The numbers that losses take.

    Attributes:
        beta: Weight of the KL divergence from the reference, above 0.
        label_smoothing: `cdpo`: the share of pairs taken to be the wrong way round, in [0, 0.5).
        alpha: `tdpo2`, `radpo2`: weight of the difference of the risks, at least 0.
        margin_weight: `modpo`: the weight of the objective that the pairs are about, above 0.
        safety_margin: `safedpo`: Delta, in units of beta h, at least 0.
        desirable_weight, undesirable_weight: `kto`: w_+ and w_-, at least 0.
    """

    beta: float
    label_smoothing: float = 0.1
    alpha: float = 0.5
    margin_weight: float = 1.0
    safety_margin: float = 10.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


class PairTerms(NamedTuple):
    """What is known of B pairs, each of shape (B,).

    Attributes:
        chosen, rejected: Log-ratios, differentiable.
        chosen_tokens, rejected_tokens: Lengths of the answers; None where no loss asks.
        margin: `modpo`: the other objectives' weighted rewards of the chosen minus the rejected answer, in the units of
            beta h. `safedpo`: I_l - I_w. None is 0.
        chosen_risk, rejected_risk: R; None where no loss asks.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None
    margin: Tensor | None = None
    chosen_risk: Tensor | None = None
    rejected_risk: Tensor | None = None


class AnswerTerms(NamedTuple):
    """What is known of N answers.

    Attributes:
        logratios: Differentiable. Shape (N,).
        desirable: Bool. Shape (N,).
        baseline: nu, without gradient: `kl_baseline` over the whole step. Shape ().
    """

    logratios: Tensor
    desirable: Tensor
    baseline: Tensor


PairLoss: TypeAlias = Callable[[PairTerms, Options], Tensor]
AnswerLoss: TypeAlias = Callable[[AnswerTerms, Options], Tensor]


def dpo(terms: PairTerms, options: Options) -> Tensor:
    """Direct preference optimisation. Shape (B,)."""
    return -F.logsigmoid(options.beta * (terms.chosen - terms.rejected))


def cdpo(terms: PairTerms, options: Options) -> Tensor:
    """DPO under labels of which a share is wrong ("conservative DPO"). Shape (B,).

    Its minimum lies at beta h = log((1-e)/e), where DPO has none.
    """
    scores = options.beta * (terms.chosen - terms.rejected)
    wrong = options.label_smoothing
    return -(1 - wrong) * F.logsigmoid(scores) - wrong * F.logsigmoid(-scores)


def ipo(terms: PairTerms, options: Options) -> Tensor:
    """Identity preference optimisation with log-ratios a token, as its authors use it and TRL has it. Shape (B,)."""
    lengths = _given(terms.chosen_tokens), _given(terms.rejected_tokens)
    margin = terms.chosen / lengths[0] - terms.rejected / lengths[1]
    return (margin - 1 / (2 * options.beta)) ** 2


def modpo(terms: PairTerms, options: Options) -> Tensor:
    """Multi-objective DPO: what other objectives say of the pair enters as a margin. Shape (B,).

    With margin = beta (log pi_r/pi_ref of the chosen minus the rejected answer) and weight lambda it is SACPO's second
    stage under beta/lambda with the reference pi_r.
    """
    scores = options.beta * (terms.chosen - terms.rejected) - _given(terms.margin)
    return -F.logsigmoid(scores / options.margin_weight)


def safedpo(terms: PairTerms, options: Options) -> Tensor:
    """DPO with a margin where the rejected answer is unsafe, on pairs put in order by `examples.safe_first`. Shape (B,)."""
    scores = options.beta * (terms.chosen - terms.rejected)
    return -F.logsigmoid(scores - options.safety_margin * _given(terms.margin))


def radpo1(terms: PairTerms, options: Options) -> Tensor:
    """Risk-aware DPO, first form, the gradient through both risks; TDPO1 with the KL divergence. Shape (B,)."""
    difference = _given(terms.rejected_risk) - _given(terms.chosen_risk)
    return -F.logsigmoid(options.beta * ((terms.chosen - terms.rejected) - difference))


def radpo2(terms: PairTerms, options: Options) -> Tensor:
    """Risk-aware DPO, second form, no gradient through the chosen answer's risk; TDPO2 with KL. Shape (B,)."""
    difference = _given(terms.rejected_risk) - _given(terms.chosen_risk).detach()
    return -F.logsigmoid(options.beta * ((terms.chosen - terms.rejected) - options.alpha * difference))


def kto(terms: AnswerTerms, options: Options) -> Tensor:
    """Kahneman-Tversky optimisation with today's TRL's baseline. Shape (N,).

    The weights answer for unequal numbers: the paper wants w_+ n_+ / (w_- n_-) in [1, 4/3]. SACPO's code sets
    w_- = n_+/n_- and the TRL of its time also drew the rarer class as often as the other, so there unequal numbers
    were corrected twice. Nothing is drawn more often here, so the same weights correct once.
    """
    towards = options.beta * (terms.logratios - terms.baseline)
    losses = 1 - torch.sigmoid(torch.where(terms.desirable, towards, -towards))
    return torch.where(terms.desirable, options.desirable_weight, options.undesirable_weight) * losses


def kl_baseline(mismatched: Tensor) -> Tensor:
    """nu of `kto`: the mean log-ratio of answers behind prompts that are not theirs, at least 0.

    An estimate of the KL divergence of the policy from the reference; one number for all answers of a step.

    Args:
        mismatched: Log-ratios, not differentiated. Shape (N,).
    """
    return mismatched.detach().mean().clamp(min=0)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("the loss was not given a term that it needs")
    return tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and what it needs to know.

    Attributes:
        pairs, answers: Its function, over pairs or over answers; the other is None.
        risk: None where it sees no risk; "any" where the settings name the measure; else the measure's name.
        slopes: For a loss that sees risks: the c of chosen and rejected answers for which d loss / d R is c times
            d loss / d log pi(y). So only the gradient of log pi(y) + c R is needed, which costs one matrix product less.
    """

    pairs: PairLoss | None = None
    answers: AnswerLoss | None = None
    risk: str | None = None
    slopes: Callable[[Options], tuple[float, float]] | None = None


def _both(options: Options) -> tuple[float, float]:
    return 1.0, 1.0


def _rejected_only(options: Options) -> tuple[float, float]:
    return 0.0, options.alpha


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo),
    "cdpo": Loss(cdpo),
    "ipo": Loss(ipo),
    "modpo": Loss(modpo),
    "safedpo": Loss(safedpo),
    "tdpo1": Loss(radpo1, risk="kl", slopes=_both),
    "tdpo2": Loss(radpo2, risk="kl", slopes=_rejected_only),
    "radpo1": Loss(radpo1, risk="any", slopes=_both),
    "radpo2": Loss(radpo2, risk="any", slopes=_rejected_only),
    "kto": Loss(answers=kto),
}


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
