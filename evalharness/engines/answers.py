"""Where an answer ends and what its text is: one rule for all engines, so that they give equal records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from psacpo.prompting import end_of_turn_ids


def end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the model's own list, the tokenizer's EOS, the chat formats' end of turn."""
    own = generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)) if i is not None)


def read_generation_config(base: Path) -> Any:
    """generation_config.json of a model directory, or what config.json implies where there is none."""
    from transformers import GenerationConfig

    from psacpo.hub import load_config

    if (base / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base)
    return GenerationConfig.from_model_config(load_config(base))


def strip_end(token_ids: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """Token ids without the end token that some engines leave at their end."""
    return tuple(token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids)


def answer_text(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of an answer, cut before the first stop string in it."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]
