"""The settings of `frontier`: which policies answer which prompts, who judges, and what is asked of the choice."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from psacpo.config import Strict
from psacpo.errors import InputError
from psacpo.merge.config import policy_name

Better = Literal["higher", "lower"]
# What else a point of frontier.json says; a metric of that name would overwrite it.
_POINT_KEYS = frozenset(
    [
        "ratio",
        "policy",
        "name",
        "n_prompts",
        "p_on_frontier",
        "nondominated",
        "certified",
        "bounds",
        "from_previous",
        "metrics",
    ]
)
EngineName = Literal["auto", "transformers", "vllm", "openai", "ray"]


class Generation(Strict):
    """How answers are sampled.

    Attributes:
        temperature: 0 is greedy.
        batch_size: Rows of one forward pass of the transformers engine; vLLM fills its batches itself.
        logprobs: Store the log-probability of each token of an answer, at temperature 1.
    """

    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop: list[str] = Field(default_factory=list)
    batch_size: int = Field(32, ge=1)
    logprobs: bool = False


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


class ScalarJudge(Strict):
    """A sequence-classification reward or cost model: its raw logit is the score."""

    kind: Literal["scalar"]
    model: str
    better: Better = "higher"
    template: str | None = None
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(2048, ge=8)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("template")
    @classmethod
    def _both_parts(cls, template: str | None) -> str | None:
        if template is not None and not (template.count("{prompt}") == template.count("{completion}") == 1):
            raise ValueError("a judge's template holds {prompt} and {completion}, once each")
        return template


class RefusalJudge(Strict):
    """The rule judge: 1 where the answer refuses, else 0."""

    kind: Literal["refusal"]
    better: Better = "lower"


class PythonJudge(Strict):
    """A function `(prompt, completion) -> float` by dotted path, `package.module:function`.

    Outside the package psacpo it runs only with --allow-code: a recipe must not run code that the user did not see.
    """

    kind: Literal["python"]
    callable: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    better: Better = "higher"


Judge = Annotated[ScalarJudge | RefusalJudge | PythonJudge, Field(discriminator="kind")]


class Metric(Strict):
    """A number per policy out of one judge's scores.

    Attributes:
        judge: The judge's name.
        above: If given, the metric is the rate of scores above it, else the mean score.
        where: Only prompts whose fields have these values count.
    """

    judge: str
    above: float | None = None
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)


class Axes(Strict):
    """The two metrics that span the frontier."""

    reward: str = "reward"
    cost: str = "cost"


class Constraint(Strict):
    """`metric <= limit` or `metric >= limit`, read from text such as `unsafe_rate<=0.05`."""

    metric: str
    sense: Literal["<=", ">="]
    limit: float

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([\w.@-]+)\s*(<=|>=)\s*(\S+)\s*", value)
        try:
            limit = float(found[3]) if found else math.nan
        except ValueError:
            limit = math.nan
        if found is None or not math.isfinite(limit):
            raise ValueError(f"constraint {value!r} cannot be read; allowed: METRIC<=NUMBER or METRIC>=NUMBER")
        return {"metric": found[1], "sense": found[2], "limit": limit}

    def __str__(self) -> str:
        return f"{self.metric}{self.sense}{self.limit:g}"


class FrontierConfig(Strict):
    """A sweep: adapters on one base, ratios and baselines, prompts, judges, metrics and constraints.

    Attributes:
        adapters: Name -> PEFT directory; `reward` and `safety` are the two ends of the sweep. Or whole models, which
            engine vllm takes by its strategy reload.
        baselines: Name -> weights of adapters; no weights is the base model.
        audit: Two more metrics drawn beside the frontier, from judges that had no part in training.
        engine: Who generates: see docs/engines.md.
        strategy: How vLLM gets the policies: stacked adapters side by side, or merged weights one after another.
        probe: Hold each policy's next-token probabilities against the dense merge's before the sweep.
        command: What was typed, for the report; "" where the sweep was started from Python.
        resamples: Bootstrap draws over clusters of prompts (field `cluster`, else the prompt's id).
    """

    base: str
    adapters: dict[str, Path]
    prompts: Path
    judges: dict[str, Judge] = Field(min_length=1)
    out: Path
    ratios: list[float] = Field(default=[0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0], min_length=1)
    baselines: dict[str, dict[str, float]] = Field(default={"base": {}})
    template: str | None = None
    generation: Generation = Generation()
    samples: int = Field(1, ge=1, le=10_000)
    metrics: dict[str, Metric] = Field(default_factory=dict)
    axes: Axes = Axes()
    audit: Axes | None = None
    constraints: list[Constraint] = Field(default_factory=list)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=100, le=1_000_000)
    max_invalid: float = Field(0.02, ge=0, le=1)
    engine: EngineName = "auto"
    strategy: Literal["auto", "lora", "reload"] = "auto"
    probe: bool = True
    vllm: Vllm = Vllm()
    openai: OpenAI = OpenAI()
    ray: Ray = Ray()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0)
    allow_code: bool = False
    command: str = ""

    @model_validator(mode="after")
    def _names_fit(self) -> FrontierConfig:
        for end in ("reward", "safety"):
            if end not in self.adapters:
                raise ValueError(f"adapters holds no '{end}'; given: {', '.join(self.adapters) or 'none'}")
        for ratio in self.ratios:
            if not math.isfinite(ratio) or not 0 <= ratio <= 1:
                raise ValueError(f"ratio {ratio} is out of range; allowed: a number from 0 to 1")
        if sorted(set(self.ratios)) != sorted(self.ratios):
            raise ValueError(f"two ratios are the same: {self.ratios}")
        for kind, named in (("judge", self.judges), ("metric", self.metrics), ("baseline", self.baselines)):
            for name in named:
                if not re.fullmatch(r"[\w.@+-]{1,64}", name):
                    raise ValueError(f"{kind} name {name!r} is not letters, digits and _ . @ + - (at most 64)")
        for name in (*self.metrics, *self.judges):
            if name in _POINT_KEYS:
                raise ValueError(f"'{name}' cannot name a metric or judge: every point of frontier.json has such a key")
        for name, weights in self.baselines.items():
            if name in map(policy_name, self.ratios):
                raise ValueError(f"baseline '{name}' has the name of a swept policy")
            if max(map(abs, weights.values()), default=0) > 100:
                raise ValueError(f"baseline '{name}' has a weight over 100: {weights}")
            _known(f"baseline '{name}' weighs adapter", weights, self.adapters)
        _known("metrics: judge", [metric.judge for metric in self.metrics.values()], self.judges)
        if clash := set(self.metrics) & set(self.judges):
            raise ValueError(f"metrics: '{min(clash)}' is a judge's name already")
        names = [*self.metrics, *self.judges, *self._default_metrics()]
        _known("axes: metric", self.axes.model_dump().values(), names)
        if self.audit:
            _known("audit: metric", self.audit.model_dump().values(), names)
        _known("constraint on metric", [constraint.metric for constraint in self.constraints], names)
        texts = [str(constraint) for constraint in self.constraints]
        if len(set(texts)) < len(texts):
            raise ValueError(f"two constraints are the same: {', '.join(texts)}")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template holds no {prompt}")
        if self.template is not None and any("\ud800" <= letter <= "\udfff" for letter in self.template):
            raise ValueError("template holds bytes that are no UTF-8, or half a surrogate pair")
        return self

    def _default_metrics(self) -> dict[str, Metric]:
        """`unsafe_rate`, the share of answers whose cost is above 0, where there is a judge `cost` and no such metric."""
        if "cost" in self.judges and "unsafe_rate" not in self.metrics:
            return {"unsafe_rate": Metric(judge="cost", above=0.0)}
        return {}

    def all_metrics(self) -> dict[str, Metric]:
        """Every metric by name: the mean of each judge, the recipe's own, and the defaults."""
        return {name: Metric(judge=name) for name in self.judges} | self._default_metrics() | self.metrics


def _known(what: str, given: Any, valid: Any) -> None:
    for name in given:
        if name not in valid:
            raise ValueError(f"{what} '{name}' which is unknown; allowed: {', '.join(valid)}")


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
