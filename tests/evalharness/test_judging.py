"""What is shared by `frontier` and `judge`: order of judges, verdicts found by content, failures asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.judges.base import Item, TextJudge, Verdict
from psacpo.evalharness.judges.scalar import Scalar
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.judging.verdicts import Answer, is_verdict, judge_all, unanswered
from psacpo.evalharness.records import Store, latest, read_records


class Length(TextJudge):
    """Scores the completion's length, notes what it was asked, and fails on what it is told to."""

    batch_size = 3

    def __init__(self, digest: str = "length-1", fails: Sequence[str] = ()) -> None:
        self.digest, self.fails = digest, list(fails)
        self.asked: list[str] = []

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        self.asked += [item.completion for item in items]
        return [
            Verdict(None, raw="503", failed=True)
            if item.completion in self.fails
            else Verdict(float(len(item.completion)), usage={"tokens": 7})
            for item in items
        ]


class Sum(TextJudge):
    """The sum of what its members said."""

    batch_size, digest = 10, "sum"

    def __init__(self, *members: str) -> None:
        self.members = members

    def reads(self, item: Item) -> Any:
        return {name: item.verdicts[name].score for name in self.members}

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        return [Verdict(sum(said.score or 0 for said in item.verdicts.values())) for item in items]


class Longer(TextJudge):
    """1 where the answer is longer than the anchor's."""

    batch_size, digest, anchor = 10, "longer", "base"

    def reads(self, item: Item) -> Any:
        return [item.completion, item.anchor]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        return [Verdict(float(len(item.completion) > len(item.anchor or ""))) for item in items]


def answers(*texts: str, policy: str = "p") -> list[Answer]:
    return [Answer(f"{policy}-{n}", Item("q", text, prompt_id=str(n), policy=policy)) for n, text in enumerate(texts)]


def scores(path: Path, judges: dict[str, Any], rows: list[Answer], cache: Cache | None = None) -> dict[str, Any]:
    with Store(path, is_verdict, batches=True) as store:
        found = judge_all(judges, dict.fromkeys(judges, "higher"), rows, store, cache)
    return {name: [record["score"] for record in records] for name, records in found.items()}


def test_equal_texts_are_judged_once_and_told_once_what_it_took(tmp_path: Path) -> None:
    judge = Length()
    rows = answers("bb", "a", "bb", "cccc", "bb")
    assert scores(tmp_path / "v.jsonl", {"j": judge}, rows) == {"j": [2, 1, 2, 4, 2]}
    assert judge.asked == ["a", "bb", "cccc"], "shortest first, each once"
    records = read_records(tmp_path / "v.jsonl")
    assert len(records) == 5
    assert sum(record.get("usage", {}).get("tokens", 0) for record in records) == 3 * 7


def test_what_is_known_is_not_asked_whatever_it_was_called(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    scores(path, {"j": Length()}, answers("a", "bb"))
    again = Length()
    found = scores(path, {"j": again}, answers("bb", "ccc", policy="other"))
    assert (found["j"], again.asked) == ([2, 3], ["ccc"])
    changed = Length(digest="length-2")
    scores(path, {"j": changed}, answers("a", "bb"))
    assert changed.asked == ["a", "bb"], "a changed judge never meets an old verdict"


def test_failed_verdicts_are_asked_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    rows = answers("a", "bb", "ccc", "dddd")
    assert scores(path, {"j": Length(fails=["bb"])}, rows)["j"] == [1, None, 3, 4]
    assert [r["failed"] for r in read_records(path) if "failed" in r] == [True]
    judge = Length()
    assert scores(path, {"j": judge}, rows)["j"] == [1, 2, 3, 4]
    assert judge.asked == ["bb"]
    last = latest(read_records(path))
    assert len(last) == 4
    assert not any(record.get("failed") for record in last)


def test_a_cache_is_shared_and_keeps_no_failures(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    scores(tmp_path / "one.jsonl", {"j": Length(fails=["bb"])}, answers("a", "bb"), Cache(cache))
    judge = Length()
    assert scores(tmp_path / "two.jsonl", {"j": judge}, answers("a", "bb"), Cache(cache))["j"] == [1, 2]
    assert judge.asked == ["bb"]
    # What a killed process left of a line is passed over, and overwritten by the next.
    with (cache / "verdicts.jsonl").open("ab") as file:
        file.write(b'{"content": "torn')
    assert unanswered(Length(), answers("a", "bb", "c"), Cache(cache))[0].completion == "c"
    scores(tmp_path / "three.jsonl", {"j": Length()}, answers("c"), Cache(cache))
    assert len((cache / "verdicts.jsonl").read_bytes().splitlines()) == 3
    (cache / "verdicts.jsonl").write_text('{"content": 1}\n')
    with pytest.raises(InputError, match="line 1 is damaged"):
        Cache(cache)


def test_members_judge_first_and_what_holds_now_is_said_last(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    rows = answers("a", "bb")
    judges = {"sum": Sum("x", "y"), "x": Length(), "y": Length("other")}
    assert scores(path, judges, rows)["sum"] == [2, 4]
    changed = judges | {"y": Length("third", fails=["bb"])}
    assert scores(path, changed, rows)["sum"] == [2, 2]
    # Back to the first members: their sum was said before, and is said again so that readers take it.
    assert scores(path, judges, rows)["sum"] == [2, 4]
    said = [record["score"] for record in read_records(path) if record["judge"] == "sum"]
    assert said == [2, 4, 2, 4]
    with pytest.raises(InputError, match="made of 'nobody', which is no judge"):
        scores(path, {"sum": Sum("nobody")}, rows)
    with pytest.raises(InputError, match="made of itself"):
        scores(path, {"one": Sum("two"), "two": Sum("one")}, rows)


def test_an_anchor_is_that_of_the_same_prompt(tmp_path: Path) -> None:
    rows = answers("a", "bbb", policy="base") + answers("aa", "bb", policy="p")
    assert scores(tmp_path / "v.jsonl", {"j": Longer()}, rows)["j"] == [0, 0, 1, 0]
    with pytest.raises(InputError, match="compares with policy 'base', of which there is no answer"):
        scores(tmp_path / "w.jsonl", {"j": Longer()}, answers("a"))


def test_runs_share_the_verdicts_of_a_cache(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep's answers that another run has, its judges are asked nothing."""
    cache = tmp_path / "cache"
    one = frontier(make_config(out=tmp_path / "one", cache=cache))
    calls: list[int] = []
    asked = Scalar.judge

    def counted(self: Scalar, items: Sequence[Item]) -> list[Verdict]:
        calls.append(len(items))
        return asked(self, items)

    monkeypatch.setattr(Scalar, "judge", counted)
    two = frontier(make_config(out=tmp_path / "two", cache=cache))
    assert calls == []
    assert (one / "frontier.json").read_bytes() == (two / "frontier.json").read_bytes()
