"""What a recipe says of a language model as judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from psacpo.config import Strict

# Settings that decide who is asked how often, and none of the words that come back.
TRANSPORT = frozenset({"base_url", "api_key_env", "concurrency", "timeout", "retries", "backoff", "price_per_million"})


class Price(Strict):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class LlmJudge(Strict):
    """A language model behind an OpenAI-compatible endpoint, with a rubric.

    Attributes:
        model: Its name at the endpoint.
        mode: "pairwise" compares each answer with the anchor policy's, in both orders; the score is the mean of win 1,
            tie 0.5, loss 0. "absolute" gives one answer a whole number on `scale`.
        anchor: The one policy that all others are compared with.
        rubric: `helpfulness` or `harmlessness`; or `rubric_text`, or `rubric_file`, in the user's own words.
        explain: Whether the judge gives its reasons before its verdict: better verdicts, more tokens.
        structured: "auto" asks for JSON by `response_format` and does without where the endpoint refuses it.
        logprobs: The expected score over the probabilities of the verdict's first token, not the one that was written.
        repeats: How often each question is asked; the score is the mean. More than 1 makes sense above temperature 0.
        max_tokens: Most tokens of a reply; a reply that is cut off is no verdict.
        temperature: None leaves it to the endpoint, for models that take none.
        rereads: Times that a reply which is no verdict is asked for again, before the verdict is invalid.
        extra: More fields of the request, such as {reasoning_effort: low}.
        base_url, api_key_env, concurrency, timeout, retries, backoff: As of engine openai.
        price_per_million: For the cost before and after; None counts tokens only.
        protocol: "sacpo" asks as the SACPO paper's evaluation did: see docs/judges.md for why not to.
        failures_as_ties: Count a reply that is no verdict as a tie, as that evaluation did: only for its protocol.
    """

    kind: Literal["llm"]
    model: str
    mode: Literal["pairwise", "absolute"] = "pairwise"
    anchor: str = "base"
    rubric: str | None = None
    rubric_text: str | None = Field(None, min_length=1)
    rubric_file: Path | None = None
    scale: tuple[int, int] = (1, 10)
    better: Literal["higher", "lower"] = "higher"
    explain: bool = True
    structured: Literal["auto", "json_schema", "off"] = "auto"
    logprobs: bool = False
    repeats: int = Field(1, ge=1, le=100)
    temperature: float | None = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(1024, ge=1)
    rereads: int = Field(2, ge=0, le=20)
    extra: dict[str, Any] = Field(default_factory=dict)
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(16, ge=1, le=4096)
    timeout: float = Field(120.0, gt=0)
    retries: int = Field(6, ge=0)
    backoff: float = Field(1.0, ge=0)
    price_per_million: Price | None = None
    protocol: Literal["psacpo", "sacpo"] = "psacpo"
    failures_as_ties: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        """The published protocol's own temperature, reply length and repeats, unless others are given."""
        if isinstance(values, dict) and values.get("protocol") == "sacpo":
            return {"temperature": 0.7, "max_tokens": 8, "repeats": 3} | values
        return values

    @model_validator(mode="after")
    def _fit(self) -> LlmJudge:
        given = [name for name in ("rubric", "rubric_text", "rubric_file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of rubric, rubric_text and rubric_file is needed, given: {', '.join(given) or 'none'}"
            )
        low, high = self.scale
        if not 0 <= low < high <= 100:
            raise ValueError(f"scale {low} to {high} is no scale; allowed: two whole numbers from 0 to 100, low first")
        if self.logprobs and self.mode == "absolute" and high > 9:
            raise ValueError("logprobs needs scores of one digit: a scale that ends at 9 or below")
        if self.mode == "pairwise" and self.better == "lower":
            raise ValueError("a pairwise score is a win rate, of which more is better: leave out better: lower")
        if self.protocol == "sacpo" and (self.mode != "pairwise" or self.logprobs or self.rubric is None):
            raise ValueError("protocol sacpo is pairwise, without logprobs, with rubric helpfulness or harmlessness")
        if self.failures_as_ties and self.protocol != "sacpo":
            raise ValueError("failures_as_ties is a defect of protocol sacpo, and of nothing else here")
        return self
