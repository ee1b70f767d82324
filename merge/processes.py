"""Linear merges in several processes, each with shards of its own. Linux only; elsewhere, and for small models, in one.

Between two passes of numpy over a block the interpreter takes its lock, and threads spend on passing it what they gain.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.merge.linear import THREADS, LinearProducer
from psacpo.merge.models import ModelDirectory
from psacpo.merge.shards import write_shards

# Bytes of a layout from which on the start of a process is nothing beside its work.
_WORTHWHILE = 64 << 20
_PR_SET_PDEATHSIG = 1


def write_in_processes(
    directories: Sequence[Path],
    layout: ModelDirectory,
    producer: LinearProducer,
    *,
    dtype: str | None = None,
    processes: int = THREADS,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, str]]:
    """`psacpo.merge.shards.write_shards`, with the shards of the layout dealt out to processes by size.

    What the producer learns of its inputs on the way is there afterwards as if it had all been produced here.

    Raises:
        InputError: As `write_shards`; a process that was ended from outside.
    """
    groups = deal(layout, processes)
    size = sum(_bytes(layout, shard) for shard in layout.shards)
    if len(groups) < 2 or size < _WORTHWHILE or sys.platform != "linux":
        return write_shards(directories, layout, producer, dtype=dtype, done=done)
    context = multiprocessing.get_context("fork")
    workers: dict[Any, Any] = {}  # the end of a pipe to hear it by -> the process
    written: list[dict[str, str]] = [{} for _ in directories]
    try:
        for group in groups:
            receiver, sender = context.Pipe(duplex=False)
            part = dataclasses.replace(layout, shards={name: layout.shards[name] for name in group})
            workers[receiver] = context.Process(
                target=_work, args=(sender, os.getpid(), directories, part, producer, dtype), daemon=True
            )
            workers[receiver].start()
            sender.close()
        while workers:
            for heard in wait(list(workers)):
                _hear(heard, workers, written, producer, done)
    except BaseException:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()
        raise
    # In the layout's order, as one process would have it.
    return [{name: found[name] for name in layout.shards} for found in written]


def deal(layout: ModelDirectory, processes: int) -> list[list[str]]:
    """The layout's shards in at most so many groups of about the same size, none empty."""
    groups: list[list[str]] = [[] for _ in range(min(processes, len(layout.shards)))]
    sizes = [0] * len(groups)
    for name in sorted(layout.shards, key=lambda name: (-_bytes(layout, name), name)):
        least = sizes.index(min(sizes))
        groups[least].append(name)
        sizes[least] += _bytes(layout, name)
    return [sorted(group) for group in groups]


def _bytes(layout: ModelDirectory, shard: str) -> int:
    return max((entry.end for entry in layout.shards[shard][1].values()), default=0)


def _hear(
    receiver: Any,
    workers: dict[Any, Any],
    written: list[dict[str, str]],
    producer: LinearProducer,
    done: Callable[[int], None],
) -> None:
    """Take one message of a worker."""
    try:
        kind, value = receiver.recv()
    except EOFError:
        process = workers.pop(receiver)
        process.join()
        raise InputError(
            f"a process of the merge was ended from outside (exit code {process.exitcode})",
            allowed="the same command again, which goes on from here; with more memory, if that was the reason",
        ) from None
    if kind == "done":
        done(value)
        return
    workers.pop(receiver).join()
    if kind == "error":
        raise value
    digests, hashes = value
    producer.hashes.learn(hashes)
    for found, files in zip(written, digests, strict=True):
        found.update(files)


def _work(
    sender: Connection,
    parent: int,
    directories: Sequence[Path],
    part: ModelDirectory,
    producer: LinearProducer,
    dtype: str | None,
) -> None:
    """Runs in a process of its own: ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was asked for
        return
    with contextlib.suppress(BrokenPipeError):
        try:
            found = write_shards(
                directories, part, producer, dtype=dtype, done=lambda count: sender.send(("done", count))
            )
            sender.send(("result", (found, producer.hashes.known)))
        except Exception as error:  # noqa: BLE001 - it is raised again where it can be told
            sender.send(("error", error))
