"""Directories whose work is taken up again after an interruption, and the memory of large files' digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psacpo import files
from psacpo.errors import InputError
from psacpo.files import (
    MANIFEST,
    PROGRESS,
    atomic_directory,
    digest_file,
    finished,
    mark_finished,
    resumable_directory,
)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def interrupt(out: Path, key: str, error: BaseException) -> Path:
    """Write one finished and one unfinished file, then stop by `error`; the directory they are in."""
    with pytest.raises(type(error)), resumable_directory(out, key=key) as partial:
        (partial / "whole").write_text("whole")
        mark_finished(partial, "whole", {"digest": "d"})
        (partial / "half").write_text("ha")
        (partial / "below").mkdir()
        (partial / "below" / "x").write_text("x")
        (partial / PROGRESS / "next.part").write_text("n")
        raise error
    return partial


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_finished_files_are_there_again_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    partial = interrupt(out, "k", error)
    assert not out.exists()
    assert partial.parent == tmp_path
    with resumable_directory(out, key="k") as again:
        assert again == partial
        assert names(again) == [PROGRESS, "whole"]
        assert names(again / PROGRESS) == ["whole.json"]
        assert finished(again, "whole") == {"digest": "d"}
        assert finished(again, "half") is None
        (again / "half").write_text("half")
    assert names(tmp_path) == ["out"]
    assert {name: (out / name).read_text() for name in names(out)} == {"whole": "whole", "half": "half"}


def test_a_marked_file_of_another_size_is_not_finished(tmp_path: Path) -> None:
    partial = interrupt(tmp_path / "out", "k", KeyboardInterrupt())
    (partial / "whole").write_text("whol")
    with resumable_directory(tmp_path / "out", key="k") as again:
        assert names(again) == [PROGRESS]
        assert names(again / PROGRESS) == []


def test_errors_and_other_keys_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, "k", KeyboardInterrupt())
    interrupt(tmp_path / "out2", "k", KeyboardInterrupt())
    others = [path for path in tmp_path.iterdir() if path.name.startswith(".out2.")]
    with atomic_directory(out) as unrelated:  # of another writer, who may be at work
        with pytest.raises(InputError, match="^no$"), resumable_directory(out, key="other") as partial:
            assert names(partial) == [PROGRESS]
            assert sorted(tmp_path.iterdir()) == sorted([partial, unrelated, *others])
            raise InputError("no")
        assert sorted(tmp_path.iterdir()) == sorted([unrelated, *others])
    assert sorted(tmp_path.iterdir()) == sorted([out, *others])


def test_marks_are_of_resumable_directories_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    mark_finished(tmp_path, "file", {})
    assert names(tmp_path) == ["file"]
    assert finished(tmp_path, "file") is None


def test_overwriting_and_names_with_wildcards(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t*"
    with resumable_directory(out, key="a") as partial:
        (partial / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="in use"), resumable_directory(out, key="b"):
        pytest.fail("it is not given")
    with resumable_directory(out, key="b", overwrite=True) as partial:
        assert names(out) == [MANIFEST]
        (partial / "new").write_text("")
    assert names(tmp_path) == ["o[u]t*"]
    assert names(out) == ["new"]


def test_what_died_between_two_renames_is_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resumable_directory(out, key="a") as partial:
        (partial / MANIFEST).write_text("{}")
    (tmp_path / ".out.old-abcd_123").mkdir()
    out.rename(tmp_path / ".out.old-abcd_123" / "out")
    with pytest.raises(InputError, match="in use"), resumable_directory(out, key="b"):
        pytest.fail("the old output is back, and in use")
    assert names(out) == [MANIFEST]
    (tmp_path / ".out.old-abcd_124").mkdir()
    with resumable_directory(out, key="b", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


@contextlib.contextmanager
def writer(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has one file whole in the directory of key "k", and does not end."""
    code = (
        "import sys, time, pathlib\n"
        "from psacpo.files import resumable_directory, mark_finished\n"
        "with resumable_directory(pathlib.Path(sys.argv[1]), key='k') as partial:\n"
        "    (partial / 'whole').write_text('whole')\n"
        "    mark_finished(partial, 'whole', {})\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("key", ["k", "other"])
def test_two_processes_do_not_write_one_output(tmp_path: Path, key: str) -> None:
    out = tmp_path / "out"
    with writer(out):
        before = names(tmp_path)
        with (
            pytest.raises(InputError, match="^output .* is being written by another process$"),
            resumable_directory(out, key=key),
        ):
            pytest.fail("it is not given")
        assert names(tmp_path) == before
    with resumable_directory(out, key="k") as partial:
        assert finished(partial, "whole") == {}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_its_work(tmp_path: Path, number: signal.Signals) -> None:
    with writer(tmp_path / "out") as process:
        process.send_signal(number)
        process.wait()
    with resumable_directory(tmp_path / "out", key="k") as partial:
        assert finished(partial, "whole") == {}
    assert names(tmp_path) == ["out"]


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A cache directory of the test's own, in which files of any size are worth remembering; how many were hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_WORTH_REMEMBERING", 1)
    hashed: list[Path] = []
    real = files._hash_file
    monkeypatch.setattr(files, "_hash_file", lambda path: (hashed.append(path), real(path))[1])
    return lambda: len(hashed)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_digests_are_remembered_by_what_a_file_is(
    tmp_path: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    path = write(tmp_path / "weights", "one")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert [digest_file(path), digest_file(path), digest_file(link)] == [sha256("one")] * 3
    assert remembering() == 1
    kept = path.stat()
    path.write_text("two")  # the same size, and the time of change put back: the inode's own time tells
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert digest_file(path) == sha256("two")
    other = write(tmp_path / "other", "six")
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert digest_file(other) == sha256("six")
    assert remembering() == 3
    cache = tmp_path / "cache" / "psacpo" / "digests.json"
    assert names(cache.parent) == ["digests.json"]
    assert sorted(json.loads(cache.read_text())) == sorted([str(path), str(other)])


def test_fresh_files_and_files_that_change_meanwhile_are_not_remembered(
    tmp_path: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "weights", "one")
    assert digest_file(path) == digest_file(path)
    os.utime(path, (1, 1))  # that the times say so does not make it old
    assert digest_file(path) == digest_file(path)
    assert remembering() == 4
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    real = files._hash_file

    def changes(read: Path) -> str:
        value = real(read)
        read.write_text("three")
        return value

    monkeypatch.setattr(files, "_hash_file", changes)
    digest_file(path)
    monkeypatch.setattr(files, "_hash_file", real)
    assert digest_file(path) == sha256("three")


@pytest.mark.parametrize("damage", ["{", "[]", '{"PATH": 3}', '{"PATH": [1, 2, 3, 4, "x"]}', "\x00"])
def test_a_damaged_memory_is_no_memory(
    tmp_path: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    path = write(tmp_path / "weights", "one")
    cache = tmp_path / "cache" / "psacpo" / "digests.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(damage.replace("PATH", str(path)))
    assert [digest_file(path), digest_file(path)] == [sha256("one")] * 2
    assert remembering() == 1


def test_no_cache_directory_and_small_files(
    tmp_path: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    path = write(tmp_path / "weights", "one")
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert [digest_file(path), digest_file(path)] == [sha256("one")] * 2
    assert remembering() == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    digest_file(path)
    assert names(tmp_path / "home" / ".cache" / "psacpo") == ["digests.json"]
    monkeypatch.setattr(files, "_WORTH_REMEMBERING", 64 << 20)
    before = remembering()
    assert [digest_file(path), digest_file(path)] == [sha256("one")] * 2
    assert remembering() == before + 2


def test_the_memory_does_not_grow_without_end(
    tmp_path: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    monkeypatch.setattr(files, "_MOST_REMEMBERED", 2)
    for name in "abc":
        digest_file(write(tmp_path / name, name))
    found = json.loads((tmp_path / "cache" / "psacpo" / "digests.json").read_text())
    assert [Path(path).name for path in found] == ["b", "c"]
