"""The data of all stages, read and encoded once each, and what there is to say about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.align.config import AlignConfig
from psacpo.align.counting import Asked
from psacpo.align.data import read_data
from psacpo.align.examples import Labelled, Pair
from psacpo.align.pairs import Pairs, encode_rows
from psacpo.align.presets import turns
from psacpo.align.stage_config import Stage
from psacpo.errors import InputError
from psacpo.files import canonical_json
from psacpo.rows import read_rows, require_columns


@dataclass(frozen=True, slots=True)
class Data:
    """A stage's data, encoded.

    Attributes:
        digest: Of the source's content.
        preset: By which the rows were read.
        transcripts: Prompts with several speakers in them that the chat template would make one user's message.
    """

    digest: str
    preset: str | None
    pairs: Pairs[Pair] | Pairs[Labelled]
    transcripts: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """The data of all stages by their names, and lines for the user about what was found.

    Attributes:
        compared: Whether there were prompts of an evaluation to compare them with.
    """

    data: dict[str, Data]
    notes: list[str]
    compared: bool


def read_stages(config: AlignConfig, tokenizer: Any) -> Reading:
    """Read and encode what every stage trains on.

    Raises:
        InputError: Of one of them, the data cannot be read or used.
    """
    asked, notes = _asked(config.evaluation_prompts)
    read: dict[str, Data] = {}
    found: dict[str, Data] = {}
    for stage in config.runs:
        # Two stages may share their data, as a stage and its naive counterpart do.
        handling = [stage.truncation.model_dump(), stage.duplicates]
        same = canonical_json([stage.data, stage.columns, stage.preset, stage.wanted, *handling])
        if same not in read:
            read[same] = _read(stage, config, tokenizer, asked)
            notes += _notes(stage, read[same])
        notes += _weights(stage, read[same])
        found[stage.name] = read[same]
    return Reading(found, notes, asked is not None)


def _read(stage: Stage, config: AlignConfig, tokenizer: Any, asked: Asked | None) -> Data:
    rows = read_data(stage.data, stage.columns, stage.preset, stage.wanted)
    pairs = encode_rows(
        rows,
        tokenizer,
        config.template,
        config.max_length,
        truncation=stage.truncation,
        drop_duplicates=stage.duplicates == "drop",
        asked=asked,
    )
    transcripts = (row.prompt for row in rows.rows if config.template is None and isinstance(row.prompt, str))
    return Data(rows.digest, rows.preset, pairs, sum(turns(prompt) is not None for prompt in transcripts))


def _notes(stage: Stage, data: Data) -> list[str]:
    notes = []
    if data.preset != stage.preset:
        notes.append(f"{stage.name}: by its columns {stage.data} is read with preset {data.preset}")
    if data.transcripts:
        notes.append(
            f"{stage.name}: warning: {data.transcripts} prompts are transcripts (Human: … Assistant: …), each of which "
            "the chat template makes one message of the user; lists of messages keep the turns, and so does "
            "template: '{prompt}'"
        )
    overlap = data.pairs.counts.get("overlap")
    if overlap:
        notes.append(
            f"{stage.name}: warning: {overlap} of {data.pairs.counts['used']} rows ask what the evaluation's prompts "
            "ask; the frontier would be measured on what was trained"
        )
    return notes


def _weights(stage: Stage, data: Data) -> list[str]:
    """What the KTO paper (arXiv 2402.01306, equation 8) says of weights that do not make up for uneven numbers."""
    desirable = data.pairs.counts.get("desirable")
    if stage.loss != "kto" or desirable is None:
        return []
    others = data.pairs.counts["used"] - desirable
    good, bad = stage.desirable_weight * desirable, stage.undesirable_weight * others
    if bad <= good <= 4 / 3 * bad:
        return []
    even = f"; undesirable_weight {stage.desirable_weight * desirable / others:.3g} makes them even" if others else ""
    return [f"{stage.name}: warning: {desirable} desirable answers weigh {good:g}, the {others} others {bad:g}{even}"]


def _asked(path: Path | None) -> tuple[Asked | None, list[str]]:
    """The evaluation's prompts; where they cannot be read yet, that is the evaluation's matter."""
    if path is None:
        return None, []
    try:
        rows = read_rows(path)
        require_columns(rows, ["prompt"], source=path)
    except InputError as error:
        return None, [f"overlap with the evaluation's prompts is not counted: {error}"]
    return Asked(row["prompt"] for row in rows if isinstance(row["prompt"], str | list)), []
