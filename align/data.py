"""Preference rows: TRL's formats, checked row by row and brought to one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from psacpo.errors import InputError, unknown_name
from psacpo.files import digest, digest_directory, digest_file
from psacpo.prompting import Prompt
from psacpo.rows import read_rows

COLUMNS = ("prompt", "chosen", "rejected")
Messages: TypeAlias = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first preferred.

    Attributes:
        row: The row's number in its source, from 1.
        prompt: A string, or messages that end before the assistant's turn.
    """

    row: int
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Preferences:
    """All rows of one source, and the digest of its content."""

    source: str
    rows: list[Preference]
    digest: str


def read_preferences(source: str, columns: Mapping[Any, str]) -> Preferences:
    """Preference rows in TRL's format from whatever `psacpo.rows` reads.

    Each row holds strings, or lists of `{"role", "content"}` messages. With messages, `chosen` and `rejected` may
    begin with the prompt, which then need not have a column of its own. Messages' other keys are not looked at.

    Args:
        columns: Which of the source's columns is the `prompt`, `chosen` and `rejected`, where it has another name.

    Raises:
        InputError: The source cannot be read, has no rows or not the columns, or a row is not a preference.
    """
    records = read_rows(source)
    names = {column: columns.get(column, column) for column in COLUMNS}
    rows = [
        _preference(record, names, number, named="prompt" in columns, where=f"{source} row {number}")
        for number, record in enumerate(records, start=1)
    ]
    path = Path(source)
    if path.is_file():
        content = digest_file(path)
    else:
        content = digest_directory(path) if path.is_dir() else digest([asdict(row) for row in rows])
    return Preferences(source, rows, content)


def _preference(
    record: Mapping[str, Any], names: Mapping[str, str], number: int, *, named: bool, where: str
) -> Preference:
    """One record; `named` says that the user gave the prompt's column, so it must be there."""
    for column, name in names.items():
        held = column == "prompt" and not named and isinstance(record.get(names["chosen"]), list)
        if name not in record and not held:
            raise InputError(f"{where}: {unknown_name('column', name, map(str, record))}")
    prompt, chosen, rejected = (_text_or_messages(record.get(name), name, where) for name in names.values())
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected, where)
    elif chosen is None or rejected is None:
        raise _wrong_type(names["rejected" if rejected is None else "chosen"], None, where)
    elif isinstance(chosen, list) or isinstance(rejected, list):
        raise InputError(f"{where}: one answer is a string, the other a list", allowed="both strings or both messages")
    elif prompt is None:
        raise _wrong_type(names["prompt"], None, where)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with the assistant's message", allowed="it ends with the user's")
    return Preference(number, prompt, chosen, rejected)


def _text_or_messages(value: object, name: str, where: str) -> str | Messages | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong_type(name, value, where)
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"{where}: '{name}' holds something that is no message",
                given=repr(message)[:80],
                allowed='{"role": text, "content": text}',
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _wrong_type(name: str, value: object, where: str) -> InputError:
    given = "an empty list" if value == [] else "nothing" if value is None else f"a {type(value).__name__}"
    return InputError(f"{where}: '{name}' is wrong", given=given, allowed="a string, or a list of messages")


def _conversation(
    prompt: str | Messages | None, chosen: Messages, rejected: Messages, where: str
) -> tuple[str | Messages, str, str]:
    """The prompt and the two answers; what `chosen` and `rejected` both begin with is the prompt or repeats it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    before = chosen[:shared]
    if before:
        repeated = before[-1]["content"] == prompt if isinstance(prompt, str) else prompt in (None, before)
        if not repeated:
            raise InputError(f"{where}: the answers begin with messages that are not the prompt")
        prompt = before
    if prompt is None:
        raise InputError(
            f"{where} has no prompt", allowed="a prompt column, or answers that begin with the same messages"
        )
    for name, messages in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        roles = [message["role"] for message in messages]
        if roles != ["assistant"]:
            raise InputError(
                f"{where}: the {name} answer is not one message of the assistant", given=", ".join(roles) or "nothing"
            )
    return prompt, chosen[-1]["content"], rejected[-1]["content"]
