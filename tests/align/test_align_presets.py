"""Public collections' rows, a few by hand of each schema: what becomes of them, and what is refused or counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from psacpo.align.data import Answer, Answers, Preference, Preferences, read_data
from psacpo.align.pairs import encode_rows
from psacpo.align.presets import PRESETS, turns
from psacpo.errors import InputError

Write = Callable[..., Path]


def pku(better: int, safer: int, safe: tuple[bool, bool]) -> dict[str, Any]:
    return {
        "prompt": "how do i open a lock",
        "response_0": "with a key",
        "response_1": "with a hammer",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": safer,
    }


TALK = "\n\nHuman: how do i bake\n\nAssistant: bread?\n\nHuman: yes, a loaf\n\nAssistant:"
HH = {"chosen": f"{TALK} mix, then heat", "rejected": f"{TALK} no\n\nHuman"}
MESSAGES = [
    {"role": "user", "content": "how do i bake"},
    {"role": "assistant", "content": "bread?"},
    {"role": "user", "content": "yes, a loaf"},
]


def ultra(better: float, worse: float) -> dict[str, Any]:
    asked = {"role": "user", "content": "how"}
    answers = ([asked, {"role": "assistant", "content": text}] for text in ("so", "no"))
    scores = {"score_chosen": better, "score_rejected": worse}
    return dict(zip(("chosen", "rejected"), answers, strict=True)) | {"prompt": "how", "messages": []} | scores


def beaver(*, safe: bool) -> dict[str, Any]:
    return {"prompt": "how", "response": "so", "category": {"animal_abuse": False}, "is_safe": safe}


@pytest.fixture
def read(tmp_path: Path, write_rows: Write) -> Callable[..., Any]:
    def read(*rows: dict[str, Any], preset: str | None = None, wanted: tuple[str, ...] = ()) -> Any:
        return read_data(str(write_rows(tmp_path / "rows.jsonl", rows)), {}, preset, wanted)

    return read


FLAGS = ("chosen_safe", "rejected_safe")


def test_pku(read: Callable[..., Any]) -> None:
    rows = [pku(0, 1, (True, False)), pku(1, 1, (False, False))]
    key, hammer = "with a key", "with a hammer"
    asked = "how do i open a lock"
    assert read(*rows, preset="pku-saferlhf-helpful", wanted=FLAGS).rows == [
        Preference(1, asked, key, hammer, safe=(True, False)),
        Preference(2, asked, hammer, key, safe=(False, False)),
    ]
    assert read(*rows, preset="pku-saferlhf-safe", wanted=FLAGS).rows == [
        Preference(1, asked, hammer, key, safe=(False, True)),
        Preference(2, asked, hammer, key, safe=(False, False)),
    ]
    labels = read(*rows, preset="pku-saferlhf-labels")
    assert labels.rows == [
        Answer(1, asked, key, True),
        Answer(1, asked, hammer, False),
        Answer(2, asked, key, False),
        Answer(2, asked, hammer, False),
    ]
    # Both orders and both kinds of labels could be meant.
    with pytest.raises(
        InputError, match="fit several presets; allowed: preset: pku-saferlhf-helpful or pku-saferlhf-s"
    ):
        read(*rows)


def test_safedpo_from_pku(read: Callable[..., Any], tiny_llama: Path) -> None:
    """Helpful pairs, the safe answer first: kept, swapped, left out; the margin is I_l - I_w."""
    rows = [
        pku(0, 0, (True, False)),
        pku(1, 0, (True, False)),
        pku(0, 0, (False, False)),
        pku(1, 1, (True, True)) | {"prompt": "another"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = encode_rows(read(*rows, preset="pku-saferlhf-helpful", wanted=FLAGS), tokenizer, None, 64)
    assert [(pair.row, pair.margin) for pair in found.pairs] == [(1, 1.0), (2, 1.0), (4, 0.0)]
    assert [tokenizer.decode(pair.chosen[:-1]) for pair in found.pairs] == ["with a key", "with a key", "with a hammer"]
    assert (found.counts["read"], found.counts["used"]) == (4, 3)
    assert (found.counts["swapped"], found.counts["unsafe"]) == (1, 1)
    # Put in order, the second row says what the first one says, and no longer its opposite.
    assert found.summary() == "3 of 4 rows used, dropped: 1 unsafe, swapped: 1, duplicates: 1"


def test_hh(read: Callable[..., Any]) -> None:
    talked = read(HH)
    assert talked.preset == "hh-rlhf"
    assert talked.rows == [Preference(1, MESSAGES, "mix, then heat", "no")]
    assert read(HH, preset="hh-rlhf-text").rows == [Preference(1, TALK, " mix, then heat", " no")]
    others = {
        "two_contexts": HH | {"rejected": "\n\nHuman: else\n\nAssistant: no"},
        "turns_not_alternating": {side: f"\n\nHuman: a\n\nHuman: b\n\nAssistant: {side}" for side in HH},
    }
    found = read(HH, *others.values(), preset="hh-rlhf")
    assert ([row.row for row in found.rows], found.dropped) == ([1], dict.fromkeys(others, 1))
    assert turns("how do i bake") is None
    # Answers within a conversation too end in the beginning of the next turn now and then.
    assert turns(TALK.replace("bread?", "bread?\n\nHuman")) == MESSAGES


def test_ultrafeedback(read: Callable[..., Any]) -> None:
    found = read(ultra(8.5, 6), ultra(7, 7), ultra(5, 6), preset="ultrafeedback", wanted=("margin",))
    [row] = found.rows
    assert (row.prompt, row.chosen, row.rejected, row.margin) == ([{"role": "user", "content": "how"}], "so", "no", 2.5)
    assert found.dropped == {"equal_scores": 1, "scores_reversed": 1}
    # Its rows are TRL's already: without the preset nothing is looked at but the answers.
    assert (read(ultra(7, 7)).preset, len(read(ultra(7, 7)).rows)) == (None, 1)


def test_beavertails(read: Callable[..., Any]) -> None:
    found = read(beaver(safe=True), beaver(safe=False))
    assert (type(found), found.preset) == (Answers, "beavertails")
    assert found.rows == [Answer(1, "how", "so", True), Answer(2, "how", "so", False)]


def test_dropped_rows_are_told(read: Callable[..., Any], tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = encode_rows(read(ultra(8, 6), ultra(7, 7), preset="ultrafeedback"), tokenizer, None, 64)
    assert found.counts == {"read": 2, "empty": 0, "identical": 0, "truncated": 0, "used": 1, "equal_scores": 1}
    assert found.summary() == "1 of 2 rows used, dropped: 1 equal scores"
    with pytest.raises(InputError, match="leaves nothing to train on: 1 equal scores"):
        read(ultra(7, 7), preset="ultrafeedback")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "column": (HH, "beavertails", "is none of beavertails: unknown column 'prompt'; allowed: chosen, rejected"),
    "id": (pku(2, 0, (True, True)), "pku-saferlhf-helpful", "'better_response_id' is wrong; given: 2; allowed: 0 or 1"),
    "truth as id": (pku(True, 0, (True, True)), "pku-saferlhf-helpful", "'better_response_id' is wrong; given: True"),
    "flag": (beaver(safe=True) | {"is_safe": "yes"}, "beavertails", "'is_safe' is wrong; given: 'yes'; allowed: true"),
    "no text": (beaver(safe=True) | {"response": None}, "beavertails", "'response' is wrong; given: nothing"),
    "score": (
        ultra(1, 0) | {"score_chosen": "8"},
        "ultrafeedback",
        "'score_chosen' is wrong; given: '8'; allowed: a finite n",
    ),
    "no transcript": (HH | {"rejected": "no"}, "hh-rlhf", "'rejected' is no transcript"),
    "no start": ({side: f"hi {text}" for side, text in HH.items()}, "hh-rlhf", "'chosen' is no transcript"),
    "messages": (ultra(1, 0) | {"chosen": [1]}, "ultrafeedback", "'chosen' holds something that is no message"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_of_another_schema(case: str, read: Callable[..., Any]) -> None:
    row, preset, message = WRONG[case]
    with pytest.raises(InputError, match=f"row 1.*{message}") as error:
        read(row, preset=preset)
    assert "\n" not in str(error.value)


def test_numbers_as_truth_values(read: Callable[..., Any]) -> None:
    """As tables have them."""
    [row] = read(beaver(safe=True) | {"is_safe": 1}, preset="beavertails").rows
    assert row.label is True
    [row] = read(pku(0, 0, (1, 0)), preset="pku-saferlhf-safe", wanted=FLAGS).rows  # type: ignore[arg-type]
    assert row.safe == (True, False)


def test_every_preset_has_a_test() -> None:
    source = Path(__file__).read_text()
    assert [name for name in PRESETS if f'"{name}"' not in source] == []
    assert isinstance(Preferences("x", [], "0").rows, list)
