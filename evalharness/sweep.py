"""The job `frontier`: all policies answer all prompts from one loaded base, judges score, the frontier is traced."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from psacpo.console import progress, say
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig, ScalarJudge
from psacpo.evalharness.engines import Completion, Engine, Failure, Policy, make_engine
from psacpo.evalharness.engines.plan import EnginePlan, engine_identity, plan_engine, require_engine
from psacpo.evalharness.engines.whole import WholeModel, read_policy
from psacpo.evalharness.judges import Judge, make_judge
from psacpo.evalharness.prompts import Job, PromptRow, plan_jobs, read_prompts
from psacpo.evalharness.records import Record, Store, locked, read_records
from psacpo.evalharness.trace import Score, better, compared_with_base, trace
from psacpo.files import (
    digest,
    digest_file,
    read_manifest,
    readable_io_errors,
    require_apart,
    write_atomically,
    write_manifest,
)
from psacpo.hub import load_config, load_tokenizer
from psacpo.merge import policy_name
from psacpo.merge.adapters import Adapter, require_compatible
from psacpo.merge.bases import find_base
from psacpo.prompting import Prompt, end_of_turn_ids, require_chat_template

Item = TypeVar("Item")
FRONTIER, COMPLETIONS, VERDICTS, PROMPTS, PLAN, FAILURES = (
    "frontier.json",
    "completions.jsonl",
    "verdicts.jsonl",
    "prompts.jsonl",
    "plan.json",
    "failures.jsonl",
)
# Seconds of answers that a kill may cost.
_FLUSH = 1.0


@dataclass
class _Plan:
    """Everything that is known before the expensive part starts."""

    base: Path
    base_digest: str
    adapters: dict[str, Adapter]
    judges: dict[str, Judge]
    prompts: list[PromptRow]
    policies: list[Policy]
    jobs: list[Job]
    engine: EnginePlan
    records: dict[str, Record] = field(default_factory=dict)


def frontier(config: FrontierConfig) -> Path:
    """Sweep the ratios, judge the answers, trace the frontier, draw the report.

    The run directory can be interrupted at any point; the same command goes on from there and ends in the same
    result. Finished answers and verdicts are found by their content, so a changed adapter, prompt, setting or judge
    never meets a stale one.

    Returns:
        The run directory: frontier.json, frontier.png, points.csv, report.html, completions.jsonl, verdicts.jsonl,
        prompts.jsonl, plan.json, psacpo.json.

    Raises:
        InputError: Something in the settings or the files they name is wrong; nothing expensive was started. Or the
            share of invalid verdicts is over `max_invalid`; everything is kept.
    """
    plan = _plan(config)
    with locked(config.out):
        _write_inputs(config, plan)
        completions = _generate(config, plan)
        scores, invalid = _judge(config, plan, completions)
        result = {"schema": 1} | _head(config, plan) | trace(config, plan.policies, plan.prompts, scores)
        result |= _tail(config, plan, completions, invalid)
        result["warnings"] += compared_with_base(config, result)
        write_atomically(config.out / FRONTIER, json.dumps(result, indent=2, allow_nan=False) + "\n")
        from psacpo.evalharness.report import report

        report(config.out)
    _refuse_invalid(config, plan, invalid, len(completions))
    return config.out


def plan_summary(config: FrontierConfig) -> dict[str, Any]:
    """What `frontier` would do, after every check it makes before the expensive part."""
    plan = _plan(config)
    keys = {job.request.key for job in plan.jobs}
    path = config.out / COMPLETIONS
    done = keys & {record["key"] for record in read_records(path)} if path.is_file() else set()
    return {
        "base": str(plan.base),
        "policies": [policy.name for policy in plan.policies],
        "prompts": len(plan.prompts),
        "answers": len(plan.jobs),
        "answers found": len(done),
        "prompt tokens": sum(len(job.request.prompt_ids) for job in plan.jobs),
        "new tokens at most": (len(keys) - len(done)) * config.generation.max_new_tokens,
        "engine": plan.engine.line(),
        "judges": {name: len(plan.jobs) for name in plan.judges},
        "out": str(config.out),
    }


def _require_run_directory(run: Path) -> None:
    """A new or empty directory, or one that a `frontier` of before left."""
    with readable_io_errors(run):
        if run.is_symlink() or (run.exists() and not run.is_dir()):
            raise InputError(f"output {run} exists and is not a directory")
        used = run.is_dir() and any(path.name != ".lock" for path in run.iterdir())
    if used:
        manifest = read_manifest(run)
        if manifest is None or manifest.get("kind") != "frontier":
            raise InputError(
                f"output directory {run} is in use (it holds files that are not a frontier run's)",
                allowed="a new or empty directory, or an earlier run to go on with",
            )


def check(config: FrontierConfig) -> tuple[list[PromptRow], dict[str, Judge]]:
    """What can be checked before there are adapters: output directory, prompts, judges, device."""
    _require_run_directory(config.out)
    models = [Path(settings.model) for settings in config.judges.values() if isinstance(settings, ScalarJudge)]
    require_apart(
        config.out, [path for path in (Path(config.base), *models, *config.adapters.values()) if path.is_dir()]
    )
    require_engine(config)
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device cuda: there is no CUDA device", allowed="auto, cpu")
    prompts = read_prompts(config.prompts)
    _require_fields(config, prompts)
    judges = {
        name: make_judge(name, settings, device=config.device, allow_code=config.allow_code)
        for name, settings in config.judges.items()
    }
    _require_templates(config, prompts)
    return prompts, judges


def _plan(config: FrontierConfig) -> _Plan:
    """Read and check all inputs; load no model weights."""
    prompts, judges = check(config)
    adapters = {name: read_policy(path, config.base) for name, path in config.adapters.items()}
    if len({isinstance(adapter, WholeModel) for adapter in adapters.values()}) > 1:
        raise InputError(
            "adapters holds both adapters and whole models", allowed="adapters on one base, or models trained from it"
        )
    require_compatible(adapters)
    found = find_base(config.base, adapters, on_disk=True)
    assert found.path is not None
    assert found.digest is not None
    base, base_digest = found.path, found.digest
    tokenizer = load_tokenizer(base)
    if config.template is None:
        require_chat_template(tokenizer)
    policies = [
        Policy(policy_name(ratio), {"reward": 1 - ratio, "safety": ratio}, ratio) for ratio in sorted(config.ratios)
    ]
    policies += [Policy(name, weights) for name, weights in config.baselines.items()]
    jobs = plan_jobs(
        tokenizer,
        prompts,
        policies,
        template=config.template,
        samples=config.samples,
        seed=config.seed,
        max_length=getattr(load_config(base), "max_position_embeddings", None),
        max_new_tokens=config.generation.max_new_tokens,
        identity={
            "base": base_digest,
            # Log-probabilities are part of a record, but no answer hangs on whether they are there.
            "generation": config.generation.model_dump(
                exclude={"batch_size"} if config.generation.logprobs else {"batch_size", "logprobs"}
            ),
        }
        | engine_identity(config),
        adapter_digests={name: adapter.content for name, adapter in adapters.items()},
    )
    _require_one_bos(tokenizer, jobs)
    engine = plan_engine(config, base, adapters, policies, [job.request for job in jobs])
    return _Plan(base, base_digest, adapters, judges, prompts, policies, jobs, engine)


def _require_one_bos(tokenizer: Any, jobs: Sequence[Job]) -> None:
    """Refuse a prompt in whose text the BOS token is written once more: it would cut off what stands before it.

    Only where BOS is nothing but that: some models end turns with it too, and some templates begin each turn with it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or bos in end_of_turn_ids(tokenizer):
        return
    for job in jobs:
        prompt, count = job.row.prompt, job.request.prompt_ids.count(bos)
        turns = 1 if isinstance(prompt, str) else sum(message["role"] == "user" for message in prompt)
        if count > max(turns, 1):
            raise InputError(
                f"prompt '{job.row.id}' holds the BOS token {tokenizer.bos_token!r} {count} times",
                allowed="once, at its beginning: take it out of the prompt's text or of the template",
            )


def _require_fields(config: FrontierConfig, prompts: Sequence[PromptRow]) -> None:
    """Refuse a metric whose `where` fits no prompt: it would be silently empty."""
    for name, metric in config.all_metrics().items():
        if not any(all(row.fields.get(k) == v for k, v in metric.where.items()) for row in prompts):
            fields = sorted({key for row in prompts for key in row.fields})
            raise InputError(
                f"metric '{name}': no prompt of {config.prompts} has {metric.where}",
                allowed=f"fields of the prompts: {', '.join(fields) or 'none'}",
            )


def _require_templates(config: FrontierConfig, prompts: Sequence[PromptRow]) -> None:
    """Refuse a judge whose raw template would see less of a conversation than the policies do."""
    turns = next((row.id for row in prompts if not isinstance(row.prompt, str) and len(row.prompt) > 1), None)
    for name, settings in config.judges.items():
        if turns is not None and getattr(settings, "template", None) is not None:
            raise InputError(
                f"judge '{name}' has a raw template, which takes one string, and prompt '{turns}' has several messages",
                allowed="string prompts, or template: null to use the judge's chat template",
            )


def _write_inputs(config: FrontierConfig, plan: _Plan) -> None:
    """psacpo.json first, so that an interrupted run is known for one; then what the records refer to."""
    run = config.out
    write_manifest(
        run,
        kind="frontier",
        config=config.model_dump(mode="json", by_alias=True),
        inputs={"base": plan.base_digest, "prompts": digest_file(config.prompts)}
        | {f"adapter {name}": adapter.digest for name, adapter in plan.adapters.items()}
        | {f"judge {name}": judge.digest for name, judge in plan.judges.items()},
        seeds={"seed": config.seed},
        engine=plan.engine.record(),
    )
    ids = {job.row.id: job.request.prompt_ids for job in plan.jobs}
    rows = [
        {"id": r.id, "prompt": r.prompt, "cluster": r.cluster} | r.fields | {"prompt_ids": ids[r.id]}
        for r in plan.prompts
    ]
    write_atomically(run / PROMPTS, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    write_atomically(run / PLAN, json.dumps({"completions": [job.request.key for job in plan.jobs]}) + "\n")


def _generate(config: FrontierConfig, plan: _Plan) -> list[tuple[Job, Record]]:
    """Every job's completion record, made now or found.

    Raises:
        InputError: Some requests failed after every retry; they are listed, and the rest is kept.
    """
    started = time.perf_counter()
    failed: dict[str, Record] = {}
    with Store(config.out / COMPLETIONS, _is_completion) as store, progress("generate", len(plan.jobs)) as advance:
        before = sum(job.request.key in store.records for job in plan.jobs)
        advance(before)
        if before < len(plan.jobs):
            say(f"engine: {plan.engine.line()}")
            engine = make_engine(config, plan.base, plan.adapters, plan.policies, plan.engine)
            try:
                if config.probe:
                    _probe(config, plan, engine)
                todo = _unfinished(plan.jobs, store.records, engine.batch_size)
                with Store(config.out / FAILURES) as failures:
                    for records in _answers(engine, todo):
                        store.append([record for record in records if "error" not in record])
                        failures.append([record for record in records if "error" in record])
                        failed |= {record["key"]: record for record in records if "error" in record}
                        advance(len(records))
            finally:
                engine.close()
        _settle_failures(config, plan, failed, store.records)
        completions = [(job, store.records[job.request.key]) for job in plan.jobs]
    _say_done("generated", len(plan.jobs), before, time.perf_counter() - started)
    return completions


def _unfinished(jobs: Sequence[Job], records: Mapping[str, Record], batch_size: int | None) -> list[Job]:
    """The jobs to do: where an engine's batches count, all of a batch of which one is missing."""
    batches = _chunks(jobs, batch_size or 1)
    return [job for batch in batches if any(job.request.key not in records for job in batch) for job in batch]


def _answers(engine: Engine, jobs: Sequence[Job]) -> Iterator[list[Record]]:
    """The records of answers and failures as they come, gathered so that each write holds a second's worth."""
    by_key = {job.request.key: job for job in jobs}
    gathered: list[Record] = []
    last = time.monotonic()
    for answer in engine.generate([job.request for job in jobs]):
        gathered.append(_record(by_key[answer.key], answer))
        if time.monotonic() - last >= _FLUSH:
            yield gathered
            gathered, last = [], time.monotonic()
    if gathered:
        yield gathered


def _record(job: Job, answer: Completion | Failure) -> Record:
    record: Record = {
        "key": answer.key,
        "policy": job.request.policy.name,
        "ratio": job.request.policy.ratio,
        "prompt_id": job.row.id,
        "sample": job.sample,
    }
    if isinstance(answer, Failure):
        return record | {"error": answer.error}
    record |= {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "n_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "seed": job.request.seed,
    }
    return record if answer.logprobs is None else record | {"logprobs": answer.logprobs}


def _probe(config: FrontierConfig, plan: _Plan, engine: Engine) -> None:
    """Stop before the sweep if a policy does not act, or is not the merged model."""
    from psacpo.evalharness.engines.probe import dense_reference, probe

    remote = plan.engine.name == "openai"
    if remote and config.openai.dialect != "vllm":
        return say("not proven that the policies act: this endpoint does not tell the ids of tokens")
    quantised = plan.engine.name == "vllm" and config.vllm.quantization
    reference = None if quantised else dense_reference(engine, plan.base, plan.adapters)
    if reference is None:
        say(
            "policies are held against the base only: their merged weights do not fit in memory, or cannot be made here"
        )
    for line in probe(
        engine,
        plan.policies,
        [job.request.prompt_ids for job in plan.jobs],
        reference=reference,
        dtype=engine_identity(config)["dtype"],
        has_base=not remote or any(not policy.adapted for policy in plan.policies),
    ):
        say(line)


def _settle_failures(
    config: FrontierConfig, plan: _Plan, failed: Mapping[str, Record], records: Mapping[str, Record]
) -> None:
    """Leave in failures.jsonl what has no answer now, and stop if that is anything."""
    path = config.out / FAILURES
    left = [record for key, record in failed.items() if key not in records]
    if not left:
        return path.unlink(missing_ok=True)
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in left))
    first = left[0]
    raise InputError(
        f"{len(left)} of {len(plan.jobs)} answers failed, the first of {first['policy']} to prompt "
        f"'{first['prompt_id']}': {first['error']}; all are in {path}",
        allowed="the same command again: it tries these once more and keeps the rest",
    )


def _judge(
    config: FrontierConfig, plan: _Plan, completions: Sequence[tuple[Job, Record]]
) -> tuple[list[Score], dict[str, int]]:
    """All valid scores, and how many verdicts of each judge are invalid."""
    scores: list[Score] = []
    invalid: dict[str, int] = {}
    with Store(config.out / VERDICTS, _is_verdict) as store:
        for name, judge in plan.judges.items():
            started = time.perf_counter()
            groups = _same_text(completions)
            batches = [[item for group in chunk for item in group] for chunk in _chunks(groups, judge.batch_size)]
            direction = config.judges[name].better

            def key(item: tuple[Job, Record], judge: Judge = judge) -> str:
                return digest([judge.digest, item[1]["key"], item[1]["text"]])

            def work(
                batch: Sequence[tuple[Job, Record]], judge: Judge = judge, name: str = name, direction: str = direction
            ) -> Iterable[Record]:
                pairs = {(job.row.id, record["text"]): job.row.prompt for job, record in batch}
                asked: list[tuple[Prompt, str]] = [(prompt, text) for (_, text), prompt in pairs.items()]
                found = dict(zip(pairs, judge.judge(asked), strict=True))
                for job, record in batch:
                    verdict = found[job.row.id, record["text"]]
                    yield {
                        "key": digest([judge.digest, record["key"], record["text"]]),
                        "completion": record["key"],
                        "judge": name,
                        "judge_digest": judge.digest,
                        "score": verdict.score,
                        "label": verdict.label,
                        "probability": verdict.probability,
                        "raw": verdict.raw,
                        "valid": verdict.valid,
                        "direction": direction,
                    }

            before = sum(key(item) in store.records for item in completions)
            with progress(f"judge {name}", len(completions)) as advance:
                for done in store.fill(batches, key, work):
                    advance(done)
            verdicts = [(item[0], store.records[key(item)]) for item in completions]
            invalid[name] = sum(not verdict["valid"] for _, verdict in verdicts)
            scores += [
                Score(job.request.policy.name, job.row, name, float(verdict["score"]))
                for job, verdict in verdicts
                if verdict["valid"]
            ]
            _say_done(f"judged by {name}:", len(completions), before, time.perf_counter() - started)
    return scores, invalid


def _is_completion(record: Record) -> bool:
    return isinstance(record.get("text"), str) and record.get("finish_reason") in ("stop", "length")


def _is_verdict(record: Record) -> bool:
    score, valid = record.get("score"), record.get("valid")
    if valid is False:
        return score is None
    return valid is True and isinstance(score, float | int) and abs(score) < 1e30


def _same_text(completions: Sequence[tuple[Job, Record]]) -> list[list[tuple[Job, Record]]]:
    """Completions grouped by prompt and text, shortest text first: equal answers are judged once."""

    def place(item: tuple[Job, Record]) -> tuple[int, str, str]:
        return len(item[1]["text"]), item[0].row.id, item[1]["text"]

    return [list(group) for _, group in groupby(sorted(completions, key=place), key=place)]


def _head(config: FrontierConfig, plan: _Plan) -> dict[str, Any]:
    """What the numbers of frontier.json mean."""
    metrics = {
        name: metric.model_dump() | {"better": better(config, metric)} for name, metric in config.all_metrics().items()
    }
    judges = {}
    for name, settings in config.judges.items():
        shown = settings.model_dump(exclude_none=True)
        if "model" in shown and Path(shown["model"]).is_dir():
            shown["model"] = Path(shown["model"]).name
        judges[name] = shown | {"digest": plan.judges[name].digest}
    return {
        "axes": config.axes.model_dump(),
        "audit": config.audit.model_dump() if config.audit else None,
        "metrics": metrics,
        "judges": judges,
    }


def _tail(
    config: FrontierConfig, plan: _Plan, completions: Sequence[tuple[Job, Record]], invalid: dict[str, int]
) -> dict[str, Any]:
    """Counts, warnings and how to make it again."""
    records = [record for _, record in completions]
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
            "prompts": len(plan.prompts),
            "clusters": len({row.cluster for row in plan.prompts}),
            "generated": len(records),
            "truncated": truncated,
            "empty": empty,
            "invalid": sum(invalid.values()),
        },
        "warnings": warnings,
        "seed": config.seed,
        "command": config.command,
    }


def _refuse_invalid(config: FrontierConfig, plan: _Plan, invalid: dict[str, int], answers: int) -> None:
    for name, count in invalid.items():
        if count > config.max_invalid * answers:
            records = read_records(config.out / VERDICTS)
            mine = (r for r in records if r["judge_digest"] == plan.judges[name].digest and not r["valid"])
            why = next((record["raw"] for record in mine), None)
            raise InputError(
                f"judge '{name}' gave {count} invalid verdicts on {answers} answers (the first: {why}); "
                f"all is kept in {config.out}",
                allowed=f"at most max_invalid {config.max_invalid:.0%}",
            )


def _say_done(what: str, total: int, before: int, seconds: float) -> None:
    found = f" ({before} of them found in this run's records)" if before else ""
    say(f"{what} {total} answers in {seconds:.1f} s{found}")


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
