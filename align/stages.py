"""The job `align`: stages in order, each from an earlier one's adapter or from the base, each done once."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from transformers import set_seed

from psacpo.align import model as models
from psacpo.align.arguments import training_arguments
from psacpo.align.checkpoints import Checkpoints
from psacpo.align.config import AlignConfig
from psacpo.align.full import load_whole
from psacpo.align.planning import (
    Prepared,
    Task,
    is_done,
    plan,
    prepare,
    quiet_libraries,
    require_free,
)
from psacpo.align.results import keep_batch, say, write
from psacpo.align.trainer import PairTrainer

__all__ = ["align", "plan", "training_arguments"]


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
                say(f"{task.stage.name}: already done, taken from {task.out}")
                continue
            # Its start may have come out anew, with other bytes than this directory's adapter was trained from.
            require_free(task, config)
            seen = (
                f", {len(task.drawn)} drawn for {task.steps} steps" if len(task.drawn) < len(task.pairs.pairs) else ""
            )
            say(f"{task.stage.name}: {task.pairs.summary()}{seen}")
            _train(config, prepared, task)
            wait_for_everyone()
    return config.out


def _train(config: AlignConfig, prepared: Prepared, task: Task) -> None:
    """Train one stage and write its directory."""
    stage, device, tokenizer = task.stage, prepared.device, prepared.tokenizer
    set_seed(task.seed)
    policy = _load(config, prepared, task.start.out if task.start else None)
    checkpoints = Checkpoints(config.out / f".{stage.name}.checkpoints", task.key)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as scratch, _deterministic(device):
        # The Trainer is given a directory of its own; only what a tracker puts there is for keeps.
        logs = str(config.out / "logs" / stage.name) if config.report_to else scratch
        trainer = PairTrainer(
            policy,
            training_arguments(config, task, device, logs),
            task.drawn,
            stage,
            beta=config.beta_of(stage),
            fresh=task.start is None and config.tuning == "lora",
            precompute=config.tuning == "full",
            pad_id=pad_id,
            checkpoints=checkpoints,
            keep=functools.partial(keep_batch, config, prepared, task),
        )
        with checkpoints.held(main=trainer.accelerator.is_main_process):
            outcome = trainer.fit()
            if trainer.accelerator.is_main_process:
                write(config, prepared, task, policy, outcome)
    del trainer, policy
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _load(config: AlignConfig, prepared: Prepared, start: Path | None) -> Any:
    """What a stage trains: an adapter on the base, or a whole model, from where it starts."""
    recompute = config.gradient_checkpointing
    if config.tuning == "full":
        return load_whole(prepared.base, start, gradient_checkpointing=recompute)
    return models.load_policy(
        prepared.base,
        config.lora,
        config.dtype,
        start,
        gradient_checkpointing=recompute,
        quantization=config.quantization,
        device=prepared.device,
    )


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
