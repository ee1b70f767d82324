"""From verdicts to frontier.json: estimates, the non-dominated set, hypervolume, and the ratio that may be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from psacpo.evalharness.config import Constraint, FrontierConfig, Metric, RefusalJudge
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.shortfall import Test, nearest
from psacpo.evalharness.stats import (
    Array,
    bootstrap_weights,
    difference,
    estimate,
    fixed_sequence,
    hypervolume,
    nondominated,
    ratio_means,
    upper_bound,
)


@dataclass(frozen=True)
class Score:
    """One valid score: of which policy, prompt and judge."""

    policy: str
    prompt: PromptRow
    judge: str
    value: float


@dataclass(frozen=True)
class _Cells:
    """A metric's sums and counts by policy and cluster, [K, C] each, and whether all its values are 0 or 1."""

    sums: Array
    counts: Array
    rate: bool


def trace(
    config: FrontierConfig, policies: Sequence[Policy], prompts: Sequence[PromptRow], scores: Sequence[Score]
) -> dict[str, Any]:
    """The measured part of frontier.json: points, baselines, hypervolume and choice."""
    clusters = sorted({row.cluster for row in prompts})
    weights = bootstrap_weights(len(clusters), config.resamples, config.seed)
    metrics = config.all_metrics()
    cells = {name: _collect(metric, [p.name for p in policies], clusters, scores) for name, metric in metrics.items()}
    entries = []
    for index, policy in enumerate(policies):
        entry: dict[str, Any] = {} if policy.ratio is None else {"ratio": policy.ratio}
        entry |= {"policy" if policy.ratio is not None else "name": policy.name, "n_prompts": len(prompts)}
        for name, cell in cells.items():
            entry[name] = asdict(
                estimate(weights, cell.sums[index], cell.counts[index], confidence=config.confidence, rate=cell.rate)
            )
        entries.append(entry)
    swept = [index for index, policy in enumerate(policies) if policy.ratio is not None]
    points = [entries[index] for index in swept]
    # Neighbours share prompts and random numbers, so their differences are known better than their means.
    for before, after, point in zip(swept, swept[1:], points[1:], strict=False):
        point["from_previous"] = {
            name: asdict(
                difference(
                    weights,
                    (cell.sums[before], cell.counts[before]),
                    (cell.sums[after], cell.counts[after]),
                    confidence=config.confidence,
                )
            )
            for name, cell in cells.items()
        }
    frontier = _frontier(config, metrics, cells, weights, swept, points)
    choice = _choose(config, metrics, cells, weights, swept, points)
    return {
        "points": points,
        "baselines": [entry for index, entry in enumerate(entries) if index not in swept],
        "hypervolume": frontier,
        "choice": choice,
    }


def better(config: FrontierConfig, metric: Metric) -> str:
    """Which way a metric is better: the way of its judge."""
    return config.judges[metric.judge].better


def compared_with_base(config: FrontierConfig, found: Mapping[str, Any]) -> list[str]:
    """A warning where the untouched base does better on an axis than the chosen policy: by means alone, no test."""
    chosen: list[Mapping[str, Any]] = [p for p in found["points"] if p["policy"] == found["choice"]["policy"]]
    bases = [entry for entry in found["baselines"] if not config.baselines[entry["name"]]]
    warnings = []
    for axis in config.axes.model_dump().values():
        sign = 1 if found["metrics"][axis]["better"] == "higher" else -1
        for point, entry in product(chosen, bases):
            own, other = point[axis]["mean"], entry[axis]["mean"]
            if own is not None and other is not None and sign * other > sign * own:
                warnings.append(
                    f"{entry['name']} has the better mean {axis} ({other:.3f}, {point['policy']} has {own:.3f})"
                )
    return warnings


def _collect(metric: Metric, policies: Sequence[str], clusters: Sequence[str], scores: Sequence[Score]) -> _Cells:
    policy_at = {name: index for index, name in enumerate(policies)}
    cluster_at = {name: index for index, name in enumerate(clusters)}
    sums = np.zeros((len(policies), len(clusters)))
    counts = np.zeros_like(sums)
    binary = True
    for score in scores:
        fields = score.prompt.fields
        if score.judge != metric.judge or any(fields.get(key) != want for key, want in metric.where.items()):
            continue
        value = score.value if metric.above is None else float(score.value > metric.above)
        binary = binary and value in (0.0, 1.0)
        cell = policy_at[score.policy], cluster_at[score.prompt.cluster]
        sums[cell] += value
        counts[cell] += 1
    return _Cells(sums, counts, binary)


def _frontier(
    config: FrontierConfig,
    metrics: Mapping[str, Metric],
    cells: Mapping[str, _Cells],
    weights: Array,
    swept: Sequence[int],
    points: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """Mark each point (nondominated, p_on_frontier) and measure the hypervolume with its interval.

    The reference point is the worst reward and the worst cost among the swept points' means: recorded, so that two
    runs can be compared under one.
    """
    axes = (config.axes.reward, config.axes.cost)
    signs = [1.0 if better(config, metrics[axis]) == "higher" else -1.0 for axis in axes]
    means = np.array([[point[axis]["mean"] for axis in axes] for point in points], dtype=np.float64) * signs
    if not np.isfinite(means).all():
        for point in points:
            point |= {"p_on_frontier": None, "nondominated": False}
        return None
    draws = np.stack(
        [
            np.stack([ratio_means(weights, cells[axis].sums[i], cells[axis].counts[i]) for i in swept], axis=1) * sign
            for axis, sign in zip(axes, signs, strict=True)
        ],
        axis=-1,
    )  # [D, K, 2]
    draws = draws[np.isfinite(draws).all(axis=(1, 2))]
    on_frontier = nondominated(draws).mean(axis=0)
    for point, share, undominated in zip(points, on_frontier, nondominated(means), strict=True):
        point |= {"p_on_frontier": float(share), "nondominated": bool(undominated)}
    reference = means.min(axis=0)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile([hypervolume(draw, reference) for draw in draws], [tail, 1 - tail])
    return {
        "value": hypervolume(means, reference),
        "low": float(low),
        "high": float(high),
        "reference": {name: float(r * s) for name, r, s in zip(("reward", "cost"), reference, signs, strict=True)},
    }


def _bound(constraint: Constraint, cell: _Cells, weights: Array, index: int, level: float) -> tuple[float, str]:
    """The confidence bound that must meet the limit, on the constraint's own scale."""
    sums, counts = cell.sums[index], cell.counts[index]
    if constraint.sense == "<=":
        return upper_bound(weights, sums, counts, level=level, rate=cell.rate)
    flipped = counts - sums if cell.rate else -sums
    bound, method = upper_bound(weights, flipped, counts, level=level, rate=cell.rate)
    return (1 - bound if cell.rate else -bound), method


def _starts_at_reward(config: FrontierConfig, metric: Metric) -> bool:
    """Whether a constraint's walk over the ratios begins at q = 0: for helpfulness and refusals, which q worsens."""
    helpful = config.all_metrics()[config.axes.reward].judge
    return metric.judge == helpful or isinstance(config.judges[metric.judge], RefusalJudge)


def _choose(
    config: FrontierConfig,
    metrics: Mapping[str, Metric],
    cells: Mapping[str, _Cells],
    weights: Array,
    swept: Sequence[int],
    points: list[dict[str, Any]],
) -> dict[str, Any]:
    """The most helpful ratio that is certified for every constraint.

    For each constraint the ratios are tested in an order fixed in advance, from the end of the sweep where the
    metric is expected to be good, at level 1 - confidence over the number of constraints, up to the first failure:
    so the chance that any certified ratio breaks any constraint is at most 1 - confidence, however many are tried.
    """
    choice: dict[str, Any] = {
        "ratio": None,
        "policy": None,
        "constraints": [str(constraint) for constraint in config.constraints],
        "confidence": config.confidence,
        "method": "none",
        "why": "no constraint was given",
    }
    if not config.constraints:
        for point in points:
            point |= {"certified": None, "bounds": {}}
        return choice
    level = 1 - (1 - config.confidence) / len(config.constraints)
    certified = dict.fromkeys(swept, True)
    methods = set()
    walks: dict[str, list[tuple[int, Test]]] = {}
    for point in points:
        point["bounds"] = {}
    for constraint in config.constraints:
        metric, cell = metrics[constraint.metric], cells[constraint.metric]
        forward = _starts_at_reward(config, metric)
        order = sorted(range(len(swept)), key=lambda i: points[i]["ratio"], reverse=not forward)
        walk = walks[str(constraint)] = []
        for place in order:
            bound, method = _bound(constraint, cell, weights, swept[place], level)
            points[place]["bounds"][str(constraint)] = bound if np.isfinite(bound) else None
            methods.add(method)
            counts = cell.counts[swept[place]]
            test = Test(
                constraint=constraint,
                mean=points[place][constraint.metric]["mean"],
                rows=int(counts.sum()),
                units=int((counts > 0).sum()),
                bound=bound,
                level=level,
                exact=method.startswith("exact"),
                passed=bool(bound <= constraint.limit if constraint.sense == "<=" else bound >= constraint.limit),
            )
            walk.append((place, test))
        for place, standing in zip(order, fixed_sequence([test.passed for _, test in walk]), strict=True):
            certified[swept[place]] &= standing
    for index, point in zip(swept, points, strict=True):
        point["certified"] = certified[index]
    choice["method"] = f"fixed-sequence test; bounds: {', '.join(sorted(methods))}"
    allowed = [point for point in points if point["certified"]]
    reward = config.axes.reward
    sign = 1 if better(config, metrics[reward]) == "higher" else -1
    text = " and ".join(choice["constraints"])
    if not allowed:
        choice["nearest"] = nearest(walks, points, metrics)
        choice["why"] = (
            f"no ratio meets {text} with {config.confidence:.0%} confidence on {points[0]['n_prompts']} prompts; "
            + choice["nearest"].pop("why")
        )
        return choice
    known = [point for point in allowed if point[reward]["mean"] is not None]
    if not known:
        choice["why"] = f"{len(allowed)} of {len(points)} ratios meet {text}, and none of them has a valid {reward}"
        return choice
    best = max(known, key=lambda point: sign * point[reward]["mean"])
    bounds = ", ".join(f"{name}: bound {value:.3f}" for name, value in best["bounds"].items())
    choice |= {"ratio": best["ratio"], "policy": best["policy"]}
    choice["why"] = (
        f"best {reward} ({best[reward]['mean']:.3f}) of the {len(allowed)} of {len(points)} ratios that meet {text} "
        f"with {config.confidence:.0%} confidence ({bounds})"
    )
    return choice
