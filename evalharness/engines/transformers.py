"""The embedded engine: transformers on any device, all policies of a batch in one forward pass."""

from __future__ import annotations

import contextlib
import gc
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation
from psacpo.evalharness.engines.answers import end_ids
from psacpo.evalharness.engines.base import Completion, NextTokens, Passage, Request
from psacpo.evalharness.engines.mixture import AdapterMixture
from psacpo.evalharness.engines.passages import answer_log_probs, by_memory
from psacpo.evalharness.engines.sampling import next_tokens, uniforms
from psacpo.hub import load_model, load_tokenizer
from psacpo.merge.adapters import Adapter

# What torch and the system say when memory runs out; on a CPU it has no type of its own.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)


@contextlib.contextmanager
def _room_for(what: str, knob: str) -> Iterator[None]:
    """One line that names the setting, where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError, InputError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise InputError(f"out of memory for {what}", allowed=knob) from error


@dataclass
class _Row:
    """One answer in the making."""

    request: Request
    uniform: Tensor
    tokens: list[int]
    logprobs: list[float]
    end_id: int | None = None
    finish_reason: str | None = None
    text: str | None = None


class TransformersEngine:
    """One base model, loaded once, with every adapter beside it.

    Attributes:
        model: The base with the mixture's hooks on it.
        tokenizer: Its tokenizer.
        mixture: The adapters.
        generation: Sampling settings.
        batch_size: Rows of one forward pass.
        log_probs: Whether answers are given with their log-probability.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mixture: AdapterMixture, generation: Generation, *, log_probs: bool = False
    ) -> None:
        self.model, self.tokenizer, self.mixture, self.generation = model, tokenizer, mixture, generation
        self.log_probs = log_probs
        self.batch_size: int | None = generation.batch_size
        self.end_ids = end_ids(model.generation_config, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else min(self.end_ids, default=0)

    @classmethod
    def load(
        cls,
        base: str | Path,
        adapters: Mapping[str, Adapter],
        *,
        generation: Generation,
        dtype: str,
        device: str,
        log_probs: bool = False,
    ) -> TransformersEngine:
        """Load the base once and attach the adapters."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        path = Path(base)
        tokenizer = load_tokenizer(path)
        with _room_for(f"base {path} in {dtype} on {device}", "a smaller dtype, another device, or engine vllm"):
            model = load_model(AutoModelForCausalLM, path, dtype=getattr(torch, dtype))
            model = model.to(device).eval()
            return cls(model, tokenizer, AdapterMixture(model, adapters), generation, log_probs=log_probs)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Answer the requests in batches of `batch_size`, in the order given: prompts of like length belong together."""
        for start in range(0, len(requests), self.generation.batch_size):
            batch = requests[start : start + self.generation.batch_size]
            with _room_for(f"a batch of {len(batch)} answers", "a smaller generation.batch_size or max_new_tokens"):
                answers = self._generate(batch)
            yield from answers

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer one batch: left-padded prompts, a key-value cache, finished rows leave the batch."""
        device = self.model.device
        rows = [
            _Row(request, torch.from_numpy(uniforms(request.seed, self.generation.max_new_tokens)).to(device), [], [])
            for request in requests
        ]
        ids, mask, weights = self._inputs(requests)
        cache = DynamicCache(config=self.model.config)
        alive = list(rows)
        try:
            for step in range(self.generation.max_new_tokens):
                self.mixture.set_rows(weights if self.mixture.names else None)
                logits = self._last_logits(ids, mask, past_key_values=cache, use_cache=True)
                self._require_finite(logits, [row.request for row in alive])
                chosen = next_tokens(
                    logits,
                    torch.stack([row.uniform[step] for row in alive]),
                    temperature=self.generation.temperature,
                    top_p=self.generation.top_p,
                    top_k=self.generation.top_k,
                )
                for row, token in zip(alive, chosen.tolist(), strict=True):
                    self._take(row, token)
                if self.generation.logprobs or self.log_probs:
                    found = logits.float().log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
                    for row, value in zip(alive, found.tolist(), strict=True):
                        row.logprobs.append(value)
                keep = [index for index, row in enumerate(alive) if row.finish_reason is None]
                if not keep:
                    break
                ids = chosen[:, None]
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                if len(keep) < len(alive):
                    chosen_rows = torch.tensor(keep, device=device)
                    alive = [alive[index] for index in keep]
                    ids, mask, weights = ids[chosen_rows], mask[chosen_rows], weights[chosen_rows]
                    cache.batch_select_indices(chosen_rows)
        finally:
            self.mixture.set_rows(None)
        return [self._completion(row) for row in rows]

    @torch.inference_mode()
    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Key -> log-probabilities of the next token over the whole vocabulary, all requests in one batch."""
        ids, mask, weights = self._inputs(requests)
        try:
            self.mixture.set_rows(weights if self.mixture.names else None)
            logits = self._last_logits(ids, mask)
        finally:
            self.mixture.set_rows(None)
        self._require_finite(logits, requests)
        rows = logits.float().log_softmax(dim=-1).tolist()
        return [{request.key: dict(enumerate(row)) for request, row in zip(requests, rows, strict=True)}]

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterator[tuple[str, float]]:
        """One forward pass of the base over each prompt with its answer, in batches of like size in memory."""
        for start in range(0, len(passages), self.generation.batch_size):
            for part in by_memory(passages[start : start + self.generation.batch_size], self.model.config.vocab_size):
                with _room_for(f"the base's probabilities of {len(part)} answers", "generation.kl_to_base: false"):
                    yield from self._base_log_probs(part)

    @torch.inference_mode()
    def _base_log_probs(self, passages: Sequence[Passage]) -> list[tuple[str, float]]:
        """Prompts padded on the left and answers on the right, so that all answers begin in one column."""
        device = self.model.device
        before = max(len(passage.prompt_ids) for passage in passages)
        after = max(len(passage.token_ids) for passage in passages)
        rows, seen = [], []
        for passage in passages:
            left, right = before - len(passage.prompt_ids), after - len(passage.token_ids)
            rows.append([self.pad_id] * left + [*passage.prompt_ids, *passage.token_ids] + [self.pad_id] * right)
            seen.append([0] * left + [1] * (before - left + after - right) + [0] * right)
        ids, mask = torch.tensor(rows, device=device), torch.tensor(seen, device=device)
        positions = mask.cumsum(dim=-1).sub(1).clamp(min=0)
        self.mixture.set_rows(None)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=after + 1, use_cache=False
        )
        found = answer_log_probs(output.logits[:, -after - 1 : -1], ids[:, before:], mask[:, before:])
        return list(zip((passage.key for passage in passages), found.tolist(), strict=True))

    def close(self) -> None:
        """Let go of the model, and give its memory back: another may be loaded in its place."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _inputs(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded ids and mask [rows, width], and weights [rows, adapters]."""
        device = self.model.device
        for request in requests:
            if request.policy.checkpoint is not None:
                raise InputError(
                    f"{request.policy.name} is a checkpoint, which the transformers engine cannot mix",
                    allowed="engine vllm with strategy reload",
                )
        prompts = [list(request.prompt_ids) for request in requests]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        weights = torch.tensor(
            [[request.policy.weights.get(name, 0.0) for name in self.mixture.names] for request in requests],
            device=device,
        )
        return ids, mask, weights

    def _last_logits(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """Logits [rows, vocabulary] after the last token of each row."""
        positions = mask.cumsum(dim=-1)[:, -ids.shape[1] :].sub(1).clamp(min=0)
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _require_finite(self, logits: Tensor, alive: Sequence[Request]) -> None:
        """Stop at a policy whose logits are no numbers: an answer would still come out, and be judged."""
        # Masked vocabulary entries are -inf; every row must have a finite largest logit and no NaN.
        good = torch.isfinite(logits.max(dim=-1).values) & ~logits.isnan().any(dim=-1)
        if not bool(good.all()):
            names = sorted({one.policy.name for one, fine in zip(alive, good.tolist(), strict=True) if not fine})
            raise InputError(f"the logits of {', '.join(names)} are not finite: its weights overflow {logits.dtype}")

    def _take(self, row: _Row, token: int) -> None:
        """Add a sampled token to its row and see whether the row ends with it."""
        if token in self.end_ids:
            row.finish_reason, row.end_id = "stop", token
            return
        row.tokens.append(token)
        for stop in self.generation.stop:
            # A stop string may straddle tokens, and a token is at least one byte of it.
            tail = self.tokenizer.decode(row.tokens[-len(stop.encode()) - 4 :], skip_special_tokens=True)
            if stop in tail:
                text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
                row.text, row.finish_reason = text[: text.index(stop)], "stop"
                return

    def _completion(self, row: _Row) -> Completion:
        text = row.text
        if text is None:
            text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        # The end token was drawn too, and is no token of the answer.
        logprobs = tuple(row.logprobs[: len(row.tokens)]) if self.generation.logprobs else None
        return Completion(
            row.request.key,
            text,
            tuple(row.tokens),
            row.finish_reason or "length",
            logprobs,
            math.fsum(row.logprobs) if self.log_probs else None,
            row.end_id,
        )
