"""The record store: nothing finished is done again, nothing torn is believed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.evalharness.records import Record, Store, locked, read_records


def fill(path: Path, batches: list[list[str]], fail_at: str = "") -> list[str]:
    """Fill a store with one record an item and give what was worked on."""
    worked: list[str] = []

    def work(batch: Sequence[str]) -> Iterable[Record]:
        worked.extend(batch)
        for item in batch:
            if item == fail_at:
                raise KeyboardInterrupt
            yield {"key": item, "value": item.upper()}

    with Store(path) as store:
        for _ in store.fill(batches, lambda item: item, work):
            pass
    return worked


def test_finished_batches_are_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill(path, [["a", "b"], ["c", "d"], ["e"]], fail_at="d")
    assert [record["key"] for record in read_records(path)] == ["a", "b"]
    assert fill(path, [["a", "b"], ["c", "d"], ["e"]]) == ["c", "d", "e"]
    assert [record["key"] for record in read_records(path)] == ["a", "b", "c", "d", "e"]
    assert fill(path, [["a", "b"], ["c", "d"], ["e"]]) == []


def test_a_batch_with_a_missing_record_is_done_whole_but_adds_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    fill(path, [["a"]])
    assert fill(path, [["a", "b"]]) == ["a", "b"]
    assert [record["key"] for record in read_records(path)] == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    fill(path, [["a"], ["b"]])
    whole = path.read_bytes()
    line = len(whole) // 2
    path.write_bytes(whole[: line + min(cut, line - 1)])
    assert [record["key"] for record in read_records(path)] == ["a"]
    assert fill(path, [["a"], ["b"]]) == ["b"]
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "a"}\nnot json\n{"key": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2 is damaged"), Store(path):
        pass


def test_odd_text_survives(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    odd = "line\u2028sep \ud83d\ude00 \x00 \x1b[31m \u202e end"
    with Store(path) as store:
        store.append([{"key": "x", "text": odd}])
    with Store(path) as store:
        assert store.records["x"]["text"] == odd
    assert read_records(path)[0]["text"] == odd


def _hold(run: Path, ready: multiprocessing.synchronize.Event, leave: multiprocessing.synchronize.Event) -> None:
    with locked(run):
        ready.set()
        leave.wait(30)


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, leave))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
            pass
    finally:
        leave.set()
        other.join()
    with locked(tmp_path):
        pass
