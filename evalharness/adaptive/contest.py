"""Which of the certified ratios has the best reward, and which others might still be better: paired on common clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from psacpo.evalharness.adaptive.anytime import AnytimeCertifier, sorter
from psacpo.evalharness.adaptive.split import Split
from psacpo.evalharness.decision.criteria import Criteria, Metric
from psacpo.evalharness.decision.measures import Mean, Measure
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.statistics.bootstrap import Array, Mask

# Of what the reward moves over the whole dial: a gain that may be missed.
_WORTH = 0.05


@dataclass(frozen=True)
class Contest:
    """How the certified ratios stand to each other.

    Attributes:
        leader: The place of the one with the best mean on the clusters that all of those not beaten have answered.
        rivals: The places of those that may be better than it by more than is worth telling apart.
    """

    leader: int | None
    rivals: list[int]


def contest(sums: Array, counts: Array, places: Sequence[int], *, worth: float, confidence: float) -> Contest:
    """Drop whoever is worse than the leader, until nobody is.

    Differences are of clusters that both have answered, with normal intervals: nothing that is promised hangs on them,
    as any of the certified may be chosen.

    Args:
        sums: Of the reward in each cluster, larger = better, [K, C].
        counts: Of its values, [K, C].
        places: The certified.
        worth: A rival that is better by less than this is let go.
    """
    alive = list(places)
    z = float(stats.norm.ppf((1 + confidence) / 2))
    while alive:
        common = (counts[alive] > 0).all(axis=0)
        if not common.any():
            return Contest(None, [])
        means = sums[alive][:, common].sum(axis=1) / counts[alive][:, common].sum(axis=1)
        leader = alive[int(np.argmax(means))]
        best = {place: _most(sums, counts, leader, place, z) for place in alive if place != leader}
        left = [place for place in alive if place == leader or best[place] >= 0]
        if len(left) == len(alive):
            return Contest(leader, [place for place, gain in best.items() if gain > worth])
        alive = left
    return Contest(None, [])


def _most(sums: Array, counts: Array, leader: int, rival: int, z: float) -> float:
    """The most that a rival may be better by."""
    both = (counts[leader] > 0) & (counts[rival] > 0)
    gains = sums[rival, both] / counts[rival, both] - sums[leader, both] / counts[leader, both]
    if len(gains) < 2:
        return np.inf
    return float(gains.mean() + z * gains.std(ddof=1) / np.sqrt(len(gains)))


def compare(criteria: Criteria, parts: Split, measure: Measure, places: Sequence[int], swept: Sequence[int]) -> Contest:
    """The contest in the reward axis' metric on all clusters but the held-out ones.

    Args:
        places: The certified.
        swept: All ratios that the design measured.
    """
    metric = criteria.all_metrics()[criteria.axes.reward]
    sign = 1.0 if criteria.better(metric) == "higher" else -1.0
    if not isinstance(measure, Mean):  # a tail of the reward: by what is there
        known = {k: mean for k in places if (mean := measure.mean(k, ~parts.held)) is not None}
        return Contest(max(known, key=lambda k: sign * known[k]) if known else None, [])
    moved = [mean for k in swept if (mean := measure.mean(k, parts.design)) is not None]
    worth = _WORTH * (max(moved) - min(moved)) if moved else 0.0
    free = ~parts.held
    return contest(
        sign * measure.sums * free, measure.counts * free, places, worth=worth, confidence=criteria.confidence
    )


@dataclass(frozen=True)
class Race:
    """What `certify` has to know of an adaptive sweep."""

    parts: Split

    @property
    def held(self) -> Mask:
        """The clusters for the chosen ratio's own numbers, [C]."""
        return self.parts.held

    @property
    def shared(self) -> Mask:
        """The design's clusters, which every policy answered, [C]."""
        return self.parts.design

    def certifier(self, criteria: Criteria, scores: Scores, level: float) -> AnytimeCertifier:
        """Tests that hold whenever the sweep stopped asking."""
        return AnytimeCertifier(criteria, scores, self.parts, level)

    def order(self, criteria: Criteria, scores: Scores, level: float) -> AnytimeCertifier | None:
        """What the design says of each mixture; None for ratios, whose order is known."""
        return sorter(criteria, scores, self.parts, level)

    def pick(
        self,
        criteria: Criteria,
        metrics: Mapping[str, Metric],
        measures: Mapping[str, Measure],
        scores: Scores,
        certified: Sequence[bool],
    ) -> int | None:
        """The place among the points of the certified one with the best reward."""
        places = [scores.swept[place] for place, passed in enumerate(certified) if passed]
        found = compare(criteria, self.parts, measures[criteria.axes.reward], places, scores.swept)
        return None if found.leader is None else scores.swept.index(found.leader)
