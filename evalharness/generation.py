"""The answers of a sweep: made by the engine, stored as they come, never made twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psacpo.console import Advance, progress, say
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines import Completion, Engine, Failure, Policy, make_engine
from psacpo.evalharness.engines.plan import EnginePlan, engine_identity
from psacpo.evalharness.judges import Judge
from psacpo.evalharness.kl import BaseLogProbs
from psacpo.evalharness.prompts import Job, PromptRow
from psacpo.evalharness.records import Record, Store
from psacpo.evalharness.run_files import COMPLETIONS, FAILURES, is_completion, is_log_prob
from psacpo.files import write_atomically
from psacpo.merge.adapters import Adapter

# Seconds of answers that a kill may cost.
FLUSH = 1.0


@dataclass
class Plan:
    """Everything of a sweep that is known before its expensive part starts.

    Attributes:
        policies: Those that are mixtures of the adapters; so of `jobs`.
        others: The baselines that are models of their own, each with its own settings and as a sweep of one policy.
        jobs_of: The jobs of other mixtures of the adapters on the same prompts.
    """

    base: Path
    base_digest: str
    adapters: dict[str, Adapter]
    judges: dict[str, Judge]
    prompts: list[PromptRow]
    policies: list[Policy]
    jobs: list[Job]
    engine: EnginePlan
    others: list[tuple[FrontierConfig, Plan]] = field(default_factory=list)
    jobs_of: Callable[[Sequence[Policy]], list[Job]] | None = None

    def all_jobs(self) -> list[Job]:
        """Of the sweep and of the others."""
        return [*self.jobs, *(job for _, part in self.others for job in part.jobs)]


def generate(config: FrontierConfig, plan: Plan) -> list[tuple[Job, Record]]:
    """Every job's completion record, made now or found.

    Raises:
        InputError: Some requests failed after every retry; they are listed, and the rest is kept.
    """
    started = time.perf_counter()
    with Answering(config, plan) as answering, progress("generate", len(plan.jobs)) as advance:
        before = answering.found(plan.jobs)
        completions = answering.ask(plan.jobs, advance)
    _say_done(len(plan.jobs), before, time.perf_counter() - started)
    return completions


class Answering:
    """A run's stored answers, and the engine that makes those that are missing; use as a context manager.

    The engine starts once, when the first answer is missing. Each policy is held against the dense merge before the
    first answer that it is asked for.

    Args:
        more: Whether policies beyond those of the first jobs are to come, so that what they are held against is kept.
    """

    def __init__(self, config: FrontierConfig, plan: Plan, *, more: bool = False) -> None:
        self.config, self.plan, self.more = config, plan, more
        self._store = Store(config.out / COMPLETIONS, is_completion)
        self._base = BaseLogProbs(config.out, quiet=more, base=plan.base) if config.measures_kl() else None
        self._engine: Engine | None = None
        self._reference: Any = None
        self._probed: set[str] = set()

    def __enter__(self) -> Self:
        self._store.__enter__()
        if self._base is not None:
            self._base.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            if self._base is not None:
                self._base.__exit__(kind, error, trace)
            self._store.__exit__(kind, error, trace)

    def found(self, jobs: Sequence[Job]) -> int:
        """How many of them are answered already."""
        return sum(job.request.key in self._store.records for job in jobs)

    def ask(self, jobs: Sequence[Job], advance: Advance) -> list[tuple[Job, Record]]:
        """Every job's completion record, made now or found.

        Raises:
            InputError: Some requests failed after every retry; they are listed, and the rest is kept.
        """
        failed: dict[str, Record] = {}
        before = self.found(jobs)
        advance(before)
        if before < len(jobs):
            engine = self._started()
            self._probe(engine, jobs)
            todo = _unfinished(jobs, self._store.records, engine.batch_size)
            with Store(self.config.out / FAILURES) as failures:
                for records in _answers(engine, todo):
                    self._store.append([record for record in records if "error" not in record])
                    failures.append([record for record in records if "error" in record])
                    failed |= {record["key"]: record for record in records if "error" in record}
                    advance(len(records))
        _settle_failures(self.config, jobs, failed, self._store.records)
        answers = [(job, self._store.records[job.request.key]) for job in jobs]
        return answers if self._base is None else self._base.of(answers, self._started)

    def _started(self) -> Engine:
        if self._engine is None:
            config, plan = self.config, self.plan
            say(f"engine: {plan.engine.line()}")
            self._engine = make_engine(config, plan.base, plan.adapters, plan.policies, plan.engine)
            if config.probe and not _provable(config, plan):
                say("not proven that the policies act: this endpoint does not tell the ids of tokens")
            elif config.probe:
                self._reference = _reference(config, plan, self._engine)
        return self._engine

    def _probe(self, engine: Engine, jobs: Sequence[Job]) -> None:
        """Stop before its first answer if a policy does not act, or is not the merged model."""
        from psacpo.evalharness.engines.probe import probe

        policies = {job.request.policy.name: job.request.policy for job in jobs}
        new = [policy for name, policy in policies.items() if name not in self._probed]
        self._probed |= set(policies)
        if not new or not self.config.probe or not _provable(self.config, self.plan):
            return
        for line in probe(
            engine,
            new,
            [job.request.prompt_ids for job in self.plan.jobs],
            reference=self._reference,
            dtype=engine_identity(self.config)["dtype"],
            has_base=self.plan.engine.name != "openai" or any(not policy.adapted for policy in self.plan.policies),
        ):
            say(line)
        if not self.more:
            self._reference = None


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
        if time.monotonic() - last >= FLUSH:
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
    if is_log_prob(answer.log_prob):
        record |= {"log_prob": answer.log_prob, "end_id": answer.end_id}
    return record if answer.logprobs is None else record | {"logprobs": answer.logprobs}


def _provable(config: FrontierConfig, plan: Plan) -> bool:
    """Whether the engine tells what a policy would say next."""
    return plan.engine.name != "openai" or config.openai.dialect == "vllm"


def _reference(config: FrontierConfig, plan: Plan, engine: Engine) -> Any:
    """What policies are held against besides the base; None where it cannot be made, which is said."""
    from psacpo.evalharness.engines.probe import dense_reference

    quantised = plan.engine.name == "vllm" and config.vllm.quantization
    reference = None if quantised else dense_reference(engine, plan.base, plan.adapters)
    if reference is None:
        say(
            "policies are held against the base only: their merged weights do not fit in memory, or cannot be made here"
        )
    return reference


def _settle_failures(
    config: FrontierConfig, jobs: Sequence[Job], failed: Mapping[str, Record], records: Mapping[str, Record]
) -> None:
    """Leave in failures.jsonl what has no answer now, and stop if that is anything."""
    path = config.out / FAILURES
    left = [record for key, record in failed.items() if key not in records]
    if not left:
        return path.unlink(missing_ok=True)
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in left))
    first = left[0]
    raise InputError(
        f"{len(left)} of {len(jobs)} answers failed, the first of {first['policy']} to prompt "
        f"'{first['prompt_id']}': {first['error']}; all are in {path}",
        allowed="the same command again: it tries these once more and keeps the rest",
    )


def _say_done(total: int, before: int, seconds: float) -> None:
    if before == total:
        return say(f"answers: all {total} found in this run's records")
    found = f"; the other {before} were found in this run's records" if before else ""
    say(f"generated {total - before} answers in {seconds:.1f} s{found}")


def _chunks(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]
