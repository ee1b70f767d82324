"""Which outputs are there already, so that a merge that is called again does not refuse its own work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.files import digest_file, read_manifest
from psacpo.merge.shards import digest_shard

KEY = "merge_key"
"""What an output's manifest calls the digest of everything that decides what it holds."""


def is_finished(out: Path, key: str) -> bool:
    """Whether a directory is an output of the merge of this key, as it was written: every file of it is read.

    A directory that appears is whole (`files.atomic_directory`), so an interrupted merge of many ratios finds those
    that it has finished.
    """
    try:
        manifest: Mapping[str, Any] = read_manifest(out) or {}
        if manifest.get(KEY) != key:
            return False
        return all(
            digest(out / name) == wanted
            for kind, digest in (("outputs", digest_shard), ("files", digest_file))
            for name, wanted in manifest[kind].items()
        )
    except (InputError, OSError, KeyError, AttributeError):  # damaged: not what was written
        return False
