"""Rows from the files people have: JSON lines, JSON, CSV, Parquet, gzip of them, a `datasets` directory or hub id."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from psacpo.errors import InputError, missing_column

Row = dict[str, Any]
# Columns that hold text whatever it looks like.
_TEXTS = ("prompt", "chosen", "rejected", "completion", "response", "response_0", "response_1")
_FILES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")


def read_rows(source: str | Path, *, any_text: bool = False) -> list[Row]:
    """All rows of a file, a `datasets` directory, or a hub dataset `id` or `id:split` (split `train` by default).

    Args:
        source: Which.
        any_text: Whether a JSON text may hold halves of surrogate pairs, as what a model wrote may.

    Raises:
        InputError: There is no such source, it cannot be read, or it holds no row. A bad line is named by its number.
    """
    path = Path(source)
    try:
        if path.is_dir():
            rows = _from_directory(path)
        elif path.is_file():
            rows = _from_file(path, any_text)
        else:
            rows = _from_hub(str(source))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"cannot read {source}: {error}") from error
    if not rows:
        raise InputError(f"{source} holds no row")
    return rows


def require_columns(rows: Iterable[Mapping[str, Any]], names: Iterable[str], *, source: str | Path) -> None:
    """Refuse rows that lack one of `names`, naming the row (from 1), the columns it has, and the nearest of them."""
    wanted = list(names)
    for number, row in enumerate(rows, start=1):
        for name in wanted:
            if name not in row:
                raise InputError(f"{source} row {number}: {missing_column(name, row)}")


def _from_file(path: Path, any_text: bool) -> list[Row]:
    name = path.name.lower()
    if not name.endswith(_FILES):
        raise InputError(
            f"cannot tell the format of {path}", given=path.suffix or "no suffix", allowed=", ".join(_FILES)
        )
    if name.endswith((".csv", ".csv.gz", ".parquet")):
        return _from_arrow(path)
    blob = path.read_bytes()
    text = (gzip.decompress(blob) if name.endswith(".gz") else blob).decode("utf-8-sig")
    if name.endswith((".json", ".json.gz")):
        return _from_json(path, text, any_text)
    # Only a line feed ends a JSON line; str.splitlines would also cut at U+2028, which JSON strings may hold.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return [_object(_parse(line, f"{path} line {number}"), f"{path} line {number}", any_text) for number, line in lines]


def _from_json(path: Path, text: str, any_text: bool) -> list[Row]:
    loaded = _parse(text, str(path))
    if not isinstance(loaded, list):
        raise InputError(f"{path} is not a JSON array of objects", given=type(loaded).__name__)
    return [_object(item, f"{path} row {number}", any_text) for number, item in enumerate(loaded, start=1)]


def _parse(text: str, where: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _object(value: object, where: str, any_text: bool) -> Row:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass" if any_text else "strict")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair, which is no text") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not an object", given=type(value).__name__, allowed='{"prompt": …}')
    return value


def _from_arrow(path: Path) -> list[Row]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    # A CSV has no types: an answer of digits is text all the same.
    texts = csv.ConvertOptions(column_types=dict.fromkeys(_TEXTS, pa.string()))
    try:
        table = (
            parquet.read_table(path)
            if path.name.lower().endswith(".parquet")
            else csv.read_csv(path, convert_options=texts)
        )
    except pa.ArrowException as error:
        raise InputError(f"cannot read {path}: {error}") from error
    bytes_of_csv = (
        [] if path.name.lower().endswith(".parquet") else [f.name for f in table.schema if f.type == pa.binary()]
    )
    if bytes_of_csv:
        raise InputError(f"{path}: column '{bytes_of_csv[0]}' holds text that is no UTF-8", allowed="a file in UTF-8")
    twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if twice:
        raise InputError(f"{path} has two columns '{twice[0]}'", allowed="a name for each column")
    return cast(list[Row], table.to_pylist())


def _from_directory(path: Path) -> list[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{path} is a directory but no saved dataset", allowed="save_to_disk's output, or a file"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise InputError(f"{path} holds no split 'train'", given=", ".join(found))
        found = found["train"]
    return [dict(row) for row in found]


def _from_hub(name: str) -> list[Row]:
    if name.startswith((".", "/", "~")) or name.lower().endswith(_FILES) or name.count("/") != 1:
        raise InputError(f"no file or directory at {name}")
    import datasets

    identifier, _, split = name.partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(identifier, split=split or "train")]
    except Exception as error:  # the hub client has no common error type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"no file at {name}, and as a hub dataset it cannot be loaded: {reason}") from error
