"""A Python function as judge."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import cast

from psacpo.errors import InputError
from psacpo.evalharness.config import PythonJudge
from psacpo.evalharness.judges.base import Verdict
from psacpo.files import digest, digest_file
from psacpo.prompting import Prompt


class Python:
    """`package.module:function`, called as `function(prompt, completion) -> float`.

    Its digest is that of the source file it stands in, so a changed rule is a new judge.
    """

    batch_size = 256

    def __init__(self, name: str, settings: PythonJudge, *, allow_code: bool) -> None:
        module_name, _, function_name = settings.callable.partition(":")
        if module_name.split(".")[0] != "psacpo" and not allow_code:
            raise InputError(
                f"judge '{name}' would run the code {settings.callable}", allowed="say --allow-code if you trust it"
            )
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
        except Exception as error:
            raise InputError(
                f"judge '{name}': cannot import {settings.callable}: {type(error).__name__}: {error}"
            ) from error
        if not callable(function):
            raise InputError(f"judge '{name}': {settings.callable} is not a function")
        self.function = cast(Callable[[Prompt, str], float], function)
        source = inspect.getsourcefile(module)
        self.digest = digest(
            {"kind": "python", "callable": settings.callable, "source": digest_path(source), "better": settings.better}
        )

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One call a pair; an exception or a value that is no finite number is an invalid verdict."""
        return [self._one(prompt, completion) for prompt, completion in pairs]

    def _one(self, prompt: Prompt, completion: str) -> Verdict:
        try:
            score = float(self.function(prompt, completion))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything; one bad answer must not end the run
            return Verdict(None, raw=f"{type(error).__name__}: {error}")
        return Verdict(score) if math.isfinite(score) else Verdict(None, raw=f"score {score}")


def digest_path(source: str | None) -> str | None:
    """The digest of a source file, None for code that has none."""
    from pathlib import Path

    return digest_file(Path(source)) if source else None
