"""Rows from every format that people have, and one clear line for every way they can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.rows import read_rows, require_columns

ROWS = [{"prompt": "a \u2028 b", "label": 1}, {"prompt": 'c, "d"', "label": 2}]


def write(path: Path, kind: str) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    match kind:
        case "jsonl":
            path.write_text("\ufeff" + text + "\n", encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case "csv":
            path.write_text('prompt,label\n"a \u2028 b",1\n"c, ""d""",2\n', encoding="utf-8")
        case "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_formats(tmp_path: Path, kind: str) -> None:
    assert read_rows(write(tmp_path / f"rows.{kind}", kind)) == ROWS


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "dict")
    assert read_rows(tmp_path / "set") == ROWS
    assert read_rows(tmp_path / "dict") == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', "line 3 is not an object; given: list"),
        ("x.jsonl", b"\n\n", "holds no row"),
        ("x.json", b'{"a": 1}', "not a JSON array"),
        ("x.json", b"[1]", "row 1 is not an object"),
        ("x.jsonl.gz", b"no gzip", "cannot read"),
        ("x.jsonl", b'{"a": "\xff"}', "cannot read"),
        ("x.parquet", b"no parquet", "cannot read"),
        ("x.jsonl", b'{"a": "\\ud800"}', "line 1 holds half a surrogate pair"),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("x.txt", b"a", "cannot tell the format .* given: .txt; allowed: .jsonl"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or directory at .*nowhere\.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="no saved dataset"):
        read_rows(tmp_path)


def test_missing_columns_name_the_nearest() -> None:
    with pytest.raises(
        InputError, match="x.jsonl row 2: column 'prompt' is missing .the nearest is 'promt'.; allowed: promt"
    ):
        require_columns([{"prompt": 1}, {"promt": 2}], ["prompt"], source="x.jsonl")


def test_what_a_model_wrote_may_be_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "\\ud800"}\n')
    assert read_rows(tmp_path / "x.jsonl", any_text=True) == [{"a": "\ud800"}]
