"""The job `compare`: what differs between two runs on the prompts that both have, paired, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.decision.criteria import Criteria, Metric
from psacpo.evalharness.decision.measures import Measure, make_measure
from psacpo.evalharness.decision.pairing import NAMES, Run, left_out, paired, read_run
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.judging.given import GivenScores
from psacpo.evalharness.statistics.bootstrap import Array, Estimate, bootstrap_weights, interval
from psacpo.evalharness.statistics.pareto import hypervolume


def compare(
    one: Path, other: Path, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Run B minus run A: at each ratio that both measured, between the chosen ratios, and in hypervolume.

    Prompts are paired by their text (by their id where a run holds no texts), answers by being to one prompt; clusters
    are those of run A. Both runs' judges are taken to be the same where they have one name; where their digests differ
    a warning says so. Both hypervolumes are under the reference point of A.

    Returns:
        runs, prompts, clusters, metrics, ratios (per common ratio: metric -> difference), chosen, hypervolume, warnings.

    Raises:
        InputError: A path is no finished run, or the two have no prompt, no metric or no ratio in common.
    """
    if seed < 0:
        raise InputError("the seed is out of range", given=seed, allowed="0 or above")
    runs = read_run(one), read_run(other)
    metrics, warnings = _common_metrics(runs)
    a, b = paired(runs)
    clusters = bootstrap_weights(len(a.clusters), resamples, seed)
    use = np.ones(len(a.clusters), dtype=np.bool_)
    sides = []
    for scores, run in zip((a, b), runs, strict=True):
        criteria = _criteria(run.frontier, scores)
        sides.append({name: make_measure(criteria, name, metric, scores) for name, metric in metrics.items()})

    def difference(name: str, k: int, j: int) -> dict[str, Any]:
        before, after = sides[0][name], sides[1][name]
        low, high = before.mean(k, use), after.mean(j, use)
        if low is None or high is None:
            return asdict(Estimate(None, None, None, 0)) | {"a": low, "b": high}
        drawn = after.draws(j, clusters) - before.draws(k, clusters)
        n = min(before.count(k, use), after.count(j, use))
        return asdict(interval(high - low, drawn, n, confidence=confidence)) | {"a": low, "b": high}

    def policies(k: int, j: int) -> dict[str, Any]:
        return {name: difference(name, k, j) for name in metrics}

    common = [(k, j) for k in a.swept for j in b.swept if a.policies[k].name == b.policies[j].name]
    best_a, best_b = _chosen(runs[0].frontier, a), _chosen(runs[1].frontier, b)
    if not common and (best_a is None or best_b is None):
        raise InputError(f"{one} and {other} have no ratio in common, and not both chose one")
    found: dict[str, Any] = {
        "runs": {name: str(run.path) for name, run in zip(NAMES, runs, strict=True)},
        "prompts": len(a.prompts),
        "clusters": len(a.clusters),
        "confidence": confidence,
        "metrics": {
            name: {"better": runs[0].frontier["metrics"][name]["better"]} for name in _by_weight(runs[0], metrics)
        },
        "ratios": [_point(a.policies[k]) | {"difference": policies(k, j)} for k, j in common],
        "chosen": None,
        "hypervolume": _hypervolumes(runs[0].frontier, sides, (a, b), clusters, confidence),
        "warnings": warnings + left_out(runs, a),
    }
    if best_a is not None and best_b is not None:
        found["chosen"] = {
            "a": a.policies[best_a].ratio,
            "b": b.policies[best_b].ratio,
            "policies": [a.policies[best_a].name, b.policies[best_b].name],
            "difference": policies(best_a, best_b),
        }
    return found


def _point(policy: Policy) -> dict[str, Any]:
    return {"ratio": policy.ratio} | ({"weights": dict(policy.weights)} if policy.point else {})


def _common_metrics(runs: tuple[Run, Run]) -> tuple[dict[str, Metric], list[str]]:
    """The metrics that both define alike, and what is to be said of the others."""
    a, b = (run.frontier for run in runs)
    metrics, warnings = {}, []
    for name, spec in a["metrics"].items():
        other = b["metrics"].get(name)
        if other is None:
            continue
        if _definition(spec) != _definition(other) or spec["better"] != other["better"]:
            warnings.append(f"metric {name} is not the same in both runs and is left out")
        elif spec["judge"] in runs[0].scores.values and spec["judge"] in runs[1].scores.values:
            metrics[name] = Metric.model_validate(_definition(spec) | {"better": spec["better"]})
    if not metrics:
        raise InputError(f"{runs[0].path} and {runs[1].path} have no metric in common", given=", ".join(a["metrics"]))
    for name in sorted({metric.judge for metric in metrics.values()}):
        digests = [frontier["judges"].get(name, {}).get("digest") for frontier in (a, b)]
        kinds = [frontier["judges"].get(name, {}).get("kind") for frontier in (a, b)]
        if digests[0] != digests[1] and kinds != ["import", "import"]:
            warnings.append(f"judge {name} is not the same in both runs: its scores may not be comparable")
    return metrics, warnings


def _by_weight(run: Run, metrics: Mapping[str, Metric]) -> list[str]:
    """The axes, what was asked of the choice, then the rest."""
    asked = [str(text).replace(">=", "<=").split("<=")[0] for text in run.frontier["choice"]["constraints"]]
    order = [*run.frontier["axes"].values(), *asked, *metrics]
    return [name for name in dict.fromkeys(order) if name in metrics]


def _definition(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name in Metric.model_fields and name != "better"}


def _criteria(frontier: Mapping[str, Any], scores: Scores) -> Criteria:
    lower = [
        spec["judge"]
        for spec in frontier["metrics"].values()
        if spec["better"] == "lower" and spec.get("above") is None and spec["judge"] in scores.values
    ]
    return GivenScores.of(
        scores, axes=frontier["axes"], lower=list(dict.fromkeys(lower)), metrics=_own_metrics(frontier, scores)
    )


def _own_metrics(frontier: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    return {
        name: _definition(spec) | {"better": spec["better"]}
        for name, spec in frontier["metrics"].items()
        if name not in scores.values and spec["judge"] in scores.values
    }


def _chosen(frontier: Mapping[str, Any], scores: Scores) -> int | None:
    name = frontier["choice"]["policy"]
    return next((k for k in scores.swept if scores.policies[k].name == name), None)


def _hypervolumes(
    frontier: Mapping[str, Any],
    sides: Sequence[Mapping[str, Measure]],
    scores: Sequence[Scores],
    weights: Array,
    confidence: float,
) -> dict[str, Any] | None:
    """B's hypervolume minus A's, under A's reference point."""
    names = list(frontier["axes"].values())
    known = frontier["hypervolume"]
    if known is None or len(known["reference"]) != 2 or any(name not in side for name in names for side in sides):
        return None
    signs = np.array([1.0 if frontier["metrics"][name]["better"] == "higher" else -1.0 for name in names])
    reference = np.array(list(known["reference"].values())) * signs
    use = np.ones(weights.shape[1], dtype=np.bool_)
    values, draws = [], []
    for side, own in zip(sides, scores, strict=True):
        means = [[side[name].mean(k, use) for name in names] for k in own.swept]
        points = np.array(means, dtype=np.float64) * signs
        drawn = np.stack(
            [np.stack([side[name].draws(k, weights) for name in names], axis=-1) for k in own.swept], axis=1
        )
        if not np.isfinite(points).all():
            return None
        values.append(hypervolume(points, reference))
        draws.append(np.array([hypervolume(np.nan_to_num(draw, nan=-np.inf), reference) for draw in drawn * signs]))
    found = interval(values[1] - values[0], draws[1] - draws[0], len(scores[0].prompts), confidence=confidence)
    return {"a": values[0], "b": values[1], "reference": known["reference"]} | {
        "mean": found.mean, "low": found.low, "high": found.high
    }  # fmt: skip
