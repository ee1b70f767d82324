"""Judges held against people: gold labels in, calibration.json out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from psacpo.console import say
from psacpo.errors import InputError, unknown_name
from psacpo.evalharness.judging.completions import whose
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.verdicts import Answer
from psacpo.evalharness.records import Record
from psacpo.evalharness.statistics.bootstrap import Estimate, bootstrap_weights
from psacpo.evalharness.statistics.calibration import (
    Array,
    auroc,
    best_accuracy,
    confusion,
    exact_rate,
    percentiles,
    rogan_gladen,
    spearman,
)
from psacpo.files import digest_file, write_atomically
from psacpo.rows import read_rows

FILE = "calibration.json"
_LABELS = ("label", "score", "human")
_SCHEMA = 1


def calibrate(
    config: JudgeConfig, out: Path, answers: Sequence[Answer], verdicts: Mapping[str, Sequence[Record]]
) -> tuple[Path, dict[str, Any]]:
    """Hold each judge's verdicts against the gold labels, and write calibration.json beside the verdicts.

    Raises:
        InputError: The gold rows fit no answer, or hold labels that are no numbers.
    """
    assert config.calibrate is not None
    gold = read_gold(config.calibrate, answers)
    clusters = [answer.drawn_with for answer in answers]
    found = {name: _one(config, name, records, gold, answers, clusters) for name, records in verdicts.items()}
    where = calibration_file(out)
    kept = {name: one for name, one in kept_judges(where).items() if name not in found}
    result = {
        "schema": _SCHEMA,
        "gold": {"file": config.calibrate.name, "digest": digest_file(config.calibrate), "labels": len(gold)},
        "confidence": config.confidence,
        "judges": found | kept,
    }
    write_atomically(where, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return where, found


def calibration_file(out: Path) -> Path:
    """Where the calibration of verdicts in `out` is, a file of them or a run."""
    return (out if out.is_dir() else out.parent) / FILE


def kept_judges(where: Path) -> dict[str, dict[str, Any]]:
    """The judges in an earlier calibration.json, each with the labels and the confidence that it was held against.

    Raises:
        InputError: There is a file that is none of this schema, which would be lost.
    """
    if not where.exists():
        return {}
    try:
        loaded = json.loads(where.read_text(encoding="utf-8"))
        common = {"gold": loaded["gold"], "confidence": loaded["confidence"]}
        if loaded["schema"] != _SCHEMA:
            raise ValueError("another schema")
        return {
            name: one | {key: one.get(key, value) for key, value in common.items()}
            for name, one in loaded["judges"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"output {where} is in use (it is no calibration of schema {_SCHEMA})",
            allowed="another directory for --out, or that file put elsewhere",
        ) from error


def read_gold(path: Path, answers: Sequence[Answer], *, warn: bool = False) -> dict[int, float]:
    """Place among the answers -> human label, from rows with `id` (or prompt_id, policy, sample) and `label`.

    Labels are 0 and 1, true and false, or people's scores on any scale.

    Args:
        path: The rows.
        answers: What was or will be judged.
        warn: Say how many rows are left out.

    Raises:
        InputError: The rows fit no answer, one answer has two, or a label is no finite number.
    """
    rows = read_rows(path, any_text=True)
    column = next((name for name in _LABELS if name in rows[0]), None)
    if column is None:
        raise InputError(f"{path} row 1: {unknown_name('column', 'label', rows[0])}")
    by_id: dict[str, list[int]] = {}
    by_whose: dict[tuple[str, str, int], int] = {}
    for place, answer in enumerate(answers):
        by_id.setdefault(answer.id, []).append(place)
        by_whose[answer.item.prompt_id, answer.item.policy, answer.item.sample] = place
    found: dict[int, float] = {}
    strange = empty = 0
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        own, policy, sample = whose(row, number, where)
        exact = by_whose.get((own, policy, sample))
        places = [exact] if exact is not None else by_id.get(own, [])
        if len(places) > 1:
            raise InputError(f"{where}: {len(places)} answers have the id '{own}'", allowed="columns policy and sample")
        if not places or row.get(column) is None:
            strange, empty = strange + (not places), empty + bool(places)
            continue
        if places[0] in found:
            raise InputError(f"{where}: a second label for '{own}'")
        try:
            found[places[0]] = float(row[column])
            if not math.isfinite(found[places[0]]):
                raise ValueError("not finite")
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"{where}: {column} is no finite number", given=repr(row[column])[:60], allowed="0, 1, or a score"
            ) from None
    if warn and found:
        if strange:
            say(f"{path}: {strange} of {len(rows)} labels are of no answer that is judged, and are left out")
        if empty:
            say(f"{path}: {empty} of {len(rows)} rows have no {column}, and are left out")
    if not found:
        raise InputError(
            f"{path}: none of its {len(rows)} labels is of an answer that was judged", allowed="the same ids"
        )
    return found


def _one(
    config: JudgeConfig,
    name: str,
    records: Sequence[Record],
    gold: Mapping[int, float],
    answers: Sequence[Answer],
    clusters: Sequence[str],
) -> dict[str, Any]:
    places = [place for place in gold if records[place]["valid"]]
    head: dict[str, Any] = {
        "digest": records[0]["judge_digest"],
        "n": len(places),
        "invalid": len(gold) - len(places),
    }
    if not places:
        return head | {"why": "no labelled answer has a valid verdict"}
    scores = np.array([records[place]["score"] for place in places], dtype=np.float64)
    labels = np.array([gold[place] for place in places], dtype=np.float64)
    lengths = np.array([len(answers[place].item.completion) for place in places], dtype=np.float64)
    weights = _row_weights(config, [clusters[place] for place in places])
    if not set(labels) <= {0.0, 1.0}:
        return head | _against_scores(config, scores, labels, lengths, weights)
    threshold = config.threshold if config.threshold is not None else _threshold(scores)
    once = np.ones((1, len(places)))
    by_length = float(auroc(lengths, labels, once)[0])
    return (
        head
        | {"threshold": threshold, "positives": int(labels.sum())}
        | confusion(scores, labels, threshold, config.confidence)
        | {
            "auroc": asdict(_auroc(config, scores, labels, weights, [clusters[place] for place in places])),
            "length_only": {
                "auroc": max(by_length, 1 - by_length) if np.isfinite(by_length) else None,
                "positive_is": "longer" if by_length >= 0.5 else "shorter",
                "best_accuracy": best_accuracy(lengths, labels),
            },
        }
    )


def _auroc(config: JudgeConfig, scores: Array, labels: Array, weights: Array, clusters: Sequence[str]) -> Estimate:
    """AUROC with the bootstrap's interval; where every draw is 0 or 1 an exact one."""
    value = float(auroc(scores, labels, np.ones((1, len(scores))))[0])
    found = _with_width(percentiles(value, auroc(scores, labels, weights), len(scores), config.confidence))
    if value not in (0.0, 1.0):
        return found
    # As many pairs of both labels can be made that share no cluster, and all of them agree: Clopper and Pearson 1934 on
    # these. On the case itself Obuchowski and Lieber 2002, "Confidence bounds when the estimated ROC area is 1.0".
    pairs = min(len({name for name, one in zip(clusters, labels, strict=True) if one == label}) for label in (0.0, 1.0))
    exact = exact_rate(int(value) * pairs, pairs, config.confidence)
    return Estimate(value, exact.low, exact.high, len(scores))


def _with_width(found: Estimate) -> Estimate:
    """The estimate, without an interval where every draw gave the same: that is none."""
    return found if found.low != found.high else Estimate(found.mean, None, None, found.n)


def _row_weights(config: JudgeConfig, clusters: Sequence[str]) -> Array:
    """How often each labelled answer is drawn: with all of its cluster, [D, n]."""
    place = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    weights: Array = bootstrap_weights(len(place), config.resamples, config.seed)[:, [place[name] for name in clusters]]
    return weights


def _against_scores(
    config: JudgeConfig, scores: Array, labels: Array, lengths: Array, weights: Array
) -> dict[str, Any]:
    """Rank correlation with people's scores."""
    draws = np.array(
        [
            np.nan if (one := spearman(np.repeat(scores, row), np.repeat(labels, row))) is None else one
            for row in weights[: min(len(weights), 500)].astype(int)
        ]
    )
    found = _with_width(percentiles(spearman(scores, labels), draws, len(scores), config.confidence))
    return {"spearman": asdict(found), "length_only": {"spearman": spearman(lengths, labels)}}


def _threshold(scores: Array) -> float:
    """0.5 for scores that are rates or probabilities, 0 for the others, such as a cost model's."""
    return 0.5 if scores.min() >= 0 and scores.max() <= 1 else 0.0


def read_calibration(path: Path, judge: str, judge_digest: str | None = None) -> dict[str, Any]:
    """What calibration.json says of one judge.

    Raises:
        InputError: The file is none, does not hold the judge, or is of another version of it.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        found = loaded["judges"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no calibration of psacpo judge --calibrate") from error
    if judge not in found:
        raise unknown_name(f"judge in {path}", judge, found)
    one: dict[str, Any] = found[judge]
    if judge_digest is not None and one["digest"] != judge_digest:
        raise InputError(f"{path} is of another judge '{judge}' than this (its model or settings have changed)")
    if "sensitivity" not in one:
        raise InputError(f"{path}: judge '{judge}' has no labels of 0 and 1 there")
    return one


def corrected(rate: float, n: float, calibration: Mapping[str, Any], confidence: float) -> Estimate:
    """A judge's rate corrected by its calibration; see `calibration_stats.rogan_gladen`."""
    both = [(calibration[name]["hits"], calibration[name]["n"]) for name in ("sensitivity", "specificity")]
    return rogan_gladen(rate, n, both[0], both[1], confidence)


def add_corrected(
    entries: Sequence[dict[str, Any]], metric: str, calibration: Mapping[str, Any], confidence: float
) -> None:
    """Give each point's or baseline's rate `metric` a part `corrected`, with an interval that holds the judge's errors.

    As many independent answers stand behind the rate as its own interval says, which knows of clusters of prompts.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    for entry in entries:
        cell = entry[metric]
        if cell["mean"] is None:
            cell["corrected"] = None
            continue
        rate, spread = cell["mean"], ((cell["high"] or 0) - (cell["low"] or 0)) / (2 * z)
        n = cell["n"] if rate in (0, 1) or not spread else min(cell["n"], rate * (1 - rate) / spread**2)
        cell["corrected"] = asdict(corrected(rate, n, calibration, confidence))


def calibration_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The calibration as a table for a person."""
    lines = []
    for name, one in found.items():
        lines.append(
            f"{name} against {one['n']} human labels" + (f", {one['invalid']} invalid" if one["invalid"] else "")
        )
        if "why" in one:
            lines.append(f"  {one['why']}")
        elif "spearman" in one:
            lines.append(
                f"  Spearman {_interval(one['spearman'])}; length alone {_number(one['length_only']['spearman'])}"
            )
        else:
            counts, length = one["confusion"], one["length_only"]
            lines += [
                f"  accuracy     {_interval(one['accuracy'])}; length alone at best {_number(length['best_accuracy'])}",
                f"  AUROC        {_interval(one['auroc'])}; length alone {_number(length['auroc'])}",
                f"  sensitivity  {_interval(one['sensitivity'])} ({one['sensitivity']['n']} positives)",
                f"  specificity  {_interval(one['specificity'])} ({one['specificity']['n']} negatives)",
                f"  confusion    {_counts(counts)}",
            ]
    return lines


def _interval(one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return "-"
    if one["low"] is None:
        return f"{one['mean']:.3f} (no interval: the same in every draw)"
    return f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
