"""Rows said twice, contradicted, or asked again in the evaluation."""

from __future__ import annotations

from psacpo.align.counting import Asked, is_blank, repeats, said


def test_repeats() -> None:
    rows = [("q", "a", "b"), ("q", "b", "a"), ("q", "a", "b"), ("q", "a", "c"), ("q", "b", "a"), ("p", "b", "a")]
    assert repeats((row, (row[0], row[2], row[1])) for row in rows) == ({2, 4}, {1})


def user(*texts: str) -> list[dict[str, str]]:
    """A conversation in which the assistant always says the same."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}] for text in texts]
    return [message for turn in turns for message in turn][:-1]


def test_what_the_user_says() -> None:
    assert said("How do I… bake?") == said(user("how do i bake")) == said("\n\nHuman: How do I bake?\n\nAssistant:")
    assert said([{"role": "system", "content": "be kind"}, *user("A!", "b")]) == ("a", "b")


def test_overlap() -> None:
    asked = Asked(["How do I bake?", user("Hello", "open the lock"), "?!"])
    assert len(asked) == 2  # what holds no word is nobody's
    assert asked.overlaps("how do i bake")
    # In the midst of a conversation too.
    assert asked.overlaps(user("hello", "how do I bake!", "thanks"))
    assert asked.overlaps(user("well", "hello", "open the lock"))
    # But a conversation only as a whole, in order and without a turn between.
    assert not asked.overlaps(user("hello"))
    assert not asked.overlaps(user("open the lock", "hello"))
    assert not asked.overlaps(user("hello", "well", "open the lock"))
    assert not asked.overlaps("how do i bake bread")
    assert not asked.overlaps("!")
    assert not Asked([]).overlaps("how")


def test_prompts_that_ask_nothing() -> None:
    assert is_blank(" \n")
    assert is_blank([{"role": "system", "content": "be kind"}, {"role": "user", "content": " "}])
    assert not is_blank("?")
    assert not is_blank(user("how", " "))
