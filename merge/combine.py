"""Full checkpoints merged by any method, tensor by tensor: bytes of each output, in blocks of rows.

Element-wise methods hold a block of each source. The others need whole tensors: one tensor of each source at a time, in
float32, however many mixes are made of them; what the mixes have in common (which elements are kept) is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch

from psacpo.errors import InputError
from psacpo.merge.arithmetic import Factors, dense_delta
from psacpo.merge.methods import METHODS, Mixture, merge_tensors, mixture, sparsified, sparsity
from psacpo.merge.models import ModelDirectory
from psacpo.merge.parameters import Arguments, MethodSettings, count_layers
from psacpo.merge.signatures import DELTA_METHODS, signature
from psacpo.merge.sparsify import draws
from psacpo.merge.stored import DTYPES, StoredTensor, stored_in
from psacpo.merge.tensorfiles import FLOATING, Entry

if TYPE_CHECKING:
    from psacpo.merge.shards import Blocks, Buffer, Producer


def method_producer(
    models: Sequence[ModelDirectory],
    base: ModelDirectory | None,
    settings: Sequence[MethodSettings],
    *,
    dtype: str | None = None,
    seed: int = 0,
) -> Producer:
    """What `psacpo.merge.shards.write_shards` asks for the bytes of each tensor: one output for each of `settings`.

    A source that is the whole result (weight 1, all others 0) gives its bits back. Tensors of other than floating dtypes
    must be equal in all sources and are left to the writer to copy.

    Args:
        models: The sources, in the order of the settings' models.
        base: What deltas are taken from, for the methods that need one (nuslerp: may have one).
        settings: One a mix, all of one method.
        dtype: Output dtype as safetensors calls it; None keeps each tensor's own, which must then be one in all sources.
        seed: Of the methods that draw.

    Raises:
        InputError: Here: models that do not fit each other, the method or the settings. While producing: a number in an
            input that is not finite, by file, tensor and index; a result that is not finite in the output's dtype.
    """
    method = settings[0].method
    if any(one.method != method for one in settings):
        raise ValueError("mixes of different methods in one pass")
    _require_fitting(models, base, settings)
    everyone = [*models, *([base] if base else [])]
    names = _require_alike(everyone, dtype)
    layers = count_layers(names)
    arguments = {name: [one.resolve(name, layers) for one in settings] for name in names}
    places = {name: [stored for model in everyone if (stored := stored_in(model, name))] for name in names}

    def produce(name: str, entry: Entry) -> Blocks | None:
        if entry.dtype not in FLOATING:
            return None
        sources = places[name]
        work = _Work(
            method,
            sources[: len(models)],
            sources[len(models)] if base else None,
            arguments[name],
            DTYPES[dtype or entry.dtype],
            seed,
        )
        return work.blocks()

    return produce


def combined_delta(
    name: str,
    deltas: Sequence[torch.Tensor | Factors | None],
    settings: MethodSettings,
    *,
    seed: int = 0,
    layers: Mapping[str, int],
) -> torch.Tensor:
    """The deltas of several LoRA adapters for one weight, merged by a method: shape [outputs, inputs], float32.

    Args:
        name: The weight's name in the base model; filters, gradients and draws go by it.
        deltas: Each dense [outputs, inputs], or as factors; None where the adapter leaves the weight alone (zero).
        settings: Of one of `DELTA_METHODS`.
        seed: Of the methods that draw.
        layers: From `count_layers` of the base's tensors.

    Raises:
        InputError: A method that is not defined on deltas, or another number of deltas than the settings have models.
        ValueError: No delta at all.
    """
    if settings.method not in DELTA_METHODS:
        raise InputError(
            f"{settings.method} works on weights, not on the deltas of adapters", allowed=", ".join(DELTA_METHODS)
        )
    _require_count(len(deltas), settings)
    dense = [dense_delta(delta, torch.float32) if isinstance(delta, Factors) else delta for delta in deltas]
    present = next((delta for delta in dense if delta is not None), None)
    if present is None:
        raise ValueError(f"no adapter has a delta for {name}")
    tensors = [torch.zeros(present.shape) if delta is None else delta.float() for delta in dense]
    arguments = settings.resolve(name, layers)
    return merge_tensors(settings.method, tensors, arguments, partial(draws, seed, name))


class _Work:
    """One tensor of all sources on its way to its outputs."""

    def __init__(
        self,
        method: str,
        sources: Sequence[StoredTensor],
        base: StoredTensor | None,
        arguments: Sequence[Arguments],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.method, self.sources, self.base, self.arguments, self.dtype = method, sources, base, arguments, dtype
        self.known = METHODS[method]
        self.draw = partial(draws, seed, sources[0].name)
        self.stored = [*sources, *([base] if base else [])]
        self.wide = reduce(torch.promote_types, (one.wide for one in self.stored))

    def blocks(self) -> Blocks:
        return self._elementwise() if self.known.signature.elementwise else self._whole()

    def _elementwise(self) -> Blocks:
        mixtures = [mixture(self.method, (), arguments) for arguments in self.arguments]
        for rows in self.sources[0].blocks():
            originals = self._read(rows)
            tensors = self._differences(originals)
            yield self._block(rows, [self._mixed(mix, tensors, rows, originals) for mix in mixtures])

    def _whole(self) -> Blocks:
        count = len(self.sources)
        tensors = [torch.empty(self.sources[0].shape, dtype=self.wide) for _ in range(count)]
        for rows in self.sources[0].blocks():
            for tensor, part in zip(tensors, self._differences(self._read(rows)), strict=True):
                tensor[rows] = part
        # Mixes whose settings for a source agree share its sparse tensor: where only ratios differ there is one a source.
        shared: dict[str, torch.Tensor] = {}
        sparse: list[list[torch.Tensor]] = [[] for _ in self.arguments]
        for source in range(count):
            tensor = tensors.pop(0)
            for arguments, row in zip(self.arguments, sparse, strict=True):
                key = repr((source, sparsity(arguments, source)))
                if key not in shared:
                    shared[key] = sparsified(self.method, tensor, source, arguments, self.draw)
                row.append(shared[key])
            del tensor
        mixtures = [mixture(self.method, row, arguments) for row, arguments in zip(sparse, self.arguments, strict=True)]
        for rows in self.sources[0].blocks():
            originals = self._read(rows)
            parts = [[tensor[rows] for tensor in row] for row in sparse]
            yield self._block(
                rows,
                [self._mixed(mix, part, rows, originals) for mix, part in zip(mixtures, parts, strict=True)],
            )

    def _read(self, rows: slice) -> list[torch.Tensor]:
        values = []
        for one in self.stored:
            part = one.read(rows)
            one.require_finite(part, rows)
            values.append(part.to(self.wide))
        return values

    def _differences(self, originals: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the method works on: differences from the base, which is the last, or the weights."""
        if self.base is None:
            return originals
        *sources, base = originals
        return [source - base for source in sources]

    def _mixed(
        self, mix: Mixture, tensors: Sequence[torch.Tensor], rows: slice, originals: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if mix.alone is not None and self.known.sparsify is None:
            return originals[mix.alone]
        merged = mix(tensors, rows)
        return merged if self.base is None else merged.add_(originals[-1])

    def _block(self, rows: slice, merged: Sequence[torch.Tensor]) -> tuple[int, Sequence[Buffer]]:
        """Rounded once, as bytes, at their offset."""
        buffers = []
        for tensor in merged:
            rounded = tensor.to(self.dtype).reshape(-1)
            if not torch.isfinite(rounded).all():
                raise InputError(
                    f"the merged weight {self.sources[0].name} is not finite in {str(self.dtype).removeprefix('torch.')}"
                )
            buffers.append(rounded.view(torch.uint8).numpy())
        return rows.start * self.sources[0].row * self.dtype.itemsize, buffers


def _require_fitting(
    models: Sequence[ModelDirectory], base: ModelDirectory | None, settings: Sequence[MethodSettings]
) -> None:
    method = settings[0].method
    takes = signature(method)
    if takes.base == "required" and base is None:
        raise InputError(f"{method} merges differences from a base, and none was given", allowed="a base model")
    if takes.base == "none" and base is not None:
        raise InputError(f"{method} merges weights and takes no base", given=base.path)
    for one in settings:
        _require_count(len(models), one)


def _require_count(count: int, settings: MethodSettings) -> None:
    if count != len(settings.models):
        raise InputError(f"the settings are for {len(settings.models)} models", given=f"{count} models")


def _require_alike(models: Sequence[ModelDirectory], dtype: str | None) -> list[str]:
    """The names of the tensors, which all models must have in the same shapes and dtypes."""
    first, *others = models
    entries = _entries(first)
    for other in others:
        theirs = _entries(other)
        missing = sorted(entries.keys() ^ theirs.keys())
        if missing:
            lacks = other if missing[0] in entries else first
            has = first if lacks is other else other
            raise InputError(f"the models' weights differ: {lacks.path} lacks {missing[0]}, which {has.path} has")
        for name, entry in entries.items():
            if entry.shape != theirs[name].shape:
                raise InputError(
                    f"shape mismatch at {name}: {list(entry.shape)} in {first.path}, {list(theirs[name].shape)} in "
                    f"{other.path}"
                )
            floating = entry.dtype in FLOATING and theirs[name].dtype in FLOATING
            if entry.dtype != theirs[name].dtype and not (floating and dtype):
                raise InputError(
                    f"dtype mismatch at {name}: {entry.dtype} in {first.path}, {theirs[name].dtype} in {other.path}",
                    allowed="one dtype" + (", or a dtype asked for by name" if floating else ""),
                )
            if not floating:
                _require_equal(name, first, other)
    return list(entries)


def _require_equal(name: str, one: ModelDirectory, other: ModelDirectory) -> None:
    """Tensors that are not floats (counters, masks) cannot be averaged: they must be the same."""
    held = []
    for model in (one, other):
        found = model.find(name)
        assert found is not None
        shard, entry = found
        if entry.dtype.startswith("F"):
            raise InputError(f"{name} of {model.path} is of a dtype that cannot be merged", given=entry.dtype)
        with (model.path / shard).open("rb") as handle:
            handle.seek(model.shards[shard][0] + entry.start)
            held.append(handle.read(entry.end - entry.start))
    if held[0] != held[1]:
        raise InputError(f"{name} holds other values ({entry.dtype}) in {one.path} than in {other.path}")


def _entries(model: ModelDirectory) -> dict[str, Entry]:
    return {name: entry for _, entries in model.shards.values() for name, entry in entries.items()}
