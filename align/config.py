"""The settings of `align`: what to train, from where, on which rows, and when a stage ends."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from psacpo.align.stage_config import Stage
from psacpo.config import Strict

__all__ = ["LEARNING_RATES", "AlignConfig", "Dtype", "Lora", "Names", "Numbers", "Stage", "Tuning", "spelled_out"]

Dtype = Literal["float32", "bfloat16", "float16"]
Tuning = Literal["lora", "full"]

# Full fine-tuning as in TRL. Adapters want ten times as much and more, the more the fewer steps there are: published
# DPO runs with LoRA take 5e-6 for sixty thousand pairs, and 1e-4 and more for a thousand.
LEARNING_RATES: dict[Tuning, float] = {"lora": 5e-5, "full": 1e-6}


def _split(value: object) -> object:
    """A line of words or numbers with commas, as the command line has it, as a list; "none" is an empty one."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    return [part for part in value if part not in ("", "none")] if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]


class Lora(Strict):
    """The adapter that each stage trains, in PEFT's words.

    Attributes:
        use_rslora: Scale by alpha / sqrt(r) in the place of alpha / r, for large r (arXiv 2312.03732).
        use_dora: Train each weight's magnitude by itself (arXiv 2402.09353). Such adapters merge as checkpoints only.
    """

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    @field_validator("target_modules", mode="before")
    @classmethod
    def _words_or_list(cls, value: object) -> object:
        """Said here, as pydantic would tell of the one half of the union that it tried first."""
        if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
            return value
        raise ValueError(f"target_modules are {value!r}; allowed: all-linear, or a list of modules' names")


class AlignConfig(Strict):
    """A whole alignment: base model, adapter shape, stages in order, and where the adapters go.

    Attributes:
        order: The stages' names in the order to train them; None is the order of `stages`. Stages with a `start` of
            their own need not be named and then come last.
        naive, lambdas: Further stages for comparison: `runs`.
        tuning: `lora` leaves an adapter a stage; `full` trains all weights and leaves whole models.
        quantization: Of the frozen base under an adapter (QLoRA, arXiv 2305.14314).
        report_to: Trackers by transformers' names.
        save_steps: Optimiser steps between two checkpoints, from which a killed stage goes on; 0 for none.
        evaluation_prompts: Rows with a column prompt: data that ask the same are counted and warned of. It decides
            nothing, so it is no part of what is written down as settings.
    """

    base: str
    # Before the stages, whose learning rates depend on it.
    tuning: Tuning = "lora"
    stages: list[Stage] = Field(min_length=1)
    out: Path
    template: str | None = None
    lora: Lora = Lora()
    quantization: Literal["4bit"] | None = None
    beta: float = Field(0.1, gt=0)
    lambda_: float = Field(10.0, gt=0, alias="lambda")
    max_length: int = Field(512, ge=8)
    dtype: Dtype = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    report_to: Names = ()
    save_steps: int = Field(100, ge=0)
    seed: int = Field(0, ge=0)
    overwrite: bool = False
    order: Names | None = None
    naive: bool = False
    lambdas: Numbers = ()
    evaluation_prompts: Path | None = Field(None, exclude=True)

    @field_validator("stages")
    @classmethod
    def _learning_rates(cls, stages: list[Stage], info: ValidationInfo) -> list[Stage]:
        rate = LEARNING_RATES[info.data.get("tuning", "lora")]
        return [s if s.learning_rate else s.model_copy(update={"learning_rate": rate}) for s in stages]

    @model_validator(mode="after")
    def _stages_fit(self) -> AlignConfig:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called '{name}'")
        if self.order is not None:
            free = [stage.name for stage in self.stages if stage.start is None]
            given = list(self.order)
            if len(set(given)) < len(given) or set(given) - set(names) or set(free) - set(given):
                raise ValueError(f"order is {', '.join(given)}; allowed: each of {', '.join(free or names)} once")
        if self.tuning == "full" and self.quantization is not None:
            raise ValueError("quantization is of a base that is not trained; allowed: null with tuning full")
        if any(value <= 0 for value in self.lambdas):
            raise ValueError(f"lambdas are {', '.join(f'{value:g}' for value in self.lambdas)}; allowed: above 0")
        different = set(self.lambdas)
        if len({f"{value:g}" for value in different}) < len(different):
            raise ValueError(
                f"lambdas are {', '.join(map(str, self.lambdas))}; allowed: apart in their first six digits"
            )
        seen: list[str] = []
        for stage in self.runs:
            if stage.name in seen:
                raise ValueError(f"stage '{stage.name}' is what naive or lambdas call one of theirs; rename it")
            if stage.start is not None and stage.start not in ("base", *seen):
                allowed = ", ".join(["base", *seen])
                raise ValueError(f"stage '{stage.name}' starts at '{stage.start}'; allowed: {allowed}")
            seen.append(stage.name)
        for name in ("lambdas", "naive"):
            if getattr(self, name) and not self._later:
                need = "needs" if name == "naive" else "need"
                raise ValueError(f"{name} {need} a stage that starts at another one; there is none")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template holds no {prompt}")
        if self.template is not None and re.search("[\ud800-\udfff]", self.template):
            raise ValueError("template holds half a surrogate pair, which is no text")
        return self

    @property
    def chain(self) -> list[Stage]:
        """The recipe's own stages in the order in which they are trained."""
        if self.order is None:
            return self.stages
        named = {stage.name: stage for stage in self.stages}
        return [named[name] for name in self.order] + [s for s in self.stages if s.name not in self.order]

    @property
    def runs(self) -> list[Stage]:
        """All stages to train: the chain, then what `lambdas` and `naive` add to it.

        `lambdas` trains the first stage of the chain that starts at another one once more for each lambda, from the
        same start, as NAME-lambdaL with KL weight beta/L; the lambda that the stage itself has is not done twice.
        `naive` trains every stage that starts at another one once more from the base, as NAME-naive with the same KL
        weight: the independent policies that rewarded soups merge.
        """
        later = self._later
        swept = later[:1] if self.lambdas else []
        found = list(self.chain)
        for stage in swept:
            for weight in dict.fromkeys(self.lambdas):
                if math.isclose(self.beta / weight, self.beta_of(stage)):
                    continue
                name = f"{stage.name}-lambda{weight:g}"
                changes = {"name": name, "start": self.start_of(stage), "beta": self.beta / weight}
                found.append(stage.model_copy(update=changes))
        for stage in later if self.naive else []:
            changes = {"name": f"{stage.name}-naive", "start": "base", "beta": self.beta_of(stage)}
            found.append(stage.model_copy(update=changes))
        return found

    @property
    def _later(self) -> list[Stage]:
        return [stage for stage in self.chain if self.start_of(stage) != "base"]

    def start_of(self, stage: Stage) -> str:
        """ "base", or the name of the stage that `stage` starts from and has as its reference."""
        if stage.start is not None:
            return stage.start
        index = self.chain.index(stage)
        return self.chain[index - 1].name if index else "base"

    def learning_rate_of(self, stage: Stage) -> float:
        """The stage's own learning rate, or the default of the run's tuning."""
        return stage.learning_rate or LEARNING_RATES[self.tuning]

    def beta_of(self, stage: Stage) -> float:
        """The stage's KL weight: its own, or beta at base, or beta/lambda after another stage (SACPO Theorem 1)."""
        if stage.beta is not None:
            return stage.beta
        return self.beta if self.start_of(stage) == "base" else self.beta / self.lambda_


# What users turn first; a recipe that is left for them says these even where they are the defaults.
_TURNED = ("base", "beta", "lambda", "lora", "max_length", "stages", "seed")
_TURNED_OF_STAGE = ("name", "data", "loss", "learning_rate", "batch_size")


def spelled_out(config: AlignConfig) -> dict[str, Any]:
    """The settings as a recipe, without `out`: what users turn, and whatever else is not a default."""
    whole = config.model_dump(by_alias=True, mode="json")
    other = config.model_dump(by_alias=True, mode="json", exclude_defaults=True)
    left = ("out", "overwrite", *(["lora"] if config.tuning == "full" else []))
    found = {name: whole[name] for name in dict.fromkeys((*_TURNED, *other)) if name not in left}
    found["stages"] = []
    for stage in config.stages:
        settings = stage.model_dump(by_alias=True, mode="json")
        more = stage.model_dump(by_alias=True, mode="json", exclude_defaults=True)
        length = "epochs" if stage.max_steps is None else "max_steps"
        found["stages"].append({name: settings[name] for name in dict.fromkeys((*_TURNED_OF_STAGE, length, *more))})
    return found
