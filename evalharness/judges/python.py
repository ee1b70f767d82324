"""A Python function as judge."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import signal
import sys
from collections.abc import Callable, Sequence
from typing import cast

from psacpo.console import printable
from psacpo.errors import InputError
from psacpo.evalharness.judges.base import Item, TextJudge, Verdict
from psacpo.evalharness.judges.settings import PythonJudge
from psacpo.files import digest, digest_file
from psacpo.prompting import Prompt

# The modules that are judges and nothing else. Any other function would be called with a model's words as its arguments.
_OURS = ("psacpo.demo.oracle",)


class Python(TextJudge):
    """`package.module:function`, called as `function(prompt, completion) -> float`.

    Its digest is that of the source file it stands in, so a changed rule is a new judge.
    """

    batch_size = 256

    def __init__(self, name: str, settings: PythonJudge, *, allow_code: bool) -> None:
        module_name, _, function_name = settings.callable.partition(":")
        if module_name not in _OURS and not allow_code:
            raise _untrusted(name, settings)
        try:
            with contextlib.redirect_stdout(_Aside()):
                module = importlib.import_module(module_name)
            function = getattr(module, function_name)
        except BaseException as error:
            _let_end(error)
            raise InputError(f"judge '{name}': cannot import {settings.callable}: {_words(error)}") from error
        if not allow_code and getattr(function, "__module__", None) != module_name:
            raise _untrusted(name, settings)  # what a module imports is not what it judges by
        if not callable(function):
            raise InputError(f"judge '{name}': {settings.callable} is not a function")
        self.function = cast(Callable[[Prompt, str], float], function)
        source = inspect.getsourcefile(module)
        self.digest = digest(
            {"kind": "python", "callable": settings.callable, "source": digest_path(source), "better": settings.better}
        )

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One call a pair; an exception or a value that is no finite number is an invalid verdict."""
        with contextlib.redirect_stdout(_Aside()):
            return [self._one(item.prompt, item.completion) for item in items]

    def _one(self, prompt: Prompt, completion: str) -> Verdict:
        try:
            score = float(self.function(prompt, completion))
        except BaseException as error:  # noqa: BLE001 - a user's code may raise anything; one bad answer must not end the run
            _let_end(error)
            return Verdict(None, raw=_words(error))
        return Verdict(score) if math.isfinite(score) else Verdict(None, raw=f"score {score}")


def _untrusted(name: str, settings: PythonJudge) -> InputError:
    return InputError(
        f"judge '{name}' would run the code {settings.callable}", allowed="say --allow-code if you trust it"
    )


def _let_end(error: BaseException) -> None:
    """Raise Ctrl-C and SIGTERM (`cli` makes it sys.exit(143)) again: they are the user's, not the judge's."""
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM):
        raise error


def _words(error: BaseException) -> str:
    """What an exception says; its own words may fail as well."""
    try:
        return f"{type(error).__name__}: {error}"[:2000]
    except Exception:  # noqa: BLE001 - see above
        return type(error).__name__


class _Aside(io.TextIOBase):
    """Where a user's code prints to: standard output is for the command's result."""

    def write(self, text: str, /) -> int:
        """The text on the error stream, without terminal escape codes."""
        return sys.stderr.write(printable(text))


def digest_path(source: str | None) -> str | None:
    """The digest of a source file, None for code that has none."""
    from pathlib import Path

    return digest_file(Path(source)) if source else None
