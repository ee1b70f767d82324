"""Preference rows from files, dataset directories and the hub, each checked and named by its line when it is wrong."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psacpo.errors import InputError, unknown_name
from psacpo.files import digest, digest_directory, digest_file
from psacpo.prompting import Message, Prompt

COLUMNS = ("prompt", "chosen", "rejected")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".parquet")
_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True, slots=True)
class Row:
    """One preference: the text of two answers to one prompt.

    Attributes:
        where: The row's place for error messages, such as `line 7`.
        prompt: A string, or messages that end with the user's.
    """

    where: str
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of one source and the digest of its content."""

    source: str
    rows: list[Row]
    digest: str


def read_rows(source: str, columns: Mapping[str, str]) -> Rows:
    """Preference rows in TRL's format.

    Args:
        source: A .jsonl, .json (either may end in .gz), .csv or .parquet file; a directory that `datasets` saved; or
            the id of a dataset on the hub. `:name` at the end of the latter two takes that split, else `train`.
        columns: Which of the source's columns is the `prompt`, `chosen` and `rejected`, where it has another name.

    Each row holds strings, or lists of `{"role", "content"}` messages. With messages, `chosen` and `rejected` may
    begin with the prompt, which then need not have a column of its own.

    Raises:
        InputError: The source cannot be read, has no rows or not the columns, or a row is not a preference.
    """
    records, content = _open(source)
    names = {column: columns.get(column, column) for column in COLUMNS}
    rows: list[Row] = []
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(
                f"{source} {where} is not an object", given=type(record).__name__, allowed="one JSON object"
            )
        if not rows:
            _check_columns(source, record, names, named="prompt" in columns)
        rows.append(_row(record, names, where, f"{source} {where}"))
    if not rows:
        raise InputError(f"{source} holds no rows", allowed="at least one row with prompt, chosen and rejected")
    return Rows(source, rows, content or digest([asdict(row) for row in rows]))


Records = Iterable[tuple[str, Any]]


def _open(source: str) -> tuple[Records, str | None]:
    """The records of a source with the place of each, and the digest of its bytes where it has bytes of its own."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.name.endswith(_LINES):
            return _json_records(path), digest_file(path)
        if path.suffix in (".csv", ".parquet"):
            return _table_records(path), digest_file(path)
        raise InputError(f"{source} is in no known format", allowed=", ".join(SUFFIXES))
    name, _, split = source.rpartition(":") if ":" in source else (source, "", "")
    path = Path(name).expanduser()
    if path.is_dir():
        return _numbered(_saved_dataset(path, split)), digest_directory(path)
    if name.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"no data at {source}", allowed=f"a {', '.join(SUFFIXES)} file, a saved dataset or a hub id")
    return _numbered(_hub_dataset(name, split)), None


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list, or the values of JSON lines, with their place. Blank lines are passed over."""
    try:
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as handle:
            if ".jsonl" not in path.suffixes:
                text = handle.read()
                if text.lstrip().startswith("["):
                    yield from _numbered(_parse(text, str(path)))
                    return
                lines: Iterable[str] = text.splitlines()
            else:
                lines = handle
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", _parse(line, f"{path} line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        inner = f" (line {error.lineno})" if error.lineno > 1 else ""
        raise InputError(f"{where} is not JSON{inner}: {error.msg} at column {error.colno}") from error


def _numbered(records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", record) for number, record in enumerate(records, 1))


def _table_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file, every cell as text, or of a Parquet file."""
    import pyarrow as arrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = arrow.parquet.read_table(path)
        else:
            parse = arrow.csv.ParseOptions(newlines_in_values=True)
            with arrow.csv.open_csv(path, parse_options=parse) as reader:
                names = reader.schema.names
            # An answer such as "42" or "true" is text too.
            texts = arrow.csv.ConvertOptions(column_types={name: arrow.string() for name in names})
            table = arrow.csv.read_csv(path, parse_options=parse, convert_options=texts)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return _numbered(row for batch in table.to_batches() for row in batch.to_pylist())


def _saved_dataset(path: Path, split: str) -> Iterable[Any]:
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise InputError(
            f"{path} is not a dataset directory (no state.json or dataset_dict.json in it)",
            allowed=f"what datasets.save_to_disk wrote, or a {', '.join(SUFFIXES)} file",
        )
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"cannot read the dataset {path}: {error}") from error
    if isinstance(loaded, DatasetDict):
        wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
        if wanted not in loaded:
            raise unknown_name(f"split of {path}", wanted, loaded)
        loaded = loaded[wanted]
    elif split:
        raise InputError(f"{path} has no splits", given=split, allowed=str(path))
    rows: Iterable[Any] = loaded
    return rows


def _hub_dataset(name: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    try:
        rows: Iterable[Any] = load_dataset(name, split=split or "train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"no file or directory {name}, and no dataset of that name on the hub: {reason}") from error
    return rows


def _check_columns(source: str, record: Mapping[str, Any], names: Mapping[str, str], *, named: bool) -> None:
    """Refuse rows without the needed columns. A conversation that holds its prompt needs no prompt column."""
    for column, name in names.items():
        if name in record:
            continue
        if (
            column == "prompt"
            and not named
            and all(isinstance(record[names[c]], list) for c in COLUMNS[1:] if names[c] in record)
        ):
            continue
        raise InputError(f"{source}: {unknown_name('column', name, record)}")


def _row(record: Mapping[str, Any], names: Mapping[str, str], place: str, where: str) -> Row:
    """One record as a `Row`."""
    for column in COLUMNS[1:]:
        if names[column] not in record:
            raise InputError(
                f"{where} has no '{names[column]}'", given=", ".join(map(str, record)) or "an empty object"
            )
    prompt, chosen, rejected = (record.get(names[column]) for column in COLUMNS)
    if isinstance(prompt, list):
        prompt = _messages(prompt, f"{where}: {names['prompt']}")
    elif prompt is not None and not isinstance(prompt, str):
        raise _wrong_type(where, names["prompt"], prompt)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise _wrong_type(where, names[column], value)
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen = _messages(chosen, f"{where}: {names['chosen']}")
        rejected = _messages(rejected, f"{where}: {names['rejected']}")
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected, where)
    elif not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise InputError(f"{where}: one answer is a string, the other a list", allowed="both strings or both messages")
    elif prompt is None:
        raise InputError(
            f"{where} has no '{names['prompt']}'", allowed="a string, or messages that end with the user's"
        )
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with the assistant's message", allowed="it ends with the user's")
    return Row(place, prompt, chosen, rejected)


def _wrong_type(where: str, name: str, value: object) -> InputError:
    return InputError(f"{where}: '{name}' is a {type(value).__name__}", allowed="a string, or a list of messages")


def _messages(value: list[Any], where: str) -> list[dict[str, str]]:
    """Messages with `role` and `content`; other keys, which no chat template for text needs, are left."""
    if not value:
        raise InputError(f"{where} is an empty list", allowed="at least one message")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"{where} holds something that is no message", given=repr(message)[:80], allowed="{role, content} texts"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _conversation(
    prompt: str | list[dict[str, str]] | None, chosen: list[dict[str, str]], rejected: list[dict[str, str]], where: str
) -> tuple[str | list[dict[str, str]], str, str]:
    """The prompt and the two answers; what `chosen` and `rejected` both begin with is the prompt or repeats it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    before = chosen[:shared]
    if prompt is None:
        if not before:
            raise InputError(
                f"{where} has no prompt", allowed="a prompt column, or answers that begin with the same prompt"
            )
        prompt = before
    elif before and not _repeats(prompt, before):
        raise InputError(f"{where}: the answers begin with messages that are not the prompt")
    elif before:
        prompt = before
    answers = []
    for name, messages in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"{where}: the {name} answer is [{roles}]", allowed="one message of the assistant")
        answers.append(messages[0]["content"])
    return prompt, answers[0], answers[1]


def _repeats(prompt: str | list[dict[str, str]], before: list[Message] | list[dict[str, str]]) -> bool:
    return before[-1]["content"] == prompt if isinstance(prompt, str) else before == prompt
