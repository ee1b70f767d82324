"""What to ask next: a function of the scores so far and of nothing else, so that it can be resumed, and simulated."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psacpo.evalharness.adaptive.anytime import AnytimeCertifier, decided, sorter
from psacpo.evalharness.adaptive.contest import compare
from psacpo.evalharness.adaptive.settings import Adaptive
from psacpo.evalharness.adaptive.space import Space, Step
from psacpo.evalharness.adaptive.split import Places, Split
from psacpo.evalharness.decision.certify import meets, starts_at_reward
from psacpo.evalharness.decision.criteria import Constraint, Criteria
from psacpo.evalharness.decision.measures import Measure, make_measure
from psacpo.evalharness.decision.order import learned
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.statistics.bootstrap import bootstrap_weights
from psacpo.evalharness.statistics.bounds import fixed_sequence
from psacpo.evalharness.statistics.pareto import hypervolume

# Draws that tell how far the hypervolume is known.
_DRAWS = 200
# Where the walk is expected to end is refined first, then where it would end with a share of the prompts, which is where
# it will end if the test's clusters turn out somewhat worse than the design's.
_LUCK = (1.0, 0.4)


@dataclass(frozen=True)
class Ask:
    """Answers that are wanted before the next decision.

    Attributes:
        what: `design`, `walk`, `compare` or `held out`.
        work: Policy -> places of the clusters whose prompts it is to answer.
    """

    what: str
    work: dict[str, Places]


Steps = Generator[Ask, Scores | None, Scores]


@dataclass
class Procedure:
    """Which points (ratios, or mixtures) answer which prompts.

    The design's clusters choose the points. Then, with the points fixed, the walk of `certify` over the test's clusters:
    from the end of the sweep where a constraint should hold, each point answers batch after batch until it has passed or
    is shown to fail, and the first that does not pass ends the walk; mixtures stand in the order in which the design finds
    them safe. Then those of the certified that may have the best reward answer more, and the best of them the held-out
    prompts.

    Attributes:
        space: The points measured so far, and where more may be.
        baselines: Policies that answer the design's prompts.
        shadows: Policies that others are compared with: they answer what anyone is asked.
        reasons: Policy -> why it is measured.
        outcomes: Policy -> how its walk ended.
        asked: Policy -> the clusters that it was given.
        refused: What was asked last, where it was over the budget.
    """

    criteria: Criteria
    adaptive: Adaptive
    parts: Split
    space: Space
    baselines: Sequence[str] = ()
    shadows: Sequence[str] = ()
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    asked: dict[str, set[int]] = field(default_factory=dict)
    refused: str | None = None

    def steps(self) -> Generator[Ask, Scores | None, None]:
        """Yields what to ask and takes all scores so far, or None where it was over the budget."""
        design = np.flatnonzero(self.parts.design)
        self.reasons = {name: {"why": "start"} for name in self.space.names}
        scores = yield self._ask("design", [*self.space.names, *self.baselines], design)
        assert scores is not None  # a budget for less is refused before anything starts
        scores = yield from self._refine(scores, design)
        if not self.criteria.constraints:
            return
        standing = set(self.space.names)
        for group, level in self._groups():
            passed, scores = yield from self._walk(group, level, scores)
            standing &= passed
        if not standing:
            return
        leader, scores = yield from self._compare(sorted(standing), scores)
        if leader is not None and self.parts.held.any():
            yield self._ask("held out", [leader], np.flatnonzero(self.parts.held))

    def _ask(self, what: str, policies: Sequence[str], clusters: Places) -> Ask:
        work: dict[str, Places] = {}
        for name in dict.fromkeys([*policies, *self.shadows]):
            new = np.array([place for place in clusters if place not in self.asked.get(name, set())], dtype=np.intp)
            if len(new):
                work[name] = new
        return Ask(what, work)

    def took(self, ask: Ask) -> None:
        """Say that an ask was granted."""
        for name, clusters in ask.work.items():
            self.asked.setdefault(name, set()).update(clusters.tolist())

    def _groups(self) -> list[tuple[list[Constraint], float]]:
        """The constraints whose walks start at the same end, and the level of each walk."""
        metrics = self.criteria.all_metrics()
        ends: dict[bool, list[Constraint]] = {}
        for constraint in self.criteria.constraints:
            ends.setdefault(starts_at_reward(self.criteria, metrics[constraint.metric]), []).append(constraint)
        level = 1 - (1 - self.criteria.confidence) / len(ends)
        return [(group, level) for _, group in sorted(ends.items())]

    def _order(self, group: Sequence[Constraint], level: float, scores: Scores) -> list[str]:
        """The points in the order of a group's walk, by the design's answers at most."""
        forward = starts_at_reward(self.criteria, self.criteria.all_metrics()[group[0].metric])
        names = self.space.names if forward else self.space.names[::-1]
        certifier = sorter(self.criteria, scores, self.parts, level)
        if certifier is None:
            return names
        places = _places(scores)
        tested = [places[name] for name in names]
        tests, clusters = self._measures(group, scores), int(self.parts.test.sum())
        return [names[k] for k in learned(certifier, tests, range(len(names)), tested, clusters)]

    def _measures(self, group: Sequence[Constraint], scores: Scores) -> list[tuple[Constraint, Measure]]:
        metrics = self.criteria.all_metrics()
        return [(c, make_measure(self.criteria, c.metric, metrics[c.metric], scores)) for c in group]

    # ---- the design

    def _refine(self, scores: Scores, design: Places) -> Steps:
        """Add points while one promises more than the noise hides."""
        while len(self.space.names) < self.adaptive.most_ratios:
            proposal = self._proposal(scores)
            if proposal is None:
                break
            name = proposal.name
            found = yield self._ask("design", [name], design)
            if found is None:
                self.refused = "design"
                break
            self.space.add(name)
            self.reasons[name] = {"why": proposal.why}
            if proposal.why == "gap":
                self.reasons[name]["gain"] = proposal.gain
            scores = found
        return scores

    def _proposal(self, scores: Scores) -> Step | None:
        """By what the design's clusters say, as if there were as many more like them as the test has."""
        places = _places(scores)
        swept = [places[name] for name in self.space.names]
        metrics = self.criteria.all_metrics()
        axes = [metrics[name] for name in self.criteria.axes.model_dump().values()]
        signs = np.array([1.0 if self.criteria.better(metric) == "higher" else -1.0 for metric in axes])
        names = self.criteria.axes.model_dump().values()
        measures = [make_measure(self.criteria, n, m, scores) for n, m in zip(names, axes, strict=True)]
        means = [[measure.mean(k, self.parts.design) for measure in measures] for k in swept]
        points = np.array(means, dtype=np.float64) * signs
        if not np.isfinite(points).all():
            return None
        weights = bootstrap_weights(len(scores.clusters), _DRAWS, self.criteria.seed, self.parts.design)
        drawn = np.stack([np.stack([m.draws(k, weights) for m in measures], axis=-1) for k in swept], axis=1) * signs
        box = float(np.prod(points.max(axis=0) - points.min(axis=0)))
        volumes = [hypervolume(draw, points.min(axis=0)) for draw in drawn if np.isfinite(draw).all()]
        noise = float(np.diff(np.quantile(volumes, [0.025, 0.975]))[0]) / 2 / box if box > 0 and volumes else np.inf
        resolution = self.adaptive.resolution
        for luck in _LUCK if self.criteria.constraints else ():
            passed = self._expected(scores, luck)
            found = self.space.propose(points, passed, resolution=resolution, noise=noise)
            if found is not None and found.why == "crossing":
                return found
        return self.space.propose(points, None, resolution=resolution, noise=noise)

    def _expected(self, scores: Scores, luck: float) -> list[bool]:
        """Which points the walks would certify, were the test's clusters like the design's: the crossing is theirs.

        Args:
            luck: Share of the test's clusters that it is told by.
        """
        places, standing = _places(scores), dict.fromkeys(self.space.names, True)
        for group, level in self._groups():
            certifier = AnytimeCertifier(self.criteria, scores, self.parts, level, among=self.parts.design, quick=True)
            tests = self._measures(group, scores)
            order = self._order(group, level, scores)
            passes = [all(self._would(certifier, c, m, places[name], luck) for c, m in tests) for name in order]
            for name, passed in zip(order, fixed_sequence(passes), strict=True):
                standing[name] &= passed
        if not any(standing.values()):  # too few prompts for any: by what the means are
            own = self._measures(self.criteria.constraints, scores)
            standing = {
                name: all(meets(c, measure.mean(places[name], self.parts.design)) for c, measure in own)
                for name in standing
            }
        return [standing[name] for name in self.space.names]

    def _would(
        self, certifier: AnytimeCertifier, constraint: Constraint, measure: Measure, k: int, luck: float
    ) -> bool:
        found = certifier.test(constraint, measure, k)
        units = round(luck * (self.parts.tells[constraint.metric] & self.parts.test).sum())
        return found.passes_with(units) if found.passes_with is not None else found.passed

    # ---- the walk

    def _walk(
        self, group: Sequence[Constraint], level: float, scores: Scores
    ) -> Generator[Ask, Scores | None, tuple[set[str], Scores]]:
        """The points that pass a group of constraints, up to the first that does not."""
        passed: set[str] = set()
        # Also prompts that tell nothing of the constraints: means of one kind of prompt could not be set beside the others'.
        order = self.parts.order
        for name in self._order(group, level, scores):
            while True:
                own = scores.only([name, *self.shadows])
                certifier = AnytimeCertifier(self.criteria, own, self.parts, level, quick=True)
                done, broken = decided(certifier, self._measures(group, own), _places(own)[name])
                left = [place for place in order if place not in self.asked[name]]
                if done is not None or not left:
                    break
                found = yield self._ask("walk", [name], np.array(left[: self.adaptive.batch], dtype=np.intp))
                if found is None:
                    self.refused = "walk"
                    break
                scores = found
            if done:
                passed.add(name)
                self.outcomes.setdefault(name, "passed")
                continue
            why = "the budget was spent" if self.refused else "no prompts were left"
            self.outcomes[name] = f"breaks {broken}" if broken is not None else f"undecided when {why}"
            break
        return passed, scores

    # ---- the reward of the certified

    def _compare(
        self, certified: Sequence[str], scores: Scores
    ) -> Generator[Ask, Scores | None, tuple[str | None, Scores]]:
        """The best of the certified, once no other may be better by much, or the prompts or the budget end."""
        reward = self.criteria.axes.reward
        metric = self.criteria.all_metrics()[reward]
        tells = self.parts.tells[reward]
        order = self.parts.order[tells[self.parts.order]]
        while True:
            places = _places(scores)
            names = {place: name for name, place in places.items()}
            measure = make_measure(self.criteria, reward, metric, scores)
            swept = [places[name] for name in self.space.names]
            found = compare(self.criteria, self.parts, measure, [places[name] for name in certified], swept)
            leader = None if found.leader is None else names[found.leader]
            if leader is None or not found.rivals or self.refused:
                return leader, scores
            open_ones = [leader, *(names[place] for place in found.rivals)]
            left = [place for place in order if any(place not in self.asked[name] for name in open_ones)]
            if not left:
                return leader, scores
            more = yield self._ask("compare", open_ones, np.array(left[: self.adaptive.batch], dtype=np.intp))
            if more is None:
                self.refused = "compare"
                return leader, scores
            scores = more


def _places(scores: Scores) -> dict[str, int]:
    return {policy.name: place for place, policy in enumerate(scores.policies)}
