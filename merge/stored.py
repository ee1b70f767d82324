"""Tensors where they lie in safetensors files, read in blocks of rows: nothing is ever held whole that need not be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from psacpo.errors import InputError
from psacpo.merge.models import ModelDirectory
from psacpo.merge.tensorfiles import FLOATING, Entry, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements that are read and widened at once, 1 MiB in float32: about what a core has to itself.
BLOCK = 1 << 18


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of floating dtype in a file.

    Attributes:
        name: As the file calls it.
        path: The file.
        begin: Where the file's tensors begin, in bytes.
        entry: Its place and form.
        stamp: Of the file when its header was read.
    """

    name: str
    path: Path
    begin: int
    entry: Entry
    stamp: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """[1] for a scalar."""
        return self.entry.shape or (1,)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def row(self) -> int:
        """Elements of one index of the first axis."""
        return math.prod(self.shape[1:])

    @property
    def wide(self) -> torch.dtype:
        """What it is computed in: float32, or its own float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def blocks(self) -> Iterator[slice]:
        """Its rows, in ascending blocks of at most `BLOCK` elements or one row; none of a tensor without elements."""
        rows = max(1, BLOCK // max(1, self.row))
        for start in range(0, self.shape[0] if self.row else 0, rows):
            yield slice(start, min(self.shape[0], start + rows))

    def read(self, rows: slice | None = None) -> torch.Tensor:
        """Rows of it (None: all), in its own dtype. May be called from any thread.

        Raises:
            InputError: The file is gone, shorter than it was, or another one.
        """
        rows = rows or slice(0, self.shape[0])
        values = torch.empty((rows.stop - rows.start) * self.row, dtype=self.dtype)
        self.read_into(rows, memoryview(values.view(torch.uint8).numpy().data))
        return values.reshape(rows.stop - rows.start, *self.shape[1:])

    def read_into(self, rows: slice, view: memoryview) -> None:
        """`read` into the bytes of exactly as many numbers."""
        offset = self.begin + self.entry.start + rows.start * self.row * self.dtype.itemsize
        try:
            with self.path.open("rb", buffering=0) as handle:
                if _stamp(os.fstat(handle.fileno())) != self.stamp:
                    raise InputError(f"{self.path} was changed while it was in use")
                while view:
                    got = os.preadv(handle.fileno(), [view], offset)
                    if not got:
                        raise InputError(f"{self.path} ended early, in {self.name}")
                    view, offset = view[got:], offset + got
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error

    def require_finite(self, values: torch.Tensor, rows: slice | None = None) -> None:
        """Refuse rows of it, as they were read, that hold NaN or infinity, by file, tensor and index."""
        if is_finite(values):
            return
        flat = values.reshape(-1)
        place = int((~torch.isfinite(flat)).nonzero()[0])
        index = np.unravel_index((rows.start if rows else 0) * self.row + place, self.shape)
        raise InputError(f"{self.path}: {self.name} holds {float(flat[place])} at index {[*map(int, index)]}")

    def scan(self) -> bool:
        """Read it through: refuse NaN and infinity, and say whether anything in it is not zero."""
        some = False
        for rows in self.blocks():
            values = self.read(rows)
            self.require_finite(values, rows)
            some = some or bool(values.any())
        return some


def is_finite(values: torch.Tensor) -> bool:
    """Whether all elements are finite: NaN is the extreme of whatever holds it."""
    return values.numel() == 0 or all(math.isfinite(extreme) for extreme in values.aminmax())


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Entry]]:
    """The tensors of a safetensors file: those of floating dtype, and the others.

    Raises:
        InputError: The file is not safetensors, or is damaged.
    """
    begin, entries = read_header(path)
    stamp = _stamp(path.stat())
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, Entry] = {}
    for name, entry in entries.items():
        _require_size(path, name, entry)
        if entry.dtype in FLOATING:
            tensors[name] = StoredTensor(name, path, begin, entry, stamp)
        else:
            others[name] = entry
    return tensors, others


def stored_in(model: ModelDirectory, name: str) -> StoredTensor | None:
    """A tensor of a model, None where there is none of this name or it is of no floating dtype."""
    found = model.find(name)
    if found is None or found[1].dtype not in FLOATING:
        return None
    shard, entry = found
    path = model.path / shard
    _require_size(path, name, entry)
    return StoredTensor(name, path, model.shards[shard][0], entry, _stamp(path.stat()))


def _require_size(path: Path, name: str, entry: Entry) -> None:
    """The format's own reader checks this too; a header that lies would be read beyond the tensor."""
    size = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
    if size is not None and math.prod(entry.shape) * size != entry.end - entry.start:
        raise InputError(f"{path} is damaged: {name} has {entry.end - entry.start} bytes for shape {list(entry.shape)}")


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
