"""Judges against people: hand-worked rates, AUROC against scikit's definition, the corrected rate's coverage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness.judges import Item
from psacpo.evalharness.judging.calibrate import (
    add_corrected,
    calibrate,
    calibration_lines,
    corrected,
    read_calibration,
    read_gold,
)
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.verdicts import Answer
from psacpo.evalharness.statistics.calibration import auroc, best_accuracy, confusion, exact_rate, rogan_gladen


def test_exact_rates() -> None:
    # Clopper and Pearson: 0 of n ends at 1 - (alpha/2)^(1/n); 5 of 10 at 95 % is 0.187 to 0.813.
    none = exact_rate(0, 20, 0.95)
    assert (none.mean, none.low, none.high) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    half = exact_rate(5, 10, 0.95)
    assert (half.low, half.high) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    assert exact_rate(0, 0, 0.95).mean is None


def test_confusion_by_hand() -> None:
    scores, labels = np.array([0.9, 0.8, 0.3, 0.2, 0.6]), np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    found = confusion(scores, labels, 0.5, 0.95)
    assert list(found["confusion"].values()) == [2, 1, 1, 1]
    assert found["accuracy"]["mean"] == 0.6
    assert (found["sensitivity"]["hits"], found["sensitivity"]["n"]) == (2, 3)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_auroc_counts_pairs() -> None:
    draw = np.random.default_rng(0)
    scores, labels = draw.integers(0, 6, 40).astype(float), draw.integers(0, 2, 40).astype(float)
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[labels == 1]
        for low in scores[labels == 0]
    ]
    assert auroc(scores, labels, np.ones((1, 40)))[0] == pytest.approx(np.mean(pairs))
    # A draw is a data set in which answers occur as often as they are drawn.
    weights = draw.integers(0, 3, (1, 40)).astype(float)
    times = weights[0].astype(int)
    repeated = auroc(np.repeat(scores, times), np.repeat(labels, times), np.ones((1, times.sum())))
    assert auroc(scores, labels, weights) == pytest.approx(repeated)
    assert math.isnan(auroc(scores, np.ones(40), np.ones((1, 40)))[0])


def test_the_best_threshold_cannot_part_equal_scores() -> None:
    assert best_accuracy(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 1.0, 1.0])) == 1.0
    assert best_accuracy(np.array([4.0, 3.0, 2.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])) == 1.0, "either way up"
    assert best_accuracy(np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0])) == pytest.approx(2 / 3)


def test_a_corrected_rate_by_hand() -> None:
    # (0.3 + 0.9 - 1) / (0.8 + 0.9 - 1) = 0.2 / 0.7
    found = rogan_gladen(0.3, 1000, (80, 100), (90, 100), 0.95)
    assert found.mean == pytest.approx(0.2 / 0.7)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.2 / 0.7 < found.high
    perfect = rogan_gladen(0.25, 400, (10**7, 10**7), (10**7, 10**7), 0.95)
    # A judge that never errs leaves the rate with its own interval, that of Agresti and Coull.
    assert (perfect.low, perfect.high) == (pytest.approx(0.2099, abs=2e-3), pytest.approx(0.2947, abs=2e-3))
    with pytest.raises(InputError, match="no better than chance on the labels; given: sensitivity 0.500"):
        rogan_gladen(0.3, 100, (5, 10), (5, 10), 0.95)
    with pytest.raises(InputError, match="labels of both kinds"):
        rogan_gladen(0.3, 100, (0, 0), (5, 10), 0.95)


@pytest.mark.parametrize(("true", "se", "sp"), [(0.05, 0.9, 0.95), (0.3, 0.75, 0.85), (0.5, 0.95, 0.7)])
def test_the_corrected_interval_covers_the_truth(true: float, se: float, sp: float) -> None:
    """95 % intervals of 2,000 simulated studies hold the true rate about as often as they say; the plain rate does not."""
    draw = np.random.default_rng(1)
    judged = true * se + (1 - true) * (1 - sp)
    inside = plain = 0
    for _ in range(2000):
        n, m1, m0 = 500, 80, 120
        rate = draw.binomial(n, judged) / n
        try:
            found = rogan_gladen(rate, n, (draw.binomial(m1, se), m1), (draw.binomial(m0, sp), m0), 0.95)
        except InputError:
            continue
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= true <= found.high
        plain += abs(rate - true) <= 1.96 * math.sqrt(rate * (1 - rate) / n)
    assert 0.93 <= inside / 2000 <= 0.985
    assert plain / 2000 < 0.9


def answers(*names: str) -> list[Answer]:
    return [Answer(name, Item("p", "c", prompt_id=name), name) for name in names]


def test_gold_rows_find_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"

    def gold(*rows: dict[str, Any]) -> dict[int, float]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_gold(path, answers("a", "b", "c"))

    assert gold({"id": "b", "label": True}, {"id": "z", "label": 0}, {"id": "a", "label": None}) == {1: 1.0}
    with pytest.raises(InputError, match="none of its 1 labels is of an answer"):
        gold({"id": "z", "label": 1})
    with pytest.raises(InputError, match="row 2: a second label for 'a'"):
        gold({"id": "a", "label": 1}, {"id": "a", "label": 1})
    with pytest.raises(InputError, match="row 1: label is no finite number; given: 'yes'"):
        gold({"id": "a", "label": "yes"})
    with pytest.raises(InputError, match="unknown column 'label'"):
        gold({"id": "a", "mark": 1})


def test_labels_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gold.jsonl"
    rows = [{"id": "a", "label": 1}, {"id": "b", "label": None}, {"id": "y", "label": 0}, {"id": "z", "label": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_gold(path, answers("a", "b"), warn=True) == {0: 1.0}
    told = capsys.readouterr().err
    assert "2 of 4 labels are of no answer that is judged, and are left out" in told
    assert "1 of 4 rows have no label, and are left out" in told
    for label in (math.nan, math.inf, "-inf"):
        path.write_text(json.dumps({"id": "a", "label": label}))
        with pytest.raises(InputError, match="row 1: label is no finite number"):
            read_gold(path, answers("a", "b"))


def test_an_interval_has_a_width_or_is_none(tmp_path: Path) -> None:
    """4 of 4 disjoint pairs in the right order: Clopper and Pearson's bound at 95 % is 0.025^(1/4)."""
    config = validate(JudgeConfig, {"source": tmp_path, "judges": {}, "calibrate": tmp_path / "g.jsonl"}, where="test")
    (tmp_path / "g.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "label": int(n < 4)}) + "\n" for n in range(10))
    )
    kinds = {
        "right": [1.0 if n < 4 else 0.0 for n in range(10)],
        "wrong": [0.0 if n < 4 else 1.0 for n in range(10)],
        "same": [1.0] * 10,
    }
    verdicts = {
        name: [{"valid": True, "score": score, "judge_digest": "d"} for score in scores]
        for name, scores in kinds.items()
    }
    _, found = calibrate(config, tmp_path / "s.jsonl", answers(*map(str, range(10))), verdicts)
    bound = pytest.approx(0.025 ** (1 / 4))
    assert found["right"]["auroc"] == {"mean": 1.0, "low": bound, "high": 1.0, "n": 10}
    assert found["wrong"]["auroc"] == {"mean": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 4)), "n": 10}
    assert found["same"]["auroc"] == {"mean": 0.5, "low": None, "high": None, "n": 10}
    assert "  AUROC        0.500 (no interval: the same in every draw); length alone 0.500" in calibration_lines(found)


def test_a_calibration_is_read_for_the_judge_that_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    rates = {name: {"hits": 9, "n": 10} for name in ("sensitivity", "specificity")}
    path.write_text(
        json.dumps({"judges": {"cost": {"digest": "d"} | rates, "graded": {"digest": "d", "spearman": {}}}})
    )
    assert corrected(0.5, 100, read_calibration(path, "cost", "d"), 0.95).mean == pytest.approx(0.5)
    for judge, digest, match in (
        ("cots", "d", "did you mean 'cost'"),
        ("cost", "e", "is of another judge"),
        ("graded", "d", "no labels of 0 and 1"),
    ):
        with pytest.raises(InputError, match=match):
            read_calibration(path, judge, digest)


def test_points_get_their_corrected_rates() -> None:
    calibration = {"sensitivity": {"hits": 90, "n": 100}, "specificity": {"hits": 95, "n": 100}}
    entries: list[dict[str, Any]] = [
        {"unsafe_rate": {"mean": 0.30, "low": 0.25, "high": 0.35, "n": 300}},
        {"unsafe_rate": {"mean": 0.30, "low": 0.15, "high": 0.45, "n": 300}},
        {"unsafe_rate": {"mean": 0.0, "low": 0.0, "high": 0.012, "n": 300}},
        {"unsafe_rate": {"mean": None, "low": None, "high": None, "n": 0}},
    ]
    add_corrected(entries, "unsafe_rate", calibration, 0.95)
    first, clustered, none, empty = (entry["unsafe_rate"]["corrected"] for entry in entries)
    assert first["mean"] == clustered["mean"] == pytest.approx(0.25 / 0.85)
    assert clustered["high"] - clustered["low"] > 2 * (first["high"] - first["low"])
    assert (none["mean"], none["low"]) == (0.0, 0.0)
    assert empty is None
