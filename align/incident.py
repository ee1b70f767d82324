"""What is kept of a batch whose loss is not a number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.align.examples import Example
from psacpo.files import atomic_directory, write_manifest


def save_batch(
    place: Path,
    examples: Sequence[Example],
    losses: Sequence[float],
    tokenizer: Any,
    *,
    metrics: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write `batch.jsonl`, a line an example, `metrics.jsonl` of the steps before, and psacpo.json; replaces the last.

    A line holds the row's number in its source, the texts and numbers of tokens of prompt and answers as the model saw
    them, cut to length and with the template, and the loss, null where it is not finite.

    Args:
        place: The directory.
        examples: The batch.
        losses: Of each example.
        metrics: The records of the steps before.
        facts: Further entries of psacpo.json: stage, step, settings.
    """
    lines = [
        {
            "row": example.row,
            "loss": loss if math.isfinite(loss) else None,
            "prompt": tokenizer.decode(example.prompt),
            "answers": [tokenizer.decode(answer) for answer in example.answers],
            "tokens": [len(example.prompt), *map(len, example.answers)],
        }
        for example, loss in zip(examples, losses, strict=True)
    ]
    with atomic_directory(place, overwrite=True) as partial:
        _write(partial / "batch.jsonl", lines)
        _write(partial / "metrics.jsonl", metrics)
        write_manifest(partial, kind="nonfinite", **facts)


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
