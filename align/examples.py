"""What training takes of a row: a prompt's token ids and answers to it, in pairs or each with a label."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from psacpo.errors import InputError


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
