"""Weighted sums of arrays of stored numbers, rounded once: sum_i w_i * x_i. numpy only; no files, no models."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from psacpo.merge.floats import (
    STORAGE,
    Array,
    first_unfit,
    fits,
    narrow,
    narrow_pairs,
    widen,
    widen_pairs,
    working_dtype,
)

# Weights whose sum is as near as this to 1 sum to 1: the rest is the rounding of decimal fractions.
_ONE = 1e-15


class _Sum(NamedTuple):
    """The memory of one sum: what is summed, by what (None: as it is), into what; a product on the way, room to round."""

    parts: Sequence[Array]
    factors: Sequence[Array | None]
    total: Array
    term: Array | None
    scratch: Array


class _Laid(NamedTuple):
    """All memory that a block of n numbers needs; differences are triples one, other, where one - other goes."""

    n: int
    wide: Sequence[Array]
    differences: Sequence[tuple[Array, Array, Array]]
    sums: Sequence[_Sum]
    out: Array


class NotFinite(ArithmeticError):
    """A number that is not finite.

    Attributes:
        source: The array that holds it; None for a sum of finite numbers that is not finite in the output's dtype.
        place: Its index in the array.
        value: The number; that of a sum before it is rounded.
    """

    def __init__(self, source: int | None, place: int, value: float) -> None:
        super().__init__(f"{value} at {place}")
        self.source, self.place, self.value = source, place, value


class Blend:
    """Weighted sums of up to `size` numbers of each source, with the memory that they take.

    A sum is in float32, or float64 where a source or the output is. Weights that sum to 1 are applied as
    x_k + sum_i w_i * (x_i - x_k), so that equal sources give themselves; k is the source of the largest weight, so that
    rounding stays that of what the sum is nearest to. A weight of 1 alone gives the source's bits.

    Args:
        stored: For each source its dtype, as safetensors calls it.
        mixes: For each sum one weight a source.
        dtype: Of the sums.
        size: The most numbers that come at once.
    """

    def __init__(self, stored: Sequence[str], mixes: Sequence[Sequence[float]], dtype: str, size: int) -> None:
        self.stored, self.mixes, self.dtype = list(stored), [tuple(mix) for mix in mixes], dtype
        # All in pairs of bfloat16, but for a last number that has no other.
        self._paired = sys.byteorder == "little" and {dtype, *stored} == {"BF16"}
        self._alone = [_alone(mix) for mix in self.mixes]
        self._affine = [abs(math.fsum(mix) - 1) <= _ONE for mix in self.mixes]
        working = working_dtype(dtype, *stored)
        # Arrays without axes: numpy takes a plain number apart anew at each call.
        self._weights = [[np.array(weight, working) for weight in mix] for mix in self.mixes]
        self._wide = [np.empty(size, working) for _ in stored]
        self._anchors = [max(range(len(mix)), key=lambda place: abs(mix[place])) for mix in self.mixes]
        summed = [place for place, alone in enumerate(self._alone) if alone is None]
        used = {self._anchors[place] for place in summed if self._affine[place]}
        # Differences may take the sources' place where no sum needs those themselves.
        inside = len(used) == 1 and all(self._affine[place] for place in summed)
        # By anchor, for each source (its own is of no use).
        self._differences = {
            anchor: list(self._wide)
            if inside
            else [np.empty(size if place != anchor else 0, working) for place in range(len(stored))]
            for anchor in sorted(used)
        }
        self._total, self._term = np.empty(size, working), np.empty(size, working)
        self._out: Array = np.empty(size, STORAGE[dtype])
        # The last sum is made where its parts are: what nobody asks for again need not leave the processor's cache.
        self._last = summed[-1] if summed else None
        self._laid = self._lay_out(size)

    def __call__(self, arrays: Sequence[Array]) -> Iterator[Array]:
        """Each sum as it is stored, shape [n], valid until the next is asked for.

        Args:
            arrays: Each source's numbers as they are stored (`floats.STORAGE`), shape [n], n at most `size`.

        Raises:
            NotFinite: Some number of a source (whatever its weight) or of a sum is not finite.
        """
        n = len(arrays[0])
        if n != self._laid.n:
            self._laid = self._lay_out(n)
        paired = self._paired and n % 2 == 0
        for numbers, array, stored in zip(self._laid.wide, arrays, self.stored, strict=True):
            if paired:
                widen_pairs(array, numbers)
            else:
                widen(array, stored, numbers)
        # Whatever is not finite in a source is not finite in a sum either, also with a weight of 0: sums are looked at.
        if all(alone is not None for alone in self._alone):
            self._require_finite(arrays)
        with np.errstate(all="ignore"):
            for one, other, difference in self._laid.differences:
                np.subtract(one, other, difference)
        out = self._laid.out
        for mix, alone, place in zip(self.mixes, self._alone, self._laid.sums, strict=True):
            if alone is not None and self.stored[alone] == self.dtype:
                yield arrays[alone]
                continue
            if alone is not None:
                widen(arrays[alone], self.stored[alone], place.total)
            else:
                _accumulate(place.parts, place.factors, place.total, place.term)
            if not fits(place.total, self.dtype):
                self._require_finite(arrays)
                narrow(self._sum_again(arrays, mix), self.dtype, out, place.scratch)
            elif paired:
                narrow_pairs(place.total, out, place.scratch)
            else:
                narrow(place.total, self.dtype, out, place.scratch)
            yield out

    def _lay_out(self, n: int) -> _Laid:
        """Where everything lies for n numbers at a time. Views are made here: a block's take as long as its sums."""
        wide = [array[:n] for array in self._wide]
        apart = {anchor: [array[:n] for array in arrays] for anchor, arrays in self._differences.items()}
        differences = [
            (wide[place], wide[anchor], difference)
            for anchor, found in apart.items()
            for place, difference in enumerate(found)
            if place != anchor
        ]
        sums = []
        for number, (weights, affine, anchor) in enumerate(
            zip(self._weights, self._affine, self._anchors, strict=True)
        ):
            parts: list[Array] = wide
            factors: list[Array | None] = [*weights]
            if affine and anchor in apart:
                others = [place for place in range(len(weights)) if place != anchor]
                parts = [wide[anchor], *(apart[anchor][place] for place in others)]
                factors = [None, *(weights[place] for place in others)]
            total, free = self._total[:n], self._term
            term: Array | None = self._term[:n]
            if number == self._last and len(parts) > 1:
                total, term, free = parts[-1], None, parts[0]
            sums.append(_Sum(parts, factors, total, term, free.view(np.uint32)[:n]))
        return _Laid(n, wide, differences, sums, self._out[:n])

    def _require_finite(self, arrays: Sequence[Array]) -> None:
        for source, (array, stored) in enumerate(zip(arrays, self.stored, strict=True)):
            numbers: Array = np.empty(array.shape, np.float64)
            widen(array, stored, numbers)
            place = first_unfit(numbers, "F64")
            if place is not None:
                raise NotFinite(source, place, float(numbers[place]))

    def _sum_again(self, arrays: Sequence[Array], mix: Sequence[float]) -> Array:
        """A sum that went out of range, in float64: it may have been on the way only."""
        total = np.zeros(arrays[0].shape, np.float64)
        numbers, term = np.empty_like(total), np.empty_like(total)
        with np.errstate(all="ignore"):
            for array, stored, weight in zip(arrays, self.stored, mix, strict=True):
                widen(array, stored, numbers)
                np.multiply(numbers, weight, out=term)
                np.add(total, term, out=total)
        place = first_unfit(total, self.dtype)
        if place is not None:
            raise NotFinite(None, place, float(total[place]))
        return total


def _accumulate(values: Sequence[Array], weights: Sequence[Array | None], total: Array, term: Array | None) -> None:
    """sum_i weights[i] * values[i] into `total`, the first last, so that a weight of 1 (None) on it costs nothing.

    `term` holds a product meanwhile; without it each value's own memory does, and `total` may be the last value's.
    """
    last = weights[-1]
    assert last is not None
    with np.errstate(all="ignore"):
        np.multiply(values[-1], last, total)
        for numbers, weight in zip(values[-2::-1], weights[-2::-1], strict=True):
            product = numbers if weight is None else np.multiply(numbers, weight, numbers if term is None else term)
            np.add(total, product, total)


def _alone(mix: Sequence[float]) -> int | None:
    """The source that is all of a mix."""
    used = [place for place, weight in enumerate(mix) if weight != 0]
    return used[0] if len(used) == 1 and mix[used[0]] == 1 else None
