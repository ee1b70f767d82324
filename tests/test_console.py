"""What people see: progress in lines where there is no terminal, plans in words, no control codes."""

from __future__ import annotations

import pytest

from psacpo import console


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(console, "time", found)
    return found


def test_a_log_gets_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("generate", 120) as advance:
        advance(20)  # found, in no time
        for second in range(1, 101):
            clock.now = 100.0 + second
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "generate: 50 of 120 (42%) after 0:30, about 1:10 left",
        "generate: 80 of 120 (67%) after 1:00, about 0:40 left",
        "generate: 110 of 120 (92%) after 1:30, about 0:10 left",
    ]


def test_long_work_in_bytes_with_a_note(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("merge", 8e9) as advance:
        clock.now += 4000
        advance(4e9, note="layer\x1b[31m 3")
        clock.now += 4000
        advance(4e9)
    assert capsys.readouterr().err == (
        "merge: (50%) after 1:06:40, about 1:06:40 left; layer\N{REPLACEMENT CHARACTER}[31m 3\n"
    )


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("judge", 3) as advance:
        for _ in range(3):
            advance()
    with console.progress("nothing", 0) as advance:
        advance(0)
    assert capsys.readouterr().err == ""


def test_a_plan_in_words() -> None:
    plan = {"policies": ["policy@0.00", "base"], "judges": {"reward": 4400, "cost": 1}, "tokens": 1234567, "left": []}
    assert console.plan_lines(plan | {"done": False, "beta": 0.1, "template": None}) == [
        "policies: policy@0.00, base",
        "judges:   reward 4400, cost 1",
        "tokens:   1,234,567",
        "left:     none",
        "done:     no",
        "beta:     0.1",
        "template: none",
    ]
