"""What a guard writes, and what its words' probabilities say: greedy replies of one batch, classes out of label tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psacpo.errors import InputError
from psacpo.evalharness.judges.guard_spec import Output
from psacpo.prompting import end_of_turn_ids

PLAUSIBLE = 20
"""A class is believed where one of its words is among so many most likely tokens; endpoints give no more of them."""


@dataclass(frozen=True)
class Reply:
    """What a guard wrote, greedily.

    Attributes:
        ids: Its tokens, without the end of turn.
        logprobs: Of the label tokens at each step, [steps + 1 where the reply ended of itself, labels].
        plausible: Whether each is among the `PLAUSIBLE` most likely, in the same shape.
    """

    ids: list[int]
    logprobs: Tensor
    plausible: Tensor


@torch.inference_mode()
def greedy_replies(
    model: Any, rows: Sequence[Sequence[int]], *, label_ids: Sequence[int], ends: Collection[int], steps: int
) -> list[Reply]:
    """Greedy replies of a model of transformers to one left-padded batch.

    Args:
        rows: Ids that the guard reads.
        label_ids: The tokens whose probabilities are wanted, L of them.
        ends: Tokens that end a reply.
        steps: Most tokens of a reply.
    """
    from transformers import DynamicCache

    width, device = max(map(len, rows)), model.device
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    labels = torch.tensor(label_ids, device=device)
    cache = DynamicCache(config=model.config) if steps > 1 else None
    written: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    logprobs: list[Tensor] = []
    plausible: list[Tensor] = []
    for _ in range(steps):
        positions = mask.cumsum(dim=-1)[:, -ids.shape[1] :].sub(1).clamp(min=0)
        logits = (
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        logprobs.append(logits.log_softmax(dim=-1)[:, labels].cpu())
        top = logits.topk(min(PLAUSIBLE, logits.shape[-1])).indices
        plausible.append((top[:, :, None] == labels).any(dim=1).cpu())
        chosen = logits.argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                written[row].append(token)
        if all(ended):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    found, likely = torch.stack(logprobs, dim=1), torch.stack(plausible, dim=1)
    return [Reply(text, found[row], likely[row]) for row, text in enumerate(written)]


def class_probabilities(logprobs: Tensor, columns: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Class -> its share of the probability that all classes' words have, of log-probabilities [labels]."""
    parts = torch.stack([logprobs[list(columns[name])].logsumexp(dim=0) for name in columns])
    return dict(zip(columns, parts.softmax(dim=0).tolist(), strict=True))


def label_tokens(tokenizer: Any, output: Output, what: str) -> tuple[dict[str, list[int]], list[int]]:
    """Class -> columns of its words' first tokens, and the token of each column.

    A word is looked up at a text's start, behind a space and behind a line break, since its token differs.

    Raises:
        InputError: Two classes begin with the same token, so one step cannot tell them apart.
    """
    tokens: dict[int, str] = {}
    for name, words in output.labels.items():
        for text in (before + word for word in words for before in ("", " ", "\n")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            first = next((number for number in ids if tokenizer.decode([number]).strip()), None)
            if first is None:
                raise InputError(f"{what}: its tokenizer has no token for the word {text.strip()!r}")
            if tokens.setdefault(first, name) != name:
                raise InputError(
                    f"{what}: the words for '{name}' and '{tokens[first]}' begin with the same token "
                    f"{tokenizer.decode([first])!r}",
                    allowed="words that the tokenizer tells apart by their first token",
                )
    columns: dict[str, list[int]] = {name: [] for name in output.labels}
    for column, name in enumerate(tokens.values()):
        columns[name].append(column)
    return columns, list(tokens)


def reply_ends(path: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a reply: the tokenizer's, and those of generation_config.json."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)}
    try:
        given = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        given = None
    found |= set(given) if isinstance(given, list) else {given}
    return frozenset(number for number in found if number is not None)
