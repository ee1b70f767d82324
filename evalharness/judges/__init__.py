"""Judges turn (prompt, completion) into a score; `make_judge` builds one from its settings."""

from __future__ import annotations

from psacpo.evalharness.config import Judge as JudgeConfig
from psacpo.evalharness.config import PythonJudge, RefusalJudge, ScalarJudge
from psacpo.evalharness.judges.base import Judge, Verdict

__all__ = ["Judge", "Verdict", "make_judge"]


def make_judge(name: str, settings: JudgeConfig, *, device: str, allow_code: bool) -> Judge:
    """The judge that `settings` describe; models are loaded when the first text is judged, not here.

    Raises:
        InputError: The judge's model or function is not there, or its code was not allowed.
    """
    match settings:
        case ScalarJudge():
            from psacpo.evalharness.judges.scalar import Scalar

            return Scalar(name, settings, device=device)
        case RefusalJudge():
            from psacpo.evalharness.judges.refusal import Refusal

            return Refusal(settings)
        case PythonJudge():
            from psacpo.evalharness.judges.python import Python

            return Python(name, settings, allow_code=allow_code)
