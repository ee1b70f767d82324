"""The job `judge`: stored completions in, verdicts out, with no generation."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.console import say
from psacpo.errors import InputError
from psacpo.evalharness.judges import Judge, make_judge
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.judging.completions import read_completions
from psacpo.evalharness.judging.config import JudgeConfig
from psacpo.evalharness.judging.quality import refuse_invalid
from psacpo.evalharness.judging.table import estimates, table
from psacpo.evalharness.judging.verdicts import Answer, in_order, is_verdict, judge_all, unanswered
from psacpo.evalharness.records import Record, Store, read_records
from psacpo.evalharness.run_files import is_run
from psacpo.files import readable_io_errors, write_atomically

DEFAULT_OUT = Path("scores.jsonl")


@dataclass(frozen=True)
class Judged:
    """What came out.

    Attributes:
        result: For machines: where it is, and each judge's figures.
        lines: For people: the same as a table.
        refuse: To be called when all is shown; raises InputError where too many verdicts are invalid.
    """

    result: dict[str, Any]
    lines: list[str]
    refuse: Callable[[], None]


def judge(config: JudgeConfig) -> Judged:
    """Score stored completions, of a file or of a `psacpo frontier` run.

    A file's verdicts are written beside `out` as they come and appear in `out` whole; a killed call goes on where it
    was. Verdicts that `out` or the cache holds already are not asked for again, and those in `out` by other judges or on
    other answers stay there. A run's verdicts are added to the run, and its frontier.json and report are made anew.

    Raises:
        InputError: Something in the settings or files is wrong; no judge was asked.
    """
    if is_run(config.source):
        return _judge_run(config)
    answers, judges = _read(config)
    _require_gold(config, answers)
    out = config.out or DEFAULT_OUT
    cache = _cache(config, out)
    with _partial(out) as partial:
        with Store(partial, is_verdict, batches=True) as store:
            verdicts = judge_all(judges, _directions(config), answers, store, cache)
        rows = [
            _row(answer, record) for found in verdicts.values() for answer, record in zip(answers, found, strict=True)
        ]
        rows += _others(out, rows)
        blob = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(out, blob.encode("utf-8", "surrogatepass"))
        partial.unlink()
    return _judged(config, out, answers, verdicts)


def plan(config: JudgeConfig) -> dict[str, Any]:
    """What `judge` would do, after every check it makes before a judge is asked."""
    if is_run(config.source):
        from psacpo.evalharness.judging.rejudge import plan_run

        answers, judges, known = plan_run(config)
    else:
        answers, judges = _read(config)
        known = _cache(config, config.out or DEFAULT_OUT, make=False)
    return {
        "source": str(config.source),
        "answers": len(answers),
        "judges": {name: _work(one, answers, known) for name, one in judges.items()},
        "out": str(config.source if is_run(config.source) else config.out or DEFAULT_OUT),
    }


def plan_for_people(found: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with a line a judge."""
    judges = {f"judge {name}": work for name, work in found["judges"].items()}
    return {"source": found["source"], "answers": found["answers"], **judges, "out": found["out"]}


def _work(judge: Judge, answers: Sequence[Answer], known: Cache) -> dict[str, Any]:
    """What one judge would be asked. A judge made of others asks nobody itself."""
    if judge.members:
        return {"texts": 0}
    todo = unanswered(judge, answers, known)
    work: dict[str, Any] = {
        "texts": len(todo),
        "found": len(answers) - len(todo),
        "characters": sum(len(item.completion) for item in todo),
    }
    estimate = getattr(judge, "estimate", None)
    return work | (dict(estimate(todo)) if estimate else {})


def _judge_run(config: JudgeConfig) -> Judged:
    if config.out is not None:
        raise InputError(f"{config.source} is a run, which holds its own verdicts", given=f"--out {config.out}")
    from psacpo.evalharness.judging.rejudge import plan_run, rejudge

    if config.calibrate is not None:
        _require_gold(config, plan_run(config)[0])
    measured, answers, verdicts = rejudge(config)
    # By the run's own settings: its table says what its frontier.json says.
    own = ("judges", "max_invalid", "confidence", "resamples", "seed")
    return _judged(
        config.model_copy(update={name: getattr(measured, name) for name in own}),
        config.source,
        answers,
        verdicts,
    )


def _judged(
    config: JudgeConfig, out: Path, answers: Sequence[Answer], verdicts: Mapping[str, Sequence[Record]]
) -> Judged:
    from psacpo.evalharness.judging.calibrate import calibrate, calibration_lines

    found = estimates(config, answers, verdicts)
    result: dict[str, Any] = {"out": str(out), "answers": len(answers), "judges": found}
    lines = table(found, answers=len(answers))
    if config.calibrate is not None:
        where, calibrations = calibrate(config, out, answers, verdicts)
        result |= {"calibration": str(where), "calibrations": calibrations}
        lines += ["", *calibration_lines(calibrations)]
    lines.append(f"report: {out / 'report.html'}" if out.is_dir() else f"verdicts: {out}")
    if "calibration" in result:
        lines.append(f"calibration: {result['calibration']}")
    return Judged(result, lines, lambda: refuse_invalid(verdicts, config.max_invalid, where=out))


def _read(config: JudgeConfig) -> tuple[list[Answer], dict[str, Judge]]:
    out = config.out or DEFAULT_OUT
    if not config.judges:
        raise InputError(
            "no judge was named", allowed="--judge PRESET, --judge FILE.yaml; psacpo judge --list shows them"
        )
    if out.exists() and config.source.exists() and out.samefile(config.source):
        raise InputError(f"output {out} is the input", allowed="another --out")
    _require_verdicts(out)
    answers = read_completions(config.source)
    judges = {
        name: make_judge(name, settings, device=config.device, allow_code=config.allow_code)
        for name, settings in config.judges.items()
    }
    in_order(judges)
    policies = {answer.item.policy for answer in answers}
    for name, one in judges.items():
        if one.anchor is not None and one.anchor not in policies:
            raise InputError(
                f"judge '{name}' compares with policy '{one.anchor}', of which {config.source} holds no answer",
                allowed=", ".join(sorted(policies - {""})) or "rows with a column policy",
            )
    return answers, judges


def _require_gold(config: JudgeConfig, answers: Sequence[Answer]) -> None:
    """Refuse labels that fit no answer, and a file that would be lost, before a judge is asked."""
    if config.calibrate is not None:
        from psacpo.evalharness.judging.calibrate import calibration_file, kept_judges, read_gold

        read_gold(config.calibrate, answers, warn=True)
        kept_judges(calibration_file(config.source if is_run(config.source) else config.out or DEFAULT_OUT))


def _directions(config: JudgeConfig) -> dict[str, str]:
    return {name: settings.better for name, settings in config.judges.items()}


def _require_verdicts(out: Path) -> None:
    """Refuse to replace a file that is not ours."""
    if out.is_dir():
        raise InputError(f"output {out} is a directory", allowed="a file")
    if out.exists() and not out.is_file():
        raise InputError(f"output {out} is a device or a pipe, which would be replaced", allowed="a file")
    if out.is_file():
        try:
            with out.open(encoding="utf-8", errors="surrogatepass") as file:
                first = json.loads(file.readline())
            mine = isinstance(first, dict) and {"judge", "judge_digest", "content"} <= set(first)
        except (ValueError, OSError):
            mine = False
        if not mine:
            raise InputError(f"output {out} is in use (it holds no verdicts)", allowed="another --out")


def _cache(config: JudgeConfig, out: Path, *, make: bool = True) -> Cache:
    cache = Cache(config.cache, make=make)
    # What an earlier call left in its partial file is found by the store; a plan has no store.
    for path in [out] if make else [out, _partial_of(out)]:
        if path.is_file():
            cache.remember(read_records(path), where=path)
    return cache


def _row(answer: Answer, record: Record) -> Record:
    """A verdict as `out` has it: whose it is, then what was said."""
    item = answer.item
    whose = {"id": answer.id, "prompt_id": item.prompt_id, "policy": item.policy, "sample": item.sample}
    return whose | {key: value for key, value in record.items() if key not in ("key", "completion")}


def _others(out: Path, rows: Sequence[Record]) -> list[Record]:
    """The verdicts in `out` that `rows` say nothing of: by another judge, or on another answer."""

    def whose(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in ("judge", "id", "policy", "sample"))

    new = {whose(row) for row in rows}
    found = [dict(row) for row in read_records(out) if whose(row) not in new] if out.is_file() else []
    if found:
        judges = dict.fromkeys(str(row.get("judge")) for row in found)
        say(f"kept {len(found)} verdicts of {', '.join(judges)} in {out}")
    return found


def _partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """The file beside `out` that takes verdicts as they come, held for this process alone."""
    path = _partial_of(out)
    try:
        with readable_io_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("ab")
    except FileNotFoundError as error:
        raise InputError(f"cannot write {out}: no directory can be made there") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"output {out} is being written by another process") from error
        yield path
