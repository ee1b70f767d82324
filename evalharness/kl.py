"""KL(pi || base) of each policy, estimated on its own answers: what the base thinks of them, asked once and stored.

The estimate is the mean over a policy's answers of log pi(y|x) - log pi_base(y|x), over all tokens of an answer and the
one that ended it, both at temperature 1 (what TRL calls `objective/kl`). Where answers are drawn at temperature 1 from
all tokens it is unbiased, for the divergence of answers up to the token limit; otherwise it is another number, and is
named as such.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psacpo.console import progress, say
from psacpo.errors import InputError
from psacpo.evalharness.config import Generation
from psacpo.evalharness.engines import Engine, Failure, Passage
from psacpo.evalharness.prompts import Job
from psacpo.evalharness.records import Record, Store, latest, read_records
from psacpo.evalharness.run_files import BASE_LOG_PROBS, COMPLETIONS, is_log_prob
from psacpo.files import digest

Answers = list[tuple[Job, Record]]
_FLUSH = 1.0


def log_ratio(record: Mapping[str, Any]) -> tuple[float, int] | None:
    """log pi(y|x) - log pi_base(y|x) of a completion's record, in nats, and the tokens that it is over; None where
    either is not known."""
    policy, base = record.get("log_prob"), record.get("base_log_prob")
    if not (isinstance(policy, float) and isinstance(base, float)):
        return None
    return policy - base, len(_drawn(record))


def meaning(generation: Generation) -> str:
    """What the mean of `kl_to_base` is, in words."""
    ratio = "mean of log pi(y|x) - log pi_base(y|x) in nats an answer"
    if generation.temperature == 1 and generation.top_p == 1 and generation.top_k == 0:
        return f"KL divergence from the base, estimated on own answers: {ratio}"
    how = f"temperature {generation.temperature:g}, top_p {generation.top_p:g}, top_k {generation.top_k}"
    return f"{ratio}, both at temperature 1, over answers drawn at {how}: no estimate of a KL divergence"


def with_base_log_probs(run: Path, records: Sequence[Record]) -> list[Record]:
    """The completions' records with what a run knows of the base's probabilities."""
    path = run / BASE_LOG_PROBS
    known = {one["key"]: one for one in latest(read_records(path, is_base_log_prob))} if path.is_file() else {}
    return [record | _part(known.get(_key(record))) for record in records]


def is_base_log_prob(record: Record) -> bool:
    """Whether a record is what the base thinks of an answer."""
    return isinstance(record.get("key"), str) and is_log_prob(record.get("base_log_prob"))


class BaseLogProbs:
    """What the base thinks of a run's answers, in base_log_probs.jsonl; use as a context manager.

    A record's key is the digest of the completion's key and tokens: an answer that was made anew is asked about anew.

    Args:
        run: The run's directory.
        quiet: Say nothing of what went well: it comes round after round.
        base: The base's directory, to whose vocabulary all tokens must belong that it is asked about.
    """

    def __init__(self, run: Path, *, quiet: bool = False, base: Path | None = None) -> None:
        self._run, self._vocabulary = run, None if base is None else _vocabulary(base)
        self._store, self._quiet = Store(run / BASE_LOG_PROBS, is_base_log_prob), quiet

    def __enter__(self) -> Self:
        self._store.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    def of(self, answers: Answers, engine: Callable[[], Engine]) -> Answers:
        """The answers' records with `base_log_prob`, found or asked for; without it where nobody can tell.

        Args:
            engine: Starts it, if it has not been: only where something is missing.
        """
        self._copy_of_the_base([(job, record) for job, record in answers if _measurable(record)])
        groups = _same_text([(job, record) for job, record in answers if _measurable(record)])
        if any(self._missing(group) for group in groups):
            running = engine()
            try:
                self._ask(groups, running)
            except InputError:
                say("all answers are kept; with generation: {kl_to_base: false} the base is not asked about them")
                raise
        return [(job, record | _part(self._store.records.get(_key(record)))) for job, record in answers]

    def _copy_of_the_base(self, answers: Answers) -> None:
        """Of its own answers the base's opinion is the policy's: their divergence is 0 to the last bit."""
        own = [
            record for job, record in answers if not job.request.policy.adapted and not job.request.policy.checkpoint
        ]
        self._store.append([_entry(record, record["log_prob"]) for record in own])

    def _missing(self, group: Answers) -> list[Record]:
        return [record for _, record in group if _key(record) not in self._store.records]

    def _ask(self, groups: Sequence[Answers], engine: Engine) -> None:
        started = time.perf_counter()
        # Rows of one forward pass decide each other's last bits: of a batch with a missing one all are asked.
        size = engine.batch_size or 1
        batches = [groups[start : start + size] for start in range(0, len(groups), size)]
        todo = [group for batch in batches if any(map(self._missing, batch)) for group in batch]
        self._require_known_tokens(todo)
        passages = {str(place): group for place, group in enumerate(todo)}
        failed: list[Failure] = []
        gathered: list[Record] = []
        last = time.monotonic()
        with progress("KL to base", len(todo)) as advance:
            asked = [_passage(key, *group[0]) for key, group in passages.items()]
            for found in engine.base_log_probs(asked):
                advance(1)
                if isinstance(found, Failure):
                    failed.append(found)
                    continue
                key, value = found
                if not is_log_prob(value):
                    failed.append(Failure(key, f"the base's log-probability is {value}"))
                    continue
                gathered += [_entry(record, value) for record in self._missing(passages[key])]
                if time.monotonic() - last >= _FLUSH:
                    self._store.append(gathered)
                    gathered, last = [], time.monotonic()
            self._store.append(gathered)
        count = sum(map(len, todo))
        texts = f" ({len(todo)} different texts)" if len(todo) < count else ""
        if not self._quiet:
            say(f"held {count} answers{texts} against the base in {time.perf_counter() - started:.1f} s")
        if failed:
            say(f"KL to base is not known of {len(failed)} texts, the first because: {failed[0].error}")

    def _require_known_tokens(self, groups: Sequence[Answers]) -> None:
        """An id beyond the vocabulary would end in the middle of a forward pass."""
        for record in (record for group in groups for _, record in group[:1]):
            strange = max(_drawn(record))
            if self._vocabulary is not None and strange >= self._vocabulary:
                path = self._run / COMPLETIONS
                raise InputError(
                    f"{path}{_line(path, record['key'])} is damaged: it holds the token {strange}",
                    allowed=f"tokens 0 to {self._vocabulary - 1}; remove the line, its work is done again",
                )


def _vocabulary(base: Path) -> int | None:
    """How many tokens a model has, None where its configuration does not say."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _line(path: Path, key: str) -> str:
    """Where a record was last written, in words."""
    found = [number for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if key.encode() in line]
    return f" line {found[-1]}" if found else ""


def _measurable(record: Record) -> bool:
    """Whether the policy's own probability is there: not of records of before it was kept, nor of every endpoint."""
    return isinstance(record.get("log_prob"), float) and bool(_drawn(record))


def _drawn(record: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of an answer with the one that ended it."""
    end = record.get("end_id")
    return tuple(record.get("token_ids") or ()) + (() if end is None else (end,))


def _key(record: Mapping[str, Any]) -> str:
    return digest([record["key"], list(record.get("token_ids") or []), record.get("end_id")])


def _entry(record: Record, value: float) -> Record:
    return {"key": _key(record), "completion": record["key"], "base_log_prob": value}


def _part(entry: Mapping[str, Any] | None) -> Record:
    return {} if entry is None else {"base_log_prob": entry["base_log_prob"]}


def _passage(key: str, job: Job, record: Record) -> Passage:
    return Passage(key, job.request.prompt_ids, _drawn(record))


def _same_text(answers: Answers) -> list[Answers]:
    """Equal answers to equal prompts together, shortest first: the base is asked about each once.

    The base's own are not among them.
    """
    together: dict[tuple[tuple[int, ...], tuple[int, ...]], Answers] = {}
    for job, record in answers:
        if job.request.policy.adapted or job.request.policy.checkpoint:
            together.setdefault((job.request.prompt_ids, _drawn(record)), []).append((job, record))
    return [together[text] for text in sorted(together, key=lambda text: (len(text[0]) + len(text[1]), text))]
