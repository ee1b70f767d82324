"""The job `frontier --from-scores`: the decision and its evidence on scores that are there already, with no model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PrivateAttr, model_validator

from psacpo.config import read_yaml, validate
from psacpo.errors import InputError
from psacpo.evalharness.decision.criteria import Criteria
from psacpo.evalharness.decision.measures import make_measure
from psacpo.evalharness.decision.score_files import ScoreFile, read_scores
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.decision.trace import metric_specs, remarks, trace
from psacpo.evalharness.judging.given import GivenScores
from psacpo.evalharness.records import locked
from psacpo.files import digest, digest_file, read_manifest, readable_io_errors, write_atomically, write_manifest


class ScoresConfig(GivenScores):
    """Scores in a file, and what is asked of them.

    Attributes:
        scores: Rows prompt_id, ratio, sample and a column for each score; see `score_files.read_scores`.
        command: What was typed, for the report.
    """

    scores: Path
    out: Path
    command: str = ""
    _file: ScoreFile = PrivateAttr()

    @model_validator(mode="after")
    def _fits_the_file(self) -> ScoresConfig:
        calibrated = next((name for name, metric in self.metrics.items() if metric.calibration), None)
        if calibrated is not None:
            raise ValueError(
                f"metric '{calibrated}' has a calibration, which is of a judge; scores of a file have none"
            )
        self._file = read_scores(self.scores, self._named())
        try:
            self.take(self._file.scores)
        except ValueError as error:
            if "axes" in self.model_fields_set or not str(error).startswith("axes: "):
                raise
            raise ValueError(f"{error}; `axes: {{reward: NAME, cost: NAME}}` in a YAML recipe names others") from error
        return self

    def _named(self) -> list[str]:
        """What is asked for by name and no metric of these settings: a column of scores, where the file has such a one."""
        asked = self._asked() if "axes" in self.model_fields_set else self._asked()[2:]
        judges = [metric.judge for metric in self.metrics.values()]
        return [*self.lower, *judges, *(name for name in asked if name not in self.metrics)]

    @property
    def file(self) -> ScoreFile:
        """What was read."""
        return self._file


def scores_settings(scores: Path, criteria: Path | None = None, **flags: Any) -> ScoresConfig:
    """The settings from flags and from a YAML file that says metrics, axes, constraints and the like; flags win.

    Args:
        criteria: Such a file, or a whole recipe, of which those keys are taken.

    Raises:
        InputError: A key is neither, or something does not fit the file of scores.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    if criteria is not None:
        loaded = read_yaml(criteria / "psacpo.yaml" if criteria.is_dir() else criteria)
        own = {*Criteria.model_fields, "lower"}
        values = {name: value for name, value in loaded.items() if name in own or "base" not in loaded}
    values |= said | {"scores": scores, "out": said.get("out", Path("frontier"))}
    values["command"] = _command(scores, criteria, said)
    return validate(ScoresConfig, values, where=str(criteria or scores))


def _command(scores: Path, criteria: Path | None, flags: Mapping[str, Any]) -> str:
    words = ["psacpo", "frontier", *([str(criteria)] if criteria else []), "--from-scores", str(scores)]
    for name, flag in (("constraints", "--constraint"), ("lower", "--lower-is-better")):
        words += [part for value in flags.get(name, []) for part in (flag, str(value))]
    for name in ("confidence", "holdout", "out", "seed"):
        words += [f"--{name}", str(flags[name])] if name in flags else []
    return shlex.join(words)


def scores_plan(config: ScoresConfig) -> dict[str, Any]:
    """What `frontier_from_scores` would do, after every check it makes."""
    _require_room(config.out)
    for name, metric in config.all_metrics().items():
        make_measure(config, name, metric, config.file.scores)
    return {
        "scores": str(config.scores),
        "rows": config.file.rows,
        "prompts": len(config.file.scores.prompts),
        "clusters": len(config.file.scores.clusters),
        "policies": config.policy_names(),
        "metrics": list(config.all_metrics()),
        "out": str(config.out),
    }


def frontier_from_scores(config: ScoresConfig) -> Path:
    """Trace the frontier of imported scores and draw the report.

    Returns:
        The run directory, as a sweep leaves it; answers are in it where the file holds them.

    Raises:
        InputError: The output directory is in use by something else, or a metric does not fit the scores; nothing was
            written.
    """
    _require_room(config.out)
    file = config.file
    # Settings that do not fit the scores show here, before anything is written.
    measured = trace(config, file.scores)
    _count_prompts(measured, file.scores)
    with locked(config.out):
        write_manifest(
            config.out,
            kind="frontier",
            config=config.model_dump(mode="json"),
            inputs={"scores": digest_file(config.scores)},
            seeds={"seed": config.seed},
        )
        source = digest_file(config.scores)
        digests = {name: digest(["import", source, name]) for name in file.columns}
        _write_records(config, digests)
        result: dict[str, Any] = {"schema": 1} | _head(config, digests) | measured
        missing = sum(file.missing.values())
        result |= {
            "counts": {
                "prompts": len(file.scores.prompts),
                "clusters": len(file.scores.clusters),
                "generated": file.rows,
                "truncated": 0,
                "empty": 0,
                "invalid": missing,
            },
            "warnings": [f"{count} rows have no {name}" for name, count in file.missing.items() if count],
            "seed": config.seed,
            "command": config.command,
        }
        result["warnings"] += _about_prompts(file.scores)
        result["warnings"] += remarks(config, result, ["base"], config.file.scores.prompts)
        write_atomically(config.out / "frontier.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        from psacpo.evalharness.report import report

        report(config.out)
    return config.out


def _count_prompts(measured: Mapping[str, Any], scores: Scores) -> None:
    """Whoever made the scores need not have asked every policy the same: a point's `n_prompts` is its own."""
    answered = {policy.name: scores.answered(k) for k, policy in enumerate(scores.policies)}
    for entry in (*measured["points"], *measured["baselines"]):
        entry["n_prompts"] = answered[entry["policy"] if "policy" in entry else entry["name"]]


def _about_prompts(scores: Scores) -> list[str]:
    """Where policies are set side by side that have scores of different prompts."""
    scored = np.stack([scores.scored(k) for k in range(len(scores.policies))])  # [K, N]
    if (scored == scored[0]).all():
        return []
    counts = scored.sum(axis=1)
    least, most = int(counts.argmin()), int(counts.argmax())
    text = (
        f"policies have scores of different prompts: {scores.policies[least].name} of {counts[least]}, "
        f"{scores.policies[most].name} of {counts[most]}, all of them of {scored.all(axis=0).sum()} in common; "
        "each one's numbers are of its own prompts"
    )
    return [text]


def _require_room(run: Path) -> None:
    """A new or empty directory, or a run of imported scores."""
    with readable_io_errors(run):
        if run.is_symlink() or (run.exists() and not run.is_dir()):
            raise InputError(f"output {run} exists and is not a directory")
        used = run.is_dir() and any(path.name != ".lock" for path in run.iterdir())
    manifest = read_manifest(run) if used else None
    if used and (manifest is None or "scores" not in manifest.get("inputs", {})):
        raise InputError(
            f"output directory {run} is in use, and not by imported scores", allowed="a new or empty directory"
        )


def _head(config: ScoresConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "axes": config.axes.model_dump(),
        "audit": config.audit.model_dump() if config.audit else None,
        "metrics": metric_specs(config),
        "judges": {
            name: {"kind": "import", "better": column.better, "digest": digests[name]}
            for name, column in config.columns().items()
        },
        "source": {"scores": config.scores.name, "rows": config.file.rows},
    }


def _write_records(config: ScoresConfig, digests: Mapping[str, str]) -> None:
    """scores.jsonl, every row as it was read, and what the file holds of answers in a sweep's form."""
    run, file = config.out, config.file
    completions, verdicts = [], []
    for row in file.completions:
        key = digest([row["policy"], row["prompt_id"], row["sample"], row["text"]])
        scores = row["scores"]
        completions.append({"key": key} | {name: value for name, value in row.items() if name != "scores"})
        completions[-1] |= {"finish_reason": "stop"}
        for name, value in scores.items():
            verdicts.append(
                {"key": digest([key, name]), "completion": key, "judge": name, "judge_digest": digests[name]}
                | {"score": value, "label": None, "raw": None, "valid": value is not None}
            )
    prompts = [{"id": row.id, "prompt": row.prompt, "cluster": row.cluster} | row.fields for row in file.scores.prompts]
    for name, rows in (
        ("scores.jsonl", file.table),
        ("prompts.jsonl", prompts),
        ("completions.jsonl", completions),
        ("verdicts.jsonl", verdicts),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        write_atomically(run / name, text)
    write_atomically(run / "plan.json", json.dumps({"completions": [row["key"] for row in completions]}) + "\n")
