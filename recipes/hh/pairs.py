"""hh-rlhf's transcripts as pairs: read, split by prompt without leaks, cut to length, tokenised, written as rows."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from psacpo.errors import InputError
from psacpo.files import canonical_json, digest
from psacpo.prompting import encode_completion, encode_prompt
from psacpo.rows import read_rows

HELD_OUT, DEVELOPMENT = 0.20, 0.08  # shares of the prompts; the rest is for training
LONG = 40  # characters from which two equal turns in two parts count as a leak; "Sure, I can help" is none
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>"]
# hh-rlhf's own format, with an end after every answer: what samples, trains and judges writes a chat in this one way.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '\n\nAssistant: ' + (m['content'] | trim) + eos_token }}{% else %}{{ '\n\nHuman: ' + (m['content'] | trim) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one conversation, of which people preferred `chosen`.

    Attributes:
        prompt: Messages that end with the user's.
        category: "helpful" or "harmful": what the prompts of its file are for.
        group: Digest of the conversation's first turn, case and punctuation aside; the unit of splitting.
    """

    id: str
    category: str
    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    group: str


def read_pairs(path: Path, category: str, counts: Counter[str]) -> list[Pair]:
    """The pairs of one file; rows that are no preference are dropped and counted."""
    pairs = []
    for number, row in enumerate(read_rows(path), start=1):
        if not (isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)):
            raise InputError(f"{path} row {number}: chosen and rejected are not both text")
        counts["read"] += 1
        prompt, chosen, other, rejected = *_conversation(row, "chosen"), *_conversation(row, "rejected")
        if prompt != other or not prompt or prompt[-1]["role"] != "user":
            counts["two contexts, or none"] += 1
        elif not chosen or not rejected or chosen == rejected:
            counts["empty or equal answers"] += 1
        else:
            group = digest(_plain(prompt[0]["content"]))[:16]
            pairs.append(Pair(f"{category}-{number}", category, prompt, chosen, rejected, group))
    return pairs


def _conversation(row: dict[str, Any], side: str) -> tuple[list[dict[str, str]], str]:
    """(messages before the answer, the answer), from a row with a prompt or from one whole transcript."""
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        return (_turns(prompt) if isinstance(prompt, str) else prompt), _tidy(row[side])
    before, _, answer = row[side].rpartition("\n\nAssistant:")
    return _turns(before), _tidy(answer)


def _turns(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript; text without a speaker's mark is one message of the user."""
    start, *marked = re.split(r"\n\n(Human|Assistant):", f"\n\n{transcript.strip()}")
    if not marked:
        return [{"role": "user", "content": start.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": _tidy(text)} for who, text in zip(marked[::2], marked[1::2], strict=True)]
    # "\n\nAssistant:" at the end asks for the answer and is no message.
    return [turn for turn in turns if turn["content"]]


def _tidy(text: str) -> str:
    """Without the space around it, and without the `Human` that some answers of the collection end in."""
    return re.sub(r"(\s*\n\nHuman)+\s*$", "", text).strip()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def split(pairs: Sequence[Pair], seed: int, counts: Counter[str]) -> dict[str, list[Pair]]:
    """`train`, `dev` and `held-out`: all pairs of a first turn in one part, no long turn in two parts.

    A pair that shares a turn of `LONG` characters or more with a later part is dropped from the earlier one.
    """
    groups = sorted({pair.group for pair in pairs})
    random.Random(seed).shuffle(groups)
    ends = {"held-out": HELD_OUT, "dev": HELD_OUT + DEVELOPMENT, "train": 1.0}
    place = {
        group: next(part for part, end in ends.items() if index < end * len(groups))
        for index, group in enumerate(groups)
    }
    parts: dict[str, list[Pair]] = {"train": [], "dev": [], "held-out": []}
    for pair in pairs:
        parts[place[pair.group]].append(pair)
    taken: set[str] = set()
    for name in reversed(parts):
        kept = [pair for pair in parts[name] if not taken & _long_turns(pair)]
        counts[f"{name}: leaks"] = len(parts[name]) - len(kept)
        taken |= {turn for pair in parts[name] for turn in _long_turns(pair)}
        parts[name] = kept
    return parts


def _long_turns(pair: Pair) -> set[str]:
    turns = {_plain(text) for text in (*(m["content"] for m in pair.prompt), pair.chosen, pair.rejected)}
    return {turn for turn in turns if len(turn) >= LONG}


def fit(pair: Pair, tokenizer: PreTrainedTokenizerFast, length: int) -> Pair | None:
    """The pair with as few of the oldest turns left out as fit in `length` tokens; None where none fits."""
    prompt = pair.prompt
    while prompt:
        shorter = replace(pair, prompt=prompt)
        if max(map(len, encode(shorter, tokenizer))) <= length:
            return shorter
        prompt = prompt[1:]
        while prompt and prompt[0]["role"] != "user":
            prompt = prompt[1:]
    return None


def encode(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the conversation with the chosen and with the rejected answer, as `psacpo` writes them."""
    prompt = encode_prompt(tokenizer, pair.prompt, None)
    chosen, rejected = (encode_completion(tokenizer, pair.prompt, a, None) for a in (pair.chosen, pair.rejected))
    return prompt + chosen, prompt + rejected


def make_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the pairs' text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = ([m["content"] for m in pair.prompt] + [pair.chosen, pair.rejected] for pair in pairs)
    core.train_from_iterator([f"\n\nHuman: {turn}\n\nAssistant: " for turn in itertools.chain(*turns)], trainer)
    core.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    wrap: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = wrap(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_data(out: Path, parts: dict[str, list[Pair]], prompts: int, seed: int) -> dict[str, int]:
    """Preference rows of the training part, and up to `prompts` prompts a category of the held-out and the dev part."""
    written = {}
    for category, name in (("helpful", "helpful"), ("harmful", "harmless")):
        rows = [_row(pair) for pair in parts["train"] if pair.category == category]
        written[f"{name}.jsonl"] = _write_lines(out / f"{name}.jsonl", rows)
    for part, file in (("held-out", "prompts.jsonl"), ("dev", "prompts_dev.jsonl")):
        rows = []
        for category in ("helpful", "harmful"):
            # One conversation a first turn: the clusters of the bootstrap are then as many as the prompts.
            single = {pair.group: pair for pair in parts[part] if pair.category == category}
            order = sorted(single.values(), key=lambda pair: digest([seed, pair.group]))
            rows += [
                {"id": pair.id, "prompt": pair.prompt, "category": category, "cluster": pair.group}
                for pair in order[:prompts]
            ]
        written[file] = _write_lines(out / file, rows)
    return written


def _row(pair: Pair) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return {"id": pair.id, "prompt": pair.prompt, "chosen": chosen, "rejected": rejected}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    path.write_text("".join(canonical_json(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
