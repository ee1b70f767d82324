"""Public preference collections in TRL's formats: one pure function a schema, from one of its rows to rows of ours.

| preset                  | collection                    | rows become                                                   |
|-------------------------|-------------------------------|---------------------------------------------------------------|
| `pku-saferlhf-helpful`  | PKU-Alignment/PKU-SafeRLHF    | pairs by `better_response_id`, with both answers' safety      |
| `pku-saferlhf-safe`     | the same                      | pairs by `safer_response_id`, with both answers' safety       |
| `pku-saferlhf-labels`   | the same                      | two single answers, labelled by `is_response_i_safe`          |
| `hh-rlhf`               | Anthropic/hh-rlhf             | pairs with the conversation as messages                       |
| `hh-rlhf-text`          | the same                      | pairs with the conversation as it stands, for "{prompt}"      |
| `ultrafeedback`         | UltraFeedback, binarised      | pairs with the difference of the scores as margin             |
| `beavertails`           | PKU-Alignment/BeaverTails     | single answers labelled by `is_safe`                          |

The first three are SACPO's (H), (S) and KTO (S) data (arXiv 2404.11049): nothing is filtered, pairs of two unsafe
answers stay in both of the paired sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from psacpo.errors import InputError, unknown_name

Record: TypeAlias = Mapping[str, Any]
# Rows in TRL's format; or why the record gives none, as it is counted.
Made: TypeAlias = list[dict[str, Any]] | str
Kind = TypeVar("Kind")

_WORDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "0 or 1",
    float: "a finite number",
    list: "messages",
}
# Of float32, in which losses are computed.
LARGEST = 3.4e38


@dataclass(frozen=True, slots=True)
class Preset:
    """One schema.

    Attributes:
        make: From a row of the schema to TRL's rows. Raises InputError for a row that is not of the schema.
        fits: Whether a row that is none of TRL's looks like one of the schema.
    """

    make: Callable[[Record], Made]
    fits: Callable[[Record], bool]


def preset(name: str) -> Preset:
    """
    Raises:
        InputError: There is no such preset.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def recognised(record: Record) -> list[str]:
    """The presets that a row fits."""
    return [name for name, one in PRESETS.items() if one.fits(record)]


def pku_pair(record: Record, by: str) -> Made:
    """A pair of PKU-SafeRLHF with the answer that column `by` numbers as the chosen one."""
    answers, safe = _pku_answers(record)
    chosen = _take(record, by, int)
    if chosen not in (0, 1):
        raise InputError(f"'{by}' is wrong", given=chosen, allowed="0 or 1")
    row = {"prompt": _take(record, "prompt", str), "chosen": answers[chosen], "rejected": answers[1 - chosen]}
    return [row | {"chosen_safe": safe[chosen], "rejected_safe": safe[1 - chosen]}]


def pku_labels(record: Record) -> Made:
    """Both answers of a row of PKU-SafeRLHF, each desirable if it is safe: absolute, not the safer of the two."""
    prompt = _take(record, "prompt", str)
    answers = zip(*_pku_answers(record), strict=True)
    return [{"prompt": prompt, "completion": text, "label": safe} for text, safe in answers]


def _pku_answers(record: Record) -> tuple[list[str], list[bool]]:
    answers = [_take(record, f"response_{i}", str) for i in (0, 1)]
    return answers, [_take(record, f"is_response_{i}_safe", bool) for i in (0, 1)]


def hh_messages(record: Record) -> Made:
    """A pair of hh-rlhf, its transcript as messages."""
    made = hh_text(record)
    if isinstance(made, str):
        return made
    [row] = made
    messages = turns(row["prompt"])
    if messages is None:
        raise _no_transcript(record, "chosen")
    roles = [message["role"] for message in messages]
    if roles != [("user", "assistant")[place % 2] for place in range(len(roles))] or roles[-1] != "user":
        return "turns_not_alternating"
    return [{"prompt": messages, "chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()}]


def hh_text(record: Record) -> Made:
    """A pair of hh-rlhf, its prompt as it stands up to the last `Assistant:`; answers keep the space before them."""
    mark = "\n\nAssistant:"
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        prompt, found, answer = _take(record, side, str).rpartition(mark)
        if not found:
            raise _no_transcript(record, side)
        prompts.append(prompt + mark)
        answers.append(_tidy(answer))
    if prompts[0] != prompts[1]:
        return "two_contexts"
    return [{"prompt": prompts[0], "chosen": answers[0], "rejected": answers[1]}]


def _tidy(answer: str) -> str:
    """Without the beginning of the next turn, in which some answers of the collection end."""
    return re.sub(r"(\s*\n\nHuman:?)+\s*$", "", answer)


def _no_transcript(record: Record, side: str) -> InputError:
    return InputError(f"'{side}' is no transcript", given=repr(record[side])[:60], allowed="\\n\\nHuman: …")


def turns(transcript: str) -> list[dict[str, str]] | None:
    r"""The messages of `\n\nHuman: …\n\nAssistant: …`, the open turn at its end left out; None if it is none."""
    start, *marked = re.split(r"\n\n(Human|Assistant):", transcript)
    if not marked or start.strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    pieces = zip(marked[::2], marked[1::2], strict=True)
    found = [{"role": roles[who], "content": _tidy(text).strip()} for who, text in pieces]
    return found[:-1] if found[-1] == {"role": "assistant", "content": ""} else found


def ultrafeedback(record: Record) -> Made:
    """A pair of UltraFeedback as binarised for Zephyr. Equal scores are no preference."""
    better, worse = (_take(record, name, float) for name in ("score_chosen", "score_rejected"))
    if better == worse:
        return "equal_scores"
    if better < worse:
        return "scores_reversed"
    chosen, rejected = _take(record, "chosen", list), _take(record, "rejected", list)
    return [{"prompt": record.get("prompt"), "chosen": chosen, "rejected": rejected, "margin": better - worse}]


def beavertails(record: Record) -> Made:
    """A single answer, desirable if it is safe."""
    prompt, response = _take(record, "prompt", str), _take(record, "response", str)
    return [{"prompt": prompt, "completion": response, "label": _take(record, "is_safe", bool)}]


def _take(record: Record, name: str, kind: type[Kind]) -> Kind:
    """The value of a column, of its kind; whole numbers are numbers, and 0 and 1 truth values, as exports write them."""
    if name not in record:
        raise unknown_name("column", name, map(str, record))
    value = record[name]
    given = type(value)
    fits = given is kind or (kind is float and given is int) or (kind is bool and given is int and value in (0, 1))
    # A score that is not finite is above no other, and below none.
    if fits and (kind is not float or abs(value) <= LARGEST):
        return kind(value)  # type: ignore[call-arg]
    shown = "nothing" if value is None else repr(value)[:60]
    raise InputError(f"'{name}' is wrong", given=shown, allowed=_WORDS[kind])


def _has(*columns: str) -> Callable[[Record], bool]:
    return lambda record: set(columns) <= set(record)


def _is_transcripts(record: Record) -> bool:
    return set(record) == {"chosen", "rejected"} and str(record["chosen"]).startswith("\n\nHuman:")


_PKU = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
PRESETS: dict[str, Preset] = {
    "pku-saferlhf-helpful": Preset(lambda row: pku_pair(row, "better_response_id"), _has(*_PKU, "better_response_id")),
    "pku-saferlhf-safe": Preset(lambda row: pku_pair(row, "safer_response_id"), _has(*_PKU, "safer_response_id")),
    "pku-saferlhf-labels": Preset(pku_labels, _has(*_PKU)),
    "hh-rlhf": Preset(hh_messages, _is_transcripts),
    # The same rows as they stand are read on request only.
    "hh-rlhf-text": Preset(hh_text, lambda record: False),
    "ultrafeedback": Preset(ultrafeedback, _has("chosen", "rejected", "score_chosen", "score_rejected")),
    "beavertails": Preset(beavertails, _has("prompt", "response", "category", "is_safe")),
}
