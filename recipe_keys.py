"""The keys of psacpo.yaml, the one recipe of a project directory. docs/align.md, merge.md and frontier.md explain them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from psacpo.align.config import Dtype, Lora, Names, Numbers, Stage, Tuning
from psacpo.config import Strict
from psacpo.evalharness.adaptive.settings import AdaptiveSwitch
from psacpo.evalharness.baseline_settings import Baseline
from psacpo.evalharness.config import Axes, Constraint, Generation, Metric, OpenAI, Ray, Vllm
from psacpo.evalharness.judges.settings import Judge
from psacpo.evalharness.prompt_sets import RecipePrompts
from psacpo.evalharness.weights import WeightSweep
from psacpo.merge.config import OutputKind


class Recipe(Strict):
    """Everything that a project's commands need. Relative paths are relative to the recipe's own directory."""

    base: str
    dtype: Dtype = "float32"
    device: str = "auto"
    template: str | None = None
    seed: int = 0

    # align
    beta: float = Field(0.1, gt=0)
    lambda_: float = Field(10.0, gt=0, alias="lambda")
    tuning: Tuning = "lora"
    lora: Lora = Lora()
    quantization: Literal["4bit"] | None = None
    max_length: int = 512
    stages: list[Stage] = Field(default_factory=list)
    order: Names | None = None
    naive: bool = False
    lambdas: Numbers = ()
    gradient_checkpointing: bool = False
    report_to: Names = ()
    save_steps: int = Field(100, ge=0)
    out: str = "."

    # merge
    adapters: dict[str, str] = Field(default_factory=lambda: {"reward": "reward", "safety": "safety"})
    as_: OutputKind | None = Field(None, alias="as")

    # frontier
    prompts: RecipePrompts | None = None
    judges: dict[str, Judge] = Field(default_factory=dict)
    ratios: list[float] = Field(default_factory=lambda: [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0])
    weights: WeightSweep | None = None
    baselines: dict[str, Baseline] = Field(default={"base": {}})
    samples: int = 1
    generation: Generation = Generation()
    metrics: dict[str, Metric] = Field(default_factory=dict)
    axes: Axes = Axes()
    objectives: list[str] | None = None
    audit: Axes | None = None
    constraints: list[Constraint] = Field(default_factory=list)
    confidence: float = 0.95
    resamples: int = 2000
    holdout: float = 0.2
    adaptive: AdaptiveSwitch = None
    max_invalid: float = 0.02
    engine: str = "auto"
    strategy: str = "auto"
    probe: bool = True
    vllm: Vllm = Vllm()
    openai: OpenAI = OpenAI()
    ray: Ray = Ray()
    frontier: str = "frontier"

    @model_validator(mode="after")
    def _one_sweep(self) -> Recipe:
        if self.weights is not None and "ratios" in self.model_fields_set:
            raise ValueError("a sweep is over ratios or over weights; allowed: one of these keys")
        return self
