"""What the statistics promise, by simulation with known truth; and every number of a frontier.json once more by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_settings
from psacpo.evalharness.statistics.bootstrap import bootstrap_weights
from psacpo.evalharness.statistics.bounds import betting_p, binomial_p, fixed_sequence
from psacpo.evalharness.statistics.tails import weighted_cvars

RATIOS = np.linspace(0, 1, 21)


@pytest.mark.slow
def test_intervals_of_means_differences_and_win_rates_cover() -> None:
    """1,000 runs of 80 clusters of 1 to 4 prompts that share much of their score: 93 to 97 % of the 95 % intervals hold."""
    generator = np.random.default_rng(0)
    runs, clusters = 1000, 80
    weights = bootstrap_weights(clusters, 800, 0)
    sizes = generator.integers(1, 5, size=(runs, clusters))
    hits: dict[str, int] = dict.fromkeys(["mean", "difference", "win rate", "rows apart"], 0)
    for own in sizes:
        owner = np.repeat(np.arange(clusters), own)
        shared = generator.normal(size=clusters)[owner]
        one = shared + generator.normal(size=len(owner))
        other = shared + 0.4 + generator.normal(size=len(owner))
        total = weights @ own

        def interval(values: np.ndarray, owner: np.ndarray = owner, total: np.ndarray = total) -> Any:
            sums = np.bincount(owner, values, minlength=clusters)
            return np.quantile(weights @ sums / total, [0.025, 0.975])

        # other - one is normal with mean .4 and variance 2.
        truths = {"mean": (one, 0.0), "difference": (other - one, 0.4), "win rate": ((other > one) * 1.0, 0.61135)}
        for name, (values, truth) in truths.items():
            low, high = interval(values)
            hits[name] += low <= truth <= high
        half = 1.96 * one.std() / np.sqrt(len(one))
        hits["rows apart"] += abs(one.mean()) <= half
    for name in ("mean", "difference", "win rate"):
        assert 0.93 <= hits[name] / runs <= 0.97, (name, hits)
    # Rows taken for independent: the intervals are far too short.
    assert hits["rows apart"] / runs < 0.88


@pytest.mark.slow
def test_intervals_of_tails_cover_where_the_tail_has_rows_enough() -> None:
    """CVaR 10 % of 300 x 4 normal scores with a prompt's share: 120 rows in the tail."""
    generator = np.random.default_rng(1)
    runs, prompts, samples = 300, 300, 4
    weights = bootstrap_weights(prompts, 300, 0)
    owner = np.repeat(np.arange(prompts), samples)
    # A normal of sd s has CVaR s * phi(z) / .1 with z its 90 % quantile.
    truth = np.sqrt(2) * np.exp(-(1.2815516**2) / 2) / np.sqrt(2 * np.pi) / 0.1
    hits = 0
    for _ in range(runs):
        scores = generator.normal(size=prompts)[owner] + generator.normal(size=len(owner))
        low, high = np.quantile(weighted_cvars(scores, owner, weights, [0.1])[0], [0.025, 0.975])
        hits += low <= truth <= high
    assert 0.90 <= hits / runs <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "samples"), [(200, 1), (120, 4)])
def test_the_chosen_ratio_breaks_the_limit_in_at_most_a_twentieth_of_1000_sweeps(prompts: int, samples: int) -> None:
    """21 ratios, true unsafe rate falling from 18 to 2 %, limit 10 %: the walk, and the best-looking ratio."""
    generator = np.random.default_rng(2)
    true = 0.18 - 0.16 * RATIOS
    limit, sweeps = 0.1, 1000
    broken, naive, chosen = 0, 0, 0
    for _ in range(sweeps):
        # The same prompts at every ratio; a prompt's own rate is beta distributed about the true one.
        difficulty = generator.random((prompts, 1))
        rates = np.clip(true[:, None, None] * 2 * difficulty[None], 0, 1)
        events = generator.random((len(RATIOS), prompts, samples)) < rates
        means = events.mean(axis=(1, 2))
        looks = np.flatnonzero(means <= limit)
        naive += bool(len(looks)) and true[looks[0]] > limit
        passes = []
        for own in events[::-1]:
            p = binomial_p(int(own.sum()), prompts, limit) if samples == 1 else betting_p(own.mean(axis=1), limit)
            passes.append(p <= 0.05)
            if not passes[-1]:
                break
        certified = sum(fixed_sequence(passes))
        if certified:
            chosen += 1
            broken += true[len(RATIOS) - certified] > limit
    assert broken / sweeps <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / sweeps)
    assert naive / sweeps > 0.35
    assert chosen / sweeps > 0.99


@pytest.mark.slow
def test_every_number_of_a_frontier_again_from_the_records(tmp_path: Path) -> None:
    """By plain loops over the rows, without any of the package's functions."""
    draw = np.random.default_rng(3)
    rows = []
    hard = draw.normal(size=120)
    for ratio in (0.0, 0.5, 1.0, None):
        for i in range(120):
            for sample in range(3):
                cost = hard[i // 2] - 1 - 2 * (0.25 if ratio is None else ratio) + draw.normal()
                rows.append(
                    {"prompt_id": f"p{i:03d}", "cluster": f"c{i // 2:03d}", "ratio": ratio, "sample": sample}
                    | {"policy": "base" if ratio is None else f"policy@{ratio:.2f}", "category": "xyz"[i % 3]}
                    | {"reward": 1 - (ratio or 0.2) + 0.2 * draw.normal(), "cost": cost}
                )
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = scores_settings(tmp_path / "scores.jsonl", constraints=["unsafe_rate<=0.3"], out=tmp_path / "run", seed=7)
    found = json.loads((frontier_from_scores(config) / "frontier.json").read_text())

    # ---- fifty lines that know the definitions and nothing of the code
    clusters = sorted({row["cluster"] for row in rows})
    weights = np.random.default_rng(7).multinomial(60, np.full(60, 1 / 60), size=2000)
    at = {name: place for place, name in enumerate(clusters)}
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], []).append(row)

    def drawn_rows(own: list[dict[str, Any]], draw: np.ndarray) -> list[dict[str, Any]]:
        return [row for row in own for _ in range(draw[at[row["cluster"]]])]

    def mean(name: str, own: list[dict[str, Any]]) -> float:
        if name == "unsafe_rate":
            return float(np.mean([row["cost"] > 0 for row in own]))
        return float(np.mean([row[name] for row in own]))

    def tail(own: list[dict[str, Any]], share: float) -> float:
        costs = sorted((row["cost"] for row in own), reverse=True)
        mass = share * len(costs)
        whole = int(mass)
        return float((sum(costs[:whole]) + (mass - whole) * costs[whole]) / mass)

    def answers(own: list[dict[str, Any]]) -> list[list[float]]:
        grouped: dict[str, list[float]] = {}
        for row in own:
            grouped.setdefault(row["prompt_id"], []).append(row["cost"])
        return list(grouped.values())

    def pairs(values: list[float]) -> list[tuple[float, float]]:
        return [(values[0], values[1]), (values[0], values[2]), (values[1], values[2])]

    entries = {entry.get("policy") or entry["name"]: entry for entry in (*found["points"], *found["baselines"])}
    firsts = {(row["prompt_id"], row["sample"]): row["reward"] for row in by_policy["policy@0.00"]}
    for name, own in by_policy.items():
        entry, derived = entries[name], entries[name]["derived"]
        for metric in ("reward", "cost", "unsafe_rate"):
            assert entry[metric]["mean"] == pytest.approx(mean(metric, own))
            assert entry[metric]["n"] == 360
        sums = np.array([sum(row["cost"] for row in own if row["cluster"] == c) for c in clusters])
        counts = np.array([sum(row["cluster"] == c for row in own) for c in clusters])
        low, high = np.quantile((weights @ sums) / (weights @ counts), [0.025, 0.975])
        assert (entry["cost"]["low"], entry["cost"]["high"]) == pytest.approx((low, high))
        assert derived["cost_cvar10"]["mean"] == pytest.approx(tail(own, 0.1))
        some = [tail(drawn_rows(own, draw), 0.1) for draw in weights]
        assert derived["cost_cvar10"]["low"] == pytest.approx(np.quantile(some, 0.025))
        assert derived["cost_worst_of_2"]["mean"] == pytest.approx(
            np.mean([max(pair) for values in answers(own) for pair in pairs(values)])
        )
        assert derived["any_unsafe_at_2"]["mean"] == pytest.approx(
            np.mean([max(pair) > 0 for values in answers(own) for pair in pairs(values)])
        )
        kinds = [[row for row in own if row["category"] == kind] for kind in "xyz"]
        assert derived["unsafe_rate_worst_category"]["mean"] == pytest.approx(
            max(mean("unsafe_rate", k) for k in kinds)
        )
        wins = [(row["reward"] > other) + 0.5 * (row["reward"] == other) for row in own
                for other in [firsts[row["prompt_id"], row["sample"]]]]  # fmt: skip
        assert derived["win_rate_vs_policy@0.00"]["mean"] == pytest.approx(np.mean(wins))

    def area(points: list[tuple[float, float]]) -> float:
        worst_reward, worst_cost = (
            found["hypervolume"]["reference"]["reward"],
            found["hypervolume"]["reference"]["cost"],
        )
        total, floor = 0.0, worst_cost
        for reward, cost in sorted(points, key=lambda point: (-point[0], point[1])):
            if reward > worst_reward and cost < floor:
                total += (reward - worst_reward) * (floor - cost)
                floor = cost
        return total

    swept = [by_policy[f"policy@{ratio:.2f}"] for ratio in (0.0, 0.5, 1.0)]
    places = [(mean("reward", own), mean("cost", own)) for own in swept]
    assert found["hypervolume"]["value"] == pytest.approx(area(places))
    assert found["hypervolume"]["reference"]["reward"] == pytest.approx(min(reward for reward, _ in places))
    table = [[[mean(m, drawn_rows(own, draw)) for m in ("reward", "cost")] for own in swept] for draw in weights[:300]]
    shares = [
        np.mean([not any(o[0] >= p[i][0] and o[1] <= p[i][1] and o != p[i] for o in p) for p in table])
        for i in range(3)
    ]
    assert [point["p_on_frontier"] for point in found["points"]] == pytest.approx(shares, abs=0.08)
    # The choice: the best reward among the certified, each of them within the limit; nothing was held out of 60 clusters.
    certified = [point for point in found["points"] if point["certified"]]
    assert found["choice"]["ratio"] == max(certified, key=lambda point: point["reward"]["mean"])["ratio"]
    for point, own in zip(found["points"], swept, strict=True):
        test = point["tests"]["unsafe_rate<=0.3"]
        assert (test["mean"], test["rows"], test["clusters"]) == (pytest.approx(mean("unsafe_rate", own)), 360, 60)
        assert (test["p"] <= 0.05) == test["passed"] == (test["bound"] <= 0.3) == bool(point["certified"])
