"""The settings of one stage: its rows, its loss and what that takes, its optimiser, and when it ends."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from psacpo.align.presets import preset
from psacpo.config import Strict

LossName = Literal["dpo", "cdpo", "ipo", "kto", "modpo", "safedpo", "tdpo1", "tdpo2", "radpo1", "radpo2"]
RiskName = Literal["kl", "cvar", "erm", "cvar_released"]
Column = Literal["prompt", "chosen", "rejected", "completion", "label", "margin", "chosen_safe", "rejected_safe"]

# Settings that some losses take; for the others they are no settings at all.
LOSS_SETTINGS: dict[str, tuple[LossName, ...]] = {
    "label_smoothing": ("cdpo",),
    "alpha": ("tdpo2", "radpo2"),
    "risk": ("radpo1", "radpo2"),
    "risk_level": ("radpo1", "radpo2"),
    "risk_per_token": ("tdpo1", "tdpo2", "radpo1", "radpo2"),
    "margin_weight": ("modpo",),
    "safety_margin": ("safedpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
# What pairs need besides their order, as columns.
LOSS_COLUMNS: dict[str, tuple[str, ...]] = {"modpo": ("margin",), "safedpo": ("chosen_safe", "rejected_safe")}
# The levels of each measure of risk: whether a number is one, and which are, in words.
_LEVELS: dict[RiskName, tuple[float, bool, str]] = {
    "cvar": (1.0, True, "above 0 and at most 1, the mass of the tail"),
    "erm": (float("inf"), False, "above 0"),
    "cvar_released": (1.0, False, "above 0 and below 1"),
}


# Of what fits into the data loader's integers.
_MOST = 2**31 - 1
# Of characters; the directories beside a stage's own have longer names.
_LONGEST_NAME = 100
# What else lies in a project directory, and the word for no adapter at all.
_TAKEN = ("base", "frontier", "policies", "logs", "psacpo.yaml", "psacpo.json")


class Truncation(Strict):
    """What is done with rows that are longer than `max_length`, in TRL's words.

    Attributes:
        prompt: Where it has to give way: the part of it that is kept, or whether the row is dropped or refused.
            `keep_start` cuts off the template's own end too, which says that the assistant is next.
        answer: The same of answers that are too long even so. Of these only the start makes sense to keep.
    """

    prompt: Literal["keep_end", "keep_start", "drop", "error"] = "keep_end"
    answer: Literal["keep_start", "drop", "error"] = "keep_start"


class Stage(Strict):
    """One stage of stepwise alignment: a loss on preference rows, with its start as the frozen reference.

    Attributes:
        name: Also the name of the output directory.
        data: Preference rows, or a Hugging Face dataset directory or hub id.
        start: "base", or the name of an earlier stage; None is the stage before, and base for the first.
        beta: KL weight; None takes the run's beta for a stage that starts at base and beta/lambda for a later one.
        learning_rate: The highest of the schedule, which runs over all steps even if a margin ends them early. None is
            LEARNING_RATES of the run's tuning.
        batch_size: Pairs per optimiser step and process; `gradient_accumulation` splits no step, it adds to it.
        max_steps: Optimiser steps; wins over `epochs`.
        stop_margin: In nats. The stage ends once the smoothed mean of log-ratio(chosen) - log-ratio(rejected)
            reaches it. The smoothing is an exponential moving average over steps with weight `stop_smoothing` on
            the past, corrected for its start at 0.
        columns: What the data call TRL's columns, and those of LOSS_COLUMNS, where they call them otherwise.
        preset: The public collection whose rows the data are: `presets.PRESETS`.
        duplicates: What becomes of rows that are equal to one before, as tokens; they are counted in any case.
        label_smoothing: `cdpo`: the share of pairs taken to be the wrong way round.
        alpha: `tdpo2`, `radpo2`: weight of the difference of the two answers' risks.
        risk: `radpo1`, `radpo2`: the measure of the policy's drift from its reference at each token.
        risk_level: Of `risk`: mass of the tail for cvar (default 0.97), mu for erm (default 1), the released code's
            confidence level for cvar_released (default 0.95); kl has none.
        risk_per_token: Whether an answer's risk is the mean over its tokens in the place of their sum.
        margin_weight: `modpo`: the weight of the objective that the pairs are about.
        safety_margin: `safedpo`: Delta, in units of beta times the margin.
        desirable_weight, undesirable_weight: `kto`: weights of the two kinds of answers. The paper wants
            desirable_weight * n_desirable between 1 and 4/3 times undesirable_weight * n_undesirable.
    """

    name: str
    data: str
    loss: LossName = "dpo"
    start: str | None = None
    beta: float | None = Field(None, gt=0)
    learning_rate: float | None = Field(None, gt=0, le=1)
    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    batch_size: int = Field(8, ge=1, le=_MOST)
    gradient_accumulation: int = Field(1, ge=1, le=_MOST)
    max_steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    stop_margin: float | None = Field(None, gt=0)
    stop_smoothing: float = Field(0.8, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    columns: dict[Column, str] = Field(default_factory=dict)
    preset: str | None = None
    truncation: Truncation = Truncation()
    duplicates: Literal["keep", "drop"] = "keep"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    alpha: float = Field(0.5, ge=0)
    risk: RiskName = "cvar"
    risk_level: float | None = None
    risk_per_token: bool = False
    margin_weight: float = Field(1.0, gt=0)
    safety_margin: float = Field(10.0, ge=0)
    desirable_weight: float = Field(1.0, ge=0)
    undesirable_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _in_range(self) -> Stage:
        if not all(0 <= value < 1 for value in self.adam_betas):
            raise ValueError(f"adam_betas {list(self.adam_betas)} are out of range; allowed: two numbers in [0, 1)")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name in _TAKEN:
            raise ValueError(
                f"stage name '{self.name}' is not a plain directory name, or is taken: {', '.join(_TAKEN)}"
            )
        if len(self.name) > _LONGEST_NAME:
            raise ValueError(
                f"stage name '{self.name[:20]}…' has {len(self.name)} characters; allowed: at most {_LONGEST_NAME}"
            )
        return self

    @model_validator(mode="after")
    def _fits_data(self) -> Stage:
        if self.preset is not None:
            preset(self.preset)
            if self.columns:
                raise ValueError(f"the preset {self.preset} knows its columns; allowed: preset or columns, not both")
        for loss, names in LOSS_COLUMNS.items():
            if self.loss != loss and set(names) & set(self.columns):
                raise ValueError(f"columns name {' and '.join(names)}, which only {loss} reads; allowed: loss {loss}")
        return self

    @property
    def wanted(self) -> tuple[str, ...]:
        """Columns that the loss needs of pairs besides their answers."""
        return LOSS_COLUMNS.get(self.loss, ())

    @model_validator(mode="after")
    def _fits_loss(self) -> Stage:
        for name, losses in LOSS_SETTINGS.items():
            if name in self.model_fields_set and self.loss not in losses:
                raise ValueError(f"{name} is no setting of the loss {self.loss}; allowed: with {', '.join(losses)}")
        if self.risk_level is not None:
            if self.risk not in _LEVELS:
                raise ValueError(f"the risk {self.risk} has no risk_level; allowed: none")
            most, closed, words = _LEVELS[self.risk]
            if not (0 < self.risk_level < most or (closed and self.risk_level == most)):
                raise ValueError(f"risk_level {self.risk_level:g} is out of range for {self.risk}; allowed: {words}")
        if self.loss == "kto" and self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError("desirable_weight and undesirable_weight are both 0; allowed: at least one above 0")
        return self

    @model_serializer(mode="wrap")
    def _of_its_loss(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the loss does not take: such a setting decides nothing, and given back it would be refused."""
        shown: dict[str, Any] = handler(self)
        return {name: value for name, value in shown.items() if self.loss in LOSS_SETTINGS.get(name, (self.loss,))}
