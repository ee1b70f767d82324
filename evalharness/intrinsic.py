"""What is measured of every answer whatever the judges are: its length, whether it was cut, repeats, refuses.

All but the last are rules that cost nothing; how far an answer is from the base is one forward pass of the base. Each is a
metric of frontier.json under its name here; a judge or metric of the same name in the recipe stands in its place.
"""

from __future__ import annotations

from psacpo.evalharness.judges.rule_settings import KlJudge, LengthJudge, RepetitionJudge, TruncatedJudge
from psacpo.evalharness.judges.settings import Judge, RefusalJudge

KL = "kl_to_base"
INTRINSIC: dict[str, Judge] = {
    "length": LengthJudge(kind="length"),
    "truncated": TruncatedJudge(kind="truncated"),
    "repetition": RepetitionJudge(kind="repetition"),
    "refused": RefusalJudge(kind="refusal"),
    KL: KlJudge(kind="kl_to_base"),
}
