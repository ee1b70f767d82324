"""A finished run judged again: its stored answers, other judges, the same statistics, nothing generated."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness.checks import require_fields, require_members, require_templates
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.judges import Judge, make_judge
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.places import as_said, home_of, placed
from psacpo.evalharness.judging.verdicts import Answer, is_verdict
from psacpo.evalharness.kl import with_base_log_probs
from psacpo.evalharness.prompts import PromptRow, is_prompt
from psacpo.evalharness.records import Record, latest, locked, read_records
from psacpo.evalharness.run_files import COMPLETIONS, PLAN, PROMPTS, VERDICTS, is_answer, is_completion, is_prompt_row
from psacpo.evalharness.scoring import Measured, item_of, judge_answers, measurable, write_frontier
from psacpo.evalharness.sweep import policies_of
from psacpo.files import MANIFEST, read_manifest, write_atomically


@dataclass(frozen=True)
class _Run:
    """A run and its settings, with the judges that it has from now on."""

    config: FrontierConfig
    manifest: dict[str, Any]
    measured: Measured
    home: Path | None

    def settings(self, new: Collection[str]) -> dict[str, Any]:
        """What psacpo.json says of them from now on."""
        values = self.config.model_dump(mode="json", by_alias=True)
        return as_said(values, self.manifest["config"], new=new, home=self.home)


def plan_run(settings: JudgeConfig) -> tuple[list[Answer], dict[str, Judge], Cache]:
    """The run's answers, its judges, and the verdicts that are known."""
    measured = _read(settings).measured
    cache = Cache(settings.cache, make=False)
    path = settings.source / VERDICTS
    if path.is_file():
        cache.remember(latest(read_records(path, is_verdict)), where=path)
    return _answers(measured), dict(measured.judges), cache


def rejudge(settings: JudgeConfig) -> tuple[FrontierConfig, list[Answer], dict[str, list[Record]]]:
    """Judge a run's answers, add the verdicts to it, and write its frontier.json and report anew.

    Raises:
        InputError: The run is not finished or damaged, or a judge is wrong: nothing was written. Or the disk is full:
            the run says what it said before, and keeps the verdicts.
    """
    with locked(settings.source):
        run = _read(settings)
        measured = run.measured
        verdicts, intrinsic = judge_answers(measured, Cache(settings.cache))
        inputs = {name: one for name, one in run.manifest["inputs"].items() if not name.startswith("judge ")}
        inputs |= {f"judge {name}": judge.digest for name, judge in measured.judges.items()}
        manifest = run.manifest | {"config": run.settings(settings.judges), "inputs": inputs}
        with _all_or_none(settings.source):
            write_atomically(settings.source / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")
            write_frontier(measured, verdicts, intrinsic)
    return run.config, _answers(measured), verdicts


@contextlib.contextmanager
def _all_or_none(run: Path) -> Iterator[None]:
    """Put the files that are made out of verdicts back as they were if one of them cannot be written.

    Second names of the old files take no room, and every file is replaced and never written over.
    """
    files = [path for path in run.iterdir() if path.is_file() and path.suffix != ".jsonl" and path.name[0] != "."]
    with tempfile.TemporaryDirectory(prefix=".before-", dir=run) as place:
        for path in files:
            try:
                os.link(path, Path(place) / path.name)
            except OSError:  # a file system without second names
                shutil.copy2(path, Path(place) / path.name)
        try:
            yield
        except BaseException:
            for path in files:
                (Path(place) / path.name).replace(path)
            raise


def _read(settings: JudgeConfig) -> _Run:
    source = settings.source
    manifest = read_manifest(source)
    assert manifest is not None  # is_run
    if "scores" in manifest.get("inputs", {}):
        raise InputError(
            f"{source} is a run of imported scores, which are not judged again", allowed="a run of psacpo frontier"
        )
    if not isinstance(manifest.get("config"), dict) or not isinstance(manifest.get("inputs"), dict):
        raise InputError(f"{source / MANIFEST} is damaged: it holds no settings")
    home = home_of(source, manifest["config"])
    values = placed(manifest["config"], home) | {
        "out": source,
        "device": settings.device,
        "allow_code": settings.allow_code,
    }
    before = validate(FrontierConfig, values, where=str(source / MANIFEST))
    config = before.model_copy(update={"judges": before.judges | settings.judges})
    config = validate(FrontierConfig, config.model_dump(by_alias=True), where=str(source / MANIFEST))
    prompts = _prompts(source / PROMPTS)
    judges = {
        name: make_judge(name, one, device=config.device, allow_code=config.allow_code)
        for name, one in config.judges.items()
    }
    require_members(config, judges)
    require_fields(config, prompts)
    require_templates(config, prompts)
    answers = _completions(source, {row.id: row for row in prompts})
    policies = policies_of(config)
    known = [policy.name for policy in policies]
    if strange := [record["policy"] for _, record in answers if record["policy"] not in known]:
        raise InputError(
            f"{source / COMPLETIONS} holds answers of policy '{strange[0]}', which is none of the run's",
            allowed=", ".join(known),
        )
    measured = measurable(Measured(config, policies, prompts, answers, judges))
    return _Run(measured.config, manifest, measured, home)


def _answers(measured: Measured) -> list[Answer]:
    return [Answer(record["key"], item_of(row, record), record["key"], row.cluster) for row, record in measured.answers]


def _prompts(path: Path) -> list[PromptRow]:
    own = ("id", "prompt", "cluster", "prompt_ids")
    return [
        PromptRow(row["id"], row["prompt"], row["cluster"], {k: v for k, v in row.items() if k not in own})
        for row in read_records(path, lambda row: is_prompt_row(row) and is_prompt(row["prompt"]))
    ]


def _completions(source: Path, prompts: dict[str, PromptRow]) -> list[tuple[PromptRow, Record]]:
    """The planned answers, in the plan's order."""
    try:
        keys: Sequence[str] = json.loads((source / PLAN).read_text(encoding="utf-8"))["completions"]
        keys = [str(key) for key in keys]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{source / PLAN} is missing or damaged", allowed="a run of psacpo frontier") from error
    records = {record["key"]: dict(record) for record in read_records(source / COMPLETIONS, is_answer)}
    missing = [key for key in keys if key not in records or not is_completion(records[key])]
    if missing:
        raise InputError(
            f"{source} is not finished: {len(missing)} of {len(keys)} answers are missing",
            allowed="the command that began it, which goes on from there",
        )
    if strange := [key for key in keys if records[key]["prompt_id"] not in prompts]:
        raise InputError(f"{source / PROMPTS} holds no prompt '{records[strange[0]]['prompt_id']}', which was answered")
    found = with_base_log_probs(source, [records[key] for key in keys])
    return [(prompts[record["prompt_id"]], record) for record in found]
