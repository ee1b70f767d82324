"""Training from scratch on token ids: a language model, and judges on top of it. Rows in, a trained model out."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from psacpo.console import say

IdPair: TypeAlias = tuple[list[int], list[int]]  # a conversation with its chosen, and with its rejected answer


def batches(lengths: Sequence[int], tokens: int, draw: random.Random) -> list[list[int]]:
    """Indices in batches of at most `tokens` tokens with their padding, of about equal lengths, in random order."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], draw.random()))
    found: list[list[int]] = [[]]
    for index in order:
        if found[-1] and (len(found[-1]) + 1) * lengths[index] > tokens:
            found.append([])
        found[-1].append(index)
    draw.shuffle(found)
    return found


def pad(rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """Right-padded token ids, shape (B, T). Attention is causal, so the padding needs no mask."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def schedule(steps: int, peak: float) -> Callable[[int], float]:
    """The learning rate at a step: linear warm-up over a twentieth of the steps, then half a cosine to nothing."""
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        return peak * min((step + 1) / warm, falling)

    return rate


def optimise(
    model: torch.nn.Module, losses: Iterator[Tensor], rate: Callable[[int], float], weight_decay: float
) -> Iterator[float]:
    """One AdamW step a loss; gives each loss's value."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def language_loss(model: Any, ids: Tensor, pad_id: int) -> Tensor:
    """Mean cross-entropy of every token after the first, in nats."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    real = ids[:, 1:] != pad_id
    return F.cross_entropy(model.lm_head(hidden[real]), ids[:, 1:][real])


def train_language_model(
    model: Any, rows: Sequence[list[int]], pad_id: int, *, epochs: int, tokens: int, peak: float, seed: int
) -> float:
    """Next-token prediction on whole conversations; gives the mean loss of the last epoch's steps, in nats."""
    draw = random.Random(seed)
    plan = [batches([len(row) for row in rows], tokens, draw) for _ in range(epochs)]
    losses = (language_loss(model, pad([rows[i] for i in b], pad_id), pad_id) for b in itertools.chain(*plan))
    running = optimise(model, losses, schedule(sum(map(len, plan)), peak), 0.1)
    model.train()
    mean, started = math.nan, time.perf_counter()
    for epoch, steps in enumerate(plan, start=1):
        mean = sum(itertools.islice(running, len(steps))) / len(steps)
        say(f"model: epoch {epoch} of {epochs}, loss {mean:.3f}, {time.perf_counter() - started:.0f} s")
    model.eval()
    return mean


@torch.inference_mode()
def held_out_loss(model: Any, rows: Sequence[list[int]], pad_id: int, tokens: int) -> float:
    """Mean cross-entropy a token over all rows, in nats."""
    total, count = 0.0, 0
    for batch in batches([len(row) for row in rows], tokens, random.Random(0)):
        part = [rows[i] for i in batch]
        n = sum(len(row) - 1 for row in part)
        total, count = total + n * language_loss(model, pad(part, pad_id), pad_id).item(), count + n
    return total / count


def preference_loss(scores: Tensor, sign: float) -> Tensor:
    """Bradley-Terry loss of pairs, with a pull of their mean score to 0.

    The loss sees differences only; the pull (Eisenstein et al. 2023, arXiv 2312.09244, section 3.1) puts the zero at
    the mean answer of the training data. It says nothing of what is safe.

    Args:
        scores: Shape (2B,): all chosen answers', then all rejected ones'.
        sign: 1 where the chosen answer is to score higher, -1 where lower.
    """
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(sign * (chosen - rejected)).mean() + 0.01 * (chosen + rejected).square().mean()


def train_judge(
    model: Any,
    train: Sequence[IdPair],
    dev: Sequence[IdPair],
    pad_id: int,
    *,
    sign: float,
    epochs: int,
    tokens: int,
    peak: float,
    seed: int,
) -> int:
    """Bradley-Terry training; the model ends as it was after the epoch with the least loss on `dev`.

    Returns:
        That epoch, from 1.
    """
    draw = random.Random(seed)
    plan = [batches(_widths(train), tokens, draw) for _ in range(epochs)]
    losses = (preference_loss(_scores(model, [train[i] for i in b], pad_id), sign) for b in itertools.chain(*plan))
    running = optimise(model, losses, schedule(sum(map(len, plan)), peak), 0.01)
    least, kept, state = math.inf, 0, {}
    for epoch, steps in enumerate(plan, start=1):
        model.train()
        mean = sum(itertools.islice(running, len(steps))) / len(steps)
        margins = sign * judge_margins(model, dev, pad_id, tokens)
        loss = -F.logsigmoid(margins).mean().item()
        say(f"judge: epoch {epoch}, loss {mean:.3f}, dev loss {loss:.3f}, dev pairs {(margins > 0).float().mean():.3f}")
        if loss < least:
            least, kept, state = loss, epoch, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    return kept


def _widths(pairs: Sequence[IdPair]) -> list[int]:
    """Tokens of each pair's two rows, padded to equal lengths."""
    return [2 * max(map(len, pair)) for pair in pairs]


def _scores(model: Any, pairs: Sequence[IdPair], pad_id: int) -> Tensor:
    """Scores of all chosen, then all rejected conversations. Shape (2B,)."""
    ids = pad([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], pad_id)
    scores: Tensor = model(input_ids=ids, attention_mask=(ids != pad_id).long()).logits[:, 0]
    return scores


@torch.inference_mode()
def judge_scores(model: Any, pairs: Sequence[IdPair], pad_id: int, tokens: int) -> Tensor:
    """Scores of the chosen and the rejected answers. Shape (2, number of pairs)."""
    model.eval()
    found = torch.empty(2, len(pairs))
    for batch in batches(_widths(pairs), tokens, random.Random(0)):
        found[:, batch] = _scores(model, [pairs[i] for i in batch], pad_id).view(2, -1)
    return found


def judge_margins(model: Any, pairs: Sequence[IdPair], pad_id: int, tokens: int) -> Tensor:
    """Score of the chosen less that of the rejected answer. Shape (number of pairs,)."""
    scores = judge_scores(model, pairs, pad_id, tokens)
    return scores[0] - scores[1]
