"""The losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from psacpo.align.config import AlignConfig
from psacpo.align.losses import LOSSES, dpo_loss, smoothed


def test_dpo_by_hand() -> None:
    """arXiv 2305.18290 Eq. 7 with beta 0.5.

    Pair 1: chosen ratio -1 - (-3) = 2, rejected ratio -4 - (-2) = -2, margin 4, h = 0.5 * 4 = 2,
            loss = -log sigmoid(2) = log(1 + e^-2) = 0.126928
    Pair 2: chosen ratio -5 - (-5) = 0, rejected ratio -1 - (-2) = 1, margin -1, h = -0.5,
            loss = log(1 + e^0.5) = 0.974077
    d loss / d chosen = -beta * sigmoid(-h): -0.5 * 0.119203 = -0.059601 and -0.5 * 0.622459 = -0.311230;
    d loss / d rejected has the other sign.
    """
    chosen = torch.tensor([-1.0, -5.0], requires_grad=True)
    rejected = torch.tensor([-4.0, -1.0], requires_grad=True)
    found = dpo_loss(chosen, rejected, torch.tensor([-3.0, -5.0]), torch.tensor([-2.0, -2.0]), 0.5)
    assert found.losses.tolist() == pytest.approx([0.126928, 0.974077], abs=1e-6)
    assert found.chosen_logratios.tolist() == [2.0, 0.0]
    assert found.rejected_logratios.tolist() == [-2.0, 1.0]
    assert found.margins.tolist() == [4.0, -1.0]
    found.losses.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.059601, -0.311230], abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([0.059601, 0.311230], abs=1e-6)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    scores = torch.tensor([-3.0, -700.0])
    assert LOSSES["dpo"](scores, scores - 1, scores, scores - 1, 0.1).losses.tolist() == pytest.approx(
        [math.log(2)] * 2
    )


def test_dpo_stays_finite_far_out() -> None:
    found = dpo_loss(torch.tensor([-9e4]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), 1.0)
    assert found.losses.item() == pytest.approx(9e4)


def test_sacpo_second_stage_is_the_modpo_loss() -> None:
    """(beta/lambda) log(pi/pi_r) = (1/lambda) [beta log(pi/pi_ref) - beta log(pi_r/pi_ref)], so stage 2 with pi_r as
    its reference is MODPO's loss (arXiv 2310.03708) with stage 1's implicit reward as the margin."""
    torch.manual_seed(0)
    policy, first, base = torch.randn(3, 2, 5, dtype=torch.float64)
    beta, weight = 0.1, 10.0
    found = dpo_loss(policy[0], policy[1], first[0], first[1], beta / weight).losses
    implicit = beta * (policy - base), beta * (first - base)
    score = ((implicit[0][0] - implicit[0][1]) - (implicit[1][0] - implicit[1][1])) / weight
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(score))


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
