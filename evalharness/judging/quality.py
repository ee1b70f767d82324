"""What is asked of the verdicts of several judges on the same answers: that few are invalid, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psacpo.errors import InputError
from psacpo.evalharness.judges.llm_replies import why_invalid
from psacpo.evalharness.judges.rule_settings import EnsembleJudge
from psacpo.evalharness.records import Record
from psacpo.evalharness.statistics.agreement import krippendorff_alpha

Verdicts = Mapping[str, Sequence[Record]]
"""Judge -> its verdict on each answer, in one order for all."""


def refuse_invalid(verdicts: Verdicts, most: float, *, where: Path) -> None:
    """Refuse a judge whose share of invalid verdicts is over `most`, naming the first of them.

    Raises:
        InputError: There is such a judge.
    """
    for name, found in verdicts.items():
        invalid = [verdict for verdict in found if not verdict["valid"]]
        if len(invalid) > most * len(found):
            raise InputError(
                f"judge '{name}' gave {len(invalid)} invalid verdicts on {len(found)} answers (the first: "
                f"{why_invalid(invalid[0]['raw'])}); all is kept in {where}",
                allowed=f"at most max_invalid {most:.0%}",
            )


def agreement_of(ensemble: EnsembleJudge, verdicts: Verdicts) -> dict[str, Any]:
    """How far an ensemble's members agree: on their votes where it counts votes, else on their scores."""
    ratings = np.array(
        [[np.nan if one["score"] is None else one["score"] for one in verdicts[name]] for name in ensemble.members]
    )
    level = "interval"
    if ensemble.rule in ("all", "any"):
        limits = np.array([ensemble.threshold(name) for name in ensemble.members])[:, None]
        ratings, level = np.where(np.isnan(ratings), np.nan, ratings > limits), "nominal"
    return {
        "members": list(ensemble.members),
        "level": level,
        "alpha": krippendorff_alpha(ratings, level),
        "n": int(((~np.isnan(ratings)).sum(axis=0) > 1).sum()),
    }
