"""Weighted sums of full models, element by element: sum_i w_i * W_i, rounded once. numpy only, no torch here.

Every byte of every input is read once for all mixes; a few blocks of numbers that fit in the processor's cache are all
that is held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from psacpo.errors import InputError
from psacpo.merge.blend import Blend, NotFinite
from psacpo.merge.floats import STORAGE, Array
from psacpo.merge.hashes import InputHashes
from psacpo.merge.models import ModelDirectory
from psacpo.merge.shards import Blocks, open_input, read_at, read_into, write_shards
from psacpo.merge.tensorfiles import FLOATING, SIZES, Entry

# Elements that are worked on at once, by measurement: fewer, and the calls cost more than the work; more, and nothing
# stays in a core's caches.
_BLOCK = 1 << 16
# In the names of tensors that have a row for each token.
_VOCABULARY = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embed_out", "lm_head")
# A model's weights go through two cores about as fast as memory gives and takes them.
THREADS = min(2, os.cpu_count() or 1)


class Digests(NamedTuple):
    """What went through a merge, as `psacpo.merge.shards` digests it.

    Attributes:
        outputs: For each output: file name -> digest.
        inputs: For each source: file name -> digest.
    """

    outputs: list[dict[str, str]]
    inputs: list[dict[str, str]]


def write_linear(
    directories: Sequence[Path],
    models: Sequence[ModelDirectory],
    mixes: Sequence[Sequence[float]],
    *,
    layout: ModelDirectory | None = None,
    dtype: str | None = None,
    threads: int = THREADS,
    done: Callable[[int], None] = lambda count: None,
) -> Digests:
    """Write sum_i w_i * W_i into each directory, for its own weights w: the shards only, no side files.

    Args:
        directories: One for each mix.
        models: The sources; their shards may be cut differently.
        mixes: For each directory one weight a source.
        layout: The model whose shards the outputs have; None is the first source.
        dtype: Of all floating tensors, as safetensors calls it; None keeps the layout's.
        threads: Tensors that are worked on at once.
        done: Called with the bytes of the layout that are dealt with, once for each directory.

    Raises:
        InputError: As `linear_producer` says. Nothing is written for models that do not fit together.
    """
    producer = linear_producer(models, mixes, dtype=dtype)
    outputs = write_shards(directories, layout or models[0], producer, dtype=dtype, threads=threads, done=done)
    return Digests(outputs, producer.input_digests())


def require_same_tensors(models: Mapping[str, ModelDirectory]) -> None:
    """Refuse models that cannot be summed: by headers, and by the content of what is not floating.

    Args:
        models: What to call a model -> the model.

    Raises:
        InputError: The first tensor that one lacks, has in another shape, or has of a dtype that cannot be mixed and
            with other content.
    """
    (first, one), *others = models.items()
    wanted = one.tensors()
    for name, model in others:
        found = model.tensors()
        for here, there, owner, lacking in ((wanted, found, first, name), (found, wanted, name, first)):
            tensor = next((tensor for tensor in here if tensor not in there), None)
            if tensor is not None:
                raise InputError(
                    f"the models do not hold the same tensors: {lacking} ({models[lacking].path}) lacks {tensor}, which "
                    f"{owner} ({models[owner].path}) has"
                )
        for tensor, (shard, entry) in wanted.items():
            other_shard, other = found[tensor]
            if entry.shape != other.shape:
                raise InputError(_shape_mismatch(tensor, {first: entry.shape, name: other.shape}))
            if entry.dtype in FLOATING and other.dtype in FLOATING:
                continue
            if entry.dtype != other.dtype:
                raise InputError(f"{tensor} is of dtype {entry.dtype} in {first} and {other.dtype} in {name}")
            start, other_start = one.shards[shard][0] + entry.start, model.shards[other_shard][0] + other.start
            size = entry.end - entry.start
            if not _same_bytes(one.path / shard, start, model.path / other_shard, other_start, size):
                raise InputError(
                    f"{tensor} is of dtype {entry.dtype}, which cannot be mixed, and differs between {first} "
                    f"({one.path}) and {name} ({model.path})"
                )


def linear_producer(
    models: Sequence[ModelDirectory], mixes: Sequence[Sequence[float]], *, dtype: str | None = None
) -> LinearProducer:
    """What `psacpo.merge.shards.write_shards` asks for the bytes of sum_i w_i * W_i: one output for each mix.

    Sums are in float32, in float64 where an input is, and rounded once, to nearest, ties to even. A mix of weight 1 on
    one source and 0 on all others gives that source's bits back; equal sources of weights that sum to 1 give themselves.

    Args:
        models: The sources; their shards may be cut differently.
        mixes: For each output one weight a source.
        dtype: Of all floating tensors, as safetensors calls it; None keeps the layout's.

    Raises:
        InputError: Here: as `require_same_tensors`. While producing: a number in an input that is not finite, by file,
            tensor and index; a result that is not finite in the output's dtype, by tensor and index.
        ValueError: A mix of another length, or with a weight that is not finite.
    """
    for mix in mixes:
        if len(mix) != len(models) or not all(map(math.isfinite, mix)):
            raise ValueError(f"weights {list(mix)} for {len(models)} models")
    require_same_tensors({f"model {place}": model for place, model in enumerate(models, 1)})
    return LinearProducer(models, mixes, dtype)


class LinearProducer:
    """See `linear_producer`. It also learns the digests of the inputs, since every byte of them goes through it."""

    def __init__(
        self, models: Sequence[ModelDirectory], mixes: Sequence[Sequence[float]], dtype: str | None = None
    ) -> None:
        self.models, self.mixes, self.dtype = list(models), [tuple(mix) for mix in mixes], dtype
        self.hashes = InputHashes(models)
        self._places = [model.tensors() for model in models]

    def __call__(self, name: str, entry: Entry) -> Blocks | None:
        if entry.dtype not in FLOATING:
            return None
        return self._blocks(name, entry.shape, self.dtype or entry.dtype)

    def input_digests(self) -> list[dict[str, str]]:
        """For each source: file name -> digest. What was not asked for (shards that were finished before) is read now."""
        return self.hashes.digests()

    def _blocks(self, name: str, shape: tuple[int, ...], dtype: str) -> Blocks:
        count = math.prod(shape)
        step = min(_BLOCK, count)
        with ExitStack() as stack:
            sources = [
                _Source(model, *places[name], step, stack)
                for model, places in zip(self.models, self._places, strict=True)
            ]
            blend = Blend([source.dtype for source in sources], self.mixes, dtype, step)
            for start in range(0, count, step):
                stored = [source.read(min(step, count - start)) for source in sources]
                yield start * SIZES[dtype], _located(blend(stored), sources, name, shape, start)
            for place, source in enumerate(sources):
                self.hashes.known[place, name] = source.state.digest()


class _Source:
    """One model's tensor on disk, read from its beginning to its end."""

    def __init__(self, model: ModelDirectory, shard: str, entry: Entry, step: int, stack: ExitStack) -> None:
        self.path, self.dtype = model.path / shard, entry.dtype
        self.offset = model.shards[shard][0] + entry.start
        self.descriptor = stack.enter_context(open_input(self.path))
        self.state = xxhash.xxh3_128()
        self.numbers: Array = np.empty(step, STORAGE[entry.dtype])

    def read(self, size: int) -> Array:
        """The next `size` numbers as they are stored; they last until the next call."""
        numbers = self.numbers[:size]
        data = numbers.view(np.uint8).data
        read_into(self.descriptor, self.path, self.offset, data)
        self.state.update(data)
        self.offset += data.nbytes
        return numbers


def _located(
    sums: Iterator[Array], sources: Sequence[_Source], name: str, shape: tuple[int, ...], start: int
) -> Iterator[Array]:
    """`sums`, with what is not finite told by file, tensor and index."""
    try:
        yield from sums
    except NotFinite as error:
        index = [int(i) for i in np.unravel_index(start + error.place, shape or (1,))]
        if error.source is not None:
            holds = f"{sources[error.source].path}: {name} holds {error.value} at index {index}"
            raise InputError(holds, allowed="finite numbers") from None
        raise InputError(
            f"the merged {name} is not finite in the output's dtype at index {index}: it would be {error.value:g}",
            allowed="weights that keep it in range, or a wider --dtype",
        ) from None


def _same_bytes(one: Path, start: int, other: Path, other_start: int, size: int) -> bool:
    with open_input(one) as first, open_input(other) as second:
        for offset in range(0, size, _BLOCK):
            count = min(_BLOCK, size - offset)
            if read_at(first, one, start + offset, count) != read_at(second, other, other_start + offset, count):
                return False
    return True


def _shape_mismatch(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    said = ", ".join(f"{list(shape)} in {name}" for name, shape in shapes.items())
    (first, one), (second, other) = shapes.items()
    vocabulary = len(one) == len(other) == 2 and one[1] == other[1] and any(part in tensor for part in _VOCABULARY)
    if not vocabulary:
        return f"the models do not fit together: {tensor} is {said}"
    return f"the models have different vocabularies: {one[0]} tokens in {first}, {other[0]} in {second} ({tensor} is {said})"
