"""Preference rows: TRL's formats and public collections', checked row by row and brought to one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from psacpo.align.presets import LARGEST, preset, recognised
from psacpo.errors import InputError, unknown_name
from psacpo.files import digest, digest_directory, digest_file
from psacpo.prompting import Prompt
from psacpo.rows import read_rows

PAIRED = ("prompt", "chosen", "rejected")
UNPAIRED = ("prompt", "completion", "label")
Messages: TypeAlias = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first preferred.

    Attributes:
        row: The row's number in its source, from 1.
        prompt: A string, or messages that end before the assistant's turn.
        margin: By how much, where the loss asks: see `losses.modpo`.
        safe: Whether the chosen and the rejected answer are safe, where the loss asks.
    """

    row: int
    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    safe: tuple[bool, bool] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt, desirable or not by itself: TRL's unpaired preference.

    Attributes:
        row: The row's number in its source, from 1.
        prompt: A string, or messages that end before the assistant's turn.
    """

    row: int
    prompt: Prompt
    completion: str
    label: bool


@dataclass(frozen=True, slots=True)
class Preferences:
    """All rows of one source, and the digest of its content.

    Attributes:
        preset: By which its rows were read.
        dropped: Rows that the preset leaves out, by the reason.
    """

    source: str
    rows: list[Preference]
    digest: str
    preset: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answers:
    """All unpaired rows of one source: see `Preferences`."""

    source: str
    rows: list[Answer]
    digest: str
    preset: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def read_data(
    source: str, columns: Mapping[Any, str], preset_name: str | None = None, wanted: Sequence[str] = ()
) -> Preferences | Answers:
    """Paired or unpaired rows in TRL's formats from whatever `psacpo.rows` reads, as the first row has it.

    Each row holds strings, or lists of `{"role", "content"}` messages. With messages, `chosen` and `rejected` may
    begin with the prompt, which then need not have a column of its own. Messages' other keys are not looked at.

    Args:
        columns: Which of the source's columns is the `prompt`, `chosen`, … , where it has another name.
        preset_name: The collection whose rows these are. Without one, rows that are not TRL's are read by the preset
            that has their columns, where that is one alone.
        wanted: Columns that pairs need besides: `margin`, `chosen_safe`, `rejected_safe`.

    Raises:
        InputError: The source cannot be read, has no rows or not the columns, or a row is not a preference.
    """
    records = read_rows(source)
    if preset_name is None and not columns:
        preset_name = _preset_of(records[0], source)
    dropped: Counter[str] = Counter()
    numbered: list[tuple[int, Mapping[str, Any]]] = list(enumerate(records, start=1))
    if preset_name is not None:
        numbered = _made(records, preset_name, source, dropped)
        if not numbered:
            raise InputError(f"{source} leaves nothing to train on: {_listed(dropped)}")
    content = _digest_of(source, records)
    if _is_unpaired(numbered[0][1], columns):
        names = {column: columns.get(column, column) for column in UNPAIRED}
        answers = [_answer(record, names, number, f"{source} row {number}") for number, record in numbered]
        return Answers(source, answers, content, preset_name, dict(dropped))
    names = {column: columns.get(column, column) for column in (*PAIRED, *wanted)}
    rows = [
        _preference(record, names, number, named="prompt" in columns, where=f"{source} row {number}")
        for number, record in numbered
    ]
    return Preferences(source, rows, content, preset_name, dict(dropped))


def read_preferences(source: str, columns: Mapping[Any, str]) -> Preferences:
    """Paired rows: `read_data` where nothing else will do."""
    found = read_data(source, columns)
    if isinstance(found, Answers):
        raise InputError(f"{source} holds single answers with a label", allowed="rows with chosen and rejected answers")
    return found


def _preset_of(record: Mapping[str, Any], source: str) -> str | None:
    """The one preset that reads rows like this one, which TRL's formats do not cover; None where they do."""
    paired = {"chosen", "rejected"} <= set(record) and ("prompt" in record or isinstance(record["chosen"], list))
    if paired or {"completion", "label"} & set(record):
        return None
    fitting = recognised(record)
    if len(fitting) > 1:
        raise InputError(f"the rows of {source} fit several presets", allowed=f"preset: {' or '.join(fitting)}")
    return fitting[0] if fitting else None


def _made(
    records: Sequence[Mapping[str, Any]], name: str, source: str, dropped: Counter[str]
) -> list[tuple[int, Mapping[str, Any]]]:
    """TRL's rows out of a collection's, each with the number of the row that it comes from."""
    make = preset(name).make
    found: list[tuple[int, Mapping[str, Any]]] = []
    for number, record in enumerate(records, start=1):
        try:
            made = make(record)
        except InputError as error:
            raise InputError(f"{source} row {number} is none of {name}: {error}") from error
        if isinstance(made, str):
            dropped[made] += 1
        else:
            found += [(number, row) for row in made]
    return found


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _digest_of(source: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Of the file or directory; of what the hub gave, by its rows."""
    path = Path(source)
    if path.is_file():
        return digest_file(path)
    return (
        digest_directory(path) if path.is_dir() else digest([{str(k): repr(v) for k, v in r.items()} for r in records])
    )


def _is_unpaired(record: Mapping[str, Any], columns: Mapping[Any, str]) -> bool:
    """Whether a source is one of single answers, by its first row and the columns that the user named."""
    if {"completion", "label"} & set(columns):
        return True
    if {"chosen", "rejected"} & set(columns) or {"chosen", "rejected"} & set(record):
        return False
    return bool({"completion", "label"} & set(record))


def _answer(record: Mapping[str, Any], names: Mapping[str, str], number: int, where: str) -> Answer:
    for name in names.values():
        if name not in record:
            raise InputError(f"{where}: {unknown_name('column', name, map(str, record))}")
    prompt, completion = (_text_or_messages(record[names[column]], names[column], where) for column in UNPAIRED[:2])
    for column, value in (("prompt", prompt), ("completion", completion)):
        if value is None:
            raise _wrong_type(names[column], None, where)
    assert prompt is not None
    assert completion is not None
    _require_open(prompt, where)
    if isinstance(completion, list):
        completion = _only_message(completion, names["completion"], where)
    return Answer(number, prompt, completion, _truth(record[names["label"]], names["label"], where))


def _preference(
    record: Mapping[str, Any], names: Mapping[str, str], number: int, *, named: bool, where: str
) -> Preference:
    """One record; `named` says that the user gave the prompt's column, so it must be there."""
    for column, name in names.items():
        held = column == "prompt" and not named and isinstance(record.get(names["chosen"]), list)
        if name not in record and not held:
            raise InputError(f"{where}: {unknown_name('column', name, map(str, record))}")
    prompt, chosen, rejected = (_text_or_messages(record.get(names[column]), names[column], where) for column in PAIRED)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected, where)
    elif chosen is None or rejected is None:
        raise _wrong_type(names["rejected" if rejected is None else "chosen"], None, where)
    elif isinstance(chosen, list) or isinstance(rejected, list):
        raise InputError(f"{where}: one answer is a string, the other a list", allowed="both strings or both messages")
    elif prompt is None:
        raise _wrong_type(names["prompt"], None, where)
    _require_open(prompt, where)
    margin = _number(record[names["margin"]], names["margin"], where) if "margin" in names else 0.0
    flags = [names[column] for column in ("chosen_safe", "rejected_safe") if column in names]
    safe = [_truth(record[name], name, where) for name in flags]
    return Preference(number, prompt, chosen, rejected, margin, (safe[0], safe[1]) if safe else None)


def _require_open(prompt: str | Messages, where: str) -> None:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with the assistant's message", allowed="it ends with the user's")


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise InputError(f"{where}: '{name}' is wrong", given=_shown(value), allowed="a finite number")
    return float(value)


def _truth(value: object, name: str, where: str) -> bool:
    """True or false; tables write them as 1 and 0."""
    if not isinstance(value, int | float) or value not in (0, 1):
        raise InputError(f"{where}: '{name}' is wrong", given=_shown(value), allowed="true or false")
    return bool(value)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]


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
    given = (
        "an empty list" if value == [] else "nothing" if value is None else f"{value!r:.40} ({type(value).__name__})"
    )
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
    return prompt, _only_message(chosen[shared:], "chosen", where), _only_message(rejected[shared:], "rejected", where)


def _only_message(messages: Messages, name: str, where: str) -> str:
    """The text of an answer that is one message of the assistant."""
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise InputError(
            f"{where}: the {name} answer is not one message of the assistant", given=", ".join(roles) or "nothing"
        )
    return messages[-1]["content"]
