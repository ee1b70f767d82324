"""One display for a command of several steps: which are done, found or under way, how far, and what each took."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from psacpo import console
from psacpo.console import Advance, clock, say

if TYPE_CHECKING:
    from rich.console import RenderableType

_MARKS = {"waits": "·", "works": "▸", "done": "✓", "found": "=", "nothing": "–", "failed": "✗", "stopped": "✗"}
_STYLES = {"waits": "dim", "works": "bold", "done": "green", "found": "cyan", "failed": "red", "stopped": "red"}
# States in which the time that a step took, or has taken so far, is shown.
_TIMED = ("works", "done", "found", "failed", "stopped")
_BAR = 12


@dataclass
class Step:
    """One step.

    Attributes:
        state: waits, works, done, found (what it leaves was there already), nothing (there was nothing to do), failed or
            stopped.
        note: What is said beside it.
    """

    name: str
    state: str = "waits"
    note: str = ""
    started: float = 0.0
    took: float = 0.0


@dataclass
class _Work:
    """What the current step counts."""

    label: str
    total: float
    started: float
    done: float = 0.0
    note: str = ""


class Steps:
    """The steps of a command; use as a context manager.

    On a terminal they stand at the lower end, one line each, and what else is said scrolls by above; elsewhere each step
    is a line when it begins and one when it ends.

    Args:
        names: In order. The last word of a name is the label under which the work of that step counts.
    """

    def __init__(self, title: str, names: Sequence[str]) -> None:
        self.title = title
        self.steps = [Step(name) for name in names]
        self._started = time.monotonic()
        self._work: _Work | None = None
        self._open: list[Step] = []
        self._live: Any = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render, console=Console(stderr=True), refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        console.shown_in(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        console.shown_in(None)
        if self._live is not None:
            self._live.stop()
        elif error is None:
            say(f"time: {self}")

    def __str__(self) -> str:
        parts = [f"{s.name} {_summed(s)}" for s in self.steps]
        return f"{', '.join(parts)}; in all {_spent(time.monotonic() - self._started)}"

    @contextlib.contextmanager
    def step(self, leaves: Mapping[str, Sequence[Path]]) -> Iterator[None]:
        """Do some steps in one go; one whose files are as they were before has found them.

        Args:
            leaves: Step's name -> the files that show whether anything was done, in the order of the steps. Those after
                the first begin when work is counted under their label.
        """
        steps = [step for step in self.steps if step.name in leaves]
        before = {step.name: _stamps(leaves[step.name]) for step in steps}
        self._open = steps[1:]
        # What leaves nothing is short: a line when it ends will do, and what is wrong with the input is one line.
        self._begin(steps[0], quiet=not any(leaves.values()))
        try:
            yield
        except BaseException as error:
            self._end("failed" if isinstance(error, Exception) else "stopped")
            raise
        self._end("done")
        for step in steps:
            if before[step.name] is not None and before[step.name] == _stamps(leaves[step.name]):
                step.state = "found"
            elif step.state == "waits":
                step.state = "done"
            if self._live is None:
                say(f"{self._place(step)}: {_told(step)}")

    def skip(self, name: str, why: str) -> None:
        """Say that there is nothing to do in a step."""
        [step] = [step for step in self.steps if step.name == name]
        step.state, step.note = "nothing", why
        if self._live is None:
            say(f"{self._place(step)}: {why}")

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Advance]:
        """What `console.progress` gives while this is shown."""
        if following := [step for step in self._open if step.name.rpartition(" ")[2] == label]:
            self._end("done")
            self._open = self._open[self._open.index(following[0]) + 1 :]
            self._begin(following[0])
        outer, work = self._work, _Work(label, total, time.monotonic())
        self._work = work
        lines = console.lines(label, total) if self._live is None else None

        def advance(step: float = 1, *, note: str = "") -> None:
            work.done, work.note = work.done + step, note
            if lines is not None:
                lines(step, note=note)

        try:
            yield advance
        finally:
            self._work = outer

    def _begin(self, step: Step, *, quiet: bool = False) -> None:
        step.state, step.started = "works", time.monotonic()
        if self._live is None and not quiet:
            say(f"{self._place(step)}")

    def _end(self, state: str) -> None:
        for step in self.steps:
            if step.state == "works":
                step.state, step.took = state, time.monotonic() - step.started

    def _place(self, step: Step) -> str:
        return f"{self.steps.index(step) + 1} of {len(self.steps)}: {step.name}"

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for width in (1, max(len(step.name) for step in self.steps), 7):
            table.add_column(width=width, no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        now = time.monotonic()
        title = Text.assemble((self.title, "bold"), "  ", (_spent(now - self._started), "dim"))
        for step in self.steps:
            style = _STYLES.get(step.state, "dim")
            spent = now - step.started if step.state == "works" else step.took
            working = step.state == "works" and self._work is not None
            table.add_row(
                Text(_MARKS[step.state], style=style),
                Text(step.name, style=style if step.state in ("works", "waits") else ""),
                Text(_spent(spent) if step.state in _TIMED and step.started else "", style="dim"),
                _working(self._work, now, step.name) if working and self._work else Text(_beside(step), style="dim"),
            )
        return Group(title, table)


def _working(work: _Work, now: float, step: str) -> RenderableType:
    """The label, a bar, the count and what is left, in about 60 columns; of a label that ends the step's name no more."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1, 0, 0), expand=True)
    label = "" if step.rpartition(" ")[2] == work.label else work.label
    if label:
        row.add_column(width=len(label), no_wrap=True)
    row.add_column(width=_BAR)
    row.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    share = min(1.0, work.done / work.total) if work.total else 0.0
    spent = now - work.started
    left = f"  {_spent(spent / share * (1 - share))} left" if 0.02 < share < 1 and spent > 2 else ""
    count = f"{work.done:g}/{work.total:g}" if max(work.total, work.done) < 1e6 else f"{share:.0%}"
    bar = ProgressBar(total=1.0, completed=share, width=_BAR)
    row.add_row(*([label] if label else []), bar, Text(f"{count}{left}  {work.note}"))
    return row


def _beside(step: Step) -> str:
    if step.note or step.state in ("waits", "works", "done"):
        return step.note
    return {"found": "found, not done again"}.get(step.state, step.state)


def _told(step: Step) -> str:
    if step.state == "found":
        return f"found in {_spent(step.took)}, not done again" if step.started else "found, not done again"
    return f"{step.state} in {_spent(step.took)}"


def _summed(step: Step) -> str:
    if step.state == "done":
        return _spent(step.took)
    return f"found in {_spent(step.took)}" if step.state == "found" and step.started else step.state


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _stamps(paths: Sequence[Path]) -> list[int] | None:
    """What changes in files when something is done: the size of records, which are only added to, else the time.

    None where one is missing, or there are none.
    """
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return None
    stamps = [
        one.st_size if path.suffix == ".jsonl" else one.st_mtime_ns for path, one in zip(paths, found, strict=True)
    ]
    return stamps or None
