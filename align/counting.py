"""What is odd about the rows of a source: said twice, contradicted, or asked again in the evaluation."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence

from psacpo.align.presets import turns
from psacpo.prompting import Prompt


def repeats(verdicts: Iterable[tuple[Hashable, Hashable]]) -> tuple[set[int], set[int]]:
    """Which rows say what one before them said, and which others say the opposite of one before them.

    Args:
        verdicts: Of each row what it says, and what its opposite would say.

    Returns:
        The places of the duplicate and of the contradictory ones, from 0.
    """
    # Hashes of 64 bits in the place of whole rows: among a million of them two are mistaken for one in 1 of 10^7 cases.
    seen: set[int] = set()
    duplicate: set[int] = set()
    contradictory: set[int] = set()
    for place, (said_here, opposite) in enumerate(verdicts):
        if hash(said_here) in seen:
            duplicate.add(place)
        elif hash(opposite) in seen:
            contradictory.add(place)
        seen.add(hash(said_here))
    return duplicate, contradictory


def is_blank(prompt: Prompt) -> bool:
    """Whether nothing is asked: a text, or messages of the user, of nothing but space."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(message["role"] == "user" and message["content"].strip() for message in prompt)


class Asked:
    """The prompts of an evaluation: training must not have seen them.

    Two prompts are the same if the user says the same words in them, whatever the case and the punctuation. A row
    overlaps if all that the user says in a prompt of the evaluation stands, turn after turn, in the row's.
    """

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._said = {words for words in map(said, prompts) if any(words)}
        self._most = max(map(len, self._said), default=0)

    def __len__(self) -> int:
        return len(self._said)

    def overlaps(self, prompt: Prompt) -> bool:
        turns_said = said(prompt)
        return any(
            turns_said[first : first + count] in self._said
            for count in range(1, self._most + 1)
            for first in range(len(turns_said) - count + 1)
        )


def said(prompt: Prompt) -> tuple[str, ...]:
    """What the user says in a prompt, turn by turn: words alone, in lower case."""
    messages: Sequence[object] | None = turns(prompt) if isinstance(prompt, str) else prompt
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    # The evaluation reads its prompts by itself, and says itself what is wrong with them.
    texts = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return tuple(" ".join(re.findall(r"\w+", text.casefold())) for text in texts if isinstance(text, str))
