"""The embedded engine: transformers on any device, all policies of a batch in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation
from psacpo.evalharness.engines.base import Completion, Request
from psacpo.evalharness.engines.mixture import AdapterMixture
from psacpo.evalharness.engines.sampling import next_tokens, uniforms
from psacpo.hub import load_model, load_tokenizer
from psacpo.merge.adapters import Adapter
from psacpo.prompting import end_of_turn_ids


@dataclass
class _Row:
    """One answer in the making."""

    request: Request
    uniform: Tensor
    tokens: list[int]
    finish_reason: str | None = None
    text: str | None = None


class TransformersEngine:
    """One base model, loaded once, with every adapter beside it.

    Attributes:
        model: The base with the mixture's hooks on it.
        tokenizer: Its tokenizer.
        mixture: The adapters.
        generation: Sampling settings.
    """

    def __init__(self, model: Any, tokenizer: Any, mixture: AdapterMixture, generation: Generation) -> None:
        self.model, self.tokenizer, self.mixture, self.generation = model, tokenizer, mixture, generation
        self.end_ids = _end_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else min(self.end_ids, default=0)

    @classmethod
    def load(
        cls, base: str | Path, adapters: Mapping[str, Adapter], *, generation: Generation, dtype: str, device: str
    ) -> TransformersEngine:
        """Load the base once and attach the adapters."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        path = Path(base)
        tokenizer = load_tokenizer(path)
        model = load_model(AutoModelForCausalLM, path, dtype=getattr(torch, dtype))
        model = model.to(device).eval()
        return cls(model, tokenizer, AdapterMixture(model, adapters), generation)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> Iterable[Completion]:
        """Answer one batch: left-padded prompts, a key-value cache, finished rows leave the batch."""
        device = self.model.device
        rows = [
            _Row(request, torch.from_numpy(uniforms(request.seed, self.generation.max_new_tokens)).to(device), [])
            for request in requests
        ]
        prompts = [list(request.prompt_ids) for request in requests]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        weights = torch.tensor(
            [[request.policy.weights.get(name, 0.0) for name in self.mixture.names] for request in requests],
            device=device,
        )
        cache = DynamicCache(config=self.model.config)
        alive = list(rows)
        try:
            for step in range(self.generation.max_new_tokens):
                self.mixture.set_rows(weights if self.mixture.names else None)
                positions = mask.cumsum(dim=-1)[:, -ids.shape[1] :].sub(1).clamp(min=0)
                output = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                logits = output.logits[:, -1]
                self._require_finite(logits, alive)
                chosen = next_tokens(
                    logits,
                    torch.stack([row.uniform[step] for row in alive]),
                    temperature=self.generation.temperature,
                    top_p=self.generation.top_p,
                    top_k=self.generation.top_k,
                )
                for row, token in zip(alive, chosen.tolist(), strict=True):
                    self._take(row, token)
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

    def _require_finite(self, logits: Tensor, alive: Sequence[_Row]) -> None:
        """Stop at a policy whose logits are no numbers: an answer would still come out, and be judged."""
        # Masked vocabulary entries are -inf; every row must have a finite largest logit and no NaN.
        good = torch.isfinite(logits.max(dim=-1).values) & ~logits.isnan().any(dim=-1)
        if not bool(good.all()):
            names = sorted(
                {row.request.policy.name for row, fine in zip(alive, good.tolist(), strict=True) if not fine}
            )
            raise InputError(f"the logits of {', '.join(names)} are not finite: its weights overflow {logits.dtype}")

    def _take(self, row: _Row, token: int) -> None:
        """Add a sampled token to its row and see whether the row ends with it."""
        if token in self.end_ids:
            row.finish_reason = "stop"
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
        return Completion(row.request.key, text, tuple(row.tokens), row.finish_reason or "length")


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the model's own list, the tokenizer's EOS, the chat formats' end of turn."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)) if i is not None)
