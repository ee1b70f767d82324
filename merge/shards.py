"""The one writer of full weights: every shard of a layout, for any number of outputs in one pass. No torch here.

Digest of a safetensors file. `xxh3:` and 64 hex digits: the SHA-256 of the file's header (its first 8 bytes, which give
the length, and the JSON) followed by the XXH3-128 (16 bytes, big end first) of each tensor's bytes, in the order in which
they lie. It is computed while the bytes are in the processor's cache, by any number of threads that share a file, and by
whoever reads the tensors from files that are cut in another way. XXH3 tells damage and mistakes, not forgery.

Why not SHA-256 throughout: on a processor without SHA instructions hashlib's does 0.4 GB/s, which for two inputs and an
output is three times the work of the merge itself; XXH3 does 50 GB/s. The same tree over SHA-256 would keep that price.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from psacpo.errors import InputError
from psacpo.files import PROGRESS, finished, mark_finished
from psacpo.merge.models import ModelDirectory
from psacpo.merge.tensorfiles import FLOATING, SIZES, Entry, byte_size, make_header, read_header

Buffer: TypeAlias = Any
"""bytes, a memoryview or a contiguous numpy array."""
Blocks: TypeAlias = Iterator[tuple[int, Iterable[Buffer]]]
"""Byte offset within the tensor and one buffer for each output, ascending, covering the tensor exactly.

A buffer is written before the next one is asked for, so that all may be views of the same memory.
"""
Producer: TypeAlias = Callable[[str, Entry], Blocks | None]
"""What gives a tensor's new bytes: called with its name and its entry in the output, from several threads at once.

None takes the layout's own bytes, where the output has the layout's dtype and shape.
"""

# Bytes that are copied at once.
_BLOCK = 1 << 18
# Shards that are open at once: while one goes to the disk the next is computed.
_OPEN = 2
# Bytes of a shard after which what is written so far is sent to the disk.
_FLUSH = 64 << 20


def write_shards(
    directories: Sequence[Path],
    layout: ModelDirectory,
    produce: Producer,
    *,
    entries: Mapping[str, Entry] | None = None,
    dtype: str | None = None,
    threads: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, str]]:
    """Write every shard of `layout`, with the names, headers and offsets that it has there, into each directory.

    A shard appears in a directory when it is whole and on the disk. In a `files.resumable_directory` it is marked then,
    and left alone when the same work is called again. Memory is what `produce` holds, for each thread.

    Args:
        directories: Where to.
        layout: The model whose shards and tensors the outputs have.
        produce: Gives the tensors.
        entries: Tensor -> dtype and shape, where these are not the layout's; offsets in them mean nothing.
        dtype: Of all floating tensors, as safetensors calls it; None keeps each tensor's own.
        threads: Tensors that are produced at once.
        done: Called with the bytes of the layout that are dealt with, once for each directory.

    Returns:
        For each directory: file name -> digest, as this module says.

    Raises:
        InputError: What `produce` raises; a file of the layout that cannot be read, or ends early.
        ValueError: `produce` does not cover a tensor.
    """
    written: list[dict[str, str]] = [{} for _ in directories]
    stop = threading.Event()
    opened: deque[_Shard] = deque()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as flusher:

        def finish() -> None:
            for found, digest in zip(written, opened[0].finish(done), strict=True):
                found[opened[0].name] = digest
            opened.popleft()

        try:
            for name in layout.shards:
                targets = _targets(layout.shards[name][1], entries or {}, dtype)
                opened.append(_Shard(name, directories, layout, targets, stop))
                opened[-1].start(produce, pool, flusher)
                if len(opened) == _OPEN:
                    finish()
            while opened:
                finish()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            flusher.shutdown(cancel_futures=True)
            for shard in opened:
                shard.close()
            raise
    return written


def digest_shard(path: Path) -> str:
    """The digest of a safetensors file on disk, in the form that `write_shards` gives.

    Raises:
        InputError: It is no safetensors file.
    """
    begin, entries = read_header(path)
    with open_input(path) as descriptor:
        header = read_at(descriptor, path, 0, begin)
        return join_digests(
            header, (hash_tensor(descriptor, path, begin + e.start, e.end - e.start) for e in entries.values())
        )


def join_digests(header: bytes, tensors: Iterable[bytes]) -> str:
    """The digest of a file from its header's bytes and its tensors' XXH3-128, in the order in which they lie."""
    return "xxh3:" + hashlib.sha256(header + b"".join(tensors)).hexdigest()


@contextlib.contextmanager
def open_input(path: Path) -> Iterator[int]:
    """A descriptor to read a file by; one that cannot be opened is an `InputError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` from a place in a file."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            raise InputError(f"{path} ended early: it changed while it was read")
        target, offset = target[count:], offset + count


def read_at(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    """`count` bytes from a place in a file."""
    data = bytearray(count)
    read_into(descriptor, path, offset, memoryview(data))
    return bytes(data)


class _Shard:
    """One file of the layout on its way into each directory."""

    def __init__(
        self,
        name: str,
        directories: Sequence[Path],
        layout: ModelDirectory,
        targets: Mapping[str, Entry],
        stop: threading.Event,
    ) -> None:
        self.name, self.directories, self.stop = name, directories, stop
        self.source = layout.path / name
        self.begin, self.entries = layout.shards[name]
        self.targets = targets
        self.facts = [finished(directory, name) for directory in directories]
        self.outputs: list[_Output | None] = [None] * len(directories)
        self.jobs: list[Future[list[bytes]]] = []
        self.header = b""

    def start(self, produce: Producer, pool: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        if all(fact is not None for fact in self.facts):
            return
        self.header, self.offset = self._header()
        for place, (directory, fact) in enumerate(zip(self.directories, self.facts, strict=True)):
            if fact is None:
                self.outputs[place] = _Output(directory, self.name, flusher)
        for output in self.outputs:
            if output is not None:
                output.write(memoryview(self.header), 0)
        self.jobs = [pool.submit(self._write_tensor, tensor, produce) for tensor in self.entries]

    def finish(self, done: Callable[[int], None]) -> list[str]:
        """Wait for the tensors, then put each file in its place; its digest for each directory."""
        count = len(self.directories)
        if not self.jobs and not any(self.outputs):
            done(count * self.source.stat().st_size)
        else:
            done(count * self.begin)
        # In the order of the file, so that of several errors the first in it is told.
        tensors: dict[str, list[bytes]] = {}
        for (name, entry), job in zip(self.entries.items(), self.jobs, strict=False):
            tensors[name] = job.result()
            done(count * (entry.end - entry.start))
        digests = []
        for place, (directory, output, fact) in enumerate(zip(self.directories, self.outputs, self.facts, strict=True)):
            if output is None:
                assert fact is not None
                digests.append(str(fact["digest"]))
                continue
            digest = join_digests(self.header, (tensors[name][place] for name in self.targets))
            output.place()
            mark_finished(directory, self.name, {"digest": digest})
            digests.append(digest)
        return digests

    def close(self) -> None:
        for output in self.outputs:
            if output is not None:
                output.close()

    def _header(self) -> tuple[bytes, int]:
        """The header's bytes, and where the tensors begin."""
        with open_input(self.source) as descriptor:
            header = read_at(descriptor, self.source, 0, self.begin)
        if any(self.targets[name] != entry for name, entry in self.entries.items()):
            header = make_header(self.targets, json.loads(header[8:]).get("__metadata__"))
        return header, len(header)

    def _write_tensor(self, name: str, produce: Producer) -> list[bytes]:
        """Write one tensor into each file; the XXH3-128 of its bytes there (b"" where the file is finished)."""
        target = self.targets[name]
        size = target.end - target.start
        states = [xxhash.xxh3_128() for _ in self.outputs]
        written = 0
        for offset, buffers in self._blocks(name, produce) if size else ():
            if self.stop.is_set():
                raise CancelledError
            if offset != written:
                raise ValueError(f"{name}: a block at {offset} where {written} comes next")
            for output, state, buffer in zip(self.outputs, states, buffers, strict=True):
                view = memoryview(buffer).cast("B")
                written = offset + view.nbytes
                if output is not None:
                    state.update(view)
                    output.write(view, self.offset + target.start + offset)
        if written != size:
            raise ValueError(f"{name}: {written} bytes where {size} belong")
        return [state.digest() for state in states]

    def _blocks(self, name: str, produce: Producer) -> Blocks:
        target, entry = self.targets[name], self.entries[name]
        blocks = produce(name, target)
        if blocks is not None:
            return blocks
        if (target.dtype, target.shape) != (entry.dtype, entry.shape):
            raise ValueError(f"{name}: nothing is produced for another dtype or shape than the layout's")
        return _copy(self.source, self.begin + entry.start, target.end - target.start, len(self.outputs))


class _Output:
    """A file that is written beside its place, in any order, and sent to the disk on the way."""

    def __init__(self, directory: Path, name: str, flusher: ThreadPoolExecutor) -> None:
        self.place_at = directory / name
        beside = directory / PROGRESS
        self.path = (beside if beside.is_dir() else directory) / f"{name}.part"
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.flusher, self.flushing, self.unflushed = flusher, Future[None](), 0
        self.flushing.set_result(None)
        self.lock = threading.Lock()

    def write(self, view: memoryview, offset: int) -> None:
        size = view.nbytes
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count
        with self.lock:
            self.unflushed += size
            if self.unflushed >= _FLUSH and self.flushing.done():
                self.flushing.result()  # an error is told once only, so it is not left for fsync to find
                self.unflushed = 0
                self.flushing = self.flusher.submit(os.fdatasync, self.descriptor)

    def place(self) -> None:
        self.flushing.result()
        os.fsync(self.descriptor)
        self.close()
        os.rename(self.path, self.place_at)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _copy(path: Path, offset: int, size: int, outputs: int) -> Blocks:
    """Bytes of the layout as they are."""
    data = memoryview(bytearray(min(_BLOCK, size)))
    with open_input(path) as descriptor:
        for start in range(0, size, _BLOCK):
            block = data[: min(_BLOCK, size - start)]
            read_into(descriptor, path, offset + start, block)
            yield start, [block] * outputs


def hash_tensor(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """XXH3-128 of a part of a file."""
    state, data = xxhash.xxh3_128(), memoryview(bytearray(min(_BLOCK, size)))
    for start in range(0, size, _BLOCK):
        block = data[: min(_BLOCK, size - start)]
        read_into(descriptor, path, offset + start, block)
        state.update(block)
    return state.digest()


def _targets(entries: Mapping[str, Entry], other: Mapping[str, Entry], dtype: str | None) -> dict[str, Entry]:
    """The tensors of a file as they will be in the output, in the order in which they will lie."""
    kinds = {
        name: (dtype if dtype and entry.dtype in FLOATING else entry.dtype, entry.shape)
        for name, entry in entries.items()
    } | {name: (entry.dtype, entry.shape) for name, entry in other.items() if name in entries}
    if all(kinds[name] == (entry.dtype, entry.shape) for name, entry in entries.items()):
        return dict(entries)
    # Wide elements first, as safetensors' own writer has it: each then lies where its type may lie.
    placed, start = {}, 0
    for name, (kind, shape) in sorted(kinds.items(), key=lambda item: -SIZES.get(item[1][0], 0)):
        size = byte_size(kind, shape)
        placed[name] = Entry(kind, shape, start, start + size)
        start += size
    return placed
