"""What `frontier` and `judge` share: every judge scores every answer, each answer's verdict is one stored record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psacpo.console import progress, say
from psacpo.errors import InputError
from psacpo.evalharness.judges.base import Item, Judge, Verdict
from psacpo.evalharness.judging.cache import Cache, read_verdict
from psacpo.evalharness.records import Record, Store
from psacpo.files import digest

_MOST = 1e30


@dataclass(frozen=True)
class Answer:
    """An item to judge, the key of its completion record, what its file calls it, and its prompt's cluster."""

    key: str
    item: Item
    id: str = ""
    cluster: str = ""

    @property
    def drawn_with(self) -> str:
        """What a bootstrap draws as one: the prompt's cluster, else the prompt."""
        return self.cluster or str(self.item.fields.get("cluster") or self.item.prompt_id)


def is_verdict(record: Record) -> bool:
    """Whether a record is a judge's verdict on an answer: valid with a finite score, or invalid with none."""
    if not all(isinstance(record.get(name), str) for name in ("key", "completion", "judge", "judge_digest")):
        return False
    if not isinstance(record.get("content", ""), str) or not isinstance(record.get("usage", {}), dict):
        return False
    score, valid = record.get("score"), record.get("valid")
    if valid is False:
        return score is None
    return valid is True and isinstance(score, float | int) and abs(score) < _MOST


def _storable(verdict: Verdict) -> Verdict:
    """A verdict whose numbers are such that `is_verdict` takes its record: any other score is an invalid verdict."""
    score, probability = verdict.score, verdict.probability
    if probability is not None and not abs(probability) < _MOST:
        verdict = replace(verdict, probability=None)
    if score is None or abs(score) < _MOST:
        return verdict
    return replace(verdict, score=None, label=None, raw=f"score {score:g} is no finite number below {_MOST:g}")


def judge_all(
    judges: Mapping[str, Judge],
    directions: Mapping[str, str],
    answers: Sequence[Answer],
    store: Store,
    cache: Cache | None = None,
    *,
    quiet: bool = False,
) -> dict[str, list[Record]]:
    """The verdict record of each answer by each judge, in the order of `answers`, made now or found.

    A verdict is found in `store` by its answer, or there and in `cache` by its content, whatever the answer was called
    that it was given on. A judge that could not be asked (`failed`) is asked again.

    Args:
        directions: Judge -> "higher" or "lower", whichever is better.
        quiet: Say nothing of judges that take no time.

    Raises:
        InputError: Judges that are made of one another, or of one that is not there.
    """
    found: dict[str, list[Record]] = {}
    for name in in_order(judges):
        judge = judges[name]
        items = _with_members(answers, judge, found)
        if judge.anchor is not None:
            items = _with_anchor(items, judge.anchor, name)
        found[name] = _judge_one(name, judge, directions[name], items, store, cache, quiet=quiet)
    return {name: found[name] for name in judges}


def unanswered(judge: Judge, answers: Sequence[Answer], cache: Cache) -> list[Item]:
    """What a judge would be asked: one item of those that read the same to it, without those whose verdict is known.

    Not for a judge that is made of others, whose verdicts are not there yet.
    """
    if judge.anchor is not None:
        answers = _with_anchor(answers, judge.anchor, "")
    known = cache.verdicts(judge.digest)
    content = {digest([judge.digest, judge.reads(answer.item)]): answer.item for answer in answers}
    return [item for key, item in content.items() if key not in known]


def in_order(judges: Mapping[str, Judge]) -> list[str]:
    """The judges' names, those that others are made of first."""
    done: list[str] = []
    while len(done) < len(judges):
        ready = [name for name in judges if name not in done and all(member in done for member in judges[name].members)]
        if not ready:
            name = next(name for name in judges if name not in done)
            unknown = [member for member in judges[name].members if member not in judges]
            why = f"'{unknown[0]}', which is no judge" if unknown else "itself, by way of others"
            raise InputError(f"judge '{name}' is made of {why}", allowed=f"other judges: {', '.join(judges)}")
        done += ready
    return done


def _with_members(answers: Sequence[Answer], judge: Judge, found: Mapping[str, Sequence[Record]]) -> list[Answer]:
    if not judge.members:
        return list(answers)
    rows = zip(*(found[member] for member in judge.members), strict=True)
    return [
        replace(
            answer, item=replace(answer.item, verdicts=dict(zip(judge.members, map(read_verdict, row), strict=True)))
        )
        for answer, row in zip(answers, rows, strict=True)
    ]


def _with_anchor(answers: Sequence[Answer], anchor: str, name: str) -> list[Answer]:
    own = {(a.item.prompt_id, a.item.sample): a.item.completion for a in answers if a.item.policy == anchor}
    if not own:
        policies = sorted({answer.item.policy for answer in answers})
        raise InputError(
            f"judge '{name}' compares with policy '{anchor}', of which there is no answer",
            allowed=f"one of {', '.join(policies)}",
        )
    return [replace(a, item=replace(a.item, anchor=own.get((a.item.prompt_id, a.item.sample)))) for a in answers]


def _judge_one(
    name: str,
    judge: Judge,
    direction: str,
    answers: Sequence[Answer],
    store: Store,
    cache: Cache | None,
    *,
    quiet: bool,
) -> list[Record]:
    started = time.perf_counter()
    content = [digest([judge.digest, judge.reads(answer.item)]) for answer in answers]
    keys = [digest([judge.digest, answer.key, read]) for answer, read in zip(answers, content, strict=True)]

    def record(place: int, verdict: Verdict) -> Record:
        return _record(keys[place], answers[place], name, judge, direction, content[place], verdict)

    done = {key for key in keys if key in store.records and not store.records[key].get("failed")}
    known = cache.verdicts(judge.digest) if cache else {}
    known |= {
        found["content"]: read_verdict(found)
        for found in store.records.values()
        # Records of before there was `content` are of nothing that could be found again.
        if found["judge_digest"] == judge.digest and "content" in found and not found.get("failed")
    }
    missing = [place for place, key in enumerate(keys) if key not in done]
    found = [place for place in missing if content[place] in known]
    store.rewrite([record(place, replace(known[content[place]], usage={})) for place in found])
    groups = _same_content(answers, content, [place for place in missing if content[place] not in known])
    asked = 0
    with contextlib.nullcontext(_unseen) if quiet else progress(f"judge {name}", len(answers)) as advance:
        advance(len(answers) - sum(map(len, groups)))
        for chunk in _chunks(groups, judge.batch_size):
            verdicts = judge.judge([answers[group[0]].item for group in chunk])
            pairs = list(zip(chunk, map(_storable, verdicts), strict=True))
            # What asking took is told once, by the first of the answers that read the same.
            said = [(group[0], verdict) for group, verdict in pairs]
            said += [(place, replace(verdict, usage={})) for group, verdict in pairs for place in group[1:]]
            store.rewrite([record(place, verdict) for place, verdict in said])
            if cache:
                cache.add(judge.digest, {content[group[0]]: verdict for group, verdict in pairs})
            asked += len(chunk)
            advance(sum(map(len, chunk)))
    _make_last(keys, judge.digest, store)
    if not quiet:
        todo = sum(map(len, groups))
        texts = f" ({asked} different texts)" if asked < todo else ""
        before = f", {len(answers) - todo} of {len(answers)} found" if todo < len(answers) else ""
        say(f"judged by {name}: {todo} answers{texts} in {time.perf_counter() - started:.1f} s{before}")
    return [store.records[key] for key in keys]


def _unseen(step: float = 1, *, note: str = "") -> None:
    """Progress that nobody sees."""


def _make_last(keys: Sequence[str], judge_digest: str, store: Store) -> None:
    """Write again what is not the last verdict of this judge on its answer: readers take the last.

    A judge reads more than the answer where it compares with an anchor or asks its members, so it can have said
    several things of one answer; what holds now is said last.
    """
    last = {r["completion"]: key for key, r in store.records.items() if r["judge_digest"] == judge_digest}
    store.rewrite([store.records[key] for key in keys if last[store.records[key]["completion"]] != key])


def _record(
    key: str, answer: Answer, name: str, judge: Judge, direction: str, content: str, verdict: Verdict
) -> Record:
    record: Record = {
        "key": key,
        "completion": answer.key,
        "judge": name,
        "judge_digest": judge.digest,
        "content": content,
        "score": verdict.score,
        "label": verdict.label,
        "probability": verdict.probability,
        "raw": verdict.raw,
        "valid": verdict.valid,
        "direction": direction,
    }
    if verdict.failed:
        record["failed"] = True
    return record | {"usage": dict(verdict.usage)} if verdict.usage else record


def _same_content(answers: Sequence[Answer], content: Sequence[str], places: Sequence[int]) -> list[list[int]]:
    """`places` of answers that read the same to a judge, shortest text first: equal answers are judged once."""

    def order(place: int) -> tuple[int, str, str]:
        return len(answers[place].item.completion), answers[place].item.prompt_id, content[place]

    together: dict[str, list[int]] = {}
    for place in sorted(places, key=order):
        together.setdefault(content[place], []).append(place)
    return list(together.values())


def _chunks(items: Sequence[list[int]], size: int) -> list[Sequence[list[int]]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
