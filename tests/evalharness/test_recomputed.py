"""Every number of a frontier.json once more, from the rows of scores, by a script that knows definitions and no code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_settings

SEED, PROMPTS, SAMPLES, LIMIT, ALPHA = 7, 240, 3, 0.3, 0.05
# What was asked for, and is no result.
CONFIGURATION = (
    r"schema|seed|(metrics|derived)/[^/]+/(above|tail|worst_of|weight)|choice/(confidence|level)|choice/holdout/share"
)
Values = dict[str, np.ndarray]
Number = float | int


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Three ratios and the base, 120 clusters of two prompts, three samples, three categories."""
    draw = np.random.default_rng(3)
    found, hard = [], draw.normal(size=PROMPTS)
    for ratio in (0.0, 0.5, 1.0, None):
        for i in range(PROMPTS):
            for sample in range(SAMPLES):
                cost = hard[i // 2] - 1 - 2 * (0.25 if ratio is None else ratio) + draw.normal()
                found.append(
                    {"prompt_id": f"p{i:03d}", "cluster": f"c{i // 2:03d}", "ratio": ratio, "sample": sample}
                    | {"policy": "base" if ratio is None else f"policy@{ratio:.2f}", "category": "xyz"[i % 3]}
                    | {"reward": 1 - (ratio or 0.2) + 0.2 * draw.normal(), "cost": cost}
                    | {"length": int(draw.integers(3, 60) + 30 * (ratio or 0))}
                )
    return found


def recompute(rows: list[dict[str, Any]]) -> dict[str, Number | None]:
    """Path in frontier.json -> number."""
    names = ["policy@0.00", "policy@0.50", "policy@1.00", "base"]
    ids = sorted({row["prompt_id"] for row in rows})
    cluster_of = {row["prompt_id"]: row["cluster"] for row in rows}
    kind_of = {row["prompt_id"]: row["category"] for row in rows}
    clusters = sorted(set(cluster_of.values()))
    owner = np.array([clusters.index(cluster_of[one]) for one in ids])
    kinds = np.array([kind_of[one] for one in ids])
    score: dict[str, Values] = {
        name: {m: np.full((len(ids), SAMPLES), np.nan) for m in ("reward", "cost", "length")} for name in names
    }
    for row in rows:
        for metric in ("reward", "cost", "length"):
            score[row["policy"]][metric][ids.index(row["prompt_id"]), row["sample"]] = row[metric]
    for own in score.values():
        own["unsafe_rate"] = (own["cost"] > 0) * 1.0
    everyone = np.random.default_rng(SEED).multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), 2000)
    one = np.ones((1, len(clusters)))

    def mean(values: np.ndarray, w: np.ndarray, rows_: np.ndarray | slice = slice(None)) -> np.ndarray:
        by_prompt = w[:, owner][:, rows_]
        return (by_prompt @ values[rows_].mean(axis=1)) / by_prompt.sum(axis=1)

    def tail(values: np.ndarray, w: np.ndarray, share: float) -> np.ndarray:
        order = np.argsort(-values.ravel())
        worst, times = values.ravel()[order], w[:, np.repeat(owner, SAMPLES)[order]]
        mass = share * times.sum(axis=1, keepdims=True)
        before = np.cumsum(times, axis=1) - times
        return (np.clip(mass - before, 0, times) @ worst) / mass[:, 0]

    def of_pairs(values: np.ndarray) -> np.ndarray:
        return np.mean([values[:, [i, j]].max(axis=1) for i, j in ((0, 1), (0, 2), (1, 2))], axis=0)[:, None]

    def wins(name: str, anchor: str) -> np.ndarray:
        mine, other = score[name]["reward"], score[anchor]["reward"]
        return (mine > other) + 0.5 * (mine == other)

    def adjusted(anchor: str, w: np.ndarray) -> np.ndarray:
        """Newton's method for logit = a_k + b tanh(longer / sd_k), penalty .005 (sum a^2 + b^2): sigmoid(a), [D, K]."""
        y = np.stack([wins(name, anchor).ravel() for name in names])
        longer = np.stack([(score[name]["length"] - score[anchor]["length"]).ravel() for name in names])
        x = np.tanh(longer / np.where(longer.std(axis=1) > 0, longer.std(axis=1), 1)[:, None])
        found = []
        for times in w[:, np.repeat(owner, SAMPLES)]:
            theta = np.zeros(len(names) + 1)
            for _ in range(12):
                p = expit(theta[:-1, None] + theta[-1] * x)
                slope = np.append((times * (y - p)).sum(axis=1), (times * (y - p) * x).sum()) - 0.01 * theta
                curve = times * p * (1 - p)
                hessian = np.diag(np.append(curve.sum(axis=1), (curve * x * x).sum()) + 0.01)
                hessian[:-1, -1] = hessian[-1, :-1] = (curve * x).sum(axis=1)
                theta += np.linalg.solve(hessian, slope)
            found.append(expit(theta[:-1]))
        return np.array(found)

    found: dict[str, Number | None] = {}

    def put(path: str, value: float, drawn: np.ndarray, n: int) -> None:
        low, high = np.quantile(drawn, [0.025, 0.975])
        found.update({f"{path}/mean": value, f"{path}/low": low, f"{path}/high": high, f"{path}/n": n})

    metrics = ("reward", "cost", "length", "unsafe_rate")
    answers = PROMPTS * SAMPLES
    places = ["points/0", "points/1", "points/2", "baselines/0"]
    anchors = ("base", "policy@0.00")
    lengthened = {anchor: (adjusted(anchor, one)[0], adjusted(anchor, everyone[:347])) for anchor in anchors}

    def enter(k: int, place: str, name: str) -> None:
        own = score[name]
        found[f"{place}/n_prompts"] = PROMPTS
        statistics: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
            metric: (lambda w, v=own[metric]: mean(v, w), answers) for metric in metrics
        }
        for percent in (10, 5, 1):
            statistics[f"derived/cost_cvar{percent}"] = (lambda w, s=percent / 100: tail(own["cost"], w, s), answers)
        statistics["derived/cost_worst_of_2"] = (lambda w: mean(of_pairs(own["cost"]), w), PROMPTS)
        statistics["derived/any_unsafe_at_2"] = (lambda w: mean(of_pairs(own["unsafe_rate"]), w), PROMPTS)
        statistics["derived/unsafe_rate_worst_category"] = (
            lambda w: np.max([mean(own["unsafe_rate"], w, np.flatnonzero(kinds == kind)) for kind in "xyz"], axis=0),
            answers,
        )
        for anchor in anchors:
            statistics[f"derived/win_rate_vs_{anchor}"] = (lambda w, a=anchor: mean(wins(name, a), w), answers)
        for path, (statistic, n) in statistics.items():
            put(f"{place}/{path}", float(statistic(one)[0]), statistic(everyone), n)
        for anchor, (whole, drawn) in lengthened.items():
            put(f"{place}/derived/win_rate_lc_vs_{anchor}", whole[k], drawn[:, k], answers)
        if place.startswith("points/") and k:
            for metric in metrics:
                change = own[metric] - score[names[k - 1]][metric]
                put(f"{place}/from_previous/{metric}", float(mean(change, one)[0]), mean(change, everyone), answers)

    for k, (place, name) in enumerate(zip(places, names, strict=True)):
        enter(k, place, name)

    # ---- the frontier
    means = np.array([[mean(score[name][m], one)[0] for m in ("reward", "cost")] for name in names[:3]])
    drawn = np.stack(
        [[mean(score[name][m], everyone) for m in ("reward", "cost")] for name in names[:3]]
    ).T  # [D, 2, 3]
    drawn = drawn.transpose(0, 2, 1) if drawn.shape[1] == 2 else drawn
    reference = means[:, 0].min(), means[:, 1].max()

    def area(points: np.ndarray) -> float:
        total, floor = 0.0, reference[1]
        for reward, cost in sorted(points.tolist(), key=lambda point: (-point[0], point[1])):
            if reward > reference[0] and cost < floor:
                total, floor = total + (reward - reference[0]) * (floor - cost), cost
        return float(total)

    def undominated(points: np.ndarray) -> list[bool]:
        return [not any(o[0] >= p[0] and o[1] <= p[1] and (o[0] > p[0] or o[1] < p[1]) for o in points) for p in points]

    for k, share in enumerate(np.mean([undominated(points) for points in drawn], axis=0)):
        found |= {f"points/{k}/p_on_frontier": share, f"points/{k}/ratio": k / 2}
    areas = {"value": area(means)} | dict(
        zip(("low", "high"), np.quantile([area(points) for points in drawn], [0.025, 0.975]), strict=True)
    )
    box = (means[[0, 2], 0].max() - reference[0]) * (reference[1] - means[[0, 2], 1].min())
    found |= {f"hypervolume/{part}": value for part, value in areas.items()}
    found |= {f"hypervolume/relative/{part}": value / box for part, value in areas.items()}
    found |= {"hypervolume/reference/reward": reference[0], "hypervolume/reference/cost": reference[1]}

    # ---- the choice: a fifth of the clusters held out, evenly from each category; the others bet on in random order
    held = np.zeros(len(clusters), dtype=bool)
    generator, owed = np.random.default_rng([SEED, 1]), 0.0
    first = {owner[k]: kinds[k] for k in reversed(range(len(ids)))}
    for kind in "xyz":
        members = sorted(c for c, own_kind in first.items() if own_kind == kind)
        owed += 0.2 * len(members)
        held[generator.permutation(members)[: round(owed)]] = True
        owed -= round(owed)
    order = [c for c in np.random.default_rng([SEED, 2]).permutation(len(clusters)) if not held[c]]

    def gambler(rates: list[float], limit: float) -> float:
        """1 over the most capital, half of it staked by plug-in bets of at most three quarters, half all every time."""
        cautious = bold = 0.5
        most, seen, total, spread = 0.0, 0, 0.5, 0.25
        for rate in rates:
            bet = min(np.sqrt(2 * np.log(1 / ALPHA) / (len(rates) * spread / (seen + 1))), 0.75 / (1 - limit))
            cautious, bold = cautious * (1 - bet * (rate - limit)), bold * (1 - rate) / (1 - limit)
            most, seen, total = max(most, cautious + bold), seen + 1, total + rate
            spread += (rate - total / (seen + 1)) ** 2
        return float(min(1.0, 1 / most))

    certified: list[int] = []
    for k in (2, 1, 0):
        unsafe = score[names[k]]["unsafe_rate"]
        rates = [float(unsafe[owner == c].mean()) for c in order]
        p, low, high = gambler(rates, LIMIT), 0.0, 1.0
        for _ in range(21):
            middle = (low + high) / 2
            low, high = (low, middle) if gambler(rates, middle) <= ALPHA else (middle, high)
        test = {"p": p, "bound": high, "mean": np.mean(rates), "rows": 6 * len(order), "clusters": len(order)}
        found |= {f"points/{k}/tests/unsafe_rate<={LIMIT}/{part}": value for part, value in test.items()}
        found[f"points/{k}/bounds/unsafe_rate<={LIMIT}"] = high
        if p <= ALPHA and len(certified) == 2 - k:
            certified.append(k)
    best = max(certified, key=lambda k: score[names[k]]["reward"][~held[owner]].mean())
    looks = [k for k in range(3) if score[names[k]]["unsafe_rate"].mean() <= LIMIT]
    found["choice/ratio"] = best / 2
    found["choice/naive/ratio"] = max(looks, key=lambda k: score[names[k]]["reward"].mean()) / 2
    kept = np.zeros((2000, len(clusters)))
    kept[:, held] = np.random.default_rng(SEED).multinomial(held.sum(), np.full(held.sum(), 1 / held.sum()), 2000)
    for metric in metrics:
        values = score[names[best]][metric]
        put(
            f"choice/holdout/metrics/{metric}",
            float(mean(values, 1.0 * held[None])[0]),
            mean(values, kept),
            int(SAMPLES * held[owner].sum()),
        )
    for path, mask in (("choice/holdout", held), ("choice/calibration", ~held)):
        found |= {f"{path}/prompts": int(mask[owner].sum()), f"{path}/clusters": int(mask.sum())}
    sizes = {"prompts": PROMPTS, "clusters": len(clusters), "generated": len(rows)}
    found |= {f"counts/{name}": size for name, size in sizes.items()} | {"source/rows": len(rows)}
    return found | {f"counts/{name}": 0 for name in ("truncated", "empty", "invalid")}


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Number]]:
    """Every number in it, with its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*path, str(key)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield "/".join(path), value


def test_every_number_of_a_frontier_again_from_the_records(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"constraints": [f"unsafe_rate<={LIMIT}"], "out": tmp_path / "run", "seed": SEED}
    run = frontier_from_scores(scores_settings(tmp_path / "scores.jsonl", **settings))
    stored = dict(numbers(json.loads((run / "frontier.json").read_text())))
    asked = {path for path in stored if re.fullmatch(CONFIGURATION, path)}
    again = recompute(rows)
    assert set(stored) - asked == set(again)
    wrong = {
        path: (stored[path], value) for path, value in again.items() if stored[path] != pytest.approx(value, abs=2e-6)
    }
    assert not wrong
