"""Tests against limits: hand-worked values, level kept at the worst case, power, and the walks that they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from psacpo.errors import InputError
from psacpo.evalharness.decision.certifier import Certifier
from psacpo.evalharness.decision.certify import FEWEST_HELD, certify, hold_out
from psacpo.evalharness.decision.criteria import Constraint
from psacpo.evalharness.decision.measures import make_measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.trace import trace
from psacpo.evalharness.dial import lambda_bar
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.judging.given import GivenScores
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.statistics.bounds import betting_p, hoeffding_bentkus_p, inverted, share_p
from psacpo.merge.adapters import read_adapter


def make(values: dict[str, Any], ratios: list[float], *, clusters: list[int] | None = None, **fields: Any) -> Scores:
    arrays = {name: np.asarray(value, dtype=float) for name, value in values.items()}
    count = next(iter(arrays.values())).shape[1]
    rows = [
        PromptRow(str(i), "", str(clusters[i] if clusters else i), {key: own[i] for key, own in fields.items()})
        for i in range(count)
    ]
    return Scores([Policy(f"policy@{q:.2f}", {}, q) for q in ratios], rows, arrays)


def test_hoeffding_bentkus_by_hand() -> None:
    # No loss: exp(-n kl(0 | m)) = (1 - m)^n, the exact binomial probability.
    assert hoeffding_bentkus_p(np.zeros(59), 0.05) == pytest.approx(0.95**59)
    # Hoeffding's part at mean .25 of 40 against .5: kl = .25 ln .5 + .75 ln 1.5.
    values = np.array([0.25] * 40)
    kl = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    bentkus = np.e * scipy_stats.binom.cdf(10, 40, 0.5)
    assert hoeffding_bentkus_p(values, 0.5) == pytest.approx(min(np.exp(-40 * kl), bentkus))
    assert hoeffding_bentkus_p(values, 0.25) == 1.0


def test_betting_by_hand() -> None:
    # The first bet is sqrt(2 ln 20 / (n / 4)), cut at .75 / .5; the bold half is (1 - y) / .5.
    y = np.array([0.25])
    bet = min(np.sqrt(2 * np.log(20) / 0.25), 1.5)
    assert betting_p(y, 0.5) == pytest.approx(1 / (0.5 * (1 + 0.25 * bet) + 0.5 * 1.5))
    assert betting_p(np.zeros(65), 0.05) <= 0.05 < betting_p(np.zeros(60), 0.05)
    assert betting_p(np.ones(50), 0.5) == 1.0
    assert (betting_p(y, 0.0), betting_p(y, 1.0)) == (1.0, 0.0)
    # Scores of small spread need few: .4 sure against .5, where a coin of .4 does not show it.
    assert betting_p(np.full(60, 0.4), 0.5) < 0.05
    assert scipy_stats.binom.cdf(24, 60, 0.5) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["coin", "beta", "clusters", "rare"])
def test_p_values_keep_their_level_at_the_limit(shape: str) -> None:
    """A mean that is the limit exactly: a test at .05 may reject in at most .05 of the runs."""
    generator = np.random.default_rng(5)
    runs, n = 1500, 80
    if shape == "coin":
        limit, draws = 0.3, (generator.random((runs, n)) < 0.3).astype(float)
    elif shape == "beta":
        limit, draws = 0.4, generator.beta(0.8, 1.2, size=(runs, n))
    elif shape == "clusters":
        limit, draws = 0.2, generator.binomial(4, generator.beta(0.4, 1.6, size=(runs, n))) / 4
    else:
        limit, draws = 0.02, (generator.random((runs, n)) < 0.04) * 0.5
    room = 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / runs)
    for test in (betting_p, hoeffding_bentkus_p):
        assert np.mean([test(row, limit) <= 0.05 for row in draws]) <= room, test.__name__


def test_the_bound_is_where_the_test_begins_to_reject() -> None:
    values = np.random.default_rng(0).beta(1, 4, size=100)
    bound = inverted(lambda at: betting_p(values, at), 0.05, 0, 1)
    assert betting_p(values, bound) <= 0.05 < betting_p(values, bound - 1e-3)
    assert values.mean() < bound < values.mean() + 0.1
    assert inverted(lambda at: 1.0, 0.05, 0, 7) == 7
    assert share_p(np.array([1.0, 2.0, 3.0, np.nan]), 2.5) == pytest.approx(2 / 4)


def test_unequal_clusters_are_tested_on_the_mean_over_rows() -> None:
    """Large clusters safe and small ones not: the rows' mean is .1, the clusters' is .5. The table shows the former."""
    clusters = [c for c in range(60) for _ in range(1 if c % 2 else 9)]
    unsafe = [[[float(c % 2)] for c in clusters]]
    scores = make({"reward": np.ones_like(unsafe), "unsafe": unsafe}, [1.0], clusters=clusters)
    criteria = GivenScores.of(scores, axes={"cost": "unsafe"}, holdout=0)
    measure = make_measure(criteria, "unsafe", criteria.all_metrics()["unsafe"], scores)
    certifier = Certifier(criteria, scores, np.ones(60, dtype=bool), 0.95)
    test = certifier.test(Constraint.model_validate("unsafe<=0.25"), measure, 0)
    assert (test.mean, test.units, test.rows, test.method) == (pytest.approx(0.1), 60, 300, "betting on clusters")
    assert test.passed
    assert 0.1 < test.bound < 0.25
    # Rows as if they were independent would have a far lower bound.
    assert test.bound > scipy_stats.binomtest(30, 300).proportion_ci(0.9).high
    below = certifier.test(Constraint.model_validate("unsafe>=0.02"), measure, 0)
    assert 0 <= below.bound < 0.1


def test_each_metric_gets_the_test_that_its_scores_allow() -> None:
    generator = np.random.default_rng(0)
    values = {
        "reward": generator.normal(size=(1, 200, 2)),
        "unsafe": (generator.random((1, 200, 2)) < 0.05).astype(float),
        "grade": generator.beta(1, 9, size=(1, 200, 2)),
    }
    scores = make(values, [1.0], category=["a", "b"] * 100)
    metrics = {
        "bounded": {"judge": "grade", "range": [0, 1], "better": "lower"},
        "tail": {"judge": "grade", "range": [0, 1], "tail": 0.1, "better": "lower"},
        "worst_kind": {"judge": "unsafe", "above": 0.5, "worst": "category"},
        "any_of_2": {"judge": "unsafe", "above": 0.5, "worst_of": 2},
    }
    asked = ["unsafe<=0.15", "bounded<=0.2", "tail<=0.9", "worst_kind<=0.2", "any_of_2<=0.25", "grade<=0.2"]
    criteria = GivenScores.of(
        scores, metrics=metrics, axes={"cost": "unsafe"}, constraints=asked, holdout=0, resamples=300
    )
    found = trace(criteria, scores)
    methods = {name: test["method"] for name, test in found["points"][0]["tests"].items()}
    assert methods == {
        "unsafe<=0.15": "betting on clusters",
        "bounded<=0.2": "betting on clusters",
        "tail<=0.9": "betting on a tail",
        "worst_kind<=0.2": "betting on clusters",
        "any_of_2<=0.25": "exact binomial",
        "grade<=0.2": "clustered bootstrap (approximate)",
    }
    assert found["choice"]["ratio"] == 1.0
    for name, test in found["points"][0]["tests"].items():
        assert test["passed"], name
        assert test["p"] <= 0.05
        assert test["bound"] <= float(name.split("<=")[1])
        assert test["bound"] > test["mean"]


def test_walks_from_both_ends_meet() -> None:
    """Safety holds from .5 up, helpfulness from .75 down: both are certified where they overlap."""
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = np.zeros((5, 200, 1))
    unsafe, helpful = rows.copy(), rows.copy()
    for k, (bad, good) in enumerate(zip([60, 30, 4, 2, 0], [200, 190, 180, 160, 90], strict=True)):
        unsafe[k, :bad] = 1
        helpful[k, :good] = 1
    scores = make({"reward": helpful, "unsafe": unsafe}, ratios)
    criteria = GivenScores.of(
        scores, axes={"cost": "unsafe"}, constraints=["unsafe<=0.06", "reward>=0.7"], holdout=0, resamples=200
    )
    found = trace(criteria, scores)
    assert [point["certified"] for point in found["points"]] == [False, False, True, True, False]
    assert found["choice"]["ratio"] == 0.5
    assert found["choice"]["level"] == pytest.approx(0.975)
    p = found["points"][3]["tests"]["reward>=0.7"]["p"]
    assert p == pytest.approx(scipy_stats.binom.sf(159, 200, 0.7))


def test_held_out_clusters_are_shared_among_the_categories_and_choose_nothing() -> None:
    generator = np.random.default_rng(1)
    n = 300
    values = {"reward": generator.normal(size=(2, n, 1)), "unsafe": np.zeros((2, n, 1))}
    scores = make(values, [0.0, 1.0], category=["a"] * 200 + ["b"] * 100)
    criteria = GivenScores.of(scores, axes={"cost": "unsafe"}, constraints=["unsafe<=0.05"], resamples=200)
    held = hold_out(criteria, scores)
    kinds = np.array([row.fields["category"] for row in scores.prompts])[np.argsort(scores.owner)]
    assert (held[kinds == "a"].sum(), held[kinds == "b"].sum()) == (40, 20)
    assert (hold_out(criteria, scores) == held).all()
    choice = trace(criteria, scores)["choice"]
    assert choice["calibration"] == {"prompts": 240, "clusters": 240}
    own = values["reward"][[0, 1].index(round(choice["ratio"])), :, 0][held[scores.owner]]
    assert choice["holdout"]["metrics"]["reward"]["mean"] == pytest.approx(own.mean())
    # Whatever the held-out rewards are, the choice is the same.
    values["reward"][:, held[scores.owner]] += np.array([100.0, -100.0])[:, None, None] * (1 if choice["ratio"] else -1)
    assert trace(criteria, scores)["choice"]["ratio"] == choice["ratio"]
    # Of 95 clusters a fifth would be 19: too few to tell anything, so nothing is held out.
    assert FEWEST_HELD == 20
    few = make({"reward": np.ones((1, 95, 1)) / 2, "unsafe": np.zeros((1, 95, 1))}, [0.0])
    assert not hold_out(GivenScores.of(few, axes={"cost": "unsafe"}, constraints=["unsafe<=0.5"]), few).any()


def test_points_say_their_lambda_where_the_safety_end_started_at_this_reward_end(
    tmp_path: Path, two_adapters: tuple[Path, Path]
) -> None:
    reward, safety = (
        Path(shutil.copytree(path, tmp_path / name))
        for path, name in zip(two_adapters, ("reward", "safety"), strict=True)
    )
    ends = {"reward": reward, "safety": safety}
    assert lambda_bar(ends) is None
    start = read_adapter(reward).digest
    (safety / "psacpo.json").write_text(json.dumps({"lambda": 4.0, "inputs": {"start": start}}))
    assert lambda_bar(ends) == 4.0
    (safety / "psacpo.json").write_text(json.dumps({"lambda": 4.0, "inputs": {"start": "another"}}))
    assert lambda_bar(ends) is None
    assert lambda_bar({"reward": tmp_path / "gone", "safety": safety}) is None
    scores = make({"reward": [[[1.0], [2.0]]] * 2, "cost": [[[1.0], [0.0]]] * 2}, [0.0, 0.25])
    points = trace(GivenScores.of(scores, resamples=100), scores, lambda_bar=4.0)["points"]
    assert [point["lambda"] for point in points] == [0.0, 1.0]


def test_three_objectives_are_measured_by_moocore() -> None:
    moocore = pytest.importorskip("moocore")
    generator = np.random.default_rng(4)
    names = ("reward", "cost", "brevity")
    values = {name: generator.normal(size=(5, 60, 1)) + generator.normal(size=(5, 1, 1)) for name in names}
    scores = make(values, [0.0, 0.25, 0.5, 0.75, 1.0])
    found = trace(GivenScores.of(scores, objectives=list(names), resamples=100), scores)
    means = np.array([[p["reward"]["mean"], -p["cost"]["mean"], p["brevity"]["mean"]] for p in found["points"]])
    volume = found["hypervolume"]
    assert volume["value"] == pytest.approx(moocore.hypervolume(means, ref=means.min(axis=0), maximise=True))
    assert volume["low"] <= volume["value"] <= volume["high"]
    assert volume["reference"] == pytest.approx(dict(zip(names, means.min(axis=0) * [1, -1, 1], strict=True)))
    expected = moocore.is_nondominated(means, maximise=True, keep_weakly=True).tolist()
    assert [point["nondominated"] for point in found["points"]] == expected


def test_three_objectives_without_moocore_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psacpo.evalharness.decision.criteria.importlib.util.find_spec", lambda name: None)
    scores = make({name: [[[1.0]]] for name in ("reward", "cost", "brevity")}, [0.5])
    with pytest.raises(
        InputError, match=r"more than two objectives need moocore; allowed: pip install 'psacpo\[moo\]'"
    ):
        GivenScores.of(scores, objectives=["reward", "cost", "brevity"])


def test_a_win_rate_that_comes_from_length_is_gone_at_equal_length() -> None:
    """The second policy writes more and the judge likes length; the third is better at the same length."""
    generator = np.random.default_rng(6)
    n = 400
    length = np.stack([np.full(n, 50.0), 50 + 40 * generator.random(n), 50 + 10 * generator.normal(size=n)])
    taste = 0.06 * length + np.array([0.0, 0.0, 1.5])[:, None]
    values = {"reward": taste + generator.logistic(size=(3, n)), "cost": -np.ones((3, n)), "length": length}
    scores = make({name: value[..., None] for name, value in values.items()}, [0.0, 0.5, 1.0])
    points = trace(GivenScores.of(scores, resamples=200), scores)["points"]
    plain, adjusted = (
        [point["derived"][name] for point in points]
        for name in ("win_rate_vs_policy@0.00", "win_rate_lc_vs_policy@0.00")
    )
    assert plain[1]["low"] > 0.6
    assert adjusted[1]["low"] < 0.5 < adjusted[1]["high"]
    assert adjusted[2]["low"] > 0.6
    assert adjusted[0]["mean"] == pytest.approx(0.5)
    with pytest.raises(InputError, match="metric 'fair' is no win rate"):
        GivenScores.of(scores, metrics={"fair": {"judge": "reward", "length_adjusted": True}})


@pytest.mark.slow
def test_the_whole_choice_keeps_its_error_where_every_ratio_breaks_one_of_two_limits() -> None:
    """Clusters of three prompts, a rate and a bounded score, both walked from q = 1; the score's mean is at its limit."""
    generator = np.random.default_rng(8)
    ratios, runs, wrong, naive = [0.0, 0.5, 1.0], 200, 0, 0
    for _ in range(runs):
        shared = np.repeat(generator.beta(1, 3, size=(1, 120)), 3, axis=1)
        grade = np.broadcast_to(shared, (3, 360)).copy()
        unsafe = (generator.random((3, 360)) < 0.2).astype(float)
        values = {"reward": generator.normal(size=(3, 360)), "unsafe": unsafe, "grade": grade}
        scores = make(
            {name: value[..., None] for name, value in values.items()}, ratios, clusters=[i // 3 for i in range(360)]
        )
        metrics = {"grade_bounded": {"judge": "grade", "range": [0, 1], "better": "lower"}}
        criteria = GivenScores.of(
            scores,
            metrics=metrics,
            axes={"cost": "unsafe"},
            constraints=["unsafe<=0.3", "grade_bounded<=0.25"],
            resamples=100,
        )
        every = criteria.all_metrics()
        measures = {name: make_measure(criteria, name, metric, scores) for name, metric in every.items()}
        use = np.ones(len(scores.clusters), dtype=bool)
        points: list[dict[str, Any]] = [
            {"ratio": q, "policy": f"policy@{q:.2f}"}
            | {name: {"mean": measure.mean(k, use)} for name, measure in measures.items()}
            for k, q in enumerate(ratios)
        ]
        choice = certify(criteria, every, measures, scores, points)
        wrong += choice["ratio"] is not None
        naive += choice["naive"] is not None
    assert wrong / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert naive / runs > 0.35
