"""The server's process: its output, its end, and the signals in between."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from psacpo.console import printable

_GRACE = 20.0  # seconds that the server has to end its requests and processes
_KEPT_LINES = 4000  # of the server's output, in which the cause of a failure is looked for


def ending(code: int) -> str:
    """An exit code as `Popen` has it, in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def stop(child: subprocess.Popen[bytes]) -> None:
    """End the server and all of its processes: asked first, then without asking."""
    with _deaf():
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)
        # Engine processes outlive a server that was killed; they are of its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt, so that the server is ended on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """No signal breaks off the server's end half-way, which takes seconds and leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Output:
    """The server's output: kept while it starts, shown once it serves.

    Args:
        stream: Where it comes from.
        shown: Whether it is shown from the start.
    """

    def __init__(self, stream: IO[bytes], *, shown: bool) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._shown = shown
        self._thread = threading.Thread(target=self._pump, args=(stream,), daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Show what comes from now on."""
        self._shown = True

    def text(self) -> str:
        """What has come so far, its last lines."""
        return "".join(list(self._lines))

    def join(self) -> None:
        """Wait until all has been read: the server and its processes have closed their ends."""
        self._thread.join(timeout=5)

    def save(self) -> Path:
        """Leave the text in a temporary file, and say where."""
        descriptor, name = tempfile.mkstemp(prefix="psacpo-serve-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(self.text())
        return Path(name)

    def _pump(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace")
            self._lines.append(line)
            if self._shown:
                with contextlib.suppress(OSError, ValueError):  # nobody reads our error stream any more
                    sys.stderr.write(printable(line))
                    sys.stderr.flush()
