"""Safetensors files as they lie on disk, and the JSON files beside them. Nothing here reads pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.errors import InputError

# dtype names of the safetensors format that weights can be added to.
FLOATING = ("F64", "F32", "F16", "BF16")
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
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
    return value


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Where the tensors of a safetensors file begin, and its tensors in the order in which they lie.

    Raises:
        InputError: The file is not safetensors, or is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size):
                raise ValueError("no safetensors header")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: Entry(item["dtype"], tuple(item["shape"]), *item["data_offsets"]) for name, item in header.items()
        }
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        end = 0
        for name, entry in ordered.items():
            if entry.start != end or entry.end < entry.start:
                raise ValueError(f"tensor {name} does not begin where the one before it ends")
            end = entry.end
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes long where its header says {8 + length + end}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    return 8 + length, ordered
