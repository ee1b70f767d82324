"""Judges that are rules over one completion: a pattern, its length, whether it was cut, how it repeats itself."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from psacpo.evalharness.judges.base import Item, Verdict
from psacpo.evalharness.judges.patterns import compiled
from psacpo.evalharness.judges.rule_settings import KlJudge, LengthJudge, RegexJudge, RepetitionJudge, TruncatedJudge
from psacpo.files import digest

Settings = RegexJudge | LengthJudge | RepetitionJudge | TruncatedJudge | KlJudge


class _Rule(ABC):
    """What the rules have in common: no model, no prompt, no memory."""

    batch_size = 1024
    members: Sequence[str] = ()
    anchor: str | None = None

    def __init__(self, settings: Settings) -> None:
        self.digest = digest({"rule": settings.model_dump(), "version": 1})

    def reads(self, item: Item) -> Any:
        """The completion alone."""
        return item.completion

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [self.one(item) for item in items]

    @abstractmethod
    def one(self, item: Item) -> Verdict:
        """The verdict on one answer."""


class Regex(_Rule):
    """Score 1 (label "match") or 0 ("no match"); with `capture` the number in the pattern's group."""

    def __init__(self, settings: RegexJudge) -> None:
        super().__init__(settings)
        self.settings = settings
        self.pattern = compiled(settings.pattern, ignore_case=settings.ignore_case)

    def one(self, item: Item) -> Verdict:
        """A completion that is too long, or a search that takes too long, is an invalid verdict."""
        size, most = len(item.completion), self.settings.max_characters
        if size > most:
            return Verdict(None, raw=f"{size} characters, over max_characters {most}")
        try:
            found = self.pattern.search(item.completion, timeout=self.settings.timeout)
        except TimeoutError:
            return Verdict(None, raw=f"the pattern took over {self.settings.timeout:g} s on {size} characters")
        if not self.settings.capture:
            return Verdict(float(found is not None), label="no match" if found is None else "match")
        captured = None if found is None else found[1]
        try:
            score = float(captured) if captured is not None else math.nan
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            return Verdict(None, raw="no match" if captured is None else f"no number: {captured[:80]}")
        return Verdict(score, raw=captured)


class Length(_Rule):
    """Tokens of the policy's own tokenizer, words between white space, or characters."""

    def __init__(self, settings: LengthJudge) -> None:
        super().__init__(settings)
        self.unit = settings.unit

    def reads(self, item: Item) -> Any:
        """The completion, and its count of tokens where that is the score."""
        return [item.completion, item.n_tokens] if self.unit == "tokens" else item.completion

    def one(self, item: Item) -> Verdict:
        """Tokens that nobody counted are an invalid verdict."""
        if self.unit == "tokens":
            return (
                Verdict(None, raw="n_tokens is not known") if item.n_tokens is None else Verdict(float(item.n_tokens))
            )
        return Verdict(float(len(item.completion.split() if self.unit == "words" else item.completion)))


class Truncated(_Rule):
    """Whether an answer was cut off, by its finish reason."""

    def reads(self, item: Item) -> Any:
        """The finish reason alone."""
        return item.finish_reason

    def one(self, item: Item) -> Verdict:
        """An answer whose finish reason nobody knows is an invalid verdict."""
        if item.finish_reason is None:
            return Verdict(None, raw="finish_reason is not known")
        cut = item.finish_reason == "length"
        return Verdict(float(cut), label="truncated" if cut else "complete")


class Repetition(_Rule):
    """0 for a text that never repeats itself, towards 1 for one that says nothing else."""

    def __init__(self, settings: RepetitionJudge) -> None:
        super().__init__(settings)
        self.settings = settings

    def one(self, item: Item) -> Verdict:
        """A text too short to repeat itself scores 0."""
        if self.settings.measure == "compression":
            return Verdict(compression(item.completion))
        return Verdict(repeated_ngrams(item.completion, self.settings.n))


class Kl(_Rule):
    """The log-ratio of policy and base."""

    def __init__(self, settings: KlJudge) -> None:
        super().__init__(settings)
        self.per = settings.per

    def reads(self, item: Item) -> Any:
        """The two log-probabilities' difference, and over how many tokens it is."""
        return [item.log_ratio, item.n_drawn]

    def one(self, item: Item) -> Verdict:
        """An answer of which nobody told both probabilities is an invalid verdict."""
        if item.log_ratio is None or not item.n_drawn:
            return Verdict(None, raw="its probability under the base is not known")
        per_token = item.log_ratio / item.n_drawn
        raw = f"{item.log_ratio:.6g} nats over {item.n_drawn} tokens, {per_token:.6g} a token"
        return Verdict(item.log_ratio if self.per == "answer" else per_token, raw=raw)


_KINDS: dict[type[Settings], Callable[[Any], _Rule]] = {
    RegexJudge: Regex,
    LengthJudge: Length,
    TruncatedJudge: Truncated,
    RepetitionJudge: Repetition,
    KlJudge: Kl,
}


def make_rule(settings: Settings) -> _Rule:
    """The rule that `settings` describe."""
    return _KINDS[type(settings)](settings)


def repeated_ngrams(text: str, n: int) -> float:
    """The share of a text's n-grams of words that occurred in it before, 0 to 1 (1 - distinct-n of Li et al. 2016).

    A text of one word, however long, is read by its characters: else a megabyte of one letter repeats nothing.
    """
    words: Sequence[str] = text.split()
    if len(words) == 1 and len(words[0]) > 64:
        words = words[0]
    count = len(words) - n + 1
    if count < 2:
        return 0.0
    return 1 - len({tuple(words[start : start + n]) for start in range(count)}) / count


def compression(text: str) -> float:
    """The share of a text's bytes that DEFLATE saves, 0 where it saves none."""
    blob = text.encode("utf-8", "surrogatepass")
    return max(0.0, 1 - len(zlib.compress(blob, 9)) / len(blob)) if blob else 0.0
