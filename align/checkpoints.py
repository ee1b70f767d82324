"""Where a stage that was killed goes on: the Trainer's own checkpoints, with what only this trainer knows beside them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from psacpo.errors import InputError
from psacpo.files import digest, readable_io_errors, write_atomically

_PREFIX = "checkpoint-"
_MARKER = "progress.json"
# What torch.save and safetensors say in words of their own where the disk is full.
_UNWRITTEN = ("inline_container.cc", "PytorchStreamWriter", "No space left", "I/O error")


@contextlib.contextmanager
def full_disk_as_such(place: Path) -> Iterator[None]:
    """Raise OSError where a library could not write its file; with it a stage's earlier checkpoints are kept."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(words in str(error) for words in _UNWRITTEN):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


class Checkpoints:
    """The checkpoints of one stage: `place/checkpoint-STEP`, the Trainer's format.

    One counts once its marker is there, which is written last and names what decides the stage's result. Only the
    newest is kept.
    """

    def __init__(self, place: Path, key: str) -> None:
        """
        Args:
            place: The directory that holds them and nothing else.
            key: Digest of all that decides the stage's result; checkpoints of another are not used.
        """
        self.place = place
        # Another release may add up in another order.
        self.key = digest([key, torch.__version__, transformers.__version__])

    @contextlib.contextmanager
    def held(self, *, main: bool) -> Iterator[None]:
        """Make the directory and keep other processes out of it; it is removed when the work is whole or refused.

        Left as they are when the process is killed or interrupted, or fails for another reason than its input.

        Args:
            main: Whether this is the process that writes.

        Raises:
            InputError: Another process trains this stage, or the directory cannot be made.
        """
        if not main:
            yield
            return
        with readable_io_errors(self.place), contextlib.ExitStack() as stack:
            self.place.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.place, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.place} is in use: another process trains this stage") from error
            except OSError:
                pass  # a file system without locks on directories (NFS)
            try:
                yield
            except InputError:
                self.remove()
                raise
            self.remove()

    def remove(self) -> None:
        """Remove all checkpoints, and the output directory if there is nothing else in it."""
        shutil.rmtree(self.place, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.place.parent.rmdir()

    def at(self, step: int) -> Path:
        """The directory of a step's checkpoint, as the Trainer calls it."""
        return self.place / f"{_PREFIX}{step}"

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of this key and what `finish` was given; None where there is none.

        One that lost a file, or a part of one, is passed over: without its optimiser it would end in other weights.
        """
        for step in sorted(self._steps(), reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = json.loads((self.at(step) / _MARKER).read_text(encoding="utf-8"))
                if found["key"] == self.key and found["sizes"] == _sizes(self.at(step)):
                    return self.at(step), found["progress"]
        return None

    def write_tensors(self, step: int, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """What one process knows besides the model. To be called before `finish`, by every process."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, self.at(step) / f"reference-{rank}.safetensors")

    def read_tensors(self, checkpoint: Path, rank: int) -> dict[str, Tensor]:
        return load_file(checkpoint / f"reference-{rank}.safetensors")

    def finish(self, step: int, progress: Mapping[str, Any]) -> None:
        """Declare a checkpoint whole, and remove the older ones. To be called by one process."""
        for file in self.at(step).rglob("*"):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sizes = _sizes(self.at(step))
        text = json.dumps({"key": self.key, "step": step, "sizes": sizes, "progress": dict(progress)})
        write_atomically(self.at(step) / _MARKER, text)
        for other in self._steps():
            if other != step:
                shutil.rmtree(self.at(other), ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self.place.is_dir():
            return []
        names = [entry.name.removeprefix(_PREFIX) for entry in self.place.iterdir() if entry.name.startswith(_PREFIX)]
        return [int(name) for name in names if name.isdecimal()]


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each of a checkpoint's files but its marker."""
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != _MARKER]
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in sorted(files)}
