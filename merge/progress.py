"""Which of several outputs are finished, so that an interrupted merge of many ratios does not refuse its own work."""

from __future__ import annotations

import contextlib
from pathlib import Path

from psacpo.errors import InputError
from psacpo.files import read_manifest, write_atomically

KEY = "merge_key"
"""What an output's manifest calls the digest of the merge that it is of."""


class Finished:
    """The outputs that an interrupted merge has finished: of one that is through, nothing is taken for its own.

    That a merge is under way is kept in a file beside the outputs, from before the first of them appears until all are
    there; whose an output is, its own manifest says, so that no moment between the two can be interrupted.

    Args:
        home: The directory of all the outputs.
        key: Digest of everything that decides what they hold.
        many: Whether there are several; of one there is nothing to keep.
    """

    def __init__(self, home: Path, key: str, *, many: bool) -> None:
        self.path = home / f".psacpo-merge-{key[:16]}.json"
        self.key, self.many = key, many
        self.interrupted = many and self.path.is_file()

    def has(self, out: Path, key: str) -> bool:
        """Whether this very merge was interrupted after it finished that output, and it is still there.

        Args:
            out: The output.
            key: What the merge writes to the output's manifest as `merge_key`.
        """
        if not self.interrupted:
            return False
        try:
            return (read_manifest(out) or {}).get(KEY) == key
        except InputError:  # damaged: not what was written
            return False

    def begin(self) -> None:
        """An output is about to appear."""
        if self.many:
            write_atomically(self.path, f'"{self.key}"\n')

    def forget(self) -> None:
        """All are finished, whatever other merges to the same place may have left undone."""
        for other in self.path.parent.glob(".psacpo-merge-*.json"):
            with contextlib.suppress(OSError):
                other.unlink()
