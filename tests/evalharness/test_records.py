"""The record store: nothing finished is done again, nothing torn is believed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.evalharness.generation import _say_done
from psacpo.evalharness.records import Store, latest, locked, read_records


def put(path: Path, *groups: str, batches: bool = False) -> None:
    """Append batches, each a string of one-letter keys."""
    with Store(path, batches=batches) as store:
        for batch in groups:
            store.append([{"key": key, "value": key.upper()} for key in batch])


def keys(path: Path) -> str:
    return "".join(record["key"] for record in read_records(path))


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    put(path, "ab", "cd")
    put(path, "abc", "cde")
    assert keys(path) == "abcde"


def test_of_two_records_with_one_key_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    put(path, "ab")
    with Store(path) as store:
        store.rewrite([{"key": "a", "value": "new"}])
        assert list(store.records) == ["b", "a"]
    with Store(path) as store:
        assert store.records["a"]["value"] == "new"
    assert [record["value"] for record in latest(read_records(path))] == ["B", "new"]


@pytest.mark.parametrize("cut", [1, 20, 26, 40, 60, 80])
def test_a_torn_batch_is_cut_off_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    put(path, "ab", "cde", batches=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Store(path, batches=True) as store:
        assert list(store.records) == ["a", "b"]
    put(path, "cde", batches=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    put(path, "a", "b")
    whole = path.read_bytes()
    line = len(whole) // 2
    path.write_bytes(whole[: line + min(cut, line - 1)])
    assert [record["key"] for record in read_records(path)] == ["a"]
    put(path, "a", "b")
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


def test_what_was_found_is_not_called_generated(capsys: pytest.CaptureFixture[str]) -> None:
    for total, before in ((4400, 0), (4400, 4000), (4400, 4400)):
        _say_done(total, before, 2.5)
    assert capsys.readouterr().err.splitlines() == [
        "generated 4400 answers in 2.5 s",
        "generated 400 answers in 2.5 s; the other 4000 were found in this run's records",
        "answers: all 4400 found in this run's records",
    ]
