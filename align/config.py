"""The settings of `align`: what to train, from where, on which rows, and when a stage ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from psacpo.config import Strict

Dtype = Literal["float32", "bfloat16", "float16"]


# What else lies in a project directory, and the word for no adapter at all.
_TAKEN = ("base", "frontier", "policies", "logs", "psacpo.yaml", "psacpo.json")


class Lora(Strict):
    """The adapter that each stage trains, in PEFT's words."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class Stage(Strict):
    """One stage of stepwise alignment: a loss on preference rows, with its start as the frozen reference.

    Attributes:
        name: Also the name of the output directory.
        data: Preference rows, or a Hugging Face dataset directory or hub id.
        start: "base", or the name of an earlier stage; None is the stage before, and base for the first.
        beta: KL weight; None takes the run's beta for a stage that starts at base and beta/lambda for a later one.
        learning_rate: The highest of the schedule, which runs over all steps even if a margin ends them early.
        batch_size: Pairs per optimiser step and process; `gradient_accumulation` splits no step, it adds to it.
        max_steps: Optimiser steps; wins over `epochs`.
        stop_margin: In nats. The stage ends once the smoothed mean of log-ratio(chosen) - log-ratio(rejected)
            reaches it. The smoothing is an exponential moving average over steps with weight `stop_smoothing` on
            the past, corrected for its start at 0.
        columns: What the data call the prompt, chosen and rejected columns, where they call them otherwise.
    """

    name: str
    data: str
    loss: Literal["dpo"] = "dpo"
    start: str | None = None
    beta: float | None = Field(None, gt=0)
    learning_rate: float = Field(1e-5, gt=0, le=1)
    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    stop_margin: float | None = Field(None, gt=0)
    stop_smoothing: float = Field(0.8, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    columns: dict[Literal["prompt", "chosen", "rejected"], str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _in_range(self) -> Stage:
        if not all(0 <= value < 1 for value in self.adam_betas):
            raise ValueError(f"adam_betas {list(self.adam_betas)} are out of range; allowed: two numbers in [0, 1)")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name in _TAKEN:
            raise ValueError(
                f"stage name '{self.name}' is not a plain directory name, or is taken: {', '.join(_TAKEN)}"
            )
        return self


class AlignConfig(Strict):
    """A whole alignment: base model, adapter shape, stages in order, and where the adapters go."""

    base: str
    stages: list[Stage] = Field(min_length=1)
    out: Path
    template: str | None = None
    lora: Lora = Lora()
    beta: float = Field(0.1, gt=0)
    lambda_: float = Field(10.0, gt=0, alias="lambda")
    max_length: int = Field(512, ge=8)
    dtype: Dtype = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    report_to: str = "none"
    seed: int = Field(0, ge=0)
    overwrite: bool = False

    @model_validator(mode="after")
    def _stages_fit(self) -> AlignConfig:
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called '{stage.name}'")
            if stage.start is not None and stage.start not in ("base", *seen):
                allowed = ", ".join(["base", *seen])
                raise ValueError(f"stage '{stage.name}' starts at '{stage.start}'; allowed: {allowed}")
            seen.append(stage.name)
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template holds no {prompt}")
        return self

    def start_of(self, stage: Stage) -> str:
        """ "base", or the name of the stage that `stage` starts from and has as its reference."""
        index = self.stages.index(stage)
        return stage.start or (self.stages[index - 1].name if index else "base")

    def beta_of(self, stage: Stage) -> float:
        """The stage's KL weight: its own, or beta at base, or beta/lambda after another stage (SACPO Theorem 1)."""
        if stage.beta is not None:
            return stage.beta
        return self.beta if self.start_of(stage) == "base" else self.beta / self.lambda_
