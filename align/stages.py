"""The job `align`: stages in order, each from an earlier one's adapter or from the base, each done once."""

from __future__ import annotations

import contextlib
import gc
import json
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
from accelerate.utils import wait_for_everyone
from transformers import TrainingArguments, set_seed

from psacpo import console
from psacpo.align import model as models
from psacpo.align.config import AlignConfig, Stage
from psacpo.align.data import read_preferences
from psacpo.align.pairs import Pair, Pairs, draw, encode_rows
from psacpo.align.trainer import Metrics, Outcome, PairTrainer
from psacpo.errors import InputError, unknown_name
from psacpo.files import (
    atomic_directory,
    canonical_json,
    digest,
    digest_model,
    read_manifest,
    readable_io_errors,
    require_apart,
    require_free_space,
    require_unused,
    write_manifest,
)

METRICS = "metrics.jsonl"
# Part of every key: raised when a change to the training code changes results, so that old adapters are not taken.
REVISION = 1


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
    pairs: Pairs
    data_digest: str
    steps: int
    drawn: list[Pair]
    seed: int
    key: str
    out: Path


def align(config: AlignConfig) -> Path:
    """Train each stage in order and leave a PEFT adapter directory `out/<stage name>` of each, relative to the base.

    A stage that starts at another goes on with that one's LoRA factors and has it, frozen, as the reference. A stage
    whose directory holds the result of the same settings, data, start and base is not trained again. Directories
    appear whole or not at all. Two runs with one seed on one machine give the same bytes.

    Seeds Python's, NumPy's and torch's global generators.

    Returns:
        `config.out`.

    Raises:
        InputError: Base, data, settings or an output directory cannot be used (before anything is trained), or
            training left the finite numbers.
    """
    with _quiet_libraries():
        prepared = _prepare(config)
        for task in prepared.tasks:
            if _is_done(task):
                _say(f"{task.stage.name}: already done, taken from {task.out}")
                continue
            # Its start may have come out anew, with other bytes than this directory's adapter was trained from.
            _require_free(task, config)
            seen = (
                f", {len(task.drawn)} drawn for {task.steps} steps" if len(task.drawn) < len(task.pairs.pairs) else ""
            )
            _say(f"{task.stage.name}: {task.pairs.summary()}{seen}")
            _train(config, prepared, task)
            wait_for_everyone()
    return config.out


def plan(config: AlignConfig) -> dict[str, Any]:
    """What `align` would do, after all of its checks: nothing is trained and no directory is made.

    Returns:
        The base, the adapters' bytes, and of each stage its start, KL weight, pairs, tokens of one pass over them,
        steps, and whether it is done already.
    """
    with _quiet_libraries():
        prepared = _prepare(config)
        found: dict[str, Any] = {
            "base": prepared.base.name,
            "out": str(config.out),
            "device": prepared.device,
            "adapter_bytes": prepared.adapter_bytes,
        }
        for task in prepared.tasks:
            name, pairs = task.stage.name, task.drawn
            found |= {
                f"{name}.start": config.start_of(task.stage),
                f"{name}.beta": config.beta_of(task.stage),
                f"{name}.pairs": len(pairs),
                f"{name}.tokens": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs),
                f"{name}.steps": task.steps,
                f"{name}.state": "done" if _is_done(task) else "to train",
            }
    return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that `align` knows before it trains, checked."""

    base: models.Base
    base_digest: str
    device: str
    tokenizer: Any
    tasks: list[Task]
    adapter_bytes: int


def _prepare(config: AlignConfig) -> Prepared:
    base = models.find_base(config.base)
    device = resolve_device(config.device)
    _check_report_to(config.report_to)
    tokenizer = models.load_tokenizer(base)
    base_digest = digest_model(base.path)
    tasks = _tasks(config, base_digest, tokenizer)
    pairs = [pair for task in tasks for pair in task.pairs.pairs]
    adapter_bytes = models.check_fits(
        base,
        config.lora,
        longest=max(map(len, pairs)),
        largest_id=max(max(ids) for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected)),
    )
    _check_outputs(config, tasks, adapter_bytes)
    return Prepared(base, base_digest, device, tokenizer, tasks, adapter_bytes)


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
    read: dict[tuple[str, str], tuple[str, Pairs]] = {}
    for stage in config.stages:
        # Two stages may share their data, as a stage and its naive counterpart do.
        source = stage.data, canonical_json(stage.columns)
        if source not in read:
            rows = read_preferences(stage.data, stage.columns)
            read[source] = rows.digest, encode_rows(rows, tokenizer, config.template, config.max_length)
        data_digest, pairs = read[source]
        start = tasks.get(config.start_of(stage))
        seed = int(digest([config.seed, stage.name])[:8], 16)
        per_batch = stage.batch_size * processes
        steps = stage.max_steps or total_steps(len(pairs.pairs), per_batch, stage.gradient_accumulation, stage.epochs)
        drawn = draw(pairs.pairs, steps * stage.gradient_accumulation * per_batch, seed)
        settings = _settings(config, stage)
        # Where base and data lie, and how a column is called, is told by the digests of what was read.
        decides = {name: value for name, value in settings.items() if name not in ("base", "data", "columns", "device")}
        key = digest(
            {
                "revision": REVISION,
                "base": base_digest,
                "start": start.key if start else None,
                "data": data_digest,
                "pairs": pairs.digest,
                "settings": decides,
                "seed": seed,
                "processes": processes,
            }
        )
        task = Task(stage, start, pairs, data_digest, steps, drawn, seed, key, config.out / stage.name)
        tasks[stage.name] = task
    return list(tasks.values())


def total_steps(pairs: int, per_batch: int, accumulation: int, epochs: float) -> int:
    """Optimiser steps in `epochs` passes over the pairs; the last batch and the last step of a pass may be smaller."""
    return math.ceil(epochs * math.ceil(math.ceil(pairs / per_batch) / accumulation))


def _settings(config: AlignConfig, stage: Stage) -> dict[str, Any]:
    """The stage's settings with nothing left open, as psacpo.json shows them."""
    shared = ("base", "template", "max_length", "dtype", "device", "gradient_checkpointing", "seed")
    resolved = {"start": config.start_of(stage), "beta": config.beta_of(stage), "lora": config.lora.model_dump()}
    return stage.model_dump(mode="json") | resolved | {name: getattr(config, name) for name in shared}


def _check_outputs(config: AlignConfig, tasks: list[Task], adapter_bytes: int) -> None:
    """Refuse what would stop a stage later: a directory in the way, no right or no space to write."""
    require_apart(config.out, [Path(config.base)] if Path(config.base).is_dir() else [])
    todo = [task for task in tasks if (read_manifest(task.out) or {}).get("key") != task.key]
    for task in todo:
        _require_free(task, config)
    if todo:
        require_free_space(config.out, adapter_bytes * len(todo))
        _require_writable(config.out)


def _require_free(task: Task, config: AlignConfig) -> None:
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


def _is_done(task: Task) -> bool:
    """Whether the task's directory holds its result, trained from what its start holds now.

    Raises:
        InputError: It does by its manifest, but the weights beside it are not those that were written.
    """
    record = read_manifest(task.out)
    if record is None or record.get("key") != task.key:
        return False
    if record.get("digest") != digest_model(task.out):
        raise InputError(
            f"the adapter in {task.out} was changed or is not whole", allowed="remove the directory to train it again"
        )
    inputs: dict[str, str] = record["inputs"]
    return task.start is None or inputs.get("start") == digest_model(task.start.out)


def _train(config: AlignConfig, prepared: Prepared, task: Task) -> None:
    """Train one stage and write its directory."""
    stage, device, tokenizer = task.stage, prepared.device, prepared.tokenizer
    set_seed(task.seed)
    policy = models.load_policy(
        prepared.base,
        config.lora,
        config.dtype,
        task.start.out if task.start else None,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as scratch, _deterministic(device):
        # The Trainer is given a directory of its own; only what a tracker puts there is for keeps.
        logs = scratch if config.report_to == "none" else str(config.out / "logs" / stage.name)
        trainer = PairTrainer(
            policy,
            training_arguments(config, task, device, logs),
            task.drawn,
            stage,
            beta=config.beta_of(stage),
            fresh=task.start is None,
            pad_id=pad_id,
        )
        outcome = trainer.fit()
        if trainer.accelerator.is_main_process:
            _write(config, prepared, task, policy, outcome)
    del trainer, policy
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _write(config: AlignConfig, prepared: Prepared, task: Task, policy: Any, outcome: Outcome) -> None:
    """Adapter, metrics.jsonl, model card and psacpo.json, whole or not at all."""
    stage = task.stage
    inputs = {"base": prepared.base_digest, "data": task.data_digest}
    weight = None
    if task.start is not None:
        inputs["start"] = digest_model(task.start.out)
        weight = config.beta_of(task.start.stage) / config.beta_of(stage)
    with atomic_directory(task.out, overwrite=config.overwrite) as partial:
        models.save_adapter(policy, outcome.state, partial, stage=stage.name)
        lines = (json.dumps(record) + "\n" for record in outcome.metrics)
        (partial / METRICS).write_text("".join(lines), encoding="utf-8")
        (partial / "README.md").write_text(_card(config, prepared, task, outcome), encoding="utf-8")
        write_manifest(
            partial,
            kind="adapter",
            config=_settings(config, stage),
            inputs=inputs,
            seeds={"seed": config.seed, "stage": task.seed},
            stage=stage.name,
            start=config.start_of(stage),
            loss=stage.loss,
            beta=config.beta_of(stage),
            **{"lambda": weight},
            base_digest=prepared.base_digest,
            steps=len(outcome.metrics),
            stopped_by=outcome.stopped_by,
            rows=task.pairs.counts | {"drawn": len(task.drawn)},
            final=outcome.metrics[-1],
            digest=digest_model(partial),
            key=task.key,
        )
    _say(_ending(task, outcome))


def _ending(task: Task, outcome: Outcome) -> str:
    last: Metrics = outcome.metrics[-1]
    why = {"stop_margin": "margin reached", "max_steps": "all steps done", "epochs": "all epochs done"}
    return (
        f"{task.stage.name}: {why[outcome.stopped_by]} after {last['step']} steps, "
        f"loss {last['loss']:.4f}, margin {last['margin_smoothed']:.3f} nats"
    )


def _card(config: AlignConfig, prepared: Prepared, task: Task, outcome: Outcome) -> str:
    """A model card with the head that the hub reads."""
    stage = task.stage
    # JSON strings are YAML strings, whatever a path holds.
    head = {"base_model": prepared.base.name, "library_name": "peft", "tags": ["lora", stage.loss, "psacpo"]}
    lines = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in head.items())
    return (
        f"---\n{lines}---\n\n# {stage.name}\n\n"
        f"A LoRA adapter trained by psacpo with {stage.loss} (beta {config.beta_of(stage):g}) for "
        f"{len(outcome.metrics)} steps, starting at and referring to {config.start_of(stage)}. "
        f"psacpo.json holds the settings and digests, {METRICS} one line a step.\n"
    )


def training_arguments(config: AlignConfig, task: Task, device: str, output_dir: str) -> TrainingArguments:
    """The stage in the Trainer's words. Nothing is saved, printed or evaluated by the Trainer itself."""
    stage = task.stage
    scheduler: str = stage.lr_scheduler
    if scheduler == "constant" and stage.warmup_steps:
        scheduler = "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_steps=task.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=stage.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_betas[0],
        adam_beta2=stage.adam_betas[1],
        max_grad_norm=stage.max_grad_norm,
        use_cpu=device == "cpu",
        bf16=config.dtype == "bfloat16",
        # Scaled float16 training needs an accelerator; on a CPU float16 weights are used as they are.
        fp16=config.dtype == "float16" and device == "cuda",
        seed=task.seed,
        data_seed=task.seed,
        save_strategy="no",
        # Every step comes to `PairTrainer.log`, which keeps it.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        run_name=f"{config.out.name or 'align'}-{stage.name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
    )
    # Several visible GPUs in one process would be DataParallel, which splits a batch between chosen and rejected.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _check_report_to(name: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed."""
    if name == "none":
        return
    from transformers.integrations import integration_utils

    trackers: Any = integration_utils
    if name not in trackers.INTEGRATION_TO_CALLBACK:
        raise unknown_name("report_to", name, ["none", *trackers.INTEGRATION_TO_CALLBACK])
    if name not in trackers.get_available_reporting_integrations():
        raise InputError(f"report_to {name}: it is not installed", allowed=f"none, or pip install {name}")


def _say(line: str) -> None:
    """One line on the error stream, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        console.say(line)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
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


@contextlib.contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On a GPU, take the deterministic kernels where there are any. A CPU's are so by themselves."""
    if device != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
