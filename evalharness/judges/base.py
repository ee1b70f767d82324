"""What every judge takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from psacpo.prompting import Prompt


@dataclass(frozen=True)
class Item:
    """One answer and what stands around it; most judges read the prompt and the completion alone.

    Attributes:
        fields: The prompt's other columns (`category`, `behavior`, ...).
        finish_reason: "length" for an answer that was cut off; None where nobody knows.
        n_tokens: Of the answer; None where nobody knows.
        log_ratio: log pi(y|x) - log pi_base(y|x) of the answer as drawn; None where nobody knows.
        n_drawn: The tokens that it is over, the one that ended the answer among them.
        anchor: The anchor policy's answer to the same prompt and sample, for judges that compare with one.
        verdicts: What the judges that this one is made of (`Judge.members`) said, by name.
    """

    prompt: Prompt
    completion: str
    prompt_id: str = ""
    policy: str = ""
    sample: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    n_tokens: int | None = None
    log_ratio: float | None = None
    n_drawn: int | None = None
    anchor: str | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one answer.

    Attributes:
        score: A finite number, or None where the verdict is invalid.
        label: A class, for judges that name one.
        probability: Of the label, for judges that give it.
        raw: What the judge said before it was read, or why the verdict is invalid.
        failed: The judge could not be asked (an endpoint that gave up): invalid now, and asked again by the next run.
        usage: What asking took, such as {"prompt_tokens": 812, "completion_tokens": 40}.
    """

    score: float | None
    label: str | None = None
    probability: float | None = None
    raw: str | None = None
    failed: bool = False
    usage: Mapping[str, int] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """Invalid verdicts are stored and counted, and enter no mean."""
        return self.score is not None


class Judge(Protocol):
    """One judge.

    Attributes:
        digest: Changes whenever the judge could give another score: model weights, template, code, version.
        batch_size: How many items one call of `judge` takes best.
        members: Names of the judges whose verdicts it reads; they judge first.
        anchor: Name of the policy whose answers it compares with; None for a judge of single answers.
    """

    digest: str
    batch_size: int
    members: Sequence[str]
    anchor: str | None

    def reads(self, item: Item) -> Any:
        """All of an item that its verdict hangs on, as JSON: items that are equal in it are judged once."""
        ...

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order. An item that cannot be judged is an invalid verdict, never an exception."""
        ...


class TextJudge:
    """What judges of a single answer's text have in common."""

    members: Sequence[str] = ()
    anchor: str | None = None

    def reads(self, item: Item) -> Any:
        """The prompt and the completion."""
        return [item.prompt, item.completion]
