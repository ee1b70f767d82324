"""Floating numbers as safetensors stores them, widened to float32 or float64 and rounded back once. numpy only.

numpy knows no bfloat16. It is the upper half of float32: widened by 16 zero bits behind it, narrowed by rounding those
off. Everything rounds to nearest, ties to even (IEEE 754).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

STORAGE: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""safetensors' name of a floating dtype -> the numpy dtype of its elements as they lie in a file."""
# The half of a word that is bfloat16; the other constants of rounding to it. (As arrays without axes: numpy takes a plain
# number apart anew at each call.)
_UPPER, _SIXTEEN, _ONE, _BELOW_HALF = (np.array(word, np.uint32) for word in (0xFFFF0000, 16, 1, 0x7FFF))
# The least magnitude that rounds to infinity: half a step beyond the largest finite number.
_OVERFLOW = {"F64": math.inf, "F32": 2.0**128 - 2.0**103, "F16": 65520.0, "BF16": 2.0**128 - 2.0**119}


def working_dtype(*dtypes: str) -> Any:
    """The numpy dtype that arithmetic on such numbers is done in: float64 if any of them is, else float32."""
    return np.float64 if "F64" in dtypes else np.float32


def widen(stored: Array, dtype: str, out: Array) -> None:
    """Stored numbers, exactly, as float32 or float64 in `out`.

    Args:
        stored: Of the dtype `STORAGE[dtype]`, shape [n].
        dtype: safetensors' name.
        out: float32 (for F64 only float64 will do) or float64, shape [n].
    """
    if dtype != "BF16":
        np.copyto(out, stored)
        return
    words = (out if out.dtype == np.float32 else np.empty(out.shape, np.float32)).view(np.uint32)
    np.copyto(words, stored)
    np.left_shift(words, _SIXTEEN, words)
    if out.dtype != np.float32:
        np.copyto(out, words.view(np.float32))


def fits(values: Array, dtype: str) -> bool:
    """Whether all of `values`, float32 or float64, are finite and stay so when they are rounded to `dtype`."""
    if values.size == 0:
        return True
    limit = _OVERFLOW[dtype]
    # One pass instead of two: no square of a number is above the sum of all. NaN and what overflows are not below.
    with np.errstate(over="ignore", invalid="ignore"):
        if float(np.dot(values, values)) < min(limit / 2, 1e18) ** 2:
            return True
    # NaN is in any maximum, and less than nothing. (`values.max()` takes as long to call as a block to look at.)
    return float(np.maximum.reduce(values)) < limit and float(np.minimum.reduce(values)) > -limit


def first_unfit(values: Array, dtype: str) -> int | None:
    """The place of the first number that is not finite, or would not be in `dtype`."""
    found = np.flatnonzero(~(np.abs(values.astype(np.float64)) < _OVERFLOW[dtype]))
    return int(found[0]) if found.size else None


def narrow(values: Array, dtype: str, out: Array, scratch: Array) -> None:
    """Numbers rounded once to `dtype`, in `out`. Those for which `fits` says no give no defined result.

    Args:
        values: float32 or float64, shape [n]; they may be used up.
        dtype: safetensors' name.
        out: Of the dtype `STORAGE[dtype]`, shape [n].
        scratch: uint32, shape [n].
    """
    if dtype != "BF16":
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values, casting="same_kind")
        return
    if values.dtype == np.float64:
        values = _round_to_odd(values)
    words = values.view(np.uint32)
    _round_words(words, scratch)
    np.right_shift(words, _SIXTEEN, words)
    np.copyto(out, words, casting="unsafe")


def widen_pairs(stored: Array, out: Array) -> None:
    """bfloat16 numbers, exactly, as float32, out of order: first those at odd places, then those at even ones.

    Two at a time are one 32-bit word (little-endian, as safetensors is), which saves half of the memory traffic.

    Args:
        stored: uint16, shape [n], n even.
        out: float32, shape [n].
    """
    pairs, words = stored.view(np.uint32), out.view(np.uint32)
    half = len(pairs)
    np.bitwise_and(pairs, _UPPER, words[:half])
    np.left_shift(pairs, _SIXTEEN, words[half:])


def narrow_pairs(values: Array, out: Array, scratch: Array) -> None:
    """`narrow` to bfloat16 of numbers in the order that `widen_pairs` gives, in `out` in their own order.

    Args:
        values: float32, shape [n], n even; they are used up.
        out: uint16, shape [n].
        scratch: uint32, shape [n].
    """
    words, pairs = values.view(np.uint32), out.view(np.uint32)
    _round_words(words, scratch)
    half = len(pairs)
    odd, even = words[:half], words[half:]
    np.bitwise_and(odd, _UPPER, pairs)
    np.right_shift(even, _SIXTEEN, even)
    np.bitwise_or(pairs, even, pairs)


def _round_words(words: Array, scratch: Array) -> None:
    """float32 as words: add half a step of bfloat16, less one where the last bit that stays is 0, so ties go to even."""
    np.right_shift(words, _SIXTEEN, scratch)
    np.bitwise_and(scratch, _ONE, scratch)
    np.add(words, scratch, words)
    np.add(words, _BELOW_HALF, words)


def _round_to_odd(values: Array) -> Array:
    """float64 as float32 that rounds on to bfloat16 as the float64 itself would (Boldo and Melquiond 2008).

    Towards zero, and then, where anything was lost, with the last bit set: so no tie comes about and none is lost.
    """
    single = values.astype(np.float32)
    back = single.astype(np.float64)
    words = single.view(np.uint32)
    words -= np.abs(back) > np.abs(values)
    words |= back != values
    return single
