"""Directories that appear whole or not at all, content digests, and psacpo.json beside every output."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError

MANIFEST = "psacpo.json"
_CHUNK = 1 << 20


def canonical_json(value: object) -> str:
    """`value` as JSON with sorted keys and no white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits, read in blocks of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK):
            state.update(block)
    return state.hexdigest()


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


MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def digest_model(path: Path) -> str:
    """The digest of what decides a model's or adapter's output: its weights and configuration files."""
    return digest_directory(path, patterns=MODEL_FILES)


@contextlib.contextmanager
def readable_io_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "read only" and "permission" into one clear line that names `path`."""
    try:
        yield
    except OSError as error:
        known = {
            errno.ENOSPC: "no space left on the device",
            errno.EDQUOT: "disk quota exceeded",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "a part of the path is a file, not a directory",
            errno.ENAMETOOLONG: "the path is too long",
        }
        if error.errno not in known:
            raise
        raise InputError(f"cannot write {path}: {known[error.errno]}") from error


def require_free_space(path: Path, needed: int) -> None:
    """Refuse before the work starts when the file system that will hold `path` has less than `needed` bytes free."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(f"no space for {path}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def require_unused(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output directory that exists and holds something, unless `overwrite` was said."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {path} exists and is not a directory")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"output directory {path} is in use (it is not empty)", allowed="a new or empty directory, or --overwrite"
        )
    if not (path / MANIFEST).is_file():
        raise InputError(
            f"output directory {path} is in use, and not by psacpo (it holds no {MANIFEST}): nothing is overwritten",
            allowed="a new or empty directory, or one that psacpo wrote",
        )


def require_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that lies in one of the inputs, or holds one: writing it would change what was read."""
    target = out.resolve()
    for given in inputs:
        place = given.resolve()
        if target == place or place in target.parents:
            raise InputError(f"output {out} lies in the input {given}", allowed="a directory outside it")


@contextlib.contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a directory beside `out` to write in; on success fsync it and rename it to `out`, on failure remove it.

    Raises:
        InputError: `out` is in use, or cannot be written.
    """
    require_unused(out, overwrite=overwrite)
    with readable_io_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                _fsync(file)
            partial.chmod(0o777 & ~_umask())
            _replace_directory(partial, out)
            _fsync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _replace_directory(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was at `out` is moved aside first and removed last, so it is never half gone."""
    old: Path | None = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.rename(out, old / out.name)
    os.rename(partial, out)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write one file whole or not at all: beside it, fsync, rename."""
    blob = data.encode("utf-8") if isinstance(data, str) else data
    with readable_io_errors(path):
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
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
