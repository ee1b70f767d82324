"""From answers to frontier.json and the report: what `frontier` and `judge RUN` do alike, with no model but the judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psacpo.config import validate
from psacpo.console import progress
from psacpo.errors import InputError
from psacpo.evalharness.adaptive.contest import Race
from psacpo.evalharness.adaptive.settings import budget_warnings
from psacpo.evalharness.adaptive.split import split
from psacpo.evalharness.baseline_settings import sources
from psacpo.evalharness.checks import calibrations
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.scores import Score, tabulate
from psacpo.evalharness.decision.trace import metric_specs, remarks, trace
from psacpo.evalharness.dial import lambda_bar
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.intrinsic import INTRINSIC, KL
from psacpo.evalharness.judges import Item, Judge, make_judge
from psacpo.evalharness.judges.llm_replies import position_report
from psacpo.evalharness.judges.presets import describe
from psacpo.evalharness.judges.rule_settings import EnsembleJudge
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.judging.calibrate import add_corrected
from psacpo.evalharness.judging.quality import Verdicts, agreement_of, refuse_invalid
from psacpo.evalharness.judging.verdicts import Answer, is_verdict, judge_all
from psacpo.evalharness.kl import log_ratio, meaning
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.records import Record, Store
from psacpo.evalharness.run_files import FRONTIER, PLAN, VERDICTS
from psacpo.files import write_atomically


@dataclass(frozen=True)
class Measured:
    """What there is to score.

    Attributes:
        answers: Each completion's record and the prompt that it answers.
        judges: Of the settings in `config`, by name.
    """

    config: FrontierConfig
    policies: Sequence[Policy]
    prompts: Sequence[PromptRow]
    answers: Sequence[tuple[PromptRow, Record]]
    judges: Mapping[str, Judge]


def score(run: Measured, cache: Cache | None = None) -> Callable[[], None]:
    """Judge the answers, trace the frontier, and write frontier.json and the report in the run's directory.

    Returns:
        A check to be called when all is written and let go of.

        Raises:
            InputError: A judge's share of invalid verdicts is over `max_invalid`; everything is kept.
    """
    run = measurable(run)
    verdicts, intrinsic = judge_answers(run, cache)
    write_frontier(run, verdicts, intrinsic)
    return lambda: refuse_invalid(verdicts, run.config.max_invalid, where=run.config.out)


def measurable(run: Measured) -> Measured:
    """The run without `kl_to_base` where no answer has it: made before it was measured, or where no engine tells.

    Raises:
        InputError: The recipe asks for it.
    """
    if not run.config.measures_kl() or any(log_ratio(record) for _, record in run.answers):
        return run
    generation = run.config.generation.model_copy(update={"kl_to_base": False})
    values = run.config.model_dump(by_alias=True) | {"generation": generation.model_dump()}
    try:
        return replace(run, config=validate(FrontierConfig, values, where=str(run.config.out)))
    except InputError as error:
        raise InputError(
            f"kl_to_base is asked for, and no answer in {run.config.out} has it",
            allowed="answers made anew, in another --out, by an engine that tells of probabilities",
        ) from error


def write_frontier(run: Measured, verdicts: Verdicts, intrinsic: Verdicts) -> None:
    """frontier.json out of verdicts, and the report out of the run."""
    with progress("report", 1) as advance:
        _write_frontier(run, verdicts, intrinsic)
        advance(1)


def _write_frontier(run: Measured, verdicts: Verdicts, intrinsic: Verdicts) -> None:
    config = run.config
    invalid = {name: sum(not verdict["valid"] for verdict in found) for name, found in verdicts.items()}
    scores = _scores(run, {**verdicts, **intrinsic})
    race = Race(split(config, config.adaptive, run.prompts)) if config.adaptive else None
    result = (
        {"schema": 1}
        | _head(run)
        | trace(config, tabulate(run.policies, run.prompts, scores), lambda_bar=lambda_bar(config.adapters), race=race)
    )
    for name, calibration in calibrations(config, run.judges).items():
        add_corrected([*result["points"], *result["baselines"]], name, calibration, config.confidence)
    if agreement := _agreement(config, verdicts):
        result["agreement"] = agreement
    if position := {
        name: position_report(verdicts[name]) for name, one in run.judges.items() if one.anchor is not None
    }:
        result["position"] = position
    result |= _tail(run, invalid)
    if config.adaptive is not None:
        result["adaptive"] = account = json.loads((config.out / PLAN).read_text(encoding="utf-8"))["adaptive"]
        result["warnings"] += budget_warnings(config.adaptive, account)
    known = sources(config.baselines)
    for entry in result["baselines"]:
        if entry["name"] in known:
            entry["source"] = known[entry["name"]]
    result["warnings"] += remarks(config, result, config.bases(), run.prompts)
    write_atomically(config.out / FRONTIER, json.dumps(result, indent=2, allow_nan=False) + "\n")
    from psacpo.evalharness.report import report

    report(config.out)


def judge_answers(run: Measured, cache: Cache | None = None) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The verdicts of the recipe's judges, and those of the rules that are always there."""
    answers = [Answer(record["key"], item_of(row, record)) for row, record in run.answers]
    directions = {name: one.better for name, one in run.config.all_judges().items()}
    rules = rules_of(run.config, run.judges)
    with Store(run.config.out / VERDICTS, is_verdict, batches=True) as store:
        verdicts = judge_all(run.judges, directions, answers, store, cache)
        return verdicts, judge_all(rules, directions, answers, store, quiet=True)


def rules_of(config: FrontierConfig, judges: Mapping[str, Judge]) -> dict[str, Judge]:
    """The judges that are always there, but for those whose name the recipe gives away."""
    return {
        name: make_judge(name, one, device="cpu", allow_code=False)
        for name, one in config.all_judges().items()
        if name not in judges
    }


def item_of(row: PromptRow, record: Record) -> Item:
    """What a judge gets to see of a stored answer."""
    ratio = log_ratio(record)
    return Item(
        prompt=row.prompt,
        completion=record["text"],
        prompt_id=row.id,
        policy=record["policy"],
        sample=record["sample"],
        fields=row.fields,
        finish_reason=record["finish_reason"],
        n_tokens=record.get("n_tokens"),
        log_ratio=ratio[0] if ratio else None,
        n_drawn=ratio[1] if ratio else None,
    )


def _scores(run: Measured, verdicts: Verdicts) -> list[Score]:
    """All valid scores."""
    return [
        Score(record["policy"], row, name, float(verdict["score"]), record["sample"])
        for name, found in verdicts.items()
        for (row, record), verdict in zip(run.answers, found, strict=True)
        if verdict["valid"]
    ]


def _agreement(config: FrontierConfig, verdicts: Verdicts) -> dict[str, Any]:
    """Krippendorff's alpha of each ensemble's members."""
    ensembles = {name: one for name, one in config.judges.items() if isinstance(one, EnsembleJudge)}
    return {name: agreement_of(one, verdicts) for name, one in ensembles.items()}


def _head(run: Measured) -> dict[str, Any]:
    """What the numbers of frontier.json mean."""
    config = run.config
    metrics = metric_specs(config)
    if KL in metrics and KL not in config.judges and KL not in config.metrics:
        metrics[KL]["meaning"] = meaning(config.generation)
    judges = {}
    for name, settings in config.judges.items():
        shown = settings.model_dump(mode="json", exclude_none=True)
        for place in ("model", "path"):
            if place in shown and Path(shown[place]).exists():
                shown[place] = Path(shown[place]).name
        known = describe(settings)
        card = {key: known[key] for key in ("licence", "source", "non_commercial") if known[key] is not None}
        judges[name] = shown | card | {"digest": run.judges[name].digest}
    return {
        "axes": config.axes.model_dump(),
        "audit": config.audit.model_dump() if config.audit else None,
        "metrics": metrics,
        "judges": judges,
        "intrinsic": [name for name in INTRINSIC if name in config.all_judges() and name not in config.judges],
    }


def _tail(run: Measured, invalid: Mapping[str, int]) -> dict[str, Any]:
    """Counts, warnings and how to make it again."""
    config, records = run.config, [record for _, record in run.answers]
    truncated = sum(record["finish_reason"] == "length" for record in records)
    empty = sum(not record["text"].strip() for record in records)
    warnings = []
    if truncated > 0.05 * len(records):
        warnings.append(
            f"{truncated} of {len(records)} answers reached max_new_tokens {config.generation.max_new_tokens} "
            "and are cut: their scores are those of cut text"
        )
    if empty:
        warnings.append(f"{empty} of {len(records)} answers are empty")
    warnings += [f"{count} verdicts of judge {name} are invalid" for name, count in invalid.items() if count]
    return {
        "counts": {
            "prompts": len(run.prompts),
            "clusters": len({row.cluster for row in run.prompts}),
            "generated": len(records),
            "truncated": truncated,
            "empty": empty,
            "invalid": sum(invalid.values()),
        },
        "warnings": warnings,
        "seed": config.seed,
        "command": config.command,
    }
