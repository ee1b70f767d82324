"""Deltas of adapters merged by a method and added to their base's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from psacpo.errors import InputError
from psacpo.merge.adapters import Adapter, factors_by_module
from psacpo.merge.changes import plan_deltas
from psacpo.merge.combine import combined_delta
from psacpo.merge.models import ModelDirectory
from psacpo.merge.parameters import MethodSettings, count_layers
from psacpo.merge.shards import Blocks, Buffer, Producer
from psacpo.merge.stored import DTYPES
from psacpo.merge.tensorfiles import Entry


def delta_method_producer(
    base: ModelDirectory,
    adapters: Sequence[Adapter],
    settings: Sequence[MethodSettings],
    *,
    seed: int = 0,
    dtype: str | None = None,
) -> Producer:
    """What `shards.write_shards` asks for the bytes of W_base + a method's merge of the adapters' dense deltas.

    A tensor is in memory as a whole, in float32, for each source; the sum is rounded once.

    Args:
        base: The base.
        adapters: Plain LoRA, all on this base.
        settings: For each output.
        seed: Of the methods that draw.
        dtype: Of the outputs, as safetensors calls it; None keeps each tensor's own.

    Raises:
        InputError: Here: an adapter that does not fit. While producing: a result that is not finite.
    """
    rows = factors_by_module(adapters)
    shapes = {module: next(f.shape for f in row if f is not None) for module, row in rows.items()}
    embeddings = frozenset[str]().union(*(adapter.embeddings for adapter in adapters))
    plan = plan_deltas(base, shapes, embeddings=embeddings, fan_in_fan_out=adapters[0].fan_in_fan_out)
    layers = count_layers(name for _, entries in base.shards.values() for name in entries)

    def produce(name: str, entry: Entry) -> Blocks | None:
        if name not in plan:
            return None if dtype is None else _one([_rounded(base, name, None, entry.dtype)] * len(settings))
        module, transposed = plan[name]
        deltas = [combined_delta(name, rows[module], one, seed=seed, layers=layers) for one in settings]
        return _one([_rounded(base, name, delta.T if transposed else delta, entry.dtype) for delta in deltas])

    return produce


def _one(buffers: Sequence[Buffer]) -> Iterator[tuple[int, Sequence[Buffer]]]:
    yield 0, buffers


def _rounded(base: ModelDirectory, name: str, delta: torch.Tensor | None, dtype: str) -> Buffer:
    weight = base.read(name)
    assert weight is not None
    if dtype not in DTYPES:
        return weight.contiguous().view(torch.uint8).numpy().reshape(-1)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = (wide if delta is None else wide + delta).to(DTYPES[dtype])
    if not torch.isfinite(merged).all():
        raise InputError(f"the merged {name} is not finite in {dtype}", allowed="--dtype float32")
    return merged.contiguous().view(torch.uint8).numpy().reshape(-1)
