"""The display of a command of several steps: in a log, and on a real terminal of 100 columns."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from psacpo.console import progress, say
from psacpo.display import Steps

SCRIPT = """
import sys, time
from pathlib import Path
from psacpo.console import progress, say
from psacpo.display import Steps

place = Path(sys.argv[1])
with Steps("psacpo run psacpo.yaml", ["align reward", "align safety", "frontier", "merge"]) as steps:
    with steps.step({"align reward": [place / "reward"], "align safety": [place / "safety"]}):
        say("reward: already done")
        with progress("safety", 40) as advance:
            for _ in range(20):
                advance(note="loss 0.693 acc 0.5 margin 0.00123 kl 0.12 " + "risk 0.5 " * 9)
            time.sleep(0.6)
        (place / "safety").write_text("trained")
    with steps.step({"frontier": [place / "records.jsonl"]}):
        with progress("generate", 10) as advance:
            advance(10)
        (place / "records.jsonl").write_text("{}")
    steps.skip("merge", "nothing, no policy was chosen")
"""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    (tmp_path / "reward").write_text("trained before")
    (tmp_path / "run.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]


def test_a_log_has_a_line_when_a_step_begins_and_one_when_it_ends(script: list[str]) -> None:
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    lines = [re.sub(r"\d+\.\d s", "T", line) for line in done.stderr.splitlines()]
    assert lines == [
        "1 of 4: align reward",
        "reward: already done",
        "2 of 4: align safety",
        "1 of 4: align reward: found in T, not done again",
        "2 of 4: align safety: done in T",
        "3 of 4: frontier",
        "3 of 4: frontier: done in T",
        "4 of 4: merge: nothing, no policy was chosen",
        "time: align reward found in T, align safety T, frontier T, merge nothing; in all T",
    ]


def test_a_terminal_shows_every_step_at_once_and_no_line_is_cut_in_two(script: list[str]) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    child = subprocess.Popen(script, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert child.wait(60) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    lines = [line.rstrip() for part in plain.split("\r\n") for line in part.split("\r")]
    assert max(map(len, lines)) <= 100
    assert "reward: already done" in lines
    working = [line for line in lines if line.startswith("▸  align safety")]
    assert any("20/40" in line and "margin 0.00123" in line and line.endswith("…") for line in working)
    assert any(line.startswith("·  frontier") for line in lines)
    last = lines[max(k for k, line in enumerate(lines) if line.startswith("psacpo run psacpo.yaml")) :]
    assert [line.split()[0] for line in last[1:5]] == ["=", "✓", "✓", "–"]
    assert re.fullmatch(r"=  align reward  \d+\.\d s +found, not done again", last[1])


def test_what_fails_is_shown_as_failed_and_progress_is_on_its_own_again(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps("psacpo run", ["one", "two"])
    with pytest.raises(ValueError, match="no"), steps, steps.step({"one": []}):
        raise ValueError("no")
    assert [step.state for step in steps.steps] == ["failed", "waits"]
    with progress("later", 1) as advance:
        advance()
    say("after")
    assert capsys.readouterr().err.splitlines()[-1] == "after"
