"""The scores of an adaptive sweep as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.judges import Judge
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.judging.quality import Verdicts
from psacpo.evalharness.judging.verdicts import Answer, is_verdict, judge_all
from psacpo.evalharness.prompts import Job, PromptRow
from psacpo.evalharness.records import Record, Store
from psacpo.evalharness.run_files import VERDICTS
from psacpo.evalharness.scoring import item_of, rules_of
from psacpo.evalharness.statistics.bootstrap import Array


class Judging:
    """A run's stored verdicts and its judges, for round after round of answers; use as a context manager."""

    def __init__(self, config: FrontierConfig, judges: Mapping[str, Judge]) -> None:
        self.config, self.judges = config, judges
        self.rules = rules_of(config, judges)
        self.directions = {name: one.better for name, one in config.all_judges().items()}
        self._anchors = {judge.anchor for judge in judges.values()} - {None}
        self._anchored: dict[str, list[Answer]] = {}
        self._store = Store(config.out / VERDICTS, is_verdict, batches=True)
        self._cache = Cache(config.cache)

    def __enter__(self) -> Self:
        self._store.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    def judge(self, answers: Sequence[tuple[Job, Record]]) -> Verdicts:
        """The verdicts on one round's answers.

        Raises:
            InputError: A judge could not be asked about more than `max_invalid` of them: what comes next hangs on them.
        """
        own = [Answer(record["key"], item_of(job.row, record)) for job, record in answers]
        beside = self._beside(own)
        found = judge_all(self.judges, self.directions, [*own, *beside], self._store, self._cache, quiet=True)
        found |= judge_all(self.rules, self.directions, own, self._store, quiet=True)
        for name, verdicts in found.items():
            failed = sum(bool(verdict.get("failed")) for verdict in verdicts[: len(own)])
            if failed > self.config.max_invalid * len(own):
                raise InputError(
                    f"judge '{name}' could not be asked about {failed} of {len(own)} answers, on which hangs what an "
                    "adaptive sweep does next",
                    allowed="the same command again: it asks these once more and keeps the rest",
                )
        return {name: verdicts[: len(own)] for name, verdicts in found.items()}

    def _beside(self, own: Sequence[Answer]) -> list[Answer]:
        """Earlier answers of the policies that a judge compares with, to the prompts of these."""
        before = {key: list(found) for key, found in self._anchored.items()}
        for answer in own:
            if answer.item.policy in self._anchors:
                self._anchored.setdefault(answer.item.prompt_id, []).append(answer)
        return [one for key in dict.fromkeys(answer.item.prompt_id for answer in own) for one in before.get(key, [])]


class Table:
    """All scores so far as `Scores` has them; rows are added with each new policy."""

    def __init__(self, prompts: Sequence[PromptRow], judges: Sequence[str], samples: int) -> None:
        self.prompts = prompts
        self.policies: list[Policy] = []
        self._place = {row.id: place for place, row in enumerate(prompts)}
        self._row: dict[str, int] = {}
        self._values: dict[str, Array] = {name: np.empty((0, len(prompts), samples)) for name in judges}
        self._first = Scores([], prompts, {})

    def put(self, answers: Sequence[tuple[Job, Record]], verdicts: Verdicts) -> None:
        """Enter the valid scores."""
        for job, _ in answers:
            policy = job.request.policy
            if policy.name not in self._row:
                self._row[policy.name] = len(self.policies)
                self.policies.append(policy)
        for name, found in verdicts.items():
            values = self._values[name]
            more = np.full((len(self.policies) - len(values), *values.shape[1:]), np.nan)
            values = self._values[name] = np.concatenate([values, more])
            for (job, _), verdict in zip(answers, found, strict=True):
                if verdict["valid"]:
                    place = self._row[job.request.policy.name], self._place[job.row.id], job.sample
                    values[place] = float(verdict["score"])

    def scores(self) -> Scores:
        """As they stand."""
        found = Scores(list(self.policies), self.prompts, dict(self._values))
        # What hangs on the prompts alone is known already.
        found.__dict__.update(clusters=self._first.clusters, owner=self._first.owner)
        return found
