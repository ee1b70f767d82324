"""What is measured of every answer whatever the judges are: its length, whether it was cut, repeats itself, refuses.

They are rules that cost nothing. Each is a metric of frontier.json under its name here; a judge or metric of the same
name in the recipe stands in its place.
"""

from __future__ import annotations

from psacpo.evalharness.judges.rule_settings import LengthJudge, RepetitionJudge, TruncatedJudge
from psacpo.evalharness.judges.settings import Judge, RefusalJudge

INTRINSIC: dict[str, Judge] = {
    "length": LengthJudge(kind="length"),
    "truncated": TruncatedJudge(kind="truncated"),
    "repetition": RepetitionJudge(kind="repetition"),
    "refused": RefusalJudge(kind="refusal"),
}
