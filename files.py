"""Directories that appear whole or not at all, content digests, and psacpo.json beside every output."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError

MANIFEST = "psacpo.json"
PROGRESS = ".progress"
"""The directory in a `resumable_directory` that holds what is not part of the output: markers, files half written."""
_CHUNK = 1 << 20
# Files of this size and more are worth remembering the digest of.
_WORTH_REMEMBERING = 8 << 20
# File times are as coarse as this on some file systems: a younger file may change again without showing it.
_SETTLED_NS = 2_000_000_000
_MOST_REMEMBERED = 4096


def canonical_json(value: object) -> str:
    """`value` as JSON with sorted keys and no white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits.

    That of a large file is remembered in the user's cache directory, for as long as the file's size, times and inode
    stay what they were.
    """
    before = path.stat()
    if before.st_size < _WORTH_REMEMBERING:
        return _hash_file(path)
    started = time.time_ns()
    name, stamp = os.path.realpath(path), _stamp(before)
    found = _remembered().get(name)
    if found is not None and found[:-1] == stamp:
        return str(found[-1])
    value = _hash_file(path)
    settled = max(before.st_mtime_ns, before.st_ctime_ns) < started - _SETTLED_NS
    if settled and _stamp(path.stat()) == stamp:
        _remember(name, [*stamp, value])
    return value


def _hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK):
            state.update(block)
    return state.hexdigest()


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _digest_cache() -> Path | None:
    """Where digests of large files are remembered; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "psacpo" / "digests.json"


def _remembered() -> dict[str, list[Any]]:
    """Real path -> size, times, inode, SHA-256. What cannot be read, or is no such record, is as if it were not there."""
    cache = _digest_cache()
    try:
        found = json.loads(cache.read_text(encoding="utf-8")) if cache else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, list) and len(entry) == 5 and re.fullmatch("[0-9a-f]{64}", str(entry[-1]))
    }


def _remember(name: str, entry: list[Any]) -> None:
    cache = _digest_cache()
    if cache is None:
        return
    others = {other: known for other, known in _remembered().items() if other != name}
    newest = list(others.items())[-(_MOST_REMEMBERED - 1) :]
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError, InputError):
        write_atomically(cache, json.dumps(dict([*newest, (name, entry)]), indent=0))


def digest_directory(path: Path, *, patterns: Iterable[str] = ("*",)) -> str:
    """One digest of all files of a directory whose names match `patterns` (not our own manifest), by name and content.

    A symbolic link counts as what it points to, so a model in a download cache has the digest of its files.
    """
    found = {
        file.relative_to(path).as_posix(): file
        for pattern in patterns
        for file in path.rglob(pattern)
        if file.is_file() and file.name != MANIFEST
    }
    return digest([[name, digest_file(found[name])] for name in sorted(found)])


def other_files(directory: Path) -> list[str]:
    """The files of an output directory by their path in it, but its manifest and what a `resumable_directory` needs."""
    found = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    return sorted(name.as_posix() for name in found if name.parts[0] not in (PROGRESS, MANIFEST))


MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def digest_model(path: Path) -> str:
    """The digest of what decides a model's or adapter's output: its weights and configuration files."""
    return digest_directory(path, patterns=MODEL_FILES)


@contextlib.contextmanager
def readable_io_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "read only" and "permission" into one clear line that names `path`."""
    _require_name(path)
    try:
        yield
    except OSError as error:
        known = {
            errno.ENOSPC: "no space left on the device",
            errno.EDQUOT: "disk quota exceeded",
            errno.EFBIG: "the file would be larger than is allowed here (ulimit -f)",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "a part of the path is a file, not a directory",
            errno.ENAMETOOLONG: "the path is too long",
            errno.ELOOP: "its symbolic links lead in a circle",
            errno.EBUSY: "it is in use by the system (a mount point)",
            errno.EXDEV: "it is on another file system than its parent directory",
        }
        if error.errno not in known:
            raise
        raise InputError(f"cannot write {path}: {known[error.errno]}") from error


def _require_name(path: Path) -> None:
    """Refuse a path that no file can have; a recipe may say one."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(f"cannot write {str(path)!r}: half a surrogate pair is no text for a file's name") from error


def require_free_space(path: Path, needed: int) -> None:
    """Refuse before the work starts when the file system that will hold `path` has less than `needed` bytes free."""
    free = free_space(path)
    if free < needed:
        raise InputError(f"no space for {path}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def require_unused(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output directory that exists and holds something, unless `overwrite` was said."""
    with readable_io_errors(path):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"output {path} exists and is not a directory")
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not overwrite:
            raise InputError(
                f"output directory {path} is in use (it is not empty)",
                allowed="a new or empty directory, or --overwrite",
            )
        if not (path / MANIFEST).is_file():
            raise InputError(
                f"output directory {path} is in use, and not by psacpo (it holds no {MANIFEST}): nothing is overwritten",
                allowed="a new or empty directory, or one that psacpo wrote",
            )


def require_apart(out: Path, inputs: Iterable[Path], *, replaced: bool = False) -> None:
    """Refuse an output that lies in one of the inputs: writing it would change what was read.

    Args:
        replaced: Whether `out` is replaced as a whole, so that no input may lie in it either.
    """
    _require_name(out)
    target = Path(os.path.realpath(out))
    for given in inputs:
        place = Path(os.path.realpath(given))
        if target == place or place in target.parents:
            raise InputError(f"output {out} lies in the input {given}", allowed="a directory outside it")
        if replaced and target in place.parents:
            raise InputError(f"output {out} holds the input {given}", allowed="a directory beside it")


@contextlib.contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a directory beside `out` to write in; on success fsync it and rename it to `out`, on failure remove it.

    What a process left that was killed in here is mended by the next call for the same `out`. Of two calls at once the
    one that ends first has `out`, and the other is refused, unless it was told to overwrite.

    Raises:
        InputError: `out` is in use, or cannot be written.
    """
    require_unused(out, overwrite=overwrite)
    with readable_io_errors(out), contextlib.ExitStack() as locks:
        out.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in _temporaries(out, "partial"):
            _remove_abandoned(abandoned)
        _restore_replaced(out)
        require_unused(out, overwrite=overwrite)
        partial = _locked_temporary(locks, out, "partial")
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                _fsync(file)
            partial.chmod(0o777 & ~_umask())
            require_unused(out, overwrite=overwrite)
            _replace_directory(partial, out)
            _fsync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def free_space(path: Path) -> int:
    """Free bytes of the file system that will hold `path`."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def resumable_directory(out: Path, *, key: str, overwrite: bool = False) -> Iterator[Path]:
    """Like `atomic_directory`, but the work of an interrupted call is taken up again by the next one with the same key.

    The directory beside `out` is kept on Ctrl-C, SIGTERM and SIGKILL, and removed on any error. In one that is taken up
    again there are the files for which `mark_finished` was called, and nothing else. Directories of other keys for the
    same `out` are removed. Nothing of the markers is left in the output.

    Args:
        out: The directory to be.
        key: Digest of everything that decides the bytes of the output.
        overwrite: Replace a directory that psacpo wrote.

    Raises:
        InputError: `out` is in use, cannot be written, or is being written by another process.
    """
    require_unused(out, overwrite=overwrite)
    with readable_io_errors(out), contextlib.ExitStack() as locks:
        out.parent.mkdir(parents=True, exist_ok=True)
        mine = f".{out.name}.partial-{digest(key)[:16]}"
        partial = out.parent / mine
        _lock_directory(locks, partial, out)
        pattern = re.compile(re.escape(f".{out.name}.partial-") + "[0-9a-f]{16}")
        for other in [entry for entry in out.parent.iterdir() if pattern.fullmatch(entry.name) and entry.name != mine]:
            try:
                _lock_directory(locks, other, out)
            except InputError:
                with contextlib.suppress(OSError):
                    partial.rmdir()  # unless there is work in it
                raise
            shutil.rmtree(other)
        _restore_replaced(out)
        # Another process may have finished while this one waited for nothing but the checks above.
        require_unused(out, overwrite=overwrite)
        _keep_finished(partial)
        try:
            yield partial
            shutil.rmtree(partial / PROGRESS)
            for file in [*sorted(partial.rglob("*")), partial]:
                _fsync(file)
            require_unused(out, overwrite=overwrite)
            _replace_directory(partial, out)
            _fsync(out.parent)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def mark_finished(directory: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Say of a file in a `resumable_directory` that it is whole and on the disk; in another directory say nothing.

    Args:
        directory: The directory.
        name: The file's name in it.
        facts: What `finished` will give back, as JSON has it.
    """
    if not (directory / PROGRESS).is_dir():
        return
    # The file must not be able to be lost when its marker is there.
    _fsync(directory / name)
    _fsync(directory)
    record = {"size": (directory / name).stat().st_size, "facts": dict(facts)}
    write_atomically(directory / PROGRESS / f"{name}.json", json.dumps(record))


def finished(directory: Path, name: str) -> dict[str, Any] | None:
    """What `mark_finished` was told of a file, None where the file is not finished."""
    try:
        record = json.loads((directory / PROGRESS / f"{name}.json").read_text(encoding="utf-8"))
        if (directory / name).stat().st_size != record["size"]:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    facts: dict[str, Any] = record["facts"]
    return facts


def _lock_directory(locks: contextlib.ExitStack, directory: Path, out: Path) -> None:
    """Make a directory, unless it is there, and hold it until `locks` closes; another process that has it is an error."""
    while True:
        directory.mkdir(exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        locks.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"output {out} is being written by another process") from error
        except OSError:
            return  # a file system without locks on directories (NFS)
        # Between opening and locking, its owner may have renamed or removed it.
        with contextlib.suppress(FileNotFoundError):
            if directory.stat().st_ino == os.fstat(descriptor).st_ino:
                return


def _keep_finished(partial: Path) -> None:
    """Remove whatever an interrupted call left half done."""
    (partial / PROGRESS).mkdir(exist_ok=True)
    markers = {f"{entry.name}.json" for entry in partial.iterdir() if finished(partial, entry.name) is not None}
    for entry in [*partial.iterdir(), *(partial / PROGRESS).iterdir()]:
        kept = entry.name == PROGRESS or entry.name in markers or f"{entry.name}.json" in markers
        if not kept:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _temporaries(out: Path, kind: str) -> list[Path]:
    """The directories beside `out` that `_locked_temporary` made for it, and no one else's."""
    pattern = re.compile(re.escape(f".{out.name}.{kind}-") + "[a-z0-9_]{8}")
    return [entry for entry in out.parent.iterdir() if pattern.fullmatch(entry.name) and not entry.is_symlink()]


def _locked_temporary(locks: contextlib.ExitStack, out: Path, kind: str) -> Path:
    """A new directory beside `out`, held until `locks` closes: one that no one holds was left by a process that died."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.{kind}-", dir=out.parent))
        # One that was taken for abandoned before it could be locked is left to whoever did so.
        with contextlib.suppress(InputError):
            _lock_directory(locks, made, out)
            return made


def _remove_abandoned(directory: Path) -> None:
    """Remove a temporary directory that no process holds."""
    with contextlib.suppress(FileNotFoundError), _if_abandoned(directory) as abandoned:
        if abandoned:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _if_abandoned(directory: Path, *, unknown: bool = False) -> Iterator[bool]:
    """Whether no process holds a directory, which then is held inside; `unknown` where that cannot be told."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:  # a file system without locks on directories (NFS)
        yield unknown
    else:
        yield True
    finally:
        os.close(descriptor)


def _restore_replaced(out: Path) -> None:
    """Mend what a process left that died between the two renames of `_replace_directory`."""
    for old in _temporaries(out, "old"):
        with contextlib.suppress(FileNotFoundError), _if_abandoned(old, unknown=True) as abandoned:
            if not abandoned:
                continue
            if not out.exists() and (old / out.name).is_dir():
                os.rename(old / out.name, out)
            shutil.rmtree(old, ignore_errors=True)


def _replace_directory(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was at `out` is moved aside first and removed last, so it is never half gone."""
    if not out.exists():
        os.rename(partial, out)
        return
    with contextlib.ExitStack() as locks:
        old = _locked_temporary(locks, out, "old")
        try:
            os.rename(out, old / out.name)
        except OSError:
            old.rmdir()
            raise
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(old / out.name, out)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write one file whole or not at all: beside it, fsync, rename."""
    blob = data.encode("utf-8") if isinstance(data, str) else data
    with readable_io_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            # Renaming over it would replace /dev/null by a file, for everyone.
            raise InputError(f"cannot write {path}: it is a device or a pipe", allowed="a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(blob)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def write_manifest(
    directory: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    seeds: Mapping[str, int],
    **more: Any,
) -> None:
    """Write psacpo.json: version, resolved config, content digest of every input, seeds, and what the writer adds."""
    from psacpo import __version__

    record = {
        "psacpo": __version__,
        "kind": kind,
        "config": dict(config),
        "inputs": dict(inputs),
        "seeds": dict(seeds),
        **more,
    }
    write_atomically(directory / MANIFEST, json.dumps(record, indent=2, sort_keys=False, default=str) + "\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """psacpo.json of a directory, or None where there is none; a damaged one is an `InputError`."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(name, {}), dict) for name in ("config", "inputs")):
        raise InputError(f"{path} is damaged: not a JSON object, or with no such in `config` or `inputs`")
    return record


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
