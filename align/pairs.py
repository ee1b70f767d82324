"""Preference rows as token ids, cut to length with every cut counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, overload

from psacpo.align.counting import Asked, is_blank, repeats
from psacpo.align.data import Answer, Answers, Preference, Preferences
from psacpo.align.examples import Labelled, Pair, safe_first
from psacpo.align.stage_config import Truncation
from psacpo.align.truncation import truncate
from psacpo.errors import InputError
from psacpo.files import digest
from psacpo.prompting import Prompt, encode_completion, encode_prompt

Encoded = TypeVar("Encoded", "Pair", "Labelled")


@dataclass(frozen=True, slots=True)
class Pairs(Generic[Encoded]):
    """What training uses, pairs or single answers with a label, and what became of the rows.

    Attributes:
        counts: Rows `read`; of these dropped as `empty` (an answer without text) or `identical` (two answers with
            equal tokens after cutting); `used` for training; of these `truncated`. Of what is odd, where there is any:
            dropped as `too_long`, as `repeated`, as `unsafe` (both answers, `losses.safedpo`) or by a preset for its own
            reasons; used and `truncated_prompts`, `truncated_answers` (answers, not rows), `duplicates`, `contradictory`,
            `empty_prompts`, `overlap` (with the evaluation's prompts), `swapped` (`losses.safedpo`). Of single answers, `desirable`.
        reasons: Those of the counts that say why rows were dropped.
    """

    source: str
    pairs: list[Encoded]
    counts: dict[str, int]
    reasons: tuple[str, ...] = ("empty", "identical", "too_long", "unsafe", "repeated")

    @property
    def digest(self) -> str:
        """Digest of all that training sees, in order, whatever the tokenizer and the template were."""
        return digest([_content(one) for one in self.pairs])

    def summary(self) -> str:
        """The counts in words, zeros left out."""
        counts = self.counts
        dropped = [f"{counts[name]} {_words(name)}" for name in self.reasons if counts.get(name)]
        text = f"{counts['used']} of {counts['read']} rows used"
        text += f", dropped: {', '.join(dropped)}" if dropped else ""
        text += f", cut to length: {counts['truncated']}" if counts["truncated"] else ""
        for name in ("swapped", "duplicates", "contradictory", "empty_prompts"):
            text += f", {_words(name)}: {counts[name]}" if counts.get(name) else ""
        return text


def _content(example: Pair | Labelled) -> list[Any]:
    if isinstance(example, Pair):
        return [example.prompt, example.chosen, example.rejected, example.margin]
    return [example.prompt, example.answers, example.desirable]


def _verdict(example: Pair | Labelled) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What the example says, and what its opposite would say."""
    prompt, answers = tuple(example.prompt), tuple(map(tuple, example.answers))
    if isinstance(example, Pair):
        return (prompt, answers), (prompt, answers[::-1])
    return (prompt, answers, example.desirable), (prompt, answers, tuple(not label for label in example.desirable))


def _words(name: str) -> str:
    return name.replace("_", " ")


@overload
def encode_rows(
    rows: Preferences,
    tokenizer: Any,
    template: str | None,
    max_length: int,
    *,
    truncation: Truncation = ...,
    drop_duplicates: bool = ...,
    asked: Asked | None = ...,
) -> Pairs[Pair]: ...


@overload
def encode_rows(
    rows: Answers,
    tokenizer: Any,
    template: str | None,
    max_length: int,
    *,
    truncation: Truncation = ...,
    drop_duplicates: bool = ...,
    asked: Asked | None = ...,
) -> Pairs[Labelled]: ...


def encode_rows(
    rows: Preferences | Answers,
    tokenizer: Any,
    template: str | None,
    max_length: int,
    *,
    truncation: Truncation = Truncation(),  # noqa: B008  (it is frozen)
    drop_duplicates: bool = False,
    asked: Asked | None = None,
) -> Pairs[Pair] | Pairs[Labelled]:
    """Encode, cut and count the rows of one source.

    Pairs of which it is known whether their answers are safe go through `safe_first`.

    Args:
        truncation: What is done with rows of more than `max_length` tokens.
        drop_duplicates: Whether of equal rows the first alone is used.
        asked: The evaluation's prompts, to count the rows that ask them too.

    Raises:
        InputError: A row does not go with the template or is too long where that is an error, or no row is left.
    """
    dropped = dict.fromkeys(("empty", "identical", "too_long", "unsafe", "repeated", *rows.dropped), 0) | rows.dropped
    fitted: list[_Fitted] = []
    for row in rows.rows:
        made = _fit(rows.source, row, tokenizer, template, max_length, truncation)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            fitted.append(made)
    odd = {"swapped": 0}
    if isinstance(rows, Preferences) and any(row.safe for row in rows.rows):
        safe = {row.row: row.safe for row in rows.rows if row.safe}
        ordered = {pair.row: pair for pair in safe_first([one.example for one in fitted], safe, odd)}
        fitted = [replace(one, example=ordered[one.example.row]) for one in fitted if one.example.row in ordered]
        dropped["unsafe"] = odd.pop("unsafe")
    again, contradictory = repeats(_verdict(one.example) for one in fitted)
    if drop_duplicates:
        dropped["repeated"] = len(again)
        fitted = [one for place, one in enumerate(fitted) if place not in again]
    counts = {
        "read": len(rows.rows) + sum(rows.dropped.values()),
        "empty": dropped["empty"],
        "identical": dropped["identical"],
        "truncated": sum(one.prompt_cut or one.answers_cut > 0 for one in fitted),
        "used": len(fitted),
    }
    odd |= {
        "truncated_prompts": sum(one.prompt_cut for one in fitted),
        "truncated_answers": sum(one.answers_cut for one in fitted),
        "duplicates": 0 if drop_duplicates else len(again),
        "contradictory": len(contradictory),
        "empty_prompts": sum(is_blank(one.asked) for one in fitted),
        "overlap": sum(asked is not None and asked.overlaps(one.asked) for one in fitted),
    }
    counts |= {name: count for name, count in (dropped | odd).items() if count}
    examples: list[Any] = [one.example for one in fitted]
    if isinstance(rows, Answers):
        counts["desirable"] = sum(one.desirable[0] for one in examples)
    found: Pairs[Any] = Pairs(rows.source, examples, counts, tuple(dropped))
    if not examples:
        raise InputError(f"{rows.source} leaves nothing to train on: {found.summary()}")
    return found


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A row as training sees it, and what was done to it.

    Attributes:
        asked: The prompt as it was read.
        answers_cut: How many of the answers lost their end.
    """

    example: Any
    asked: Prompt
    prompt_cut: bool
    answers_cut: int


def _fit(
    source: str, row: Preference | Answer, tokenizer: Any, template: str | None, max_length: int, truncation: Truncation
) -> _Fitted | str:
    """One row encoded and cut to length; or as what it is dropped."""
    texts = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    if not all(text.strip() for text in texts):
        return "empty"
    try:
        whole, *answers = _encoded(row.prompt, texts, tokenizer, template)
        keep_first = whole[0] == tokenizer.bos_token_id
        fits = truncate(whole, tuple(answers), max_length=max_length, keep_first=keep_first, truncation=truncation)
    except InputError as error:
        raise InputError(f"{source} row {row.row}: {error}") from error
    if fits is None:
        return "too_long"
    prompt, parts = fits
    cut = sum(part != answer for part, answer in zip(parts, answers, strict=True))
    if isinstance(row, Answer):
        return _Fitted(Labelled(row.row, prompt, parts, (row.label,)), row.prompt, prompt != whole, cut)
    if parts[0] == parts[1]:
        return "identical"
    return _Fitted(Pair(row.row, prompt, parts[0], parts[1], row.margin), row.prompt, prompt != whole, cut)


def _encoded(asked: Prompt, texts: Sequence[str], tokenizer: Any, template: str | None) -> list[list[int]]:
    """Token ids of a prompt and of answers to it."""
    prompt = encode_prompt(tokenizer, asked, template)
    if not prompt:
        raise InputError("the prompt has no tokens", allowed="at least one token")
    return [prompt, *(encode_completion(tokenizer, asked, text, template) for text in texts)]


def draw(pairs: Sequence[Encoded], count: int, seed: int) -> list[Encoded]:
    """`count` examples drawn without replacement, in their own order; all of them where there are not more."""
    if count >= len(pairs):
        return list(pairs)
    return [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), count))]
