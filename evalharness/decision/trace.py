"""From scores to frontier.json: estimates, the non-dominated set, hypervolume, and the ratio that may be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from psacpo.evalharness.decision.certify import Race, certify
from psacpo.evalharness.decision.criteria import Criteria, Metric
from psacpo.evalharness.decision.measures import Measure, make_measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.statistics.bootstrap import Array, bootstrap_weights, interval
from psacpo.evalharness.statistics.pareto import hypervolume, nondominated

# A tail's mean needs so many rows in the tail to be more than the few worst of them.
_FEWEST_IN_TAIL = 5


def trace(
    criteria: Criteria, scores: Scores, *, lambda_bar: float | None = None, race: Race | None = None
) -> dict[str, Any]:
    """The measured part of frontier.json: points, baselines, hypervolume and choice.

    Args:
        lambda_bar: Weight of safety that the safety end was trained with; the points then say their own, to first order.
        race: Of an adaptive sweep, whose policies have not all answered the same prompts: what is said of one beside
            another is then of those that all of them answered, and `own` has each one's numbers on all of its own.
    """
    metrics = criteria.all_metrics()
    measures = {name: make_measure(criteria, name, metric, scores) for name, metric in metrics.items()}
    derived = _derived(criteria, scores)
    every = measures | derived
    shared = np.ones(len(scores.clusters), dtype=np.bool_) if race is None else race.shared
    weights = bootstrap_weights(len(scores.clusters), criteria.resamples, criteria.seed, shared)
    draws = {
        name: np.stack([measure.draws(k, weights) for k in range(len(scores.policies))])
        for name, measure in every.items()
    }  # [K, D] each: the same draws of clusters for all policies and metrics
    entries = []
    for k, policy in enumerate(scores.policies):
        entry: dict[str, Any] = {"ratio": policy.ratio} if policy.swept else {}
        if policy.point:
            entry["weights"] = dict(policy.adapted)
        entry |= {"policy" if policy.swept else "name": policy.name, "n_prompts": scores.prompts_in(shared)}
        if policy.ratio is not None and lambda_bar is not None:
            entry["lambda"] = policy.ratio * lambda_bar
        cells = {
            name: asdict(measure.estimate(k, weights, shared, criteria.confidence, draws[name][k]))
            for name, measure in every.items()
        }
        entry |= {name: cells[name] for name in measures}
        entry["derived"] = {name: cells[name] for name in derived}
        if race is not None:
            entry |= _own(criteria, measures, scores, k)
        entries.append(entry)
    points = [entries[k] for k in scores.swept]
    # Neighbours share prompts and random numbers, so their differences are known better than their means.
    for before, after, point in zip(scores.swept, scores.swept[1:], points[1:], strict=False):
        point["from_previous"] = {
            name: _difference(
                entries[before][name],
                entries[after][name],
                draws[name][after] - draws[name][before],
                criteria.confidence,
            )
            for name in measures
        }
    return {
        "points": points,
        "baselines": [entry for k, entry in enumerate(entries) if k not in scores.swept],
        "derived": {
            name: _spec(criteria.derived_metrics()[name])
            | {"better": criteria.better(criteria.derived_metrics()[name])}
            | {"meaning": criteria.derived_metrics()[name].meaning()}
            for name in derived
        },
        "hypervolume": _frontier(criteria, draws, points, scores.swept),
        "choice": certify(criteria, metrics, measures, scores, points, race),
    }


def _own(criteria: Criteria, measures: Mapping[str, Measure], scores: Scores, k: int) -> dict[str, Any]:
    """What one policy of an adaptive sweep answered, and its numbers on that: more, and other prompts than others'."""
    asked = scores.asked(k)
    weights = bootstrap_weights(len(asked), criteria.resamples, criteria.seed, asked)
    found = {name: asdict(one.estimate(k, weights, asked, criteria.confidence)) for name, one in measures.items()}
    return {"answered": scores.answered(k), "own": found}


def metric_specs(criteria: Criteria) -> dict[str, dict[str, Any]]:
    """`metrics` of frontier.json: what each metric's numbers mean."""
    return {
        name: _spec(metric) | {"better": criteria.better(metric), "meaning": metric.meaning()}
        for name, metric in criteria.all_metrics().items()
    }


def _spec(metric: Metric) -> dict[str, Any]:
    # Of a file its name alone: a run's directory says nothing of the machine's others.
    calibration = metric.calibration.name if metric.calibration else None
    return metric.model_dump(exclude={"calibration"}) | ({"calibration": calibration} if calibration else {})


def remarks(
    criteria: Criteria, found: Mapping[str, Any], bases: Sequence[str], prompts: Sequence[PromptRow]
) -> list[str]:
    """Warnings about the choice: where a base does better on an axis, and what its numbers are of."""
    return [
        *_against_bases(criteria, found, bases),
        *_about_holdout(criteria, found["choice"]),
        *_about_roles(criteria, prompts),
    ]


def _about_roles(criteria: Criteria, prompts: Sequence[PromptRow]) -> list[str]:
    """Where a constraint is met on prompts that nobody would ask it of."""
    roles = {str(row.fields["role"]) for row in prompts if row.fields.get("role") is not None}
    if "safety" not in roles or len(roles) < 2:
        return []
    metrics = criteria.all_metrics()
    mixed = dict.fromkeys(
        c.metric for c in criteria.constraints if c.metric == "unsafe_rate" and not metrics[c.metric].where
    )
    said = ", ".join(sorted(roles))
    return [
        f"{name} counts prompts of all roles ({said}); where: {{role: safety}} counts those alone" for name in mixed
    ]


def _against_bases(criteria: Criteria, found: Mapping[str, Any], bases: Sequence[str]) -> list[str]:
    """Where the untouched base does better on an axis than the chosen policy: by means alone, no test."""
    chosen: list[Mapping[str, Any]] = [p for p in found["points"] if p["policy"] == found["choice"]["policy"]]
    entries = [entry for entry in found["baselines"] if entry["name"] in bases]
    metrics = criteria.all_metrics()
    warnings = []
    for axis in criteria.axes.model_dump().values():
        sign = 1 if criteria.better(metrics[axis]) == "higher" else -1
        for point, entry in product(chosen, entries):
            own, other = point[axis]["mean"], entry[axis]["mean"]
            if own is not None and other is not None and sign * other > sign * own:
                warnings.append(
                    f"{entry['name']} has the better mean {axis} ({other:.3f}, {point['policy']} has {own:.3f})"
                )
    return warnings


def _about_holdout(criteria: Criteria, choice: Mapping[str, Any]) -> list[str]:
    if choice["policy"] is None:
        return []
    if choice.get("holdout") is None:
        why = "holdout is 0" if not criteria.holdout else f"{choice['calibration']['clusters']} clusters are too few"
        return [f"no prompts were held out ({why}): the chosen ratio's numbers are of the prompts that chose it"]
    broken = [text for text, met in choice["holdout"]["meets"].items() if not met]
    return [f"on the held-out prompts {choice['policy']} does not meet {text}" for text in broken]


def _derived(criteria: Criteria, scores: Scores) -> dict[str, Measure]:
    """The derived metrics that these scores can tell: no tail of a handful of rows, no category that is nowhere."""
    found = {}
    asked = criteria.all_metrics()
    for name, metric in criteria.derived_metrics().items():
        values = scores.values.get(metric.judge)
        rows = [row for row in scores.prompts if all(row.fields.get(k) == v for k, v in metric.where.items())]
        if name in asked or values is None or not rows:
            continue
        if metric.worst is not None and len({str(row.fields.get(metric.worst)) for row in rows} - {"None"}) < 2:
            continue
        if metric.tail is not None:
            count = int((~np.isnan(values)).sum(axis=(1, 2)).min()) if metric.per == "answers" else values.shape[2]
            if metric.tail * count < (_FEWEST_IN_TAIL if metric.per == "answers" else 1):
                continue
        found[name] = make_measure(criteria, name, metric, scores)
    return found


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], draws: Array, confidence: float) -> dict[str, Any]:
    if before["mean"] is None or after["mean"] is None:
        return {"mean": None, "low": None, "high": None, "n": 0}
    n = min(before["n"], after["n"])
    return asdict(interval(after["mean"] - before["mean"], draws, n, confidence=confidence))


def _frontier(
    criteria: Criteria, draws: Mapping[str, Array], points: Sequence[dict[str, Any]], swept: Sequence[int]
) -> dict[str, Any] | None:
    """Mark each point (nondominated, p_on_frontier) and measure the hypervolume with its interval.

    The reference point is the worst value of each objective among the swept points' means: recorded, so that two runs
    can be compared under one. `relative` is the share of the box between the reference and the best values of the
    ends of the sweep (with weights, its points of one adapter alone): a straight line between two ends that trade off
    two objectives has a half.
    """
    names = criteria.objectives or list(criteria.axes.model_dump().values())
    keys = names if criteria.objectives else ["reward", "cost"]
    metrics = criteria.all_metrics()
    signs = np.array([1.0 if criteria.better(metrics[name]) == "higher" else -1.0 for name in names])
    means = np.array([[point[name]["mean"] for name in names] for point in points], dtype=np.float64) * signs
    if not np.isfinite(means).all():
        for point in points:
            point |= {"p_on_frontier": None, "nondominated": False}
        return None
    drawn = np.stack([draws[name][swept].T for name in names], axis=-1) * signs  # [D, K, M]
    drawn = drawn[np.isfinite(drawn).all(axis=(1, 2))]
    on_frontier = nondominated(drawn).mean(axis=0)
    for point, share, undominated in zip(points, on_frontier, nondominated(means), strict=True):
        point |= {"p_on_frontier": float(share), "nondominated": bool(undominated)}
    reference = means.min(axis=0)
    values = np.array([hypervolume(draw, reference) for draw in drawn])
    tail = (1 - criteria.confidence) / 2
    value, (low, high) = hypervolume(means, reference), np.quantile(values, [tail, 1 - tail])
    alone = [place for place, point in enumerate(points) if len(point.get("weights", {})) == 1]
    box = float(np.prod(means[alone if len(alone) > 1 else [0, -1]].max(axis=0) - reference))
    return {
        "value": value,
        "low": float(low),
        "high": float(high),
        "reference": {key: float(r * s) for key, r, s in zip(keys, reference, signs, strict=True)},
        "objectives": names,
        "relative": {"value": value / box, "low": float(low) / box, "high": float(high) / box} if box > 0 else None,
    }
