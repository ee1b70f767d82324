"""What the user sees while work goes on: progress on a terminal, quiet when piped, hostile text made harmless."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Protocol

# C0 and C1 controls except tab and newline, and the Unicode marks that reorder text on screen.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without terminal escape codes and bidirectional overrides: model output is hostile."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def say(line: str) -> None:
    """One line for a person on the error stream; results go to standard output."""
    print(printable(line), file=sys.stderr, flush=True)


class Advance(Protocol):
    """What `progress` gives: count `step` more as done, and show `note` behind the bar."""

    def __call__(self, step: float = 1, *, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """A progress bar on the error stream, shown only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda step=1, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(step: float = 1, *, note: str = "") -> None:
            bar.update(task, advance=step, note=note)

        yield advance
