"""A judge made of other judges: the mean, the worst, or whether all or any of them object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from psacpo.evalharness.judges.base import Item, Verdict
from psacpo.evalharness.judges.rule_settings import EnsembleJudge
from psacpo.files import digest

_SCORES: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "max": max, "min": min}
_VOTES: dict[str, Callable[[Sequence[bool]], bool]] = {"all": all, "any": any}


class Ensemble:
    """Reads its members' verdicts alone; invalid where fewer than the quorum of them are valid."""

    batch_size = 1024
    anchor: str | None = None

    def __init__(self, settings: EnsembleJudge) -> None:
        self.settings = settings
        self.members: Sequence[str] = settings.members
        self.digest = digest({"ensemble": settings.model_dump(), "version": 1})

    def reads(self, item: Item) -> Any:
        """The members' scores: what they said them of plays no part."""
        return {name: item.verdicts[name].score for name in self.members}

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item; the members' scores stand in `raw`."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Verdict:
        said = {name: item.verdicts[name].score for name in self.members}
        scores = {name: score for name, score in said.items() if score is not None}
        raw = ", ".join(
            f"{name} {'invalid' if score is None else format(score, '.6g')}" for name, score in said.items()
        )
        # A member that could not be asked is asked again by the next run, and with it this judge.
        failed = any(item.verdicts[name].failed for name in self.members)
        if len(scores) < (self.settings.quorum or len(self.members)):
            return Verdict(None, raw=raw, failed=failed)
        rule = self.settings.rule
        if rule in _SCORES:
            return Verdict(_SCORES[rule](list(scores.values())), raw=raw, failed=failed)
        votes = [score > self.settings.threshold(name) for name, score in scores.items()]
        vote = _VOTES[rule](votes)
        return Verdict(float(vote), label=rule if vote else f"not {rule}", raw=raw, failed=failed)
