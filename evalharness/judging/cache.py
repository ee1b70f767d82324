"""A directory of verdicts by what was judged and who judged it, shared by any number of runs and files."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.judges.base import Verdict
from psacpo.files import readable_io_errors

FILE = "verdicts.jsonl"


def read_verdict(record: Mapping[str, Any]) -> Verdict:
    """The verdict that a record holds."""
    return Verdict(
        score=record["score"],
        label=record.get("label"),
        probability=record.get("probability"),
        raw=record.get("raw"),
        failed=record.get("failed", False),
        usage=record.get("usage", {}),
    )


def is_known(record: Any) -> bool:
    """Whether a record is a verdict that can be found again: whose word on what, and a finite score or none."""
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), str) for name in ("content", "judge_digest")
    ):
        return False
    score, probability = record.get("score", ""), record.get("probability")
    numbers = [one for one in (score, probability) if one is not None]
    words = [one for one in (record.get("label"), record.get("raw")) if one is not None]
    return (
        all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < 1e30 for one in numbers)
        and all(isinstance(one, str) for one in words)
        and isinstance(record.get("usage", {}), dict)
    )


class Cache:
    """Verdicts in DIR/verdicts.jsonl, one line each, added at the end under a lock.

    The key is the digest of judge and text (`content` of a verdict record), so that a changed judge never meets an old
    verdict. What failed is not kept: it is asked again. No completion is stored, only what a judge said of it.

    Args:
        directory: None for verdicts that only this process knows.
        make: Make the directory where there is none.

    Raises:
        InputError: The file is damaged, or the directory cannot be written.
    """

    def __init__(self, directory: Path | None, *, make: bool = True) -> None:
        self._known: dict[str, dict[str, Verdict]] = {}
        self.path = None if directory is None else directory / FILE
        if self.path is None or directory is None:
            return
        try:
            with readable_io_errors(directory):
                if make:
                    directory.mkdir(parents=True, exist_ok=True)
                    self.path.touch()
                blob = self.path.read_bytes() if self.path.is_file() else b""
        except FileNotFoundError as error:
            raise InputError(f"cannot write {directory}: no directory can be made there") from error
        for number, line in enumerate(blob[: _whole(blob)].split(b"\n")[:-1], start=1):
            self._read(line, number)

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            if not is_known(record):
                raise ValueError("a field is missing or of the wrong kind")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path} line {number} is damaged: {error}", allowed="remove the line") from error
        self._known.setdefault(record["judge_digest"], {})[record["content"]] = read_verdict(record)

    def remember(self, records: Iterable[Mapping[str, Any]], *, where: Path) -> None:
        """Know the verdicts of a file's records for as long as this object lives, but for those without `content`.

        Raises:
            InputError: A record is damaged.
        """
        for record in records:
            if not isinstance(record, dict) or ("content" in record and not is_known(record)):
                raise InputError(f"{where} holds a damaged verdict", given=repr(record)[:80], allowed="remove its line")
            if "content" in record and not record.get("failed"):
                self._known.setdefault(record["judge_digest"], {})[record["content"]] = read_verdict(record)

    def verdicts(self, judge_digest: str) -> dict[str, Verdict]:
        """Content -> verdict, all that one judge said."""
        return dict(self._known.get(judge_digest, {}))

    def add(self, judge_digest: str, verdicts: Mapping[str, Verdict]) -> None:
        """Keep verdicts that did not fail."""
        known = self._known.setdefault(judge_digest, {})
        new = {key: said for key, said in verdicts.items() if not said.failed and key not in known}
        known |= new
        if not new or self.path is None:
            return
        blob = b"".join(_lines(judge_digest, new))
        with readable_io_errors(self.path), self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # What a killed process left of a line is no verdict.
            file.truncate(_whole(file.read()))
            file.seek(0, 2)
            file.write(blob)


def _lines(judge_digest: str, verdicts: Mapping[str, Verdict]) -> Iterable[bytes]:
    for content, said in verdicts.items():
        record = {
            "content": content,
            "judge_digest": judge_digest,
            "score": said.score,
            "label": said.label,
            "probability": said.probability,
            "raw": said.raw,
            "usage": dict(said.usage),
        }
        yield (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _whole(blob: bytes) -> int:
    return blob.rfind(b"\n") + 1
