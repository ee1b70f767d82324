"""What `psacpo judge` shows of its verdicts: each judge's mean with its interval, what was invalid, whose it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from psacpo.evalharness.judges.llm_replies import position_report
from psacpo.evalharness.judges.presets import PRESETS, Preset, describe
from psacpo.evalharness.judges.rule_settings import EnsembleJudge
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.quality import agreement_of
from psacpo.evalharness.judging.verdicts import Answer
from psacpo.evalharness.records import Record
from psacpo.evalharness.statistics.bootstrap import bootstrap_weights, estimate

# Judges side by side in the table of policies, so that it stays within 100 columns.
_ABREAST = 3
_ARROWS = {"higher": "higher is better", "lower": "lower is better"}


def estimates(
    config: JudgeConfig, answers: Sequence[Answer], verdicts: Mapping[str, Sequence[Record]]
) -> dict[str, dict[str, Any]]:
    """Each judge's mean over valid verdicts, its interval over clusters of prompts, and its counts.

    Of answers of several policies also each policy's own, under `policies`, by the same draws of clusters.
    """
    clusters = [answer.drawn_with for answer in answers]
    place = {name: index for index, name in enumerate(sorted(set(clusters)))}
    weights = bootstrap_weights(len(place), config.resamples, config.seed)
    policies = dict.fromkeys(answer.item.policy for answer in answers)
    found = {}
    for name, records in verdicts.items():
        rate = all(record["score"] in (0.0, 1.0) for record in records if record["valid"])

        def cell(rows: Sequence[tuple[str, Record]], rate: bool = rate) -> dict[str, Any]:
            sums, counts = np.zeros(len(place)), np.zeros(len(place))
            for cluster, record in rows:
                if record["valid"]:
                    sums[place[cluster]] += record["score"]
                    counts[place[cluster]] += 1
            invalid = sum(not record["valid"] for _, record in rows)
            return asdict(estimate(weights, sums, counts, confidence=config.confidence, rate=rate)) | {
                "invalid": invalid
            }

        rows = list(zip(clusters, records, strict=True))
        own: dict[str, list[tuple[str, Record]]] = {policy: [] for policy in policies}
        for answer, row in zip(answers, rows, strict=True):
            own[answer.item.policy].append(row)
        settings = config.judges[name]
        found[name] = (
            cell(rows)
            | {"digest": records[0]["judge_digest"]}
            | ({"policies": {policy: cell(part) for policy, part in own.items()}} if len(own) > 1 else {})
            | {"failed": sum(bool(record.get("failed")) for record in records)}
            | describe(settings)
            | {"better": settings.better}
            | _took(settings, records)
            | ({"position": position} if (position := position_report(records))["n"] else {})
            | ({"agreement": agreement_of(settings, verdicts)} if isinstance(settings, EnsembleJudge) else {})
        )
    return found


def _took(settings: Any, records: Sequence[Record]) -> dict[str, Any]:
    """What asking took, in tokens and, where the judge's price is known, in US dollars."""
    total: dict[str, float] = {}
    for record in records:
        for key, value in record.get("usage", {}).items():
            total[key] = total.get(key, 0) + value
    price = getattr(settings, "price_per_million", None)
    if not total or price is None:
        return {"usage": total} if total else {}
    usd = total.get("prompt_tokens", 0) * price.input + total.get("completion_tokens", 0) * price.output
    return {"usage": total, "usd": usd / 1e6}


def table(found: Mapping[str, Mapping[str, Any]], *, answers: int) -> list[str]:
    """One line a judge; of answers of several policies then one line a policy, with each judge's mean and interval."""
    several = any("policies" in one for one in found.values())
    means = [] if several else ["mean", "interval"]
    rows = [["judge", "n", *means, "invalid", "direction", "licence"]]
    for name, one in found.items():
        licence = "non-commercial" if one["non_commercial"] else one["licence"] or "-"
        cells = [] if several else [_mean(one), _interval(one)]
        rows.append([name, str(one["n"]), *cells, str(one["invalid"]), _ARROWS[one["better"]], licence])
    lines = [*_aligned(rows), ""]
    if several:
        for start in range(0, len(found), _ABREAST):
            lines += [*_by_policy(dict(list(found.items())[start : start + _ABREAST])), ""]
    for name, one in found.items():
        if one.get("agreement"):
            lines.append(_agreement_line(name, one["agreement"]))
        if one.get("position"):
            lines.append(_position_line(name, one["position"]))
        if one.get("usage"):
            took = ", ".join(f"{value:,.0f} {key.replace('_', ' ')}" for key, value in one["usage"].items())
            cost = f", {one['usd']:.2f} USD" if one.get("usd") is not None else ""
            lines.append(f"{name}: {took}{cost}")
        if one["failed"]:
            lines.append(f"{name}: {one['failed']} verdicts failed, and are asked again by the same command")
    marked = [name for name, one in found.items() if one["non_commercial"]]
    if marked:
        lines.append(f"not for commercial use: {', '.join(marked)}")
    lines.append(f"{answers} answers")
    return lines


def _by_policy(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Policies down, judges across."""
    policies = next(iter(found.values()))["policies"]
    rows = [["policy", *found]]
    for policy in policies:
        cells = [one["policies"][policy] for one in found.values()]
        rows.append([policy or "-", *(f"{_mean(cell)} ({_interval(cell)})" for cell in cells)])
    return _aligned(rows)


def _mean(cell: Mapping[str, Any]) -> str:
    return "-" if cell["mean"] is None else f"{cell['mean']:.3f}"


def _interval(cell: Mapping[str, Any]) -> str:
    return "-" if cell["low"] is None else f"{cell['low']:.3f} to {cell['high']:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _position_line(name: str, found: Mapping[str, Any]) -> str:
    first = found["first_position_rate"]
    return f"{name}: the same verdict in both orders for {found['swap_consistency']:.1%} of {found['n']} pairs" + (
        "" if first is None else f", the first answer preferred in {first:.1%}"
    )


def _agreement_line(name: str, found: Mapping[str, Any]) -> str:
    alpha = "cannot be told (all the same)" if found["alpha"] is None else f"{found['alpha']:.3f}"
    return f"{name}: Krippendorff alpha {alpha} ({found['level']}) of {', '.join(found['members'])} on {found['n']} answers"


def presets() -> dict[str, Any]:
    """The presets by name."""
    return {name: {"settings": dict(one.settings)} | describe_preset(one) for name, one in PRESETS.items()}


def describe_preset(one: Preset) -> dict[str, Any]:
    """What a reader has to know of a preset."""
    return {
        "direction": _ARROWS[one.settings.get("better", "higher")],
        "licence": one.licence,
        "non_commercial": one.non_commercial,
        "source": one.source,
        "note": one.note,
    }


def preset_lines() -> list[str]:
    """The presets as a table, narrow enough for 100 columns."""
    rows = [["preset", "better", "licence", "source"]]
    for name, one in PRESETS.items():
        licence = one.licence + (
            " (non-commercial)" if one.non_commercial and "non-commercial" not in one.licence else ""
        )
        source = one.source.removeprefix("https://huggingface.co/")
        rows.append([name, str(one.settings.get("better", "higher")), licence, source])
    last = "Sources are on huggingface.co; --json adds each preset's settings and what its scores mean."
    return [*_aligned(rows), "", last]
