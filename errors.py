"""The errors that a user can mend: each is one line that says what was wrong, what was given and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user. The command line prints it as one line and exits with 2.

    Args:
        what: What was wrong, with the offending name or path in it.
        given: The value that came, if the sentence does not hold it yet.
        allowed: What would have been right.
    """

    def __init__(self, what: str, *, given: object = None, allowed: str | None = None) -> None:
        parts = [what]
        if given is not None:
            parts.append(f"given: {given}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


def unknown_name(kind: str, given: str, valid: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `valid`, with the nearest valid one if any is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    hint = f"unknown {kind} '{given}'" + (f", did you mean '{near[0]}'?" if near else "")
    return InputError(hint, allowed=", ".join(names))


def missing_column(name: str, there: Iterable[str]) -> InputError:
    """An `InputError` for rows without a column, with the columns that are there and the nearest of them if any is near."""
    names = sorted(map(str, there))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"column '{name}' is missing" + (f" (the nearest is '{near[0]}')" if near else "")
    return InputError(hint, allowed=", ".join(names))
