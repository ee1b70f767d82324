"""What `align` will do: every input read and checked, every stage's result known by its key, before any training."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from psacpo import console
from psacpo.align import model as models
from psacpo.align.checks import require_assistant_turn, require_quantisation
from psacpo.align.config import AlignConfig
from psacpo.align.examples import Labelled, Pair
from psacpo.align.objectives import objective_of
from psacpo.align.pairs import Pairs, draw
from psacpo.align.reading import read_stages
from psacpo.align.stage_config import Stage
from psacpo.errors import InputError, unknown_name
from psacpo.files import (
    digest,
    digest_model,
    read_manifest,
    readable_io_errors,
    require_apart,
    require_free_space,
    require_unused,
)

# Part of every key: raised when a change to the training code changes results, so that old adapters are not taken.
REVISION = 2


@dataclass(frozen=True, slots=True)
class Task:
    """One stage with everything that decides its result.

    Attributes:
        start: The task whose adapter it goes on from; None starts at the base.
        steps: Optimiser steps if no margin ends the stage early.
        drawn: The pairs that these steps see: a seeded draw where they see fewer than all.
        seed: Its own, from the run's seed and its name, so that stages do not influence each other.
        key: Digest of all that decides the result. The start enters by its key, so every key is known beforehand.
    """

    stage: Stage
    start: Task | None
    pairs: Pairs[Pair] | Pairs[Labelled]
    data_digest: str
    steps: int
    drawn: list[Pair] | list[Labelled]
    seed: int
    key: str
    out: Path


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that `align` knows before it trains, checked."""

    base: models.Base
    base_digest: str
    device: str
    tokenizer: Any
    tasks: list[Task]
    stage_bytes: int


def plan(config: AlignConfig) -> dict[str, Any]:
    """What `align` would do, after all of its checks: nothing is trained and no directory is made.

    Returns:
        The base, the bytes that a stage leaves, and of each stage its start, KL weight, learning rate, pairs, tokens of
        one pass over them, steps, and whether it is done already.
    """
    with quiet_libraries():
        prepared = prepare(config)
        found: dict[str, Any] = {
            "base": prepared.base.name,
            "out": str(config.out),
            "device": prepared.device,
            "model_bytes" if config.tuning == "full" else "adapter_bytes": prepared.stage_bytes,
        }
        for task in prepared.tasks:
            name, pairs = task.stage.name, task.drawn
            found |= {
                f"{name}.start": config.start_of(task.stage),
                f"{name}.beta": config.beta_of(task.stage),
                f"{name}.learning_rate": config.learning_rate_of(task.stage),
                f"{name}.pairs": len(pairs),
                f"{name}.tokens": sum(len(p.answers) * len(p.prompt) + sum(map(len, p.answers)) for p in pairs),
                f"{name}.steps": task.steps,
                f"{name}.state": "done" if is_done(task) else "to train",
            }
    return found


def prepare(config: AlignConfig) -> Prepared:
    base = models.find_base(config.base)
    device = resolve_device(config.device)
    for name in config.report_to:
        _check_report_to(name)
    require_quantisation(config.quantization)
    models.require_language_model(base)
    tokenizer = models.load_tokenizer(base)
    require_assistant_turn(tokenizer, config.template)
    base_digest = digest_model(base.path)
    tasks = _tasks(config, base_digest, tokenizer)
    pairs = [pair for task in tasks for pair in task.pairs.pairs]
    whole = config.tuning == "full"
    parameters = models.check_fits(
        base,
        None if whole else config.lora,
        longest=max(map(len, pairs)),
        largest_id=max(max(ids) for pair in pairs for ids in (pair.prompt, *pair.answers)),
    )
    # Adapters are written as they are trained, in float32.
    stage_bytes = parameters * models.DTYPES[config.dtype if whole else "float32"].itemsize
    _check_outputs(config, tasks, stage_bytes)
    return Prepared(base, base_digest, device, tokenizer, tasks, stage_bytes)


def resolve_device(name: str) -> str:
    """Give "cuda" or "cpu"; "auto" is cuda where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is no CUDA device", allowed="auto, cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _tasks(config: AlignConfig, base_digest: str, tokenizer: Any) -> list[Task]:
    """Read and encode the data of all stages, and say what each will do."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tasks: dict[str, Task] = {}
    reading = read_stages(config, tokenizer)
    if os.environ.get("RANK", "0") == "0":
        for note in reading.notes:
            console.say(note)
    for stage in config.runs:
        data = reading.data[stage.name]
        pairs = data.pairs
        start = tasks.get(config.start_of(stage))
        seed = int(digest([config.seed, stage.name])[:8], 16)
        per_batch = stage.batch_size * processes
        steps = stage.max_steps or total_steps(len(pairs.pairs), per_batch, stage.gradient_accumulation, stage.epochs)
        drawn: Any = draw(pairs.pairs, steps * stage.gradient_accumulation * per_batch, seed)
        # Rows that the loss cannot learn from are refused here, before any stage trains.
        objective_of(drawn, stage, config.beta_of(stage), seed)
        resolved = resolved_settings(config, stage)
        # Where base and data lie, and how the data were read, is told by the digests of what was read.
        told = ("base", "data", "columns", "preset", "truncation", "duplicates", "device")
        decides = {name: value for name, value in resolved.items() if name not in told}
        key = digest(
            {
                "revision": REVISION,
                "base": base_digest,
                "start": start.key if start else None,
                "data": data.digest,
                "pairs": pairs.digest,
                "settings": decides,
                "seed": seed,
                "processes": processes,
            }
        )
        task = Task(stage, start, pairs, data.digest, steps, drawn, seed, key, config.out / stage.name)
        tasks[stage.name] = task
    return list(tasks.values())


def total_steps(pairs: int, per_batch: int, accumulation: int, epochs: float) -> int:
    """Optimiser steps in `epochs` passes over the pairs; the last batch and the last step of a pass may be smaller."""
    return math.ceil(epochs * math.ceil(math.ceil(pairs / per_batch) / accumulation))


def resolved_settings(config: AlignConfig, stage: Stage) -> dict[str, Any]:
    """The stage's settings with nothing left open, as psacpo.json shows them."""
    shared = ("base", "template", "max_length", "dtype", "device", "gradient_checkpointing", "seed")
    resolved = {
        "start": config.start_of(stage),
        "beta": config.beta_of(stage),
        "learning_rate": config.learning_rate_of(stage),
        "tuning": config.tuning,
        "lora": config.lora.model_dump() if config.tuning == "lora" else None,
        "quantization": config.quantization,
    }
    return stage.model_dump(mode="json") | resolved | {name: getattr(config, name) for name in shared}


def _check_outputs(config: AlignConfig, tasks: list[Task], stage_bytes: int) -> None:
    """Refuse what would stop a stage later: a directory in the way, no right or no space to write."""
    require_apart(config.out, [Path(config.base)] if Path(config.base).is_dir() else [])
    with readable_io_errors(config.out):
        todo = [task for task in tasks if (read_manifest(task.out) or {}).get("key") != task.key]
    for task in todo:
        require_free(task, config)
    if todo:
        require_free_space(config.out, stage_bytes * len(todo))
        _require_writable(config.out)


def require_free(task: Task, config: AlignConfig) -> None:
    """Refuse a directory that holds something else than this task's result."""
    if not config.overwrite and read_manifest(task.out):
        raise InputError(
            f"{task.out} holds the result of other settings, data, start or base than stage '{task.stage.name}' has now",
            allowed="another out, another stage name, or --overwrite",
        )
    require_unused(task.out, overwrite=config.overwrite)


def _require_writable(out: Path) -> None:
    """Refuse an output place that cannot be written, without making a directory there."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    with readable_io_errors(out):
        tempfile.TemporaryFile(dir=place).close()


def is_done(task: Task) -> bool:
    """Whether the task's directory holds its result, trained from what its start holds now.

    Raises:
        InputError: It does by its manifest, but the weights beside it are not those that were written.
    """
    record = read_manifest(task.out)
    if record is None or record.get("key") != task.key:
        return False
    if record.get("digest") != digest_model(task.out):
        raise InputError(
            f"what stage '{task.stage.name}' left in {task.out} was changed or is not whole",
            allowed="remove the directory to train it again",
        )
    inputs: dict[str, str] = record["inputs"]
    return task.start is None or inputs.get("start") == digest_model(task.start.out)


def _check_report_to(name: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed."""
    from transformers.integrations import integration_utils

    trackers: Any = integration_utils
    if name not in trackers.INTEGRATION_TO_CALLBACK:
        raise unknown_name("report_to", name, ["none", *trackers.INTEGRATION_TO_CALLBACK])
    if name not in trackers.get_available_reporting_integrations():
        raise InputError(f"report_to {name}: it is not installed", allowed=f"none, or pip install {name}")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and notes off the error stream for a while."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Between transformers and peft: names that the one gave up and the other still uses.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
