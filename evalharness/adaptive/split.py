"""Which prompts choose the ratios, which test them, and which are kept for the chosen one's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psacpo.errors import InputError
from psacpo.evalharness.adaptive.settings import Adaptive
from psacpo.evalharness.decision.certify import hold_out
from psacpo.evalharness.decision.criteria import Criteria, Metric, Range
from psacpo.evalharness.decision.order import stratified
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.prompts import PromptRow
from psacpo.evalharness.statistics.bootstrap import Mask

Places = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """The clusters of prompts in three parts, drawn by the seed before any answer is seen.

    Attributes:
        design: Answered by every ratio; choose the ratios, [C].
        test: The tests', [C].
        held: The chosen ratio's own numbers, [C].
        order: The test's clusters in the order in which every ratio meets them.
        most: Constraint's metric -> the most values of it that a cluster can hold.
        tells: Metric -> clusters that can hold a value of it, [C].
    """

    design: Mask
    test: Mask
    held: Mask
    order: Places
    most: dict[str, int]
    tells: dict[str, Mask]


def split(criteria: Criteria, adaptive: Adaptive, prompts: Sequence[PromptRow]) -> Split:
    """The parts; without a constraint there is nothing to test, and every cluster is of the design.

    Raises:
        InputError: There are too few clusters, or a constraint's metric has values in none of the test's.
    """
    scores = Scores([], prompts, {})
    count = len(scores.clusters)
    held = hold_out(criteria, scores)
    free = ~held
    share = adaptive.design if criteria.constraints else 1.0
    design = stratified(scores, share, [criteria.seed, 4], among=free)
    test = free & ~design
    order = np.random.default_rng([criteria.seed, 2]).permutation(count)
    metrics = criteria.all_metrics()
    asked = dict.fromkeys([*criteria.axes.model_dump().values(), *(c.metric for c in criteria.constraints)])
    sizes = {name: _sizes(criteria, metrics[name], scores) for name in asked}
    found = Split(
        design,
        test,
        held,
        order[test[order]],
        {name: max(1, int(size.max(initial=0))) for name, size in sizes.items()},
        {name: size > 0 for name, size in sizes.items()},
    )
    for name in asked if criteria.constraints else ():
        for what, part in (("choose the ratios", found.design), ("test them", found.test)):
            if not (found.tells[name] & part).any():
                raise InputError(
                    f"--adaptive: {count} clusters of prompts are too few: metric '{name}' has none to {what}",
                    allowed="more prompts, another share `design`, or a sweep without --adaptive",
                )
    return found


def _sizes(criteria: Criteria, metric: Metric, scores: Scores) -> Places:
    """How many values of a metric each cluster can hold, [C]: known from the prompts, so no answer has a say in it."""
    rows = [
        all(row.fields.get(key) == want for key, want in metric.where.items())
        and (metric.worst is None or row.fields.get(metric.worst) is not None)
        for row in scores.prompts
    ]
    single = metric.worst_of is not None or (metric.tail is not None and metric.per == "prompt")
    depth = 1 if single else criteria.samples_per_prompt()
    return depth * np.bincount(scores.owner[np.array(rows, dtype=np.bool_)], minlength=len(scores.clusters))


def require_raceable(criteria: Criteria) -> None:
    """Refuse a constraint that no anytime-valid test is known for.

    Raises:
        InputError: A metric whose scores have no known range, or that is a fit over all answers.
    """
    metrics = criteria.all_metrics()
    for constraint in criteria.constraints:
        if race_range(criteria, metrics[constraint.metric]) is None:
            raise InputError(
                f"--adaptive cannot test '{constraint}' as the answers come: the range of its scores is not known",
                allowed=f"a rate (`above`), `range: [lowest, highest]` in metric {constraint.metric}, "
                "or a sweep without --adaptive",
            )


def race_range(criteria: Criteria, metric: Metric) -> Range | None:
    """The least and greatest value of a metric, by its settings alone: what the scores happen to be proves nothing."""
    column = criteria.columns()[metric.judge]
    if metric.length_adjusted:
        return None
    if metric.above is not None or metric.versus is not None or column.anchor is not None or column.refuses:
        return 0.0, 1.0
    return (0.0, 1.0) if metric.judge == "truncated" and metric.range is None else metric.range
