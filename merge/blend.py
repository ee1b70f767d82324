"""Weighted sums of arrays of stored numbers, rounded once: sum_i w_i * x_i. numpy only; no files, no models."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

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
# The weight of what is added as it is.
_WHOLE = 1


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
        self._weights = [[working(weight) for weight in mix] for mix in self.mixes]
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

    def __call__(self, arrays: Sequence[Array]) -> Iterator[Array]:
        """Each sum as it is stored, shape [n], valid until the next is asked for.

        Args:
            arrays: Each source's numbers as they are stored (`floats.STORAGE`), shape [n], n at most `size`.

        Raises:
            NotFinite: Some number of a source (whatever its weight) or of a sum is not finite.
        """
        n = len(arrays[0])
        paired = self._paired and n % 2 == 0
        wide = [array[:n] for array in self._wide]
        for numbers, array, stored in zip(wide, arrays, self.stored, strict=True):
            if paired:
                widen_pairs(array, numbers)
            else:
                widen(array, stored, numbers)
        # Whatever is not finite in a source is not finite in a sum either, also with a weight of 0: sums are looked at.
        if all(alone is not None for alone in self._alone):
            self._require_finite(arrays)
        with np.errstate(all="ignore"):
            for anchor, differences in self._differences.items():
                for place, difference in enumerate(differences):
                    if place != anchor:
                        np.subtract(wide[place], wide[anchor], out=difference[:n])
        for mix, weights, alone, affine, anchor in zip(
            self.mixes, self._weights, self._alone, self._affine, self._anchors, strict=True
        ):
            if alone is not None and self.stored[alone] == self.dtype:
                yield arrays[alone]
                continue
            total, term, out = self._total[:n], self._term[:n], self._out[:n]
            if alone is not None:
                widen(arrays[alone], self.stored[alone], total)
            elif affine:
                others = [place for place in range(len(mix)) if place != anchor]
                parts = [self._differences[anchor][place][:n] for place in others]
                _accumulate([wide[anchor], *parts], [_WHOLE, *(weights[place] for place in others)], total, term)
            else:
                _accumulate(wide, weights, total, term)
            scratch = term.view(np.uint32)[:n]
            if not fits(total, self.dtype):
                self._require_finite(arrays)
                narrow(self._sum_again(arrays, mix), self.dtype, out, scratch)
            elif paired:
                narrow_pairs(total, out, scratch)
            else:
                narrow(total, self.dtype, out, scratch)
            yield out

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


def _accumulate(values: Sequence[Array], weights: Sequence[Any], total: Array, term: Array) -> None:
    """sum_i weights[i] * values[i] into `total`, the first last, so that a weight of 1 on it costs nothing."""
    with np.errstate(all="ignore"):
        np.multiply(values[-1], weights[-1], out=total)
        for numbers, weight in zip(values[-2::-1], weights[-2::-1], strict=True):
            if weight == 1:
                np.add(total, numbers, out=total)
                continue
            np.multiply(numbers, weight, out=term)
            np.add(total, term, out=total)


def _alone(mix: Sequence[float]) -> int | None:
    """The source that is all of a mix."""
    used = [place for place, weight in enumerate(mix) if weight != 0]
    return used[0] if len(used) == 1 and mix[used[0]] == 1 else None
