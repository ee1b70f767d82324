"""What the user sees while work goes on: progress on a terminal, quiet when piped, hostile text made harmless."""

from __future__ import annotations

import contextlib
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""
_AT_ONCE = 0.5

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


class Display(Protocol):
    """What shows all progress of a command of several steps in one place."""

    def progress(self, label: str, total: float) -> contextlib.AbstractContextManager[Advance]: ...


_display: Display | None = None


def shown_in(display: Display | None) -> None:
    """Show progress in a display from now on; None is on its own again."""
    global _display
    _display = display


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """A progress bar on a terminal's error stream; elsewhere a plain line every `EVERY` seconds.

    A log of an hour's work is not silent, and holds no bars.
    """
    if _display is not None:
        with _display.progress(label, total) as shown:
            yield shown
        return
    if not sys.stderr.isatty():
        yield lines(label, total)
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


def lines(label: str, total: float) -> Advance:
    """Progress in lines, for logs."""
    return _Lines(label, total)


class _Lines:
    """Progress in lines, such as `generate: 1200 of 3600 (33 %) after 12:05, about 24:10 left`."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total = label, total
        self.done, self.found = 0.0, 0.0
        self.started = self.said = time.monotonic()

    def __call__(self, step: float = 1, *, note: str = "") -> None:
        now = time.monotonic()
        self.done += step
        if now - self.started < _AT_ONCE:
            # What is counted at once was found done, and says nothing about the pace.
            self.found = self.done
        if now - self.said < EVERY or self.done >= self.total:
            return
        self.said, spent = now, now - self.started
        count = f"{self.done:g} of {self.total:g} " if max(self.total, self.done) < 1e6 else ""
        new = self.done - self.found
        left = f", about {clock(spent / new * (self.total - self.done))} left" if new > 0 else ""
        say(
            f"{self.label}: {count}({self.done / self.total:.0%}) after {clock(spent)}{left}"
            + (f"; {note}" if note else "")
        )


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some: 4:05, 1:00:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A plan for a person: a name and its value a line, lists and mappings in words, large counts in groups of three.

    Of a mapping that holds mappings these are the rows of a table.
    """
    width = max((len(name) for name in plan), default=0) + 2
    found: list[str] = []
    for name, value in plan.items():
        if isinstance(value, Mapping) and any(isinstance(one, Mapping) for one in value.values()):
            found += [f"{name}:", *(f"  {line}" for line in _table(value))]
        else:
            found.append(f"{name + ':':<{width}}{_words(value, groups=True)}")
    return found


def _table(rows: Mapping[str, Any]) -> list[str]:
    """What several rows have is a column; all else stands below."""
    tabled = {name: row for name, row in rows.items() if isinstance(row, Mapping)}
    keys = dict.fromkeys(key for row in tabled.values() for key in row)
    columns = [key for key in keys if sum(key in row for row in tabled.values()) > 1]
    cells = [["", *columns]]
    cells += [
        [name, *(_words(row[key], groups=True) if key in row else "" for key in columns)]
        for name, row in tabled.items()
    ]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    for name, row in rows.items():
        rest = {key: value for key, value in row.items() if key not in columns} if isinstance(row, Mapping) else row
        lines += textwrap.wrap(f"{name}: {_words(rest, groups=True)}", 98) if rest or rest == 0 else []
    return lines


def _words(value: Any, *, groups: bool = False) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple | set):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if groups else str(value)
    return "none" if value is None else str(value)
