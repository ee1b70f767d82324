"""Safetensors files as they lie on disk, and the JSON files beside them. Nothing here reads pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from psacpo.errors import InputError

# dtype names of the safetensors format that weights can be added to.
FLOATING = ("F64", "F32", "F16", "BF16")
# Bytes of one element, and bits of those that share bytes.
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {name: 8 * size for name, size in SIZES.items()}
# A header longer than this is refused by the format itself.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; `start` and `end` are byte offsets from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is an `InputError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is damaged: nested too deep") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
    return value


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes.

    Raises:
        ValueError: The dtype is not known, or the tensor ends within a byte.
    """
    if dtype not in _BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    size, rest = divmod(math.prod(shape) * _BITS[dtype], 8)
    if rest:
        raise ValueError(f"shape {list(shape)} of {dtype} ends within a byte")
    return size


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Where the tensors of a safetensors file begin, and its tensors in the order in which they lie.

    Raises:
        InputError: The file is not safetensors, is shorter or longer than its header says, or its header contradicts
            itself: a tensor twice, tensors that overlap or leave gaps, a size that is not that of dtype and shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size):
                raise ValueError("no safetensors header")
            # As text: json would take UTF-16 and UTF-32 too, which no reader of the format does.
            header = json.loads(handle.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise TypeError("its header is no JSON object")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise TypeError("its __metadata__ is no list of texts by name")
        json.dumps([*header, metadata], ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
        entries = {name: _entry(name, item) for name, item in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        end = 0
        for name, entry in ordered.items():
            if entry.start != end:
                raise ValueError(f"tensor {name} does not begin where the one before it ends")
            end = entry.end
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes long where its header says {8 + length + end}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    return 8 + length, ordered


def make_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The bytes of a safetensors file before its tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
        for name, entry in entries.items()
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(name: str, item: Any) -> Entry:
    """What a header says of one tensor."""
    dtype, shape, offsets = (
        (item.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(item, dict) else (None, None, None)
    )
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"its header does not say what tensor {name} is")
    try:
        expected = byte_size(dtype, shape)
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from error
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"tensor {name} takes {offsets[1] - offsets[0]} bytes, where shape {shape} of {dtype} takes {expected}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none below 0."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in its header twice")
    return found
