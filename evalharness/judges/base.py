"""What every judge takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from psacpo.prompting import Prompt


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one answer.

    Attributes:
        score: A finite number, or None where the verdict is invalid.
        label: A class, for judges that name one.
        probability: Of the label, for judges that give it.
        raw: What the judge said before it was read, or why the verdict is invalid.
    """

    score: float | None
    label: str | None = None
    probability: float | None = None
    raw: str | None = None

    @property
    def valid(self) -> bool:
        """Invalid verdicts are stored and counted, and enter no mean."""
        return self.score is not None


class Judge(Protocol):
    """One judge.

    Attributes:
        digest: Changes whenever the judge could give another score: model weights, template, code, version.
        batch_size: How many pairs one call of `judge` takes best.
    """

    digest: str
    batch_size: int

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, completion), in order."""
        ...
