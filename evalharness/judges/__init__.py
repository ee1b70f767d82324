"""Judges turn (prompt, completion) into a score; `make_judge` builds one from its settings."""

from __future__ import annotations

from psacpo.evalharness.judges.base import Item, Judge, Verdict
from psacpo.evalharness.judges.llm_settings import LlmJudge
from psacpo.evalharness.judges.rule_settings import (
    EnsembleJudge,
    ImportJudge,
    KlJudge,
    LengthJudge,
    RegexJudge,
    RepetitionJudge,
    TruncatedJudge,
)
from psacpo.evalharness.judges.settings import GuardJudge, PythonJudge, RefusalJudge, ScalarJudge
from psacpo.evalharness.judges.settings import Judge as JudgeSettings

__all__ = ["Item", "Judge", "Verdict", "make_judge"]


def make_judge(name: str, settings: JudgeSettings, *, device: str, allow_code: bool) -> Judge:
    """The judge that `settings` describe; models are loaded when the first text is judged, not here.

    Raises:
        InputError: The judge's model or function is not there, or its code was not allowed.
    """
    match settings:
        case ScalarJudge():
            from psacpo.evalharness.judges.scalar import Scalar

            return Scalar(name, settings, device=device, allow_code=allow_code)
        case GuardJudge():
            from psacpo.evalharness.judges.guard import Guard

            return Guard(name, settings, device=device)
        case RefusalJudge():
            from psacpo.evalharness.judges.refusal import Refusal

            return Refusal(settings)
        case PythonJudge():
            from psacpo.evalharness.judges.python import Python

            return Python(name, settings, allow_code=allow_code)
        case RegexJudge() | LengthJudge() | TruncatedJudge() | RepetitionJudge() | KlJudge():
            from psacpo.evalharness.judges.rules import make_rule

            return make_rule(settings)
        case LlmJudge():
            from psacpo.evalharness.judges.llm import Llm

            return Llm(name, settings)
        case ImportJudge():
            from psacpo.evalharness.judges.imported import Imported

            return Imported(name, settings)
        case EnsembleJudge():
            from psacpo.evalharness.judges.ensemble import Ensemble

            return Ensemble(settings)
