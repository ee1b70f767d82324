"""Write docs/cli.md from the real --help of every command: `make docs`. A test holds the page to the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
VERBS = (
    "init",
    "demo",
    "align",
    "merge",
    "frontier",
    "judge",
    "compare",
    "report",
    "serve",
    "run",
    "doctor",
)


def render() -> str:
    """The page's text."""
    parts = ["# Every command and flag\n\nMade by `make docs` from the commands themselves.\n"]
    for verb in ((), *((verb,) for verb in VERBS)):
        command = [sys.executable, "-m", "psacpo.cli", *verb, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
        text = done.stdout.replace("python -m psacpo.cli", "psacpo").rstrip()
        parts.append(f"## psacpo {' '.join(verb)}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
