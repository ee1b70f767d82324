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
    np.left_shift(words, 16, out=words)
    if out.dtype != np.float32:
        np.copyto(out, words.view(np.float32))


def fits(values: Array, dtype: str) -> bool:
    """Whether all of `values`, float32 or float64, are finite and stay so when they are rounded to `dtype`."""
    if values.size == 0:
        return True
    # NaN is in any maximum, and less than nothing.
    limit = _OVERFLOW[dtype]
    return float(values.max()) < limit and float(values.min()) > -limit


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
        np.copyto(out, values, casting="same_kind")
        return
    if values.dtype == np.float64:
        values = _round_to_odd(values)
    words = values.view(np.uint32)
    # Add half a step, less one where the last bit that stays is 0: a tie then goes to the even neighbour.
    np.right_shift(words, 16, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)
    np.add(words, scratch, out=words)
    np.add(words, 0x7FFF, out=words)
    np.right_shift(words, 16, out=words)
    np.copyto(out, words, casting="unsafe")


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
