"""Full weights: a base model and adapters at any number of mixes, tensor by tensor, in blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from psacpo.errors import InputError
from psacpo.merge.adapter_files import Adapter
from psacpo.merge.arithmetic import Factors, dora_weight, folded, interpolate
from psacpo.merge.changes import Change, plan_changes, plan_deltas
from psacpo.merge.floats import first_unfit, fits
from psacpo.merge.hashes import InputHashes
from psacpo.merge.linear import THREADS
from psacpo.merge.models import ModelDirectory
from psacpo.merge.shards import Blocks, Buffer, Producer, write_shards
from psacpo.merge.stored import DTYPES, StoredTensor, stored_in
from psacpo.merge.tensorfiles import Entry

__all__ = ["DeltaProducer", "delta_producer", "plan_deltas", "write_in_threads"]


def delta_producer(
    base: ModelDirectory, adapters: Sequence[Adapter], mixes: Sequence[Sequence[float]], *, dtype: str | None = None
) -> DeltaProducer:
    """What `psacpo.merge.shards.write_shards` asks for the bytes of each tensor of base + adapters, a buffer a mix.

    Each tensor is W + sum_i w_i (W_i - W), W_i what adapter i makes of it: computed in float32 (float64 where the base
    is), rounded once. One read of the base serves all mixes, and each mix has the bits that it would have alone. An
    adapter of weight zero does not take part, so that the ends of a dial are the adapters' own merges.

    Args:
        base: The base, whose layout the outputs have.
        adapters: All on this base.
        mixes: For each output a weight for each adapter, of any sign.
        dtype: Output dtype as safetensors calls it; None keeps each tensor's own.

    Raises:
        InputError: Here: an adapter that does not fit the base. While producing: a number in the base that is not
            finite, by file, tensor and index; a result that is not finite in the output's dtype.
        ValueError: A mix of another length.
    """
    if any(len(mix) != len(adapters) for mix in mixes):
        raise ValueError(f"mixes {mixes} for {len(adapters)} adapters")
    return DeltaProducer(base, adapters, mixes, dtype)


class DeltaProducer:
    """See `delta_producer`. It also learns the digests of the base, since every byte of it goes through it."""

    def __init__(
        self, base: ModelDirectory, adapters: Sequence[Adapter], mixes: Sequence[Sequence[float]], dtype: str | None
    ) -> None:
        self.base, self.adapters, self.mixes, self.dtype = base, adapters, mixes, dtype
        self.hashes = InputHashes([base])
        self._plan = plan_changes(base, adapters)

    def __call__(self, name: str, entry: Entry) -> Blocks | None:
        source = stored_in(self.base, name)
        return None if source is None else self._blocks(name, source)

    def base_digests(self) -> dict[str, str]:
        """File name -> digest. What was not asked for (shards that were finished before) is read now."""
        return self.hashes.digests()[0]

    def _blocks(self, name: str, source: StoredTensor) -> Blocks:
        dtype = DTYPES[self.dtype or source.entry.dtype]
        memory = _Memory(source, dtype)
        if name in self._plan:
            yield from _Tensor(source, self._plan[name], self.adapters).blocks(self.mixes, memory)
        else:
            yield from _unchanged(source, len(self.mixes), memory)
        self.hashes.known[0, name] = memory.state.digest()


def write_in_threads(
    directories: Sequence[Path], layout: ModelDirectory, produce: Producer, **settings: Any
) -> list[dict[str, str]]:
    """`psacpo.merge.shards.write_shards`, with a tensor to each core. Its products are too small to be split well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return write_shards(directories, layout, produce, threads=min(THREADS, before), **settings)
    finally:
        torch.set_num_threads(before)


def _unchanged(source: StoredTensor, outputs: int, memory: _Memory) -> Blocks:
    dtype = memory.write.dtype
    for rows in source.blocks():
        values = memory.load(rows)
        source.require_finite(values, rows)
        same = dtype == source.dtype
        if same:
            buffer: Buffer = _bytes(values)
        else:
            memory.widened(values)
            buffer = memory.rounded(values, rows)
        yield rows.start * source.row * dtype.itemsize, [buffer] * outputs


def _bytes(values: torch.Tensor) -> Any:
    return values.reshape(-1).view(torch.uint8).numpy()


class _Memory:
    """Room for one block of a tensor: as it is read, in what it is computed in, as it is written."""

    def __init__(self, source: StoredTensor, dtype: torch.dtype) -> None:
        size = max(((rows.stop - rows.start) * source.row for rows in source.blocks()), default=0)
        self.source = source
        self.kind = next(name for name, known in DTYPES.items() if known == dtype)
        self.read = torch.empty(size, dtype=source.dtype)
        self.wide = torch.empty(size, dtype=source.wide)
        self.write = torch.empty(size, dtype=dtype)
        # The same memory as bytes and for numpy: views of torch take long to make, and there are many blocks.
        self.read_bytes: memoryview = _bytes(self.read).data
        self.write_bytes: memoryview = _bytes(self.write).data
        self.numbers = self.wide.numpy()
        self.state = xxhash.xxh3_128()

    def load(self, rows: slice) -> torch.Tensor:
        """Rows as they are stored, valid until the next call; to be asked for in order, each once."""
        count = (rows.stop - rows.start) * self.source.row
        view = self.read_bytes[: count * self.read.itemsize]
        self.source.read_into(rows, view)
        self.state.update(view)
        return self.read[:count].view(rows.stop - rows.start, *self.source.shape[1:])

    def widened(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the memory to work on them in, of their shape."""
        return self.wide[: values.numel()].view(values.shape).copy_(values)

    def rounded(self, read: torch.Tensor, rows: slice) -> Buffer:
        """The bytes of what was made of some rows in the memory that `widened` gave.

        Args:
            read: The numbers of the base that it was made of.
            rows: Which.
        """
        count = read.numel()
        numbers = self.numbers[:count]
        if not fits(numbers, self.kind):
            # The base's own numbers are to blame before what was made of them.
            self.source.require_finite(read, rows)
            of = "the base's dtype" if self.write.dtype == self.source.dtype else "dtype"
            place = rows.start * self.source.row + (first_unfit(numbers, self.kind) or 0)
            index = [*map(int, np.unravel_index(place, self.source.shape))]
            raise InputError(
                f"the merged weight {self.source.name} is not finite in {of} {self.kind}, at index {index}"
            )
        self.write[:count].copy_(self.wide[:count])
        return self.write_bytes[: count * self.write.itemsize]


class _Tensor:
    """One tensor of the base, and what each adapter makes of it."""

    def __init__(self, source: StoredTensor, change: Change, adapters: Sequence[Adapter]) -> None:
        self.source, self.transposed = source, change.transposed
        self.wide = source.wide
        self.deltas: dict[int, Factors] = {}
        self.shifts: dict[int, torch.Tensor] = {}
        self.saved: dict[int, StoredTensor] = {}
        self.dora: dict[int, tuple[Factors, torch.Tensor]] = {}
        for part in change.parts:
            adapter = adapters[part.adapter]
            if part.kind == "saved":
                self.saved[part.adapter] = adapter.saved[part.name]
                continue
            if part.kind == "shift":
                scale = adapter.modules[part.name].scale
                self.shifts[part.adapter] = (adapter.shifts[part.name].double() * scale).to(self.wide)
                continue
            factors = adapter.modules[part.name]
            factors = factors.transposed() if self.transposed else factors
            # Whole rows of B are read block by block.
            factors = Factors(factors.A.to(self.wide).contiguous(), factors.B.to(self.wide).contiguous(), factors.scale)
            if part.kind == "dora":
                self.dora[part.adapter] = factors, adapter.magnitudes[part.name].to(self.wide)
            else:
                self.deltas[part.adapter] = factors

    def blocks(self, mixes: Sequence[Sequence[float]], memory: _Memory) -> Blocks:
        used = {index for mix in mixes for index, weight in enumerate(mix) if weight != 0}
        norms = self._column_norms([index for index in self.dora if index in used]) if self.transposed else {}
        stacked: dict[tuple[int, ...], torch.Tensor] = {}
        products: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for mix in mixes:
            owners = tuple(index for index in self.deltas if mix[index] != 0)
            if not owners:
                products.append(None)
                continue
            if owners not in stacked:
                stacked[owners] = torch.cat([self.deltas[index].A for index in owners])
            # Folded once for the tensor: for each block it would cost as much as the product.
            left = torch.cat([folded(self.deltas[index], mix[index], slice(None)) for index in owners], dim=1)
            products.append((left, stacked[owners]))
        for rows in self.source.blocks():
            values = memory.load(rows)
            if self.saved:  # at weight 1 nothing of the base is left, nor of what is wrong with it
                self.source.require_finite(values, rows)
            whole = self._whole(rows, values, used, norms)
            # One after the other, in one memory, whatever the number of mixes.
            yield (
                rows.start * self.source.row * memory.write.itemsize,
                (
                    self._mixed(mix, rows, values, whole, product, memory)
                    for mix, product in zip(mixes, products, strict=True)
                ),
            )

    def _mixed(
        self,
        mix: Sequence[float],
        rows: slice,
        values: torch.Tensor,
        whole: Mapping[int, torch.Tensor],
        product: tuple[torch.Tensor, torch.Tensor] | None,
        memory: _Memory,
    ) -> Buffer:
        """Rows of the tensor at one mix."""
        mixed = values
        if any(mix[index] != 0 for index in whole):
            mixed = interpolate(values.to(self.wide), list(whole.values()), [mix[index] for index in whole])
        value = memory.widened(mixed)
        if product is not None:
            left, right = product
            value.addmm_(left[rows], right)
        for index, shift in self.shifts.items():
            if mix[index] != 0:
                value.add_(shift[rows], alpha=mix[index])
        return memory.rounded(values, rows)

    def _whole(
        self, rows: slice, values: torch.Tensor, used: set[int], norms: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Rows of W_i of each adapter that does not just add something to W."""
        whole = {}
        for index, tensor in self.saved.items():
            if index in used:
                whole[index] = tensor.read(rows).to(self.wide)
        for index, (factors, magnitude) in self.dora.items():
            if index not in used:
                continue
            updated = torch.addmm(values.to(self.wide), folded(factors, 1.0, rows), factors.A)
            if self.transposed:
                whole[index] = dora_weight(updated, magnitude, norms[index], transposed=True)
            else:
                norm = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64).to(self.wide)
                whole[index] = dora_weight(updated, magnitude[rows], norm)
        return whole

    def _column_norms(self, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """Adapter -> the norms of the columns of W + delta, shape [outputs]: a pass through the tensor of its own."""
        squares = {index: torch.zeros(self.source.row, dtype=torch.float64) for index in indices}
        for rows in self.source.blocks() if indices else ():
            values = self.source.read(rows)
            self.source.require_finite(values, rows)
            for index in indices:
                factors, _ = self.dora[index]
                updated = torch.addmm(values.to(self.wide), folded(factors, 1.0, rows), factors.A)
                squares[index] += updated.double().square_().sum(dim=0)
        return {index: total.sqrt().to(self.wide) for index, total in squares.items()}
