"""Append-only JSON lines with content-addressed keys: what is finished is never done again, what is torn is ignored."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psacpo.errors import InputError
from psacpo.files import readable_io_errors

Record = dict[str, Any]


class Store:
    """One file of records, each with a `key`; use as a context manager.

    A batch of records is one write and one fsync. A kill in the middle of a write leaves a last line without its line
    feed: it is cut off when the store is opened again, and its work is done again. Of two records with one key the
    later counts.

    Args:
        check: Whether a record that was read is one; a file with any other is refused.
        batches: A torn batch is cut off whole, so that its work is done again in the same company, on which numbers
            depend in their last bits. The last line of each batch then ends in a space before its line feed.

    Attributes:
        records: Key -> record, everything that the file holds, in the order in which it was last written.
    """

    def __init__(
        self, path: Path, check: Callable[[Record], bool] = lambda record: True, *, batches: bool = False
    ) -> None:
        self.path = path
        self.check = check
        self.batches = batches
        self.records: dict[str, Record] = {}

    def __enter__(self) -> Self:
        with readable_io_errors(self.path):
            self._file = self.path.open("a+b")
        self._file.truncate(self._whole())
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            try:
                record = json.loads(line)
                whole_record = isinstance(record["key"], str) and self.check(record)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise self._damaged(number, str(error)) from error
            if not whole_record:
                raise self._damaged(number, "a field is missing or of the wrong kind")
            self._put(record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _whole(self) -> int:
        """How many bytes of the file are whole lines, or whole batches."""
        self._file.seek(0)
        size = lines = batches = 0
        line = b""
        for line in self._file:
            size += len(line)
            if line.endswith(b"\n"):
                lines = size
            if self.batches and line.endswith(b" \n"):
                batches = size
        # A file without such marks is not of our writing: its lines are all that is known of it.
        return size if line.endswith(b"\n") else batches or lines

    def _put(self, record: Record) -> None:
        self.records.pop(record["key"], None)
        self.records[record["key"]] = record

    def _damaged(self, number: int, why: str) -> InputError:
        return InputError(
            f"{self.path} line {number} is damaged: {why}", allowed="remove the line, its work is done again"
        )

    def append(self, records: Sequence[Record]) -> None:
        """Add records whose keys are new, durably, in one write."""
        self.rewrite([record for record in records if record["key"] not in self.records])

    def rewrite(self, records: Sequence[Record]) -> None:
        """Add records whose keys may be old: of two with one key the later counts."""
        if not records:
            return
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        blob = ("\n".join(lines) + (" \n" if self.batches else "\n")).encode("utf-8", "surrogatepass")
        with readable_io_errors(self.path):
            self._file.write(blob)
            self._file.flush()
            os.fsync(self._file.fileno())
        for record in records:
            self._put(record)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's directory for this process alone."""
    try:
        with readable_io_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            handle = (run / ".lock").open("w")
    except FileNotFoundError as error:
        raise InputError(f"cannot write {run}: no directory can be made there") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"run directory {run} is in use by another process") from error
        yield


def read_records(path: Path, check: Callable[[Record], bool] = lambda record: True) -> list[Mapping[str, Any]]:
    """The whole lines of a record file, in order, without opening it for writing.

    Raises:
        InputError: There is no such file, or a line is no record that `check` takes.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: {path.parent} is no finished run")
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is damaged: {error}") from error
        if not isinstance(record, dict) or not check(record):
            raise InputError(f"{path} line {number} is damaged: a field is missing or of the wrong kind")
        found.append(record)
    return found


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of records with one key the last, in the order in which they were last written."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        found.pop(record["key"], None)
        found[record["key"]] = record
    return list(found.values())
