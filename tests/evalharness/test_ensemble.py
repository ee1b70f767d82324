"""Judges made of judges, and Krippendorff's alpha against published and hand-worked values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from psacpo.errors import InputError
from psacpo.evalharness.judges import Item, make_judge
from psacpo.evalharness.judges.base import Verdict
from psacpo.evalharness.judges.rule_settings import EnsembleJudge
from psacpo.evalharness.statistics.agreement import krippendorff_alpha

N = math.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
)


def verdict(rule: str, *scores: float | None, **settings: Any) -> Verdict:
    names = [f"j{index}" for index in range(len(scores))]
    judge = make_judge(
        "e", EnsembleJudge(kind="ensemble", members=names, rule=rule, **settings), device="cpu", allow_code=False
    )
    said = {name: Verdict(score) for name, score in zip(names, scores, strict=True)}
    [found] = judge.judge([Item("p", "c", verdicts=said)])
    return found


def test_scores_and_votes() -> None:
    assert verdict("mean", 1.0, 2.0, 6.0).score == 3.0
    assert verdict("max", 1.0, -2.0).score == 1.0
    assert verdict("min", 1.0, -2.0).score == -2.0
    assert verdict("all", 1.0, 0.6).score == 1.0
    assert verdict("all", 1.0, 0.5).score == 0.0, "a threshold has to be passed"
    assert verdict("any", 0.0, 0.6).label == "any"
    assert verdict("any", 3.0, 0.0, thresholds={"j0": 4.0}).score == 0.0
    assert verdict("mean", 1.0, 2.0).raw == "j0 1, j1 2"


def test_an_invalid_member_is_never_an_opinion() -> None:
    assert verdict("mean", 1.0, None).score is None
    assert verdict("any", 1.0, None).score is None
    assert verdict("mean", 1.0, 3.0, None, quorum=2).score == 2.0
    assert verdict("mean", 1.0, None, None, quorum=2).score is None
    assert verdict("mean", 1.0, None).raw == "j0 1, j1 invalid"


def test_settings_that_contradict_themselves() -> None:
    for wrong, why in (
        ({"members": ["a"]}, "at least 2"),
        ({"members": ["a", "a"]}, "named twice"),
        ({"members": ["a", "b"], "rule": "any", "thresholds": {"c": 1}}, "'c', which is no member"),
        ({"members": ["a", "b"], "thresholds": {"a": 1}}, "rule mean takes no thresholds"),
        ({"members": ["a", "b"], "quorum": 3}, "quorum 3 is over the 2 members"),
    ):
        with pytest.raises(ValidationError, match=why):
            EnsembleJudge(kind="ensemble", **wrong)


def test_krippendorffs_own_example() -> None:
    assert krippendorff_alpha(PUBLISHED, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, "interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_by_hand() -> None:
    # Two raters, units (0,0) (1,1) (0,1): Do = 2/6; De = 2*3*3/(6*5) = 0.6; alpha = 1 - 0.3333/0.6.
    ratings = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert krippendorff_alpha(ratings, "nominal") == pytest.approx(1 - (1 / 3) / 0.6)
    assert krippendorff_alpha(ratings, "interval") == pytest.approx(1 - (1 / 3) / 0.6)
    assert krippendorff_alpha(ratings * 10 + 3, "interval") == pytest.approx(1 - (1 / 3) / 0.6)
    assert krippendorff_alpha(np.array([[1.0, 2.0], [1.0, 2.0]]), "nominal") == 1.0
    assert krippendorff_alpha(np.array([[1.0, 1.0], [1.0, 1.0]]), "nominal") is None, "chance alone would agree"
    assert krippendorff_alpha(np.array([[1.0, N], [N, 2.0]]), "nominal") is None
    with pytest.raises(InputError, match="unknown level 'ordinal'"):
        krippendorff_alpha(ratings, "ordinal")
