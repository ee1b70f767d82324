"""The job `compare`: what differs between two runs on the prompts that both have, paired, with intervals."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.decision.criteria import Criteria, Metric
from psacpo.evalharness.decision.measures import Measure, make_measure
from psacpo.evalharness.decision.score_files import read_scores
from psacpo.evalharness.decision.scores import Score, Scores, tabulate
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.judging.given import GivenScores
from psacpo.evalharness.judging.verdicts import is_verdict
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.records import read_records
from psacpo.evalharness.report.schema import parse_frontier
from psacpo.evalharness.run_files import is_answer, is_prompt_row
from psacpo.evalharness.statistics.bootstrap import Array, Estimate, bootstrap_weights, interval
from psacpo.evalharness.statistics.pareto import hypervolume
from psacpo.evalharness.summary import WIDTH, read_frontier
from psacpo.evalharness.weights import weights_name
from psacpo.files import digest, read_manifest

_NAMES = ("A", "B")


@dataclass(frozen=True)
class _Run:
    """One run's scores, and what its frontier.json says."""

    path: Path
    frontier: Mapping[str, Any]
    scores: Scores


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
    runs = _read(one), _read(other)
    metrics, warnings = _common_metrics(runs)
    a, b = _paired(runs)
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
        "runs": {name: str(run.path) for name, run in zip(_NAMES, runs, strict=True)},
        "prompts": len(a.prompts),
        "clusters": len(a.clusters),
        "confidence": confidence,
        "metrics": {
            name: {"better": runs[0].frontier["metrics"][name]["better"]} for name in _by_weight(runs[0], metrics)
        },
        "ratios": [_point(a.policies[k]) | {"difference": policies(k, j)} for k, j in common],
        "chosen": None,
        "hypervolume": _hypervolumes(runs[0].frontier, sides, (a, b), clusters, confidence),
        "warnings": warnings + _left_out(runs, a),
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


def _read(path: Path) -> _Run:
    """A run of a sweep or of imported scores; of a sweep the answers and verdicts of its present settings."""
    frontier = read_frontier(path)
    parse_frontier(frontier, where=str(path / "frontier.json"))
    manifest = read_manifest(path) or {}
    if "scores" in manifest.get("inputs", {}):
        return _Run(path, frontier, read_scores(path / "scores.jsonl").scores)
    prompts = {
        str(row["id"]): PromptRow(
            str(row["id"]),
            row["prompt"],
            str(row["cluster"]),
            {key: value for key, value in row.items() if key not in ("id", "prompt", "cluster", "prompt_ids")},
        )
        for row in read_records(path / "prompts.jsonl", is_prompt_row)
    }
    names = {entry.get("policy") or entry["name"]: entry for entry in _entries(frontier)}
    answers = read_records(path / "completions.jsonl", is_answer)
    completions = {row["key"]: row for row in answers if row["policy"] in names}
    judges: dict[str, list[str]] = {}
    for name, judge in frontier["judges"].items():
        judges.setdefault(judge["digest"], []).append(name)
    verdicts: dict[tuple[str, str], float] = {}
    for row in read_records(path / "verdicts.jsonl", is_verdict):
        intrinsic = [row["judge"]] if row["judge"] in frontier.get("intrinsic", []) else []
        for name in judges.get(row["judge_digest"], intrinsic):
            verdicts.pop((row["completion"], name), None)
            if row["valid"] and row["completion"] in completions:
                verdicts[row["completion"], name] = float(row["score"])
    planned = set(_planned(path))
    scores = [
        Score(row["policy"], prompts[row["prompt_id"]], name, value, row["sample"])
        for (key, name), value in verdicts.items()
        if key in planned and (row := completions[key])["prompt_id"] in prompts
    ]
    policies = [
        Policy(name, entry.get("weights", {}), entry.get("ratio"), point="weights" in entry)
        for name, entry in names.items()
    ]
    return _Run(path, frontier, tabulate(policies, list(prompts.values()), scores))


def _planned(path: Path) -> list[str]:
    try:
        found = json.loads((path / "plan.json").read_text(encoding="utf-8"))["completions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path / 'plan.json'} is missing or damaged: {error}") from error
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path / 'plan.json'} is damaged: it holds no list of completions")
    return found


def _entries(frontier: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*frontier["points"], *frontier["baselines"]]


def _common_metrics(runs: tuple[_Run, _Run]) -> tuple[dict[str, Metric], list[str]]:
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


def _by_weight(run: _Run, metrics: Mapping[str, Metric]) -> list[str]:
    """The axes, what was asked of the choice, then the rest."""
    asked = [str(text).replace(">=", "<=").split("<=")[0] for text in run.frontier["choice"]["constraints"]]
    order = [*run.frontier["axes"].values(), *asked, *metrics]
    return [name for name in dict.fromkeys(order) if name in metrics]


def _definition(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name in Metric.model_fields and name != "better"}


def _paired(runs: tuple[_Run, _Run]) -> tuple[Scores, Scores]:
    """Both runs' scores on the prompts that both have, in one order and with the clusters of the first.

    Raises:
        InputError: There is no such prompt.
    """
    keys = [{_identity(row): place for place, row in enumerate(run.scores.prompts)} for run in runs]
    shared = [key for key in keys[0] if key in keys[1]]
    if not shared:
        raise InputError(
            f"{runs[0].path} and {runs[1].path} have no prompt in common",
            allowed="two runs of the same prompts, or of some of them",
        )
    first = [runs[0].scores.prompts[keys[0][key]] for key in shared]
    found = []
    for run, places in zip(runs, keys, strict=True):
        order = [places[key] for key in shared]
        own = [run.scores.prompts[place] for place in order]
        rows = [replace(row, cluster=mate.cluster) for row, mate in zip(own, first, strict=True)]
        values = {name: values[:, order] for name, values in run.scores.values.items()}
        found.append(Scores(run.scores.policies, rows, values))
    return found[0], found[1]


def _identity(row: PromptRow) -> str:
    return digest(["text", row.prompt]) if row.prompt else digest(["id", row.id])


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


def _left_out(runs: tuple[_Run, _Run], paired: Scores) -> list[str]:
    return [
        f"{len(run.scores.prompts) - len(paired.prompts)} prompts of run {name} are not in the other and are left out"
        for name, run in zip(_NAMES, runs, strict=True)
        if len(run.scores.prompts) > len(paired.prompts)
    ]


def compare_lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison as a table of at most `summary.WIDTH` columns: B minus A, * where the interval leaves 0 out."""
    metrics = _fitting(list(found["metrics"]), max([18, *(len(_called(one)) for one in found["ratios"])]))
    rows = [["B - A", *metrics]]
    chosen = found["chosen"]
    if chosen is not None:
        ends = [chosen["a"], chosen["b"]]
        both = ", ".join(
            _short(name) if q is None else f"{q:g}" for q, name in zip(ends, chosen["policies"], strict=True)
        )
        rows.append([f"chosen {both}", *(_cell(chosen["difference"][m]) for m in metrics)])
    rows += [[_called(one), *(_cell(one["difference"][m]) for m in metrics)] for one in found["ratios"]]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table.insert(1, "-" * max(map(len, table)))
    lines = [f"A: {found['runs']['A']}", f"B: {found['runs']['B']}", *_verdict(found), "", *table, ""]
    lines += [line for text in found["warnings"] for line in textwrap.wrap(f"warning: {text}", WIDTH)]
    lines.append(
        f"{found['prompts']} prompts of both in {found['clusters']} clusters; {found['confidence']:.0%} intervals of paired "
        "differences, * without 0"
    )
    return lines


def _called(one: Mapping[str, Any]) -> str:
    return weights_name(one["weights"]).removeprefix("policy@") if one["ratio"] is None else f"{one['ratio']:.4g}"


def _short(name: str) -> str:
    return name.removeprefix("policy@")


def _verdict(found: Mapping[str, Any]) -> list[str]:
    volume = found["hypervolume"]
    if volume is None:
        return []
    where = "no difference is shown"
    if volume["low"] > 0:
        where = "B's frontier is the better one"
    elif volume["high"] < 0:
        where = "A's frontier is the better one"
    text = f"hypervolume: {volume['mean']:+.4g} ({volume['low']:+.4g} to {volume['high']:+.4g}): {where}"
    return textwrap.wrap(text, WIDTH)


def _fitting(names: Sequence[str], width: int) -> list[str]:
    fitting: list[str] = []
    for name in names:
        width += max(len(name), 24) + 2
        if width > WIDTH:
            break
        fitting.append(name)
    return fitting


def _cell(value: Mapping[str, Any]) -> str:
    if value["mean"] is None or value["low"] is None:
        return "-"
    star = "*" if value["low"] > 0 or value["high"] < 0 else ""
    return f"{value['mean']:+.3f} ({value['low']:+.3f} {value['high']:+.3f}){star}"
