"""Rows of more than max_length tokens: what is cut, what is dropped, what is refused."""

from __future__ import annotations

import pytest

from psacpo.align.stage_config import Truncation
from psacpo.align.truncation import truncate
from psacpo.errors import InputError

PROMPT, ANSWER = list(range(10)), list(range(100, 108))


def test_the_prompt_gives_way_first() -> None:
    assert truncate(PROMPT, (ANSWER, [1]), max_length=18) == (PROMPT, (ANSWER, [1]))
    # From its front, for both answers alike.
    assert truncate(PROMPT, (ANSWER, [1]), max_length=12) == ([6, 7, 8, 9], (ANSWER, [1]))
    assert truncate(PROMPT, (ANSWER, [1]), max_length=12, keep_first=True) == ([0, 7, 8, 9], (ANSWER, [1]))
    start = Truncation(prompt="keep_start")
    assert truncate(PROMPT, (ANSWER,), max_length=12, truncation=start) == ([0, 1, 2, 3], (ANSWER,))


def test_a_quarter_stays_the_prompts() -> None:
    assert truncate(PROMPT, (ANSWER, [1]), max_length=8) == ([8, 9], (ANSWER[:6], [1]))
    assert truncate([7], (ANSWER, list(range(8))), max_length=8) == ([7], (ANSWER[:7], list(range(7))))


def test_drop_and_error() -> None:
    for part, given in (("prompt", (PROMPT, (ANSWER,))), ("answer", ([7], (ANSWER,)))):
        assert truncate(*given, max_length=8, truncation=Truncation.model_validate({part: "drop"})) is None
        with pytest.raises(
            InputError, match=f"the {part} is {10 if part == 'prompt' else 8} tokens.*leaves it"
        ) as error:
            truncate(*given, max_length=8, truncation=Truncation.model_validate({part: "error"}))
        assert f"truncation: {{{part}: keep_" in str(error.value)
    # What fits is nobody's matter.
    assert truncate([7], (ANSWER,), max_length=9, truncation=Truncation(prompt="error", answer="error")) is not None
    # A prompt that leaves room enough is not to blame for a long answer.
    assert truncate([7], (ANSWER,), max_length=8, truncation=Truncation(prompt="drop")) == ([7], (ANSWER[:7],))
