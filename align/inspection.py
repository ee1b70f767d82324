"""What a stage would train on, seen before it does: counts, lengths, and examples with the mask of the loss."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from psacpo.align import model as models
from psacpo.align.config import AlignConfig
from psacpo.align.examples import Labelled, Pair
from psacpo.align.objectives import objective_of
from psacpo.align.reading import Data, read_stages
from psacpo.align.stage_config import Stage
from psacpo.errors import InputError

EXAMPLES = 5


def inspect(config: AlignConfig, examples: int = EXAMPLES) -> dict[str, Any]:
    """Read and encode every stage's data as training would; no weights are loaded and nothing is written.

    Returns:
        `notes`, lines for the user; `data`, one entry for each set of rows: the `stages` that use it, `source`,
        `preset`, `kind`, the `counts` of `pairs.Pairs`, the number of different `prompts`, `tokens` (median, p95 and
        max of the prompt and of each kind of answer, as trained), `compared` (whether there are prompts of an evaluation
        that rows could ask too), `longer` (of pairs, how many have the longer answer
        chosen, how many answers are equally long, and the accuracy of going by length alone) and `examples`, drawn
        with the run's seed: decoded with their special tokens, prompt (masked) and answers (trained) apart.

    Raises:
        InputError: Base, template or data cannot be used.
    """
    tokenizer = models.load_tokenizer(models.find_base(config.base))
    reading = read_stages(config, tokenizer)
    found: dict[int, dict[str, Any]] = {}
    for stage in config.runs:
        data = reading.data[stage.name]
        if id(data) not in found:
            found[id(data)] = _facts(stage, data) | {
                "compared": reading.compared,
                "examples": _examples(data, tokenizer, config.seed, examples),
            }
        found[id(data)]["stages"].append(stage.name)
    notes = reading.notes + [
        note for stage in config.runs for note in _refusals(config, stage, reading.data[stage.name])
    ]
    return {"base": config.base, "max_length": config.max_length, "notes": notes, "data": [*found.values()]}


def _refusals(config: AlignConfig, stage: Stage, data: Data) -> list[str]:
    """Why the stage could not be trained on its rows: who looks at them should see it, and see them all the same."""
    rows: Any = data.pairs.pairs
    try:
        objective_of(rows, stage, config.beta_of(stage), config.seed)
    except InputError as error:
        return [f"would be refused: {error}"]
    return []


def _facts(stage: Stage, data: Data) -> dict[str, Any]:
    pairs: Sequence[Pair | Labelled] = data.pairs.pairs
    lengths: dict[str, list[int]] = {"prompt": [len(one.prompt) for one in pairs]}
    for one in pairs:
        for name, answer in zip(_names(one), one.answers, strict=True):
            lengths.setdefault(name, []).append(len(answer))
    facts: dict[str, Any] = {
        "stages": [],
        "source": stage.data,
        "preset": data.preset,
        "kind": "pairs" if isinstance(pairs[0], Pair) else "single answers",
        "counts": data.pairs.counts,
        "dropped": {name: data.pairs.counts.get(name, 0) for name in data.pairs.reasons},
        "prompts": len({tuple(one.prompt) for one in pairs}),
        "tokens": {name: _spread(values) for name, values in lengths.items()},
    }
    both = [pair for pair in pairs if isinstance(pair, Pair)]
    return facts | ({"longer": _longer(both)} if both else {})


def _names(example: Pair | Labelled) -> tuple[str, ...]:
    if isinstance(example, Pair):
        return "chosen", "rejected"
    return tuple("desirable" if label else "undesirable" for label in example.desirable)


def _spread(values: Sequence[int]) -> dict[str, int]:
    """Median, 95th percentile and maximum, each a value that occurs."""
    ordered = sorted(values)
    return {name: ordered[math.ceil(part * len(ordered)) - 1] for name, part in _PARTS.items()}


_PARTS = {"median": 0.5, "p95": 0.95, "max": 1.0}


def _longer(pairs: Sequence[Pair]) -> dict[str, float]:
    """How far the length of the answers alone tells which is chosen; a tie is half a hit."""
    chosen = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    equal = sum(len(pair.chosen) == len(pair.rejected) for pair in pairs)
    share = (chosen + equal / 2) / len(pairs)
    return {"chosen": chosen, "equal": equal, "accuracy": max(share, 1 - share)}


def _examples(data: Data, tokenizer: Any, seed: int, count: int) -> list[dict[str, Any]]:
    pairs: Sequence[Pair | Labelled] = data.pairs.pairs
    places = sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    found = []
    for one in (pairs[place] for place in places):
        prompt = tokenizer.decode(one.prompt)
        answers = [
            {"kind": name, "text": _behind(tokenizer, one.prompt, prompt, answer), "tokens": len(answer)}
            for name, answer in zip(_names(one), one.answers, strict=True)
        ]
        found.append({"row": one.row, "prompt": prompt, "prompt_tokens": len(one.prompt), "answers": answers})
    return found


def _behind(tokenizer: Any, ids: list[int], prompt: str, answer: list[int]) -> str:
    """An answer's text as it stands behind its prompt: alone, it could lose the space that it begins with."""
    whole: str = tokenizer.decode([*ids, *answer])
    return whole[len(prompt) :] if whole.startswith(prompt) else str(tokenizer.decode(answer))
