"""Rows to token ids: every cut and every dropped row is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from psacpo.align.data import Answer, Answers, Preference, Preferences, read_preferences
from psacpo.align.examples import Labelled, Pair
from psacpo.align.pairs import draw, encode_rows
from psacpo.errors import InputError

RAW = "USER: {prompt} ASSISTANT:"


def preferences(*rows: tuple[Any, str, str]) -> Preferences:
    return Preferences("rows", [Preference(n, *row) for n, row in enumerate(rows, start=1)], "0")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2"])
def test_chat_template_tokens(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    asked = [{"role": "user", "content": "how do i bake"}]
    given = preferences(("how do i bake", "help first", "sorry"), (asked, "help first", "sorry"))
    pairs = encode_rows(given, tokenizer, None, 64).pairs
    assert (pairs[0].prompt, pairs[0].chosen) == (pairs[1].prompt, pairs[1].chosen)
    bos = "<s>" if name == "tiny_llama" else ""
    assert tokenizer.decode(pairs[0].prompt) == f"{bos}<|user|>how do i bake<|assistant|>"
    assert tokenizer.decode(pairs[0].chosen) == "help first</s>"
    assert pairs[0].rejected[-1] == tokenizer.eos_token_id


def test_raw_template_tokens(tiny_llama_raw: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_raw)
    pair = encode_rows(preferences(("bake", " help", " sorry")), tokenizer, RAW, 64).pairs[0]
    assert tokenizer.decode(pair.prompt + pair.chosen) == "<s>USER: bake ASSISTANT: help</s>"


def test_counts(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    long = "bread " * 40
    given = preferences(
        ("how", "help", "sorry"),
        ("how", " \n", "sorry"),
        ("how", "help", ""),
        ("how", "same", "same"),
        (long, "help", "sorry"),
        ("how", long + "a", long + "b"),
    )
    found = encode_rows(given, tokenizer, None, 32)
    # The last row's answers differ only behind the cut.
    counts = {"read": 6, "empty": 2, "identical": 2, "truncated": 1, "used": 2}
    assert found.counts == counts | {"truncated_prompts": 1}
    assert found.summary() == "2 of 6 rows used, dropped: 2 empty, 2 identical, cut to length: 1"
    assert [pair.row for pair in found.pairs] == [1, 5]
    assert all(len(pair) <= 32 for pair in found.pairs)
    assert found.pairs[1].prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(found.pairs[1].prompt).endswith("bread <|assistant|>")


def test_single_answers(tiny_llama: Path) -> None:
    """The same tokens as in a pair; what is empty or cut is counted."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    long = "bread " * 40
    rows = [Answer(1, "how", "help", True), Answer(2, "how", " ", True), Answer(3, long, "sorry", False)]
    found = encode_rows(Answers("rows", rows, "0"), tokenizer, None, 32)
    pair, other = encode_rows(preferences(("how", "help", "x"), (long, "sorry", "y")), tokenizer, None, 32).pairs
    assert found.pairs == [
        Labelled(1, pair.prompt, (pair.chosen,), (True,)),
        Labelled(3, other.prompt, (other.chosen,), (False,)),
    ]
    counts = {"read": 3, "empty": 1, "identical": 0, "truncated": 1, "used": 2}
    assert found.counts == counts | {"truncated_prompts": 1, "desirable": 1}
    assert found.summary() == "2 of 3 rows used, dropped: 1 empty, cut to length: 1"
    flipped = encode_rows(Answers("rows", [Answer(1, "how", "help", False), rows[2]], "0"), tokenizer, None, 32)
    assert flipped.digest != found.digest
    with pytest.raises(InputError, match="nothing to train on: 0 of 1 rows used, dropped: 1 empty"):
        encode_rows(Answers("rows", rows[1:2], "0"), tokenizer, None, 32)


def test_repeated_rows(tiny_llama: Path) -> None:
    """Counted and kept; or the first alone is. Those that say the opposite are kept either way."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    long = "bread " * 40
    given = preferences(
        ("how", "a", "b"), ("how", "a", "b"), ("how", "b", "a"), (long, "a", "b"), (long, "a", "b"), ("bake", "a", "b")
    )
    kept = encode_rows(given, tokenizer, None, 32)
    counts = {"read": 6, "empty": 0, "identical": 0, "truncated": 2, "used": 6}
    assert kept.counts == counts | {"truncated_prompts": 2, "duplicates": 2, "contradictory": 1}
    assert kept.summary() == "6 of 6 rows used, cut to length: 2, duplicates: 2, contradictory: 1"
    found = encode_rows(given, tokenizer, None, 32, drop_duplicates=True)
    counts = {"read": 6, "empty": 0, "identical": 0, "truncated": 1, "used": 4}
    assert found.counts == counts | {"truncated_prompts": 1, "repeated": 2, "contradictory": 1}
    assert [pair.row for pair in found.pairs] == [1, 3, 4, 6]


@pytest.mark.parametrize("template", [None, RAW, f"<s>{RAW}", "chat without BOS", "chat without EOS"])
def test_one_bos_and_one_eos(template: str | None, tiny_llama: Path) -> None:
    """Whoever writes them: the tokenizer by itself, the template, or neither."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # As Llama's tokenizers do, and as some do at the end too.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    if template and template.startswith("chat"):
        left_out = "{{ bos_token }}" if template.endswith("BOS") else "</s>"
        assert left_out in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(left_out, "")
        template = None
        begins = left_out == "</s>"
    else:
        begins = True
    [pair] = encode_rows(preferences(("how", "help", "sorry")), tokenizer, template, 64).pairs
    assert (pair.prompt.count(bos), pair.prompt[0] == bos, eos in pair.prompt) == (int(begins), begins, False)
    for answer in pair.answers:
        assert (answer.count(eos), answer[-1], bos in answer) == (1, eos, False)


def test_nothing_left(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(InputError, match="nothing to train on: 0 of 1 rows used, dropped: 1 empty"):
        encode_rows(preferences(("how", "", "sorry")), tokenizer, None, 32)


def test_row_that_does_not_fit_the_template(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    talk = [{"role": role, "content": "how"} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match="rows row 2: a raw template takes one string"):
        encode_rows(preferences(("how", "a", "b"), (talk, "a", "b")), tokenizer, RAW, 32)


def test_draw() -> None:
    pairs = [Pair(row, [1], [2], [3]) for row in range(50)]
    assert draw(pairs, 50, 1) == draw(pairs, 60, 1) == pairs
    some = draw(pairs, 20, 1)
    assert [pair.row for pair in some] == sorted({pair.row for pair in some})
    assert len(some) == 20
    assert some == draw(pairs, 20, 1) != draw(pairs, 20, 2)


USER = {"role": "user", "content": "how"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
SHAPES: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "how", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "implicit prompt": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "empty prompt column": {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]},
    "prompt said twice": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "string prompt said twice": {"prompt": "how", "chosen": [USER, YES], "rejected": [USER, NO]},
    "string prompt, messages": {"prompt": "how", "chosen": [YES], "rejected": [NO]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_row_formats(shape: str, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    found = read_preferences(str(write_rows(tmp_path / "rows.jsonl", [SHAPES[shape]])), {})
    assert found.rows[0].prompt in ("how", [USER])
    assert (found.rows[0].chosen, found.rows[0].rejected) == ("yes", "no")


def test_long_conversation_keeps_all_shared_turns(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    talk = [USER, YES, {"role": "user", "content": "and then"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"chosen": [*talk, YES], "rejected": [*talk, NO]}])
    assert read_preferences(str(path), {}).rows[0].prompt == talk


def test_named_columns_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    parquet.write_table(pyarrow.table({"question": ["q"], "good": ["yes"], "bad": ["no"]}), tmp_path / "rows.parquet")
    row = read_preferences(str(tmp_path / "rows.parquet"), names).rows[0]
    assert (row.prompt, row.chosen, row.rejected) == ("q", "yes", "no")


def test_dataset_directory(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([SHAPES["implicit prompt"]]).save_to_disk(tmp_path / "saved")
    found = read_preferences(str(tmp_path / "saved"), {})
    assert found.rows[0].prompt == [USER]
    assert found.digest == read_preferences(str(tmp_path / "saved"), {}).digest


GOOD = {"prompt": "how", "chosen": "yes", "rejected": "no"}
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "missing column": ({"promt": "how", "chosen": "y", "rejected": "n"}, {}, "'prompt', did you mean 'promt'.*chosen"),
    "named column": (GOOD, {"chosen": "best"}, "unknown column 'best'; allowed: chosen, prompt, rejected"),
    "named prompt": (SHAPES["implicit prompt"], {"prompt": "question"}, "unknown column 'question'"),
    "number": (GOOD | {"chosen": 7}, {}, r"row 2: 'chosen' is wrong; given: 7 \(int\)"),
    "null answer": (GOOD | {"rejected": None}, {}, "row 2: 'rejected' is wrong; given: nothing"),
    "null prompt": (GOOD | {"prompt": None}, {}, "row 2: 'prompt' is wrong; given: nothing"),
    "mixed": (GOOD | {"chosen": [YES]}, {}, "one answer is a string, the other a list"),
    "no message": (
        {"prompt": "how", "chosen": ["yes"], "rejected": [NO]},
        {},
        "'chosen' holds something that is no me",
    ),
    "empty list": ({"prompt": "how", "chosen": [], "rejected": [NO]}, {}, "given: an empty list"),
    "no prompt": ({"chosen": [YES], "rejected": [NO]}, {}, "row 2 has no prompt"),
    "other prompt": ({"prompt": "x", "chosen": [USER, YES], "rejected": [USER, NO]}, {}, "that are not the prompt"),
    "two answers": ({"prompt": "x", "chosen": [YES, YES], "rejected": [NO]}, {}, "chosen answer is not one message"),
    "user answers": ({"prompt": "x", "chosen": [USER], "rejected": [NO]}, {}, "given: user"),
    "answered prompt": ({"prompt": [USER, YES], "chosen": [YES], "rejected": [NO]}, {}, "prompt ends with the assist"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    row, columns, message = BAD_ROWS[case]
    first = {column: row.get(column, GOOD[column]) for column in GOOD} if case == "named prompt" else GOOD
    rows = [row, row] if columns or case == "missing column" else [first, row]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=message) as error:
        read_preferences(str(path), columns)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no row"),
        (json.dumps(GOOD) + "\n[1]\n", "line 2 is not an object"),
        (json.dumps(GOOD) + "\n\n{oops\n", "line 3 is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_preferences(str(path), {})
