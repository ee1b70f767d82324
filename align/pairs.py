"""Preference rows as token ids, cut to length with every cut counted, and padded batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psacpo.align.data import Preferences
from psacpo.errors import InputError
from psacpo.files import digest
from psacpo.prompting import encode_completion, encode_prompt


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference, at least one each. `row` is the row's number in its source, from 1."""

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


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
        counts = self.counts
        dropped = [f"{counts[name]} {name}" for name in ("empty", "identical") if counts[name]]
        text = f"{counts['used']} of {counts['read']} rows used"
        text += f", dropped: {', '.join(dropped)}" if dropped else ""
        return text + (f", cut to length: {counts['truncated']}" if counts["truncated"] else "")


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
        try:
            prompt = encode_prompt(tokenizer, row.prompt, template)
            answers = [encode_completion(tokenizer, row.prompt, text, template) for text in (row.chosen, row.rejected)]
        except InputError as error:
            raise InputError(f"{rows.source} row {row.row}: {error}") from error
        if not prompt:
            raise InputError(f"{rows.source} row {row.row}: the prompt has no tokens", allowed="at least one token")
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


def collate(pairs: Sequence[Pair], pad_id: int) -> dict[str, Tensor]:
    """B pairs as one right-padded batch of 2B rows: all chosen, then all rejected.

    Under causal attention a token sees only what stands before it, so right padding changes no value of a real token.

    Returns:
        input_ids: (2B, T).
        attention_mask: (2B, T), 1 on tokens, 0 on padding.
        completion_mask: (2B, T), True on answer tokens.
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, attended, answered = [], [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        ids.append(prompt + answer + [pad_id] * padding)
        attended.append([1] * (longest - padding) + [0] * padding)
        answered.append([False] * len(prompt) + [True] * len(answer) + [False] * padding)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attended),
        "completion_mask": torch.tensor(answered),
    }
