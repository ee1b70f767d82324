"""What a stage leaves and says: its directory, the batch that broke it, and lines for a person."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from psacpo import console
from psacpo.align import model as models
from psacpo.align.checkpoints import full_disk_as_such
from psacpo.align.config import AlignConfig
from psacpo.align.examples import Example
from psacpo.align.full import save_whole
from psacpo.align.incident import save_batch
from psacpo.align.planning import Prepared, Task, resolved_settings
from psacpo.align.trainer import Metrics, Outcome
from psacpo.errors import InputError
from psacpo.files import atomic_directory, digest_model, write_manifest

METRICS = "metrics.jsonl"
# In nats: a stage whose smoothed margin never came so far has not learnt anything to speak of.
_STANDSTILL = 0.01


def write(config: AlignConfig, prepared: Prepared, task: Task, policy: Any, outcome: Outcome) -> None:
    """Adapter, metrics.jsonl, model card and psacpo.json, whole or not at all."""
    stage = task.stage
    inputs = {"base": prepared.base_digest, "data": task.data_digest}
    weight = None
    if task.start is not None:
        inputs["start"] = digest_model(task.start.out)
        weight = config.beta_of(task.start.stage) / config.beta_of(stage)
    with atomic_directory(task.out, overwrite=config.overwrite) as partial, full_disk_as_such(task.out):
        if config.tuning == "lora":
            models.save_adapter(policy, outcome.state, partial, stage=stage.name)
        else:
            save_whole(policy, outcome.state, partial, prepared.tokenizer, dtype=config.dtype, stage=stage.name)
        lines = (json.dumps(record) + "\n" for record in outcome.metrics)
        (partial / METRICS).write_text("".join(lines), encoding="utf-8")
        (partial / "README.md").write_text(_card(config, prepared, task, outcome), encoding="utf-8")
        write_manifest(
            partial,
            kind="adapter" if config.tuning == "lora" else "checkpoint",
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
    say(_ending(task, outcome))
    if line := _standstill(config, task, outcome):
        say(line)


def _standstill(config: AlignConfig, task: Task, outcome: Outcome) -> str | None:
    """A line for a stage that ended where it began: newcomers take that for a finished adapter."""
    moved = max(abs(float(record["margin_smoothed"] or 0)) for record in outcome.metrics)
    if moved >= _STANDSTILL:
        return None
    return (
        f"{task.stage.name}: warning: training moved nothing (the margin stayed below {_STANDSTILL:g} nats): raise "
        f"learning_rate (now {config.learning_rate_of(task.stage):g}) or the steps (now {len(outcome.metrics)})"
    )


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
    lora = config.tuning == "lora"
    library, tags = ("peft", ["lora"]) if lora else ("transformers", [])
    head = {"base_model": prepared.base.name, "library_name": library, "tags": [*tags, stage.loss, "psacpo"]}
    lines = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in head.items())
    return (
        f"---\n{lines}---\n\n# {stage.name}\n\n"
        f"{'A LoRA adapter' if lora else 'A model, all weights of it,'} trained by psacpo with {stage.loss} (beta {config.beta_of(stage):g}) for "
        f"{len(outcome.metrics)} steps, starting at and referring to {config.start_of(stage)}. "
        f"psacpo.json holds the settings and digests, {METRICS} one line a step.\n"
    )


def keep_batch(
    config: AlignConfig,
    prepared: Prepared,
    task: Task,
    examples: Sequence[Example],
    losses: Sequence[float],
    step: int,
    metrics: Sequence[Metrics],
) -> str:
    """Keep a batch whose loss is not finite, and say where."""
    place = config.out / f"{task.stage.name}.nonfinite"
    facts = {
        "config": resolved_settings(config, task.stage),
        "inputs": {"base": prepared.base_digest, "data": task.data_digest},
        "seeds": {"seed": config.seed, "stage": task.seed},
        "stage": task.stage.name,
        "step": step,
    }
    # Of several processes that meet one at once, the first to write has the place.
    with contextlib.suppress(InputError):
        save_batch(place, examples, losses, prepared.tokenizer, metrics=metrics, facts=facts)
    return str(place)


def say(line: str) -> None:
    """One line on the error stream, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        console.say(line)
