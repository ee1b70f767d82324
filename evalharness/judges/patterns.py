"""Patterns that somebody wrote down, compiled within bounds: a short text can unroll to gigabytes."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from typing import Any

import regex  # type: ignore[import-untyped]

# Seconds of a processor and bytes that compiling may take, and seconds of a clock that nobody waits longer than.
_SECONDS = 2
_PATIENCE = 60
_BYTES = 2**31
# Counted repeats unroll, so that those within others multiply; long lists of alternatives grow with their square.
_HEAVY = re.compile(r"\{\s*\d")
_LONG = 1000
_CHILD = """
import resource, sys
import regex
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
try:
    regex.compile(sys.stdin.read())
except MemoryError:
    sys.exit(9)
except Exception:
    pass
"""


@functools.lru_cache(maxsize=256)
def compiled(pattern: str, *, ignore_case: bool = False) -> Any:
    """The pattern of Python's `regex` module.

    One that may take long is tried in another process first, which can be ended: compiling itself cannot.

    Raises:
        ValueError: It cannot be read, or takes more than 2 s or 2 GiB to compile.
    """
    if (_HEAVY.search(pattern) or len(pattern) > _LONG) and not _compiles(pattern):
        raise ValueError(
            f"pattern {pattern[:80]!r} takes over {_SECONDS} s or {_BYTES >> 30} GiB to compile; allowed: smaller repeats"
        )
    try:
        return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"pattern {pattern[:80]!r} cannot be read: {why}") from error


def _compiles(pattern: str) -> bool:
    """Whether compiling ends within its bounds; patterns that are no patterns do."""
    try:
        # From the root, where nothing stands that `import` could take for a package.
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(_SECONDS), str(_BYTES)],
            input=pattern.encode("utf-8", "surrogatepass"),
            timeout=_PATIENCE,
            cwd="/",
            capture_output=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # 9, or a signal: memory or time ran out.
    return done.returncode in (0, 1)
