"""Append-only JSON lines with content-addressed keys: what is finished is never done again, what is torn is ignored."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from psacpo.errors import InputError
from psacpo.files import readable_io_errors

Record = dict[str, Any]
Item = TypeVar("Item")


class Store:
    """One file of records, each with a `key`; use as a context manager.

    A batch of records is one write and one fsync. A kill in the middle of a write leaves a last line without its
    line feed: it is cut off when the store is opened again, and its work is done again.

    Args:
        check: Whether a record that was read is one; a file with any other is refused.

    Attributes:
        records: Key -> record, everything that the file holds, whole lines only.
    """

    def __init__(self, path: Path, check: Callable[[Record], bool] = lambda record: True) -> None:
        self.path = path
        self.check = check
        self.records: dict[str, Record] = {}

    def __enter__(self) -> Self:
        with readable_io_errors(self.path):
            self._file = self.path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
                whole_record = isinstance(record["key"], str) and self.check(record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise self._damaged(number, str(error)) from error
            if not whole_record:
                raise self._damaged(number, "a field is missing or of the wrong kind")
            self.records[record["key"]] = record
        self._file.truncate(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _damaged(self, number: int, why: str) -> InputError:
        return InputError(
            f"{self.path} line {number} is damaged: {why}", allowed="remove the line, its work is done again"
        )

    def append(self, records: Sequence[Record]) -> None:
        """Add records whose keys are new, durably, in one write."""
        new = [record for record in records if record["key"] not in self.records]
        if not new:
            return
        blob = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new).encode("utf-8", "surrogatepass")
        with readable_io_errors(self.path):
            self._file.write(blob)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records |= {record["key"]: record for record in new}

    def fill(
        self,
        batches: Iterable[Sequence[Item]],
        key: Callable[[Item], str],
        work: Callable[[Sequence[Item]], Iterable[Record]],
    ) -> Iterator[int]:
        """Do the batches that are not finished, and give how many items each batch held, done or not.

        A batch is done again whole when one of its records is missing: numbers depend on a batch's company in
        their last bits, and an interrupted run must end in the very result of an uninterrupted one.
        """
        for batch in batches:
            if any(key(item) not in self.records for item in batch):
                self.append(list(work(batch)))
            yield len(batch)


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


def read_records(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines of a record file, in order, without opening it for writing."""
    if not path.is_file():
        raise InputError(f"{path} is missing: {path.parent} is no finished run")
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
