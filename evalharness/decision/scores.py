"""All scores of a run as arrays: which policy, prompt and sample got what from each judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.statistics.bootstrap import Array, Mask


@dataclass(frozen=True)
class Score:
    """One valid score: of which policy, prompt and judge; a sample of None is the next one of its prompt."""

    policy: str
    prompt: PromptRow
    judge: str
    value: float
    sample: int | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of K policies on N prompts with at most S samples.

    Attributes:
        values: Judge -> [K, N, S]; NaN where there is no valid score.
    """

    policies: Sequence[Policy]
    prompts: Sequence[PromptRow]
    values: dict[str, Array]

    @cached_property
    def clusters(self) -> list[str]:
        """The clusters' names, C of them, sorted."""
        return sorted({row.cluster for row in self.prompts})

    @cached_property
    def owner(self) -> NDArray[np.intp]:
        """Which cluster each prompt belongs to, [N]."""
        place = {name: index for index, name in enumerate(self.clusters)}
        return np.array([place[row.cluster] for row in self.prompts], dtype=np.intp)

    @cached_property
    def swept(self) -> list[int]:
        """The places of the swept points among the policies, in rising order of the ratio.

        Points that have weights and no ratio stand in the order of the policies, which is `weights.place_of`'s.
        """
        found = [(policy.ratio or 0.0, index) for index, policy in enumerate(self.policies) if policy.swept]
        return [index for _, index in sorted(found)]

    def by_cluster(self, values: Array) -> tuple[Array, Array]:
        """Sums and counts of values [K, N] or [K, N, S] in each cluster, [K, C] each; NaN is no value."""
        rows = values.reshape(values.shape[0], values.shape[1], -1)
        sums, counts = np.nansum(rows, axis=2), (~np.isnan(rows)).sum(axis=2)
        return self._gathered(sums), self._gathered(counts)

    def _gathered(self, rows: NDArray[Any]) -> Array:
        """Of each policy and prompt, [K, N], to each policy and cluster, [K, C]."""
        if not len(rows):
            return np.zeros((0, len(self.clusters)))
        return np.stack([np.bincount(self.owner, own, minlength=len(self.clusters)) for own in rows]).astype(np.float64)

    def only(self, names: Sequence[str]) -> Scores:
        """The same of some policies."""
        places = [place for place, policy in enumerate(self.policies) if policy.name in names]
        found = Scores(
            [self.policies[k] for k in places], self.prompts, {name: own[places] for name, own in self.values.items()}
        )
        # What hangs on the prompts alone is known already.
        found.__dict__.update(clusters=self.clusters, owner=self.owner)
        return found

    def answered(self, k: int) -> int:
        """How many prompts policy k has any score of."""
        return int(self.scored(k).sum())

    def asked(self, k: int) -> Mask:
        """The clusters [C] that hold a prompt which policy k has any score of."""
        return np.asarray(np.bincount(self.owner[self.scored(k)], minlength=len(self.clusters)) > 0, dtype=np.bool_)

    def scored(self, k: int) -> Mask:
        """The prompts [N] that policy k has any score of."""
        found = np.any([~np.isnan(values[k]).all(axis=1) for values in self.values.values()], axis=0)
        return np.asarray(found, dtype=np.bool_)

    def prompts_in(self, clusters: Mask) -> int:
        """How many prompts the chosen clusters [C] hold."""
        return int(clusters[self.owner].sum())


def tabulate(policies: Sequence[Policy], prompts: Sequence[PromptRow], scores: Sequence[Score]) -> Scores:
    """Scores one by one as arrays."""
    policy_at = {policy.name: index for index, policy in enumerate(policies)}
    prompt_at = {row.id: index for index, row in enumerate(prompts)}
    taken: Counter[tuple[int, int, str]] = Counter()
    cells: dict[str, list[tuple[int, int, int, float]]] = {}
    for score in scores:
        k, n = policy_at[score.policy], prompt_at[score.prompt.id]
        sample = taken[k, n, score.judge] if score.sample is None else score.sample
        taken[k, n, score.judge] += 1
        cells.setdefault(score.judge, []).append((k, n, sample, score.value))
    deepest = 1 + max((cell[2] for found in cells.values() for cell in found), default=0)
    values: dict[str, Array] = {}
    for judge, found in cells.items():
        filled = np.full((len(policies), len(prompts), deepest), np.nan)
        k_at, n_at, s_at, value = zip(*found, strict=True)
        filled[list(k_at), list(n_at), list(s_at)] = value
        values[judge] = filled
    return Scores(policies, prompts, values)
