"""What a language-model judge's reply says, and what stored verdicts say about the judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

# A verdict stands at the very end of a reply: no more than this is searched for where it begins.
_TAIL = 20_000
_MOST_OPENED = 200
_FENCE = re.compile(r"\s*```\s*$")


def read_reply(text: str, key: str, options: list[Any]) -> Any:
    """The option that a reply ends with, None if it ends with none.

    Only one JSON object counts that is the whole reply or stands at its very end (a code fence may close it). What the
    judge quotes before it, and objects that say a key twice, count for nothing.

    Args:
        key: The object's key that holds the verdict.
        options: Strings, or whole numbers.
    """
    found = _last_object(text)
    value = found.get(key) if found else None
    if isinstance(options[0], str):
        value = value.strip() if isinstance(value, str) else None
        return next((option for option in options if value is not None and value.lower() == option.lower()), None)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value in options else None


def _last_object(text: str) -> dict[str, Any] | None:
    text = _FENCE.sub("", text[-_TAIL:]).strip()
    if not text.endswith("}"):
        return None
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    places = [match.start() for match in re.finditer(r"\{", text)]
    # The outermost object first: one that stands inside a string of another is a quotation.
    for start in [*places[:1], *places[1:][-_MOST_OPENED:]]:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if end == len(text) and isinstance(value, dict):
            return value
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def expected_value(choice: Mapping[str, Any], key: str, values: Mapping[Any, float]) -> float | None:
    """The mean of `values` over the probabilities of the token in which the reply's verdict begins.

    Args:
        choice: Of a chat completion that was asked for with logprobs and top_logprobs.
        key: That of the JSON object's verdict.
        values: Option -> its value; each option's first letter is its own.

    Returns:
        None where the endpoint gave no probabilities, or less than half of them is on options.
    """
    try:
        return _expected(choice, key, values)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        # Of another form than the reference's: nothing that could be read.
        return None


def _expected(choice: Mapping[str, Any], key: str, values: Mapping[Any, float]) -> float | None:
    tokens = (choice.get("logprobs") or {}).get("content") or []
    text = "".join(str(token.get("token", "")) for token in tokens)
    starts = [match.end() for match in re.finditer(rf'"{re.escape(key)}"\s*:\s*"?', text)]
    if not starts:
        return None
    place = 0
    for token in tokens:
        place += len(str(token.get("token", "")))
        if place > starts[-1]:
            break
    mass = total = 0.0
    for candidate in token.get("top_logprobs") or []:
        said = str(candidate.get("token", "")).strip(' "\n:')
        fitting = [value for option, value in values.items() if said and str(option).startswith(said)]
        if len(fitting) == 1:
            probability = math.exp(min(float(candidate["logprob"]), 0.0))
            mass, total = mass + probability, total + probability * fitting[0]
    return total / mass if mass >= 0.5 else None


def why_invalid(raw: str | None) -> str:
    """One short line out of an invalid verdict's `raw`, whichever judge wrote it."""
    try:
        found = json.loads(raw or "")
        why = found["why"] if isinstance(found, dict) else raw
    except (ValueError, KeyError):
        why = raw
    return " ".join(str(why).split())[:200]


def in_words(raw: str | None) -> str:
    """A verdict's `raw` for people: of a language-model judge its replies without the requests, else as it is."""
    try:
        found = json.loads(raw or "")
        lines = [found["why"]] if "why" in found else []
        for one in found.get("asked", []):
            shown = {"answer": "shown first: ", "anchor": "shown second: "}.get(one.get("first"), "")
            lines.append(shown + str(one.get("reply") or one.get("why")))
        return "\n".join(lines) or (raw or "")
    except (ValueError, TypeError, KeyError, AttributeError):
        return raw or ""


def position_report(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How a pairwise judge's verdicts hang on the order in which it saw the answers.

    Args:
        records: Verdict records; those that are invalid, of other judges, or were not asked for are passed over. Records
            of one content are one verdict.

    Returns:
        n: Pairs of questions that differ in their order alone. swap_consistency: Share of them with the same answer as
        winner, or a tie twice. first_position_rate: Share of all decided verdicts that were for the answer shown first;
        0.5 is no bias. Both are None where nothing was asked.
    """
    seen: set[Any] = set()
    pairs: list[tuple[float, float]] = []
    for record in records:
        content = record.get("content", id(record))
        if record.get("valid") is False or content in seen:
            continue
        orders = asked(record.get("raw"))
        if orders:
            seen.add(content)
        first = [order["outcome"] for order in orders if order["first"] == "answer"]
        second = [order["outcome"] for order in orders if order["first"] == "anchor"]
        pairs += [(one, other) for one, other in zip(first, second, strict=False) if None not in (one, other)]
    # Outcomes are the answer's; an answer that was shown second and lost is a verdict for the first position.
    for_first = [one for one, _ in pairs if one != 0.5] + [1 - other for _, other in pairs if other != 0.5]
    return {
        "n": len(pairs),
        "swap_consistency": sum(_side(one) == _side(other) for one, other in pairs) / len(pairs) if pairs else None,
        "first_position_rate": sum(value > 0.5 for value in for_first) / len(for_first) if for_first else None,
    }


def _side(outcome: float) -> int:
    return (outcome > 0.5) - (outcome < 0.5)


def asked(raw: str | None) -> list[dict[str, Any]]:
    """What a verdict's `raw` says of each question that was asked in two orders; nothing for other judges."""
    try:
        found = json.loads(raw or "")
        return [order for order in found["asked"] if "first" in order]
    except (ValueError, KeyError, TypeError):
        return []
