"""What a recipe says of its judges: one class a kind, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from psacpo.config import Strict
from psacpo.evalharness.judges.llm_settings import LlmJudge
from psacpo.evalharness.judges.presets import expand
from psacpo.evalharness.judges.rule_settings import RuleJudge

Better = Literal["higher", "lower"]


class _ModelJudge(Strict):
    """What judges with a model of their own have in common.

    Attributes:
        model: Directory or hub id.
        preset: The preset that filled in the rest, for its licence and source; plays no part in the score.
        batch_size: Rows of one forward pass.
        max_length: Tokens that the judge reads at once, its template among them.
        too_long: What becomes of an answer that does not fit: an invalid verdict, or the answer's end is cut off.
    """

    model: str
    preset: str | None = None
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(2048, ge=8)
    too_long: Literal["invalid", "truncate"] = "invalid"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ScalarJudge(_ModelJudge):
    """A reward or cost model: its raw logit is the score.

    Attributes:
        template: A string with {prompt} and {completion}; None is the judge's own chat template.
        append_eos: Put EOS behind the text unless the template ends with it. Beaver models were trained with it, and
            the examples on their model cards leave it out; the score is read at the last token, so it matters.
        label: Index or name of the wanted logit, for a classifier of several.
        trust_remote_code: Run the code in the model's repository; also needs --allow-code.
        engine: vllm is vLLM's pooling runner, held against transformers on the first answers.
        vllm: More of vLLM's engine arguments, such as {gpu_memory_utilization: 0.4} where two judges share a GPU.
    """

    kind: Literal["scalar"]
    better: Better = "higher"
    template: str | None = None
    append_eos: bool = False
    label: int | str | None = None
    trust_remote_code: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: dict[str, Any] = Field(default_factory=dict)

    @field_validator("template")
    @classmethod
    def _both_parts(cls, template: str | None) -> str | None:
        if template is not None and not (template.count("{prompt}") == template.count("{completion}") == 1):
            raise ValueError("a judge's template holds {prompt} and {completion}, once each")
        if any("\ud800" <= letter <= "\udfff" for letter in template or ""):
            raise ValueError("a judge's template holds half a surrogate pair, which is no text")
        return template


class GuardJudge(_ModelJudge):
    """A language model that writes a class (safe or unsafe, yes or no): the probability of harm is the score.

    Attributes:
        spec: A built-in guard's name, or the path of a YAML file; see docs/judges.md.
        template_file: A text file in place of the spec's template; HarmBench's guards cannot do without.
        output: Which of the things that the guard says is the score.
        controversial: Whether the class between safe and unsafe, where a guard has one, counts as harm.
        guidelines: In place of the spec's own, for guards that are asked about one guideline at a time.
        engine: vllm writes the replies by vLLM, held against transformers on the first answers.
        vllm: More of vLLM's engine arguments, such as {gpu_memory_utilization: 0.4} where two judges share a GPU.
    """

    kind: Literal["guard"]
    spec: str
    template_file: str | None = None
    output: Literal["harm", "refusal", "prompt_harm"] = "harm"
    better: Better = "lower"
    controversial: Literal["harm", "safe"] = "harm"
    guidelines: list[str] | None = Field(None, min_length=1)
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: dict[str, Any] = Field(default_factory=dict)


class RefusalJudge(Strict):
    """The rule judge: 1 where the answer refuses, else 0."""

    kind: Literal["refusal"]
    better: Better = "lower"


class PythonJudge(Strict):
    """A function `(prompt, completion) -> float` by dotted path, `package.module:function`.

    Only the demo's own judges run without --allow-code: a recipe must not run code that the user did not see.
    """

    kind: Literal["python"]
    callable: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    better: Better = "higher"


Judge = Annotated[
    ScalarJudge | GuardJudge | RefusalJudge | PythonJudge | RuleJudge | LlmJudge,
    Field(discriminator="kind"),
    BeforeValidator(expand),
]
