"""The job `align`: stages in order, each from an earlier one's adapter or from the base, each done once."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from transformers import TrainingArguments, set_seed

from psacpo import console
from psacpo.align import model as models
from psacpo.align.config import AlignConfig
from psacpo.align.planning import (
    Prepared,
    Task,
    is_done,
    plan,
    prepare,
    quiet_libraries,
    require_free,
    resolved_settings,
)
from psacpo.align.trainer import Metrics, Outcome, PairTrainer
from psacpo.files import atomic_directory, digest_model, write_manifest

__all__ = ["align", "plan"]

METRICS = "metrics.jsonl"


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
    with quiet_libraries():
        prepared = prepare(config)
        for task in prepared.tasks:
            if is_done(task):
                _say(f"{task.stage.name}: already done, taken from {task.out}")
                continue
            # Its start may have come out anew, with other bytes than this directory's adapter was trained from.
            require_free(task, config)
            seen = (
                f", {len(task.drawn)} drawn for {task.steps} steps" if len(task.drawn) < len(task.pairs.pairs) else ""
            )
            _say(f"{task.stage.name}: {task.pairs.summary()}{seen}")
            _train(config, prepared, task)
            wait_for_everyone()
    return config.out


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
            config=resolved_settings(config, stage),
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
            forward=asdict(outcome.route),
            rows=task.pairs.counts | {"drawn": len(task.drawn), "scored": outcome.scored},
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
        # They are constants here, and sending them at every forward would need equally many on every process.
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=device == "cuda",
    )
    # Several visible GPUs in one process would be DataParallel, which splits a batch between chosen and rejected.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _say(line: str) -> None:
    """One line on the error stream, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        console.say(line)


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
