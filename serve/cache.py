"""Policies on disk: built once, shared by all servers of a machine, the least recently used removed at a byte limit.

    ROOT/.lock                      held by whoever changes anything below
    ROOT/<key>/policy@0.37/         a PEFT adapter directory, whole or not there

<key> is a digest of what the two adapters do, so other adapters never meet the same entry. Each server that has an
entry in use keeps a shared lock on its adapter_config.json; the kernel drops that with the process, however it ends.
An entry is removed only under an exclusive lock, so never from under a server that may read it again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from psacpo.errors import InputError
from psacpo.files import MANIFEST, atomic_directory, read_manifest, readable_io_errors, write_manifest
from psacpo.serve.ratios import PREFIX

KIND = "served policy"
_LOCK = ".lock"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PATIENCE = 120.0  # seconds; one build of a large policy takes a few


class CacheFull(Exception):
    """There is no room for one more policy: all that there are, are in use."""


@dataclass
class Lease:
    """An entry that stays on disk until the lease is closed, or its process ends."""

    path: Path
    _descriptor: int = -1

    @property
    def lost(self) -> bool:
        """Whether somebody has removed the entry in spite of the lock, as who clears out a cache directory does."""
        return self._descriptor >= 0 and not (self.path / _CONFIG).is_file()

    def close(self) -> None:
        """Let the entry be removed when room is needed. More than once is no error."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.utime(self.path)  # used until now
            os.close(self._descriptor)
            self._descriptor = -1


class PolicyCache:
    """The policies under one directory.

    Args:
        root: The directory; made if it is not there.
        limit: Bytes that its entries may take together.
        patience: Seconds to wait for another process that changes the directory.

    Raises:
        InputError: The directory cannot be written, or its file system has no locks.
    """

    def __init__(self, root: Path, limit: int, *, patience: float = _PATIENCE) -> None:
        self.root, self.limit, self._patience = root.absolute(), limit, patience
        with self._locked():
            self._sweep()

    def lease(self, key: str, name: str, size: int, build: Callable[[Path], None]) -> Lease:
        """The entry `name` under `key`, built if it is not there.

        Args:
            key: Digest of what the entry depends on but its name.
            name: `policy@0.37`.
            size: Bytes that it will take at most.
            build: Writes the adapter's files into an empty directory.

        Raises:
            CacheFull: It does not fit beside the entries that are in use.
            InputError: The disk is full, or cannot be written.
        """
        entry = self.root / key / name
        with self._locked():
            if not _whole(entry):
                self._discard(entry)
                self._make_room(size)
                self._build(entry, build)
            os.utime(entry)
            return Lease(entry, _share(entry))

    def names(self, key: str) -> list[str]:
        """The entries under `key`, in no order."""
        try:
            return [entry.name for entry in (self.root / key).iterdir() if entry.name.startswith(PREFIX)]
        except FileNotFoundError:
            return []

    def size(self) -> int:
        """Bytes that all entries take now."""
        return sum(_bytes(entry) for entry in self._entries())

    def _build(self, entry: Path, build: Callable[[Path], None]) -> None:
        # A full disk leaves nothing behind: atomic_directory removes what it has begun.
        with atomic_directory(entry) as partial:
            build(partial)
            sizes = {name: (partial / name).stat().st_size for name in (_CONFIG, _WEIGHTS)}
            write_manifest(partial, kind=KIND, config={"policy": entry.name}, inputs={}, seeds={}, sizes=sizes)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used entries that no one has in use, until `size` bytes fit."""
        held = [(entry.stat().st_mtime, _bytes(entry), entry) for entry in self._entries()]
        total = sum(taken for _, taken, _ in held)
        for _, taken, entry in sorted(held):
            if total + size <= self.limit:
                return
            if self._discard(entry):
                total -= taken
        if total + size > self.limit:
            raise CacheFull(
                f"no room for a policy of {size / 1e6:.1f} MB: {total / 1e6:.1f} of {self.limit / 1e6:.1f} MB in "
                f"{self.root} are in use by running servers; allowed: a larger --cache-size, or another --cache-dir"
            )

    def _discard(self, entry: Path) -> bool:
        """Remove an entry, unless someone has it in use; whether it is gone."""
        try:
            descriptor = os.open(entry / _CONFIG, os.O_RDWR)
        except FileNotFoundError:
            descriptor = -1
        try:
            if descriptor >= 0:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            if entry.exists():
                # Out of sight in one step, then away at leisure; what a crash leaves of it is swept.
                gone = entry.with_name(f".{entry.name}.gone-{os.getpid()}")
                os.rename(entry, gone)
                shutil.rmtree(gone, ignore_errors=True)
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _entries(self) -> list[Path]:
        found = self.root.glob(f"*/{PREFIX}*")
        return [entry for entry in found if not entry.is_symlink() and (entry / MANIFEST).is_file()]

    def _sweep(self) -> None:
        """Remove what killed processes left half done: whoever works here holds the lock, and that is us."""
        for left in self.root.glob(f"*/.{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with readable_io_errors(self.root):
            # Each time: a running server's cache directory may have been cleared out.
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._wait_for(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int) -> None:
        until = time.monotonic() + self._patience
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise InputError(
                        f"the cache directory {self.root} has been locked by another process for "
                        f"{self._patience:.0f} s",
                        allowed="that process ended, or another --cache-dir",
                    ) from None
                time.sleep(0.005)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                raise InputError(
                    f"the file system of the cache directory {self.root} has no locks",
                    allowed="--cache-dir on a local disk",
                ) from error


def _share(entry: Path) -> int:
    """A descriptor whose shared lock keeps the entry; nobody holds it exclusively while the directory is locked."""
    descriptor = os.open(entry / _CONFIG, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _whole(entry: Path) -> bool:
    """Whether an entry is there as it was written, as far as names and sizes tell."""
    try:
        record = read_manifest(entry) or {}
        sizes = record.get("sizes", {})
        return bool(sizes) and all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (InputError, OSError):
        return False


def _bytes(entry: Path) -> int:
    total = 0
    for file in entry.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
