"""What a sweep is going to take, told before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psacpo.evalharness.adaptive.run import Prepared
from psacpo.evalharness.adaptive.simulation import play, world
from psacpo.evalharness.adaptive.space import space_of
from psacpo.evalharness.baseline_settings import mixtures
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.generation import Plan
from psacpo.evalharness.judges import Item, Judge
from psacpo.evalharness.prompts import PromptRow

_RUNS = 3
# More clusters than these are simulated as these: the share that is spent falls slowly.
_MOST_CLUSTERS = 1000
_CHARACTERS_PER_TOKEN = 4


def estimate(config: FrontierConfig, plan: Plan, prepared: Prepared) -> dict[str, Any]:
    """What an adaptive sweep takes at least, at most and by simulation, and what the full grid would take."""
    assert config.adaptive is not None
    books = prepared.books
    tokens = sum(books.lengths[row.id] for row in plan.prompts) / len(plan.prompts)

    def cost(generations: int) -> dict[str, Any]:
        return {
            "generations": generations,
            "prompt tokens": round(generations * tokens),
            "new tokens at most": generations * config.generation.max_new_tokens,
        }

    first = len({*config.point_names(), *mixtures(config.baselines)})
    start = first * books.prompts(books.parts.design) * config.samples
    found: dict[str, Any] = {"start": cost(start)}
    most = config.adaptive.most_ratios
    if config.constraints:
        likely = _simulated(config, plan, prepared)
        found["likely, by simulation"] = cost(likely) | {
            "share of the full grid": f"{likely / books.full_grid(most):.0%}",
            "of": f"{_RUNS} made-up sweeps whose unsafe rate crosses the limit near the middle; yours is another",
        }
    found["at most"] = cost(books.most())
    found["full grid"] = cost(books.full_grid(most)) | {f"{prepared.procedure.space.kind}s": most}
    if config.adaptive.budget is not None:
        found["budget"] = str(config.adaptive.budget)
    return found


def _simulated(config: FrontierConfig, plan: Plan, prepared: Prepared) -> int:
    assert config.adaptive is not None
    limits = [constraint.limit for constraint in config.constraints if constraint.sense == "<="]
    limit = min([limit for limit in limits if 0 < limit <= 1 / 3], default=0.1)
    clusters = len(prepared.books.parts.design)
    size = min(clusters, _MOST_CLUSTERS)
    whole = size * config.samples
    free = config.adaptive.model_copy(update={"budget": None})
    shares = []
    for run in range(_RUNS):
        criteria = world(limit, confidence=config.confidence, samples=config.samples, seed=run, holdout=config.holdout)
        draw = np.random.default_rng([config.seed, run])
        shares.append(play(criteria, free, size, draw, space=space_of(config)).spent / whole)
    books = prepared.books
    beside = len(mixtures(config.baselines)) * books.prompts(books.parts.design) * config.samples
    return min(books.most(), round(float(np.mean(shares)) * len(plan.prompts) * config.samples) + beside)


def judge_estimates(
    config: FrontierConfig, judges: Mapping[str, Judge], prompts: Sequence[PromptRow], answers: int
) -> dict[str, Any]:
    """What so many answers take of the judges that can tell, were each as long as `max_new_tokens` allows."""
    text = "x" * (_CHARACTERS_PER_TOKEN * config.generation.max_new_tokens)
    found = {}
    for name, judge in judges.items():
        tell = getattr(judge, "estimate", None)
        if tell is None:
            continue
        anchor = text if judge.anchor is not None else None
        items = [Item(row.prompt, text, row.id, fields=row.fields, anchor=anchor) for row in prompts]
        one = tell(items)
        # In proportion: every prompt is answered about as often as any other.
        scale = answers / len(prompts)
        found[name] = {
            key: value if value is None else round(value * scale, 2) if key == "usd" else round(value * scale)
            for key, value in one.items()
        }
    return found
