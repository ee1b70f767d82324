"""The settings of `frontier`: which policies answer which prompts, who judges, and what is asked of the choice."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from psacpo.config import Strict
from psacpo.errors import InputError
from psacpo.evalharness.adaptive.settings import AdaptiveSwitch
from psacpo.evalharness.baseline_settings import Baseline, mixtures
from psacpo.evalharness.decision.criteria import Axes, Column, Constraint, Criteria, Metric, known
from psacpo.evalharness.intrinsic import INTRINSIC, KL
from psacpo.evalharness.judges.llm_settings import LlmJudge
from psacpo.evalharness.judges.settings import Judge, RefusalJudge
from psacpo.evalharness.prompt_sets import Prompts, prompt_sets, roles_of
from psacpo.evalharness.weights import Weights, WeightSweep, weight_points, weights_name
from psacpo.merge.config import policy_name

__all__ = ["Axes", "Constraint", "FrontierConfig", "Generation", "Metric", "OpenAI", "Ray", "Vllm"]

EngineName = Literal["auto", "transformers", "vllm", "openai", "ray"]


class Generation(Strict):
    """How answers are sampled.

    Attributes:
        temperature: 0 is greedy.
        batch_size: Rows of one forward pass of the transformers engine; vLLM fills its batches itself.
        logprobs: Store the log-probability of each token of an answer, at temperature 1.
        kl_to_base: Measure how far each policy's answers are from the base's: one forward pass of the base for each
            different answer. None is yes, but for engine openai: a vLLM on a CPU that serves adapters ends when it is
            asked for the log-probabilities of a prompt (seen in 0.32).
    """

    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop: list[str] = Field(default_factory=list)
    batch_size: int = Field(32, ge=1)
    logprobs: bool = False
    kl_to_base: bool | None = None


class Vllm(Strict):
    """How vLLM is started; what is None is left to vLLM.

    Attributes:
        dtype: Of weights and activations; None is the sweep's `dtype`.
        quantization: A method that quantises while loading (fp8, bitsandbytes, ...), or that of the base's own files.
        enforce_eager: No compilation and no CUDA graphs; None is true on a CPU.
        max_num_seqs: Most answers in the making at once.
        extra: More of vLLM's engine arguments by their names, such as {swap_space: 8}.
    """

    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    max_model_len: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: str | None = None
    enforce_eager: bool | None = None
    max_num_seqs: int | None = Field(None, ge=1)
    extra: dict[str, Any] = Field(default_factory=dict)


class OpenAI(Strict):
    """An OpenAI-compatible endpoint whose models are the policies.

    Attributes:
        base_url: Such as http://host:8000/v1; None is the environment's OPENAI_BASE_URL.
        api_key_env: The environment variable that holds the key; no key is ever written down.
        models: Policy name -> model name there, where they differ.
        dialect: "vllm" (vLLM, SGLang, psacpo serve) takes the prompt's token ids and says the answer's; "openai" sends
            the prompt as text and only what OpenAI's own reference has.
        concurrency: Most requests under way at once.
        timeout: Seconds that one try may take.
        retries: Tries after the first, on 408, 409, 429, 5xx, timeouts, lost connections and answers that are no JSON.
        backoff: Seconds before the first retry; each later one waits twice as long, 60 at most, or what Retry-After says.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    models: dict[str, str] = Field(default_factory=dict)
    dialect: Literal["vllm", "openai"] = "vllm"
    concurrency: int = Field(32, ge=1, le=4096)
    timeout: float = Field(600.0, gt=0)
    retries: int = Field(6, ge=0)
    backoff: float = Field(0.5, ge=0)


class Ray(Strict):
    """Workers of a Ray cluster, each with an engine of its own; the cluster is RAY_ADDRESS, else this machine.

    Attributes:
        engine: What each worker holds.
        workers: How many; None is as many as the cluster has room for.
        cpus: That each worker takes.
        gpus: That each worker takes; None is all that its engine uses, where the cluster has GPUs.
        batch_size: Requests that a worker gets at once; None is chosen by engine.
        retries: How often the requests of a worker that died are given out again.
    """

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    workers: int | None = Field(None, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float | None = Field(None, ge=0)
    batch_size: int | None = Field(None, ge=1)
    retries: int = Field(3, ge=0)


class FrontierConfig(Criteria):
    """A sweep: adapters on one base, ratios and baselines, prompts, judges, metrics and constraints.

    Attributes:
        adapters: Name -> PEFT directory; `reward` and `safety` are the two ends of the sweep. Or whole models, which
            engine vllm takes by its strategy reload.
        weights: In the place of ratios, for more than two adapters: a grid over the simplex, or vectors of weights.
        adaptive: Add points where they decide something, between the ends of `ratios` or in the simplex of `weights`, and ask
            no more than it takes.
        baselines: Name -> weights of adapters, a model directory, or an endpoint; no weights is the base model.
        engine: Who generates: see docs/engines.md.
        strategy: How vLLM gets the policies: stacked adapters side by side, or merged weights one after another.
        probe: Hold each policy's next-token probabilities against the dense merge's before the sweep.
        cache: A directory of verdicts that other runs share, found by judge and text.
        command: What was typed, for the report; "" where the sweep was started from Python.
    """

    base: str
    adapters: dict[str, Path]
    prompts: Prompts
    judges: dict[str, Judge] = Field(min_length=1)
    out: Path
    ratios: list[float] = Field(default=[0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0], min_length=1)
    weights: WeightSweep | None = None
    adaptive: AdaptiveSwitch = None
    baselines: dict[str, Baseline] = Field(default={"base": {}})
    template: str | None = None
    generation: Generation = Generation()
    samples: int = Field(1, ge=1, le=10_000)
    max_invalid: float = Field(0.02, ge=0, le=1)
    engine: EngineName = "auto"
    strategy: Literal["auto", "lora", "reload"] = "auto"
    probe: bool = True
    vllm: Vllm = Vllm()
    openai: OpenAI = OpenAI()
    ray: Ray = Ray()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allow_code: bool = False
    cache: Path | None = None
    command: str = ""

    @model_validator(mode="after")
    def _names_fit(self) -> FrontierConfig:
        for end in ("reward", "safety"):
            if end not in self.adapters:
                raise ValueError(f"adapters holds no '{end}'; given: {', '.join(self.adapters) or 'none'}")
        for ratio in self.ratios:
            if not math.isfinite(ratio) or not 0 <= ratio <= 1:
                raise ValueError(f"ratio {ratio} is out of range; allowed: a number from 0 to 1")
        if self.adaptive is not None and self.weights is None and len(self.ratios) < 2:
            raise ValueError("adaptive adds ratios between the least and the greatest of ratios; allowed: two or more")
        if sorted(set(self.ratios)) != sorted(self.ratios):
            raise ValueError(f"two ratios are the same: {self.ratios}")
        for name in self.baselines:
            if not re.fullmatch(r"[\w.@+-]{1,64}", name):
                raise ValueError(f"baseline name {name!r} is not letters, digits and _ . @ + - (at most 64)")
        points = self.point_names()
        for name in self.baselines:
            if name in points:
                raise ValueError(f"baseline '{name}' has the name of a swept policy")
        for name, weights in mixtures(self.baselines).items():
            if max(map(abs, weights.values()), default=0) > 100:
                raise ValueError(f"baseline '{name}' has a weight over 100: {weights}")
            known(f"baseline '{name}' weighs adapter", weights, self.adapters)
        if self.engine == "openai" and self.generation.kl_to_base:
            if self.openai.dialect != "vllm":
                raise ValueError("generation.kl_to_base needs openai.dialect vllm, which tells of tokens by their ids")
            if not self.bases():
                raise ValueError(
                    "generation.kl_to_base needs the base among the policies; allowed: baselines: {base: {}}"
                )
        self.check_names()
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template holds no {prompt}")
        if self.template is not None and any("\ud800" <= letter <= "\udfff" for letter in self.template):
            raise ValueError("template holds bytes that are no UTF-8, or half a surrogate pair")
        return self

    def all_judges(self) -> dict[str, Judge]:
        """The recipe's judges, and the rules that are always there, but for those whose name the recipe gives away."""
        always = {name: one for name, one in INTRINSIC.items() if name not in self.metrics}
        if not self.measures_kl():
            always.pop(KL, None)
        return self.judges | {name: one for name, one in always.items() if name not in self.judges}

    def measures_kl(self) -> bool:
        """Whether answers are measured against the base."""
        asked = self.generation.kl_to_base
        return bool(asked) if self.engine == "openai" else asked is not False

    def columns(self) -> dict[str, Column]:
        """One column a judge, the rules that are always there among them."""
        return {
            name: Column(
                judge.better,
                refuses=isinstance(judge, RefusalJudge),
                anchor=judge.anchor if isinstance(judge, LlmJudge) and judge.mode == "pairwise" else None,
            )
            for name, judge in self.all_judges().items()
        }

    def default_metrics(self) -> dict[str, Metric]:
        """As of all criteria; where sets of prompts have roles, `unsafe_rate` counts those for safety alone."""
        found = super().default_metrics()
        roles = {role for one in prompt_sets(self.prompts) for role in roles_of(one)}
        if "safety" in roles and len(roles) > 1 and "unsafe_rate" in found:
            found["unsafe_rate"] = found["unsafe_rate"].model_copy(update={"where": {"role": "safety"}})
        return found

    def samples_per_prompt(self) -> int:
        """`samples`."""
        return self.samples

    def policy_names(self) -> list[str]:
        """The swept points' and the baselines'."""
        return [*self.point_names(), *self.baselines]

    def point_names(self) -> list[str]:
        """The swept points', from the reward end on."""
        if self.weights is None:
            return [policy_name(ratio) for ratio in sorted(self.ratios)]
        return [weights_name(vector) for vector in self.weight_points()]

    def weight_points(self) -> list[Weights]:
        """The points of a sweep over weights, in their order; none where it is over ratios."""
        return [] if self.weights is None else weight_points(self.weights, self.adapters)

    def anchors(self) -> list[str]:
        """The untouched bases, and the point at the reward end."""
        return [*self.bases(), self.point_names()[0]]

    def bases(self) -> list[str]:
        """The baselines that are the untouched base."""
        return [name for name, weights in mixtures(self.baselines).items() if not weights]


def parse_engine_settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`vllm.max_num_seqs=64` and the like as {"vllm": {"max_num_seqs": 64}}; values are read as YAML.

    Raises:
        InputError: A text of another form, or of an engine that has no settings.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        engine, dot, setting = name.strip().partition(".")
        if not (equals and dot and setting) or engine not in ("vllm", "openai", "ray"):
            raise InputError(
                f"engine setting '{text}' cannot be read",
                allowed="ENGINE.NAME=VALUE with ENGINE one of vllm, openai, ray, such as vllm.tensor_parallel_size=2",
            )
        try:
            found.setdefault(engine, {})[setting.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"engine setting '{text}': its value cannot be read") from error
    return found
