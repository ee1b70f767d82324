"""The losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from psacpo.align.config import AlignConfig
from psacpo.align.losses import (
    LOSSES,
    AnswerTerms,
    Options,
    PairTerms,
    cdpo,
    dpo,
    ipo,
    kl_baseline,
    kto,
    modpo,
    radpo1,
    radpo2,
    safedpo,
    smoothed,
)
from psacpo.align.risk import RISKS
from psacpo.align.stage_config import LOSS_SETTINGS, LossName, RiskName, Stage

CHOSEN, REJECTED = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])


def leaves(*values: torch.Tensor) -> list[torch.Tensor]:
    return [value.clone().requires_grad_() for value in values]


def gradient(tensor: torch.Tensor) -> list[float]:
    assert tensor.grad is not None
    found: list[float] = tensor.grad.tolist()
    return found


def test_dpo_by_hand() -> None:
    """arXiv 2305.18290 Eq. 7 with beta 0.5.

    Pair 1: log-ratios 2 and -2, h = 0.5 * 4 = 2, loss = -log sigmoid(2) = log(1 + e^-2) = 0.126928
    Pair 2: log-ratios 0 and 1, h = -0.5, loss = log(1 + e^0.5) = 0.974077
    d loss / d chosen = -beta * sigmoid(-h): -0.5 * 0.119203 = -0.059601 and -0.5 * 0.622459 = -0.311230;
    d loss / d rejected has the other sign.
    """
    chosen, rejected = leaves(CHOSEN, REJECTED)
    losses = dpo(PairTerms(chosen, rejected), Options(0.5))
    assert losses.tolist() == pytest.approx([0.126928, 0.974077], abs=1e-6)
    losses.sum().backward()
    assert gradient(chosen) == pytest.approx([-0.059601, -0.311230], abs=1e-6)
    assert gradient(rejected) == pytest.approx([0.059601, 0.311230], abs=1e-6)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    zero = torch.zeros(2)
    assert dpo(PairTerms(zero, zero), Options(0.1)).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_stays_finite_far_out() -> None:
    assert dpo(PairTerms(torch.tensor([-9e4]), torch.zeros(1)), Options(1.0)).item() == pytest.approx(9e4)


def test_cdpo_by_hand() -> None:
    """-(0.8) log s(2) - 0.2 log s(-2) = 0.8 * 0.126928 + 0.2 * 2.126928 = 0.526928; its minimum is where s = 0.8."""
    options = Options(0.5, label_smoothing=0.2)
    assert cdpo(PairTerms(CHOSEN[:1], REJECTED[:1]), options).item() == pytest.approx(0.526928, abs=1e-6)
    [margin] = leaves(torch.tensor([math.log(4) / 0.5]))
    cdpo(PairTerms(margin, torch.zeros(1)), options).sum().backward()
    assert gradient(margin) == pytest.approx([0.0], abs=1e-7)
    plain = cdpo(PairTerms(CHOSEN, REJECTED), Options(0.5, label_smoothing=0.0))
    assert plain.tolist() == dpo(PairTerms(CHOSEN, REJECTED), Options(0.5)).tolist()


def test_ipo_by_hand() -> None:
    """Log-ratios a token: 2/4 - (-2/2) = 1.5, (1.5 - 1/(2*0.5))^2 = 0.25; 0 - 1/5 = -0.2, (-1.2)^2 = 1.44."""
    terms = PairTerms(CHOSEN, REJECTED, torch.tensor([4, 3]), torch.tensor([2, 5]))
    assert ipo(terms, Options(0.5)).tolist() == pytest.approx([0.25, 1.44])


def test_safedpo_by_hand() -> None:
    """beta h = 2 and -0.5; Delta 3 where the rejected answer is unsafe: -log s(2 - 3) and -log s(-0.5)."""
    terms = PairTerms(CHOSEN, REJECTED, margin=torch.tensor([1.0, 0.0]))
    found = safedpo(terms, Options(0.5, safety_margin=3.0)).tolist()
    assert found == pytest.approx([math.log(1 + math.e), 0.974077], abs=1e-6)


def test_radpo_by_hand() -> None:
    """beta 0.5, margins 4 and -1, R_w = (1, 0), R_l = (3, 2): delta = (2, 2).

    First form: beta (h - delta) = (1, -1.5), losses (0.313262, 1.701413). Second, alpha 0.25: (1.75, -0.75), losses
    (0.160224, 1.136871). With g = -beta s(-score): both forms have d/d m_w = g and d/d R_l = -alpha g (alpha 1 in the
    first form); d/d R_w = g in the first form and 0 in the second.
    """
    for function, alpha, expected, score in (
        (radpo1, 1.0, [0.313262, 1.701413], torch.tensor([1.0, -1.5])),
        (radpo2, 0.25, [0.160224, 1.136871], torch.tensor([1.75, -0.75])),
    ):
        chosen, rejected, first, second = leaves(CHOSEN, REJECTED, torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0]))
        terms = PairTerms(chosen, rejected, chosen_risk=first, rejected_risk=second)
        losses = function(terms, Options(0.5, alpha=0.25))
        assert losses.tolist() == pytest.approx(expected, abs=1e-6)
        losses.sum().backward()
        g = -0.5 * torch.sigmoid(-score)
        assert gradient(chosen) == pytest.approx(g.tolist())
        assert gradient(rejected) == pytest.approx((-g).tolist())
        assert gradient(second) == pytest.approx((-alpha * g).tolist())
        if function is radpo1:
            assert gradient(first) == pytest.approx(g.tolist())
        else:
            assert first.grad is None


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.risk])
def test_risk_slopes(name: str) -> None:
    """d loss / d R is c times d loss / d m, so the gradient may come through log pi + c R alone."""
    loss, options = LOSSES[name], Options(0.5, alpha=0.3)
    assert loss.pairs is not None
    assert loss.slopes is not None
    chosen, rejected, first, second = leaves(CHOSEN, REJECTED, torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0]))
    loss.pairs(PairTerms(chosen, rejected, chosen_risk=first, rejected_risk=second), options).sum().backward()
    assert first.grad is not None or loss.slopes(options)[0] == 0
    for slope, answer, risk in zip(loss.slopes(options), (chosen, rejected), (first, second), strict=True):
        given = [0.0, 0.0] if risk.grad is None else gradient(risk)
        assert given == pytest.approx([slope * value for value in gradient(answer)])


def test_second_form_without_alpha_is_dpo() -> None:
    risks = {"chosen_risk": torch.tensor([1.0, 0.0]), "rejected_risk": torch.tensor([3.0, 2.0])}
    found = radpo2(PairTerms(CHOSEN, REJECTED, **risks), Options(0.5, alpha=0.0))
    assert found.tolist() == dpo(PairTerms(CHOSEN, REJECTED), Options(0.5)).tolist()


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "radpo1"])
def test_swapping_the_answers_turns_the_score(name: str) -> None:
    """s(score) and s(-score) are the probabilities of the two orders: they sum to 1. The second form's do not."""
    first, second = torch.tensor([1.0, 0.5]), torch.tensor([3.0, 2.0])
    loss = LOSSES[name].pairs
    assert loss is not None
    one = loss(PairTerms(CHOSEN, REJECTED, chosen_risk=first, rejected_risk=second), Options(0.5))
    other = loss(PairTerms(REJECTED, CHOSEN, chosen_risk=second, rejected_risk=first), Options(0.5))
    assert ((-one).exp() + (-other).exp()).tolist() == pytest.approx([1.0, 1.0])


def test_kto_by_hand() -> None:
    """beta 0.5, mismatched log-ratios 3, -1, 1: nu = 1. Desirable m = 3: 2 (1 - s(1)) = 2 * 0.268941; undesirable m = 2:
    0.5 (1 - s(-0.5)) = 0.5 * 0.622459. d/dm = -w+ beta s(1)s(-1) = -0.196612 and w- beta s(.5)s(-.5) = 0.058751."""
    baseline = kl_baseline(torch.tensor([3.0, -1.0, 1.0], requires_grad=True))
    assert baseline.item() == 1.0
    assert not baseline.requires_grad
    assert kl_baseline(torch.tensor([-3.0, 1.0])).item() == 0.0
    [ratios] = leaves(torch.tensor([3.0, 2.0]))
    options = Options(0.5, desirable_weight=2.0, undesirable_weight=0.5)
    losses = kto(AnswerTerms(ratios, torch.tensor([True, False]), baseline), options)
    assert losses.tolist() == pytest.approx([0.537883, 0.311230], abs=1e-6)
    losses.sum().backward()
    assert gradient(ratios) == pytest.approx([-0.196612, 0.058751], abs=1e-6)


def test_a_missing_term_is_said() -> None:
    with pytest.raises(ValueError, match="not given a term"):
        modpo(PairTerms(CHOSEN, REJECTED), Options(0.5))


def test_sacpo_second_stage_is_the_modpo_loss() -> None:
    """(beta/lambda) log(pi/pi_r) = (1/lambda) [beta log(pi/pi_ref) - beta log(pi_r/pi_ref)], so stage 2 with pi_r as
    its reference is MODPO's loss (arXiv 2310.03708) with stage 1's implicit reward as the margin."""
    torch.manual_seed(0)
    policy, first, base = torch.randn(3, 2, 5, dtype=torch.float64)
    beta, weight = 0.1, 10.0
    found = dpo(PairTerms(policy[0] - first[0], policy[1] - first[1]), Options(beta / weight))
    implicit = beta * (first - base)
    terms = PairTerms(policy[0] - base[0], policy[1] - base[1], margin=implicit[0] - implicit[1])
    torch.testing.assert_close(found, modpo(terms, Options(beta, margin_weight=weight)))


def test_settings_know_the_losses_and_risks() -> None:
    assert set(LossName.__args__) == set(LOSSES)  # type: ignore[attr-defined]
    assert set(RiskName.__args__) == set(RISKS)  # type: ignore[attr-defined]
    assert set(LOSS_SETTINGS) <= set(Stage.model_fields)


def stage(**settings: object) -> Stage:
    return Stage.model_validate({"name": "s", "data": "d"} | settings)


def test_settings_are_those_of_the_loss() -> None:
    """What a loss does not take is neither shown nor taken, so it cannot make one result look like another's."""
    assert not set(LOSS_SETTINGS) & set(stage().model_dump())
    shown = stage(loss="radpo2", risk="erm", risk_level=5).model_dump()
    assert {name: shown[name] for name in LOSS_SETTINGS if name in shown} == {
        "alpha": 0.5,
        "risk": "erm",
        "risk_level": 5,
        "risk_per_token": False,
    }
    assert stage(**shown) == stage(loss="radpo2", risk="erm", risk_level=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"risk": "erm"}, "risk is no setting of the loss dpo; allowed: with radpo1, radpo2"),
        ({"loss": "kto", "alpha": 0.5}, "alpha is no setting of the loss kto"),
        ({"loss": "radpo2", "risk_level": 0}, "risk_level 0 is out of range for cvar; allowed: above 0 and at most 1"),
        ({"loss": "radpo1", "risk": "erm", "risk_level": -1}, "allowed: above 0"),
        ({"loss": "radpo1", "risk": "cvar_released", "risk_level": 1}, "allowed: above 0 and below 1"),
        ({"loss": "radpo1", "risk": "kl", "risk_level": 0.5}, "the risk kl has no risk_level"),
        ({"loss": "kto", "desirable_weight": 0, "undesirable_weight": 0}, "both 0"),
        ({"loss": "cdpo", "label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "hinge"}, "'dpo', 'cdpo'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**settings)


def test_smoothing_is_the_weighted_mean_of_all_values() -> None:
    """Weight 0.5 after 1, 2, 4: (0.25 * 1 + 0.5 * 2 + 1 * 4) / (0.25 + 0.5 + 1) = 5.25 / 1.75 = 3."""
    average, corrected = 0.0, []
    for step, value in enumerate([1.0, 2.0, 4.0], start=1):
        average, now = smoothed(average, value, step, 0.5)
        corrected.append(now)
    assert corrected == pytest.approx([1.0, 5 / 3, 3.0])
    assert smoothed(9.0, 2.5, 4, 0.0)[1] == 2.5


def test_beta_of_each_stage() -> None:
    stages = [{"name": "r", "data": "d"}, {"name": "s", "data": "d"}, {"name": "n", "data": "d", "start": "base"}]
    own = {"name": "o", "data": "d", "start": "r", "beta": 0.3}
    config = AlignConfig.model_validate({"base": "b", "out": "o", "stages": [*stages, own], "beta": 0.2, "lambda": 8.0})
    assert [config.beta_of(stage) for stage in config.stages] == pytest.approx([0.2, 0.025, 0.2, 0.3])
    assert [config.start_of(stage) for stage in config.stages] == ["base", "r", "base", "r"]
