"""Directories whole or not at all, digests, and the errors of a full or forbidden disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from psacpo import files
from psacpo.errors import InputError, unknown_name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with files.atomic_directory(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert names(out) == ["a"]
    assert names(tmp_path / "deep") == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~files._umask()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.atomic_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_is_there_is_kept_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(InputError, match="in use"), files.atomic_directory(out):
        pass
    files.write_manifest(out, kind="k", config={}, inputs={}, seeds={})
    with pytest.raises(ZeroDivisionError), files.atomic_directory(out, overwrite=True):
        _ = 1 / 0
    (out / files.MANIFEST).unlink()
    assert names(out) == ["old"]
    with pytest.raises(InputError, match="not by psacpo"), files.atomic_directory(out, overwrite=True):
        pass
    files.write_manifest(out, kind="k", config={}, inputs={}, seeds={})
    with files.atomic_directory(out, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no space left"), files.atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
    with pytest.raises(InputError, match="no space"):
        files.require_free_space(tmp_path / "not" / "yet" / "there", 10**18)
    files.require_free_space(tmp_path, 1)


def test_a_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    files.write_atomically(path, "one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*f: no space left"):
        files.write_atomically(path, "two")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["f"]


def test_outputs_and_inputs_lie_apart(tmp_path: Path) -> None:
    model = tmp_path / "project" / "model"
    model.mkdir(parents=True)
    for out in (model, model / "reward", tmp_path / "project" / "x" / ".." / "model"):
        with pytest.raises(InputError, match="lies in the input"):
            files.require_apart(out, [model])
    files.require_apart(tmp_path / "project", [model])
    with pytest.raises(InputError, match="holds the input"):
        files.require_apart(model.parent, [model], replaced=True)


def test_digests_follow_content_and_names_only(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"weights")
        (directory / "config.json").write_text("{}")
    (two / "README.md").write_text("no part of a model's output")
    (two / files.MANIFEST).write_text("{}")
    assert files.digest_model(one) == files.digest_model(two)
    assert files.digest_directory(one) != files.digest_directory(two)
    (two / "model.safetensors").write_bytes(b"weightz")
    assert files.digest_model(one) != files.digest_model(two)
    assert files.digest({"b": 1, "a": [1.5, None]}) == files.digest({"a": [1.5, None], "b": 1})
    assert files.digest([1]) != files.digest(["1"])


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    assert files.read_manifest(tmp_path) is None
    files.write_manifest(tmp_path, kind="k", config={"a": Path("x")}, inputs={"base": "d"}, seeds={"seed": 1}, extra=2)
    found = files.read_manifest(tmp_path)
    assert found is not None
    assert (found["kind"], found["config"], found["extra"]) == ("k", {"a": "x"}, 2)
    (tmp_path / files.MANIFEST).write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        files.read_manifest(tmp_path)
    (tmp_path / files.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        files.read_manifest(tmp_path)


def test_errors_are_one_line() -> None:
    error = InputError("a\n b", given="c\nd", allowed="e")
    assert str(error) == "a b; given: c d; allowed: e"
    assert "did you mean 'ratios'?" in str(unknown_name("key", "ratio", ["ratios", "base"]))
    assert json.dumps(str(unknown_name("key", "zzz", ["b", "a"]))) == "\"unknown key 'zzz'; allowed: a, b\""
