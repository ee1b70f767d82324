"""Preference rows as token ids, cut to length with every cut counted."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from psacpo.align.data import Preferences
from psacpo.errors import InputError
from psacpo.files import digest
from psacpo.prompting import Prompt, encode_completion, encode_prompt


class Example(Protocol):
    """A prompt and one or more answers to it, as token ids, at least one each."""

    @property
    def row(self) -> int:
        """The row's number in its source, from 1."""
        ...

    @property
    def prompt(self) -> list[int]: ...

    @property
    def answers(self) -> tuple[list[int], ...]: ...

    def __len__(self) -> int:
        """Tokens of the longest of its sequences."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference, at least one each. `row` is the row's number in its source, from 1.

    Attributes:
        margin: What `losses.modpo` and `losses.safedpo` know of the pair besides its order.
    """

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    @property
    def answers(self) -> tuple[list[int], ...]:
        return self.chosen, self.rejected

    def __len__(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Labelled:
    """Token ids of a prompt and of answers of which each is desirable or not by itself.

    Attributes:
        desirable: One label an answer.
    """

    row: int
    prompt: list[int]
    answers: tuple[list[int], ...]
    desirable: tuple[bool, ...]

    def __len__(self) -> int:
        """Tokens of the longest of its sequences."""
        return len(self.prompt) + max(map(len, self.answers))


def labelled(example: Pair | Labelled) -> Labelled:
    """A pair as two labelled answers, the chosen one desirable; what is labelled already stays as it is."""
    if isinstance(example, Labelled):
        return example
    return Labelled(example.row, example.prompt, example.answers, (True, False))


def mismatched(examples: Sequence[Labelled], seed: int) -> list[Labelled]:
    """Each example's prompt with the answers of another one, whose prompt differs; every example gives its answers once.

    The map is seeded and fixed for a whole run, so the reference needs to see these rows once only. An answer that
    would reach beyond the longest of the examples loses its end.

    Raises:
        InputError: More than half of the answers are to one prompt, so that some cannot be put behind another.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    # Equal prompts stand together, the most frequent ones first: half a turn on, none meets its own kind.
    places: dict[tuple[int, ...], list[int]] = {}
    for place in order:
        places.setdefault(tuple(examples[place].prompt), []).append(place)
    groups = sorted(places.values(), key=lambda group: -len(group))
    if 2 * len(groups[0]) > len(order):
        raise InputError(
            "kto needs answers behind prompts that are not theirs",
            given=f"{len(groups[0])} of {len(order)} rows with one prompt",
            allowed="at most half of the rows with the same prompt",
        )
    order = [place for group in groups for place in group]
    step = len(groups[0])
    longest = max(map(len, examples))
    found = list(examples)
    for position, place in enumerate(order):
        prompt, giver = examples[place].prompt, examples[order[(position + step) % len(order)]]
        answers = tuple(answer[: longest - len(prompt)] for answer in giver.answers)
        found[place] = Labelled(examples[place].row, prompt, answers, giver.desirable)
    return found


def safe_first(
    pairs: Sequence[Pair], safe: Mapping[int, tuple[bool, bool]], counts: dict[str, int] | None = None
) -> list[Pair]:
    """SafeDPO's transformation (arXiv 2505.20065): the safe answer of a pair is the chosen one, whatever was preferred.

    Pairs with an unsafe chosen and a safe rejected answer are swapped, pairs of two unsafe answers left out. `margin`
    becomes I_l - I_w, 1 where the rejected answer is unsafe.

    Args:
        safe: Of each row's number, whether its chosen and its rejected answer are safe.
        counts: Gets `swapped` and `unsafe`, the number of pairs left out.
    """
    found: list[Pair] = []
    swapped = 0
    for pair in pairs:
        chosen, rejected = safe[pair.row]
        if not chosen and rejected:
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
            chosen, rejected = rejected, chosen
            swapped += 1
        if chosen:
            found.append(replace(pair, margin=float(not rejected)))
    if counts is not None:
        counts |= {"swapped": swapped, "unsafe": len(pairs) - len(found)}
    return found


# What losses need to know of pairs besides their order.
_MARGINS = {
    "modpo": "a margin column: the other objectives' weighted rewards of the chosen minus the rejected answer",
    "safedpo": "whether each answer is safe, and at least one pair of a safe and an unsafe one",
}


def require_margins(stage: str, loss: str, pairs: Sequence[Pair]) -> None:
    """
    Raises:
        InputError: The loss goes by the pairs' margins, and none has any: it would be dpo under another name.
    """
    if loss in _MARGINS and not any(pair.margin for pair in pairs):
        raise InputError(
            f"stage '{stage}': {loss} needs what the rows do not have", given="no margins", allowed=_MARGINS[loss]
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs that training uses, and what became of the rows.

    Attributes:
        counts: Rows `read`; of these dropped as `empty` (an answer without text) or `identical` (two answers with
            equal tokens after cutting); `used` for training; of these `truncated`.
    """

    source: str
    pairs: list[Pair]
    counts: dict[str, int]

    @property
    def digest(self) -> str:
        """Digest of all token ids, in order: what training sees, whatever the tokenizer and the template were."""
        return digest([[pair.prompt, pair.chosen, pair.rejected] for pair in self.pairs])

    def summary(self) -> str:
        """The counts in words, zeros left out."""
        return _in_words(self.counts)


@dataclass(frozen=True, slots=True)
class Answers:
    """Labelled answers that training uses, and what became of the rows: `Pairs` for `losses.kto` on single answers.

    Attributes:
        counts: Rows `read`; of these dropped as `empty`; `used`; of these `truncated` and `desirable`.
    """

    source: str
    answers: list[Labelled]
    counts: dict[str, int]

    @property
    def digest(self) -> str:
        """Digest of all token ids and labels, in order."""
        return digest([[one.prompt, one.answers, one.desirable] for one in self.answers])

    def summary(self) -> str:
        """The counts in words, zeros left out."""
        return _in_words(self.counts)


def _in_words(counts: Mapping[str, int]) -> str:
    dropped = [f"{counts[name]} {name}" for name in ("empty", "identical") if counts.get(name)]
    text = f"{counts['used']} of {counts['read']} rows used"
    text += f", dropped: {', '.join(dropped)}" if dropped else ""
    return text + (f", cut to length: {counts['truncated']}" if counts["truncated"] else "")


class Judged(Protocol):
    """One answer to a prompt with a label, as text."""

    @property
    def row(self) -> int: ...

    @property
    def prompt(self) -> Prompt: ...

    @property
    def completion(self) -> str: ...

    @property
    def label(self) -> bool: ...


def encode_answers(
    source: str, rows: Sequence[Judged], tokenizer: Any, template: str | None, max_length: int
) -> Answers:
    """Encode, cut and count rows of single answers.

    Raises:
        InputError: A row does not go with the template, or no row is left.
    """
    found: list[Labelled] = []
    counts = {"read": len(rows), "empty": 0, "truncated": 0, "used": 0, "desirable": 0}
    for row in rows:
        if not row.completion.strip():
            counts["empty"] += 1
            continue
        whole = _encoded(source, row.row, row.prompt, (row.completion,), tokenizer, template)
        prompt, answer = whole
        keep_first = prompt[0] == tokenizer.bos_token_id
        prompt, answer, _ = truncate(prompt, answer, answer, max_length=max_length, keep_first=keep_first)
        counts["used"] += 1
        counts["truncated"] += [prompt, answer] != whole
        counts["desirable"] += row.label
        found.append(Labelled(row.row, prompt, (answer,), (row.label,)))
    if not found:
        raise InputError(f"{source} leaves nothing to train on: {_in_words(counts)}")
    return Answers(source, found, counts)


def _encoded(
    source: str, number: int, asked: Prompt, texts: Sequence[str], tokenizer: Any, template: str | None
) -> list[list[int]]:
    """Token ids of a prompt and of answers to it."""
    try:
        prompt = encode_prompt(tokenizer, asked, template)
        answers = [encode_completion(tokenizer, asked, text, template) for text in texts]
    except InputError as error:
        raise InputError(f"{source} row {number}: {error}") from error
    if not prompt:
        raise InputError(f"{source} row {number}: the prompt has no tokens", allowed="at least one token")
    return [prompt, *answers]


def encode_rows(rows: Preferences, tokenizer: Any, template: str | None, max_length: int) -> Pairs:
    """Encode, cut and count the rows of one source.

    Raises:
        InputError: A row does not go with the template, or no row is left.
    """
    pairs: list[Pair] = []
    counts = {"read": len(rows.rows), "empty": 0, "identical": 0, "truncated": 0, "used": 0}
    for row in rows.rows:
        if not row.chosen.strip() or not row.rejected.strip():
            counts["empty"] += 1
            continue
        prompt, *answers = _encoded(rows.source, row.row, row.prompt, (row.chosen, row.rejected), tokenizer, template)
        cut = truncate(prompt, *answers, max_length=max_length, keep_first=prompt[0] == tokenizer.bos_token_id)
        if cut[1] == cut[2]:
            counts["identical"] += 1
            continue
        counts["used"] += 1
        counts["truncated"] += cut != (prompt, *answers)
        pairs.append(Pair(row.row, *cut))
    found = Pairs(rows.source, pairs, counts)
    if not pairs:
        raise InputError(f"{rows.source} leaves nothing to train on: {found.summary()}")
    return found


def draw(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs drawn without replacement, in their own order; all of them where there are not more."""
    if count >= len(pairs):
        return list(pairs)
    return [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), count))]


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], *, max_length: int, keep_first: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair so that neither prompt + chosen nor prompt + rejected has more than `max_length` tokens.

    The prompt gives way first: its end is kept, down to a quarter of `max_length` (SACPO's own 128 of 512). Then the
    answers lose their ends. Both answers keep the same prompt, and with `keep_first` the prompt keeps its BOS.
    """
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest > max_length:
        room = max(max_length - longest, max_length // 4)
        if len(prompt) > room:
            prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]] if keep_first else prompt[-room:]
        chosen, rejected = chosen[: max_length - len(prompt)], rejected[: max_length - len(prompt)]
    return prompt, chosen, rejected
