"""How a row that is longer than `max_length` is made to fit, or not."""

from __future__ import annotations

from psacpo.align.stage_config import Truncation
from psacpo.errors import InputError


def truncate(
    prompt: list[int],
    answers: tuple[list[int], ...],
    *,
    max_length: int,
    keep_first: bool = False,
    truncation: Truncation = Truncation(),  # noqa: B008  (it is frozen)
) -> tuple[list[int], tuple[list[int], ...]] | None:
    """Cut a row so that the prompt with none of the answers has more than `max_length` tokens.

    The prompt gives way first, down to a quarter of `max_length` (SACPO's own 128 of 512). Then the answers lose their
    ends, and with these their EOS. All answers keep the same prompt, and with `keep_first` the prompt keeps its BOS.

    Returns:
        Prompt and answers; None where `truncation` says that such a row is dropped.

    Raises:
        InputError: `truncation` says that such a row is an error.
    """
    longest = max(map(len, answers))
    if len(prompt) + longest <= max_length:
        return prompt, answers
    room = max(max_length - longest, max_length // 4)
    if len(prompt) > room:
        if truncation.prompt == "keep_end":
            prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]] if keep_first else prompt[-room:]
        elif truncation.prompt == "keep_start":
            prompt = prompt[:room]
        elif truncation.prompt == "drop":
            return None
        else:
            raise _too_long("prompt", len(prompt), room, max_length)
    room = max_length - len(prompt)
    if longest > room:
        if truncation.answer == "drop":
            return None
        if truncation.answer == "error":
            raise _too_long("answer", longest, room, max_length)
        answers = tuple(answer[:room] for answer in answers)
    return prompt, answers


def _too_long(part: str, tokens: int, room: int, max_length: int) -> InputError:
    return InputError(
        f"the {part} is {tokens} tokens, and max_length {max_length} leaves it {room}",
        allowed=f"a larger max_length, or truncation: {{{part}: {'keep_end' if part == 'prompt' else 'keep_start'}}}",
    )
