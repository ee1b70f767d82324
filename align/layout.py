"""Answers as rows of a batch: the prompt once with all answers behind it, or one padded row an answer. Pure tensors.

A batch is a dict of tensors. B examples have A answers, all first ones, then all second ones and so on: of pairs, the
2B answers are all chosen ones, then all rejected ones. K is the largest number of answers of an example and L the
longest answer. Whatever the rows look like, four tensors say where the answers' tokens are predicted:

- `predictors`: the flat position in (rows * T) whose output predicts the token, 0 behind an answer's end. Shape (A, L);
- `targets`: the token's id, 0 behind an answer's end. Shape (A, L);
- `completion_mask`: True on the answers' tokens. Shape (A, L);
- `answered`: which answers an example has. Shape (K, B), True A times, in the order of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from psacpo.align.examples import Example

Batch: TypeAlias = dict[str, Tensor]
Layout: TypeAlias = Literal["shared", "padded"]

# Segments of a row; its further answers are counted on from CHOSEN.
PADDING, PROMPT, CHOSEN, REJECTED = range(4)


def _ordered(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(slot, place in `examples`) of all answers, in the order of a batch."""
    most = max(len(example.answers) for example in examples)
    return [(slot, place) for slot in range(most) for place, one in enumerate(examples) if slot < len(one.answers)]


def shared_rows(examples: Sequence[Example], pad_id: int) -> Batch:
    """One row an example, `prompt | chosen | rejected`, right-padded: the prompt is computed once for all answers.

    Positions go on from the prompt's end in every answer, and `tree_mask` keeps the answers from seeing one another, so
    each is computed as if it stood alone behind the prompt (prefix sharing).

    Returns:
        input_ids, position_ids: Shape (B, T).
        segments: PADDING, PROMPT, CHOSEN, REJECTED or the next answer's number of each position. Shape (B, T).
        predictors, targets, completion_mask, answered: See the head of this file.
    """
    width = max(shared_length(example) for example in examples)
    ids, positions, segments = [], [], []
    firsts: list[list[int]] = []
    for row, example in enumerate(examples):
        prompt = len(example.prompt)
        row_ids, row_positions, row_segments = [*example.prompt], [*range(prompt)], [PROMPT] * prompt
        starts = []
        for slot, answer in enumerate(example.answers):
            starts.append(row * width + len(row_ids))
            row_ids += answer
            row_positions += range(prompt, prompt + len(answer))
            row_segments += [CHOSEN + slot] * len(answer)
        padding = width - len(row_ids)
        behind = prompt + len(example.answers[-1])
        ids.append([*row_ids, *[pad_id] * padding])
        positions.append([*row_positions, *range(behind, behind + padding)])
        segments.append([*row_segments, *[PADDING] * padding])
        firsts.append(starts)
    order = _ordered(examples)
    # The first token of every answer is predicted by the prompt's last.
    leads = [firsts[place][0] - 1 for _, place in order]
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "segments": torch.tensor(segments),
    } | _answers(examples, order, [firsts[place][slot] for slot, place in order], leads)


def padded_rows(examples: Sequence[Example], pad_id: int) -> Batch:
    """One row an answer, `prompt | answer`, right-padded: right for every causal model.

    Under causal attention a token sees only what stands before it, so right padding changes no value of a real token.

    Returns:
        input_ids: Shape (A, T), rows in the order of the answers.
        attention_mask: 1 on tokens, 0 on padding. Shape (A, T).
        predictors, targets, completion_mask, answered: See the head of this file.
    """
    order = _ordered(examples)
    rows = [(examples[place].prompt, examples[place].answers[slot]) for slot, place in order]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    starts = [row * width + len(prompt) for row, (prompt, _) in enumerate(rows)]
    return {
        "input_ids": torch.tensor([[*p, *a, *[pad_id] * (width - n)] for (p, a), n in zip(rows, lengths, strict=True)]),
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in lengths]),
    } | _answers(examples, order, starts, [start - 1 for start in starts])


LAYOUTS: dict[Layout, Callable[[Sequence[Example], int], Batch]] = {"shared": shared_rows, "padded": padded_rows}


def _answers(
    examples: Sequence[Example], order: Sequence[tuple[int, int]], starts: Sequence[int], leads: Sequence[int]
) -> Batch:
    """Where the answers are predicted: the first token at `leads`, the others one place before themselves."""
    answers = [examples[place].answers[slot] for slot, place in order]
    longest = max(map(len, answers))
    predictors, targets, mask = [], [], []
    for answer, start, lead in zip(answers, starts, leads, strict=True):
        count, rest = len(answer), longest - len(answer)
        predictors.append([lead, *range(start, start + count - 1), *[0] * rest])
        targets.append([*answer, *[0] * rest])
        mask.append([True] * count + [False] * rest)
    return {
        "predictors": torch.tensor(predictors),
        "targets": torch.tensor(targets),
        "completion_mask": torch.tensor(mask),
        "answered": torch.tensor([[slot < len(one.answers) for one in examples] for slot in range(order[-1][0] + 1)]),
    }


def tree_mask(segments: Tensor) -> Tensor:
    """Who sees whom in `shared_rows`: what stands before, in the prompt or in the same answer.

    Padding stands last and sees itself, so no row of the mask is empty and no real token sees padding.

    Args:
        segments: Shape (B, T).

    Returns:
        Shape (B, 1, T, T), True where the query (third) attends to the key (fourth dimension).
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    queries, keys = segments[:, :, None], segments[:, None, :]
    seen = (keys == PROMPT) | (keys == queries)
    return (seen & (place[:, None] >= place)).unsqueeze(1)


def shared_length(example: Example) -> int:
    """Tokens of the example's row in `shared_rows`."""
    return len(example.prompt) + sum(map(len, example.answers))


def padded_length(example: Example) -> int:
    """Tokens of the example's rows in `padded_rows` when it is alone in its batch."""
    return len(example.answers) * len(example)


LENGTHS: dict[Layout, Callable[[Example], int]] = {"shared": shared_length, "padded": padded_length}


def group(lengths: Sequence[int], overhead: float) -> list[list[int]]:
    """Split rows of different lengths into batches that cost least, the longest rows first.

    A batch of k rows, padded to its longest row of T tokens, costs k * T + `overhead`: few batches waste tokens on
    padding, many waste time on calls. Sorted by length, the best batches are runs of neighbours, so the least cost
    over all groupings is found by dynamic programming in O(n^2).

    Args:
        lengths: Tokens of each row.
        overhead: What one more batch costs, counted in tokens.

    Returns:
        Places in `lengths`, each exactly once; within equal lengths in their own order.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    best, cut = [0.0], [0]
    for end in range(1, len(order) + 1):
        costs = [best[start] + (end - start) * lengths[order[start]] + overhead for start in range(end)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.insert(0, order[cut[end] : end])
        end = cut[end]
    return parts
