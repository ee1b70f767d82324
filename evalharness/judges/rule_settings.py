"""Settings of the judges that need no model: rules over the text, imported scores, and judges made of others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from psacpo.config import Strict
from psacpo.evalharness.judges.patterns import compiled

Better = Literal["higher", "lower"]


class RegexJudge(Strict):
    """1 where the pattern occurs in the completion, else 0; or the number that it captures.

    Attributes:
        pattern: In the syntax of Python's `regex` module.
        capture: Score the number in the pattern's first group; an answer without it is an invalid verdict.
        max_characters: A longer completion is an invalid verdict.
        timeout: Seconds that one completion may take: a pattern that tries every way to match ends there.
    """

    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    ignore_case: bool = False
    capture: bool = False
    max_characters: int = Field(1_000_000, ge=1)
    timeout: float = Field(1.0, gt=0, le=60)
    better: Better = "lower"

    @model_validator(mode="after")
    def _can_match(self) -> RegexJudge:
        groups = compiled(self.pattern, ignore_case=self.ignore_case).groups
        if self.capture and groups != 1:
            raise ValueError(f"capture takes the number in a pattern's one group; {self.pattern!r} has {groups}")
        return self


class LengthJudge(Strict):
    """How long the completion is. Tokens are the policy's own, which stored completions need not have."""

    kind: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = "tokens"
    better: Better = "lower"


class TruncatedJudge(Strict):
    """1 where the completion ended at max_new_tokens, 0 where it ended of itself."""

    kind: Literal["truncated"]
    better: Better = "lower"


class RepetitionJudge(Strict):
    """How much of the completion was said before: the share of its word n-grams that are repeats, or of its bytes that
    compression saves."""

    kind: Literal["repetition"]
    measure: Literal["ngrams", "compression"] = "ngrams"
    n: int = Field(4, ge=1, le=64)
    better: Better = "lower"


class KlJudge(Strict):
    """How far the completion is from the base: the log of how much likelier the policy was to say it, in nats.

    log pi(y|x) - log pi_base(y|x), both at temperature 1, over all of an answer's tokens and the one that ended it. Its
    mean over answers that were drawn at temperature 1 from all tokens estimates KL(pi || pi_base) without bias.

    Attributes:
        per: An answer's sum, or that divided by its tokens.
    """

    kind: Literal["kl_to_base"]
    per: Literal["answer", "token"] = "answer"
    better: Better = "lower"


class ImportJudge(Strict):
    """Scores from a file: humans, other tools, the logs of lm-eval and inspect.

    Attributes:
        path: Rows as `psacpo.rows` reads them, with `prompt_id`, a policy (`policy` or `ratio`, where there are several)
            and `sample` (0 where there is none); or an lm-eval samples_*.jsonl, or an inspect JSON log.
        score: The column, metric or scorer that holds the score.
        format: How the file is laid out; auto tells by its contents.
        policy: Whose answers a file is about that names no policy, as the logs of one model do.
    """

    kind: Literal["import"]
    path: Path
    score: str = "score"
    format: Literal["auto", "rows", "lm-eval", "inspect"] = "auto"
    policy: str = ""
    better: Better = "higher"


class EnsembleJudge(Strict):
    """One score out of other judges' scores on the same answer.

    Attributes:
        members: Names of the judges. Their scores enter as they are: a mean wants one scale and one direction.
        rule: mean, max, min of the scores; all, any: 1 where all, or any, of them are above their thresholds, else 0.
        thresholds: Member -> what its score must be above, for all and any; 0.5 where none is named.
        quorum: How many members must be valid for a valid verdict; None is all of them.
    """

    kind: Literal["ensemble"]
    members: list[str] = Field(min_length=2)
    rule: Literal["mean", "max", "min", "all", "any"] = "mean"
    thresholds: dict[str, float] = Field(default_factory=dict)
    quorum: int | None = Field(None, ge=1)
    better: Better = "lower"

    @field_validator("members")
    @classmethod
    def _different(cls, members: list[str]) -> list[str]:
        if len(set(members)) < len(members):
            raise ValueError(f"a member is named twice: {', '.join(members)}")
        return members

    @model_validator(mode="after")
    def _fits(self) -> EnsembleJudge:
        for name in self.thresholds:
            if name not in self.members:
                raise ValueError(f"threshold of '{name}', which is no member; allowed: {', '.join(self.members)}")
        if self.thresholds and self.rule not in ("all", "any"):
            raise ValueError(f"rule {self.rule} takes no thresholds; allowed: all, any")
        if self.quorum is not None and self.quorum > len(self.members):
            raise ValueError(f"quorum {self.quorum} is over the {len(self.members)} members")
        return self

    def threshold(self, member: str) -> float:
        """What a member's score must be above to be a vote."""
        return self.thresholds.get(member, 0.5)


RuleJudge = RegexJudge | LengthJudge | TruncatedJudge | RepetitionJudge | KlJudge | ImportJudge | EnsembleJudge
