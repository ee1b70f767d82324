"""Which of several outputs are finished, so that an interrupted merge of many ratios does not refuse its own work."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from psacpo.files import MANIFEST, write_atomically


class Finished:
    """Names of the outputs that one merge has finished, kept beside them until all are.

    Args:
        home: The directory of all the outputs.
        key: Digest of everything that decides what they hold.
        many: Whether there are several; of one there is nothing to keep.
    """

    def __init__(self, home: Path, key: str, *, many: bool) -> None:
        self.path = home / f".psacpo-merge-{key[:16]}.json"
        self.many = many
        self.names: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            self.names = list(json.loads(self.path.read_text(encoding="utf-8"))) if many else []

    def has(self, out: Path) -> bool:
        """Whether this very merge has finished that output, and it is still there."""
        return out.name in self.names and (out / MANIFEST).is_file()

    def add(self, out: Path) -> None:
        self.names.append(out.name)
        if self.many:
            write_atomically(self.path, json.dumps(self.names))

    def forget(self) -> None:
        """All are finished."""
        self.path.unlink(missing_ok=True)
