"""Stages on other data than plain pairs: single answers, margins, safety flags, presets; and the evaluation's prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from psacpo.align import AlignConfig, align, plan
from psacpo.align.data import read_data
from psacpo.align.pairs import encode_rows
from psacpo.align.stage_config import Stage
from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.files import read_manifest

Rows = Callable[..., list[dict[str, str]]]


@pytest.fixture
def here(tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path], make_config: Callable[..., AlignConfig]):  # type: ignore[no-untyped-def]
    """`here([row, …], loss=…)`: the settings of one stage `a` on these rows."""

    def make(rows: Any, *, settings: dict[str, Any] | None = None, **stage: Any) -> AlignConfig:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        named = {"out": tmp_path / "out"} | (settings or {})
        return make_config(tiny_llama, named.pop("out"), [{"data": data} | stage], **named)

    return make


def single(rows: list[dict[str, str]], *, talk: bool = False) -> list[dict[str, Any]]:
    """Every other row's chosen or rejected answer, with a label; messages where `talk`."""
    found = []
    for place, row in enumerate(rows):
        prompt, text = row["prompt"], row["chosen" if place % 2 else "rejected"]
        plain: dict[str, Any] = {"prompt": prompt, "completion": text}
        messages = {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": text}],
        }
        found.append((messages if talk else plain) | {"label": bool(place % 2)})
    return found


def test_kto_on_single_answers(
    here: Callable[..., AlignConfig], rows: Rows, metrics: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """It learns, from plain rows and from conversations the same, and one bad answer alone has no margin."""
    config = here(single(rows(32)), loss="kto", max_steps=12, batch_size=7)
    planned = plan(config)
    pairs = encode_rows(read_data(config.stages[0].data, {}), AutoTokenizer.from_pretrained(config.base), None, 512)
    tokens = sum(len(one.prompt) + len(one.answers[0]) for one in pairs.pairs)
    assert (planned["a.pairs"], planned["a.tokens"]) == (32, tokens)
    align(config)
    manifest = read_manifest(config.out / "a") or {}
    assert (manifest["rows"]["used"], manifest["rows"]["desirable"], manifest["rows"]["scored"]) == (32, 16, 32)
    found = metrics(config.out / "a")
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[-1]["accuracy"] > 0.9
    before = (config.out / "a" / "adapter_model.safetensors").read_bytes()
    talked = here(single(rows(32), talk=True), loss="kto", max_steps=12, batch_size=7, settings={"out": tmp_path / "b"})
    align(talked)
    assert (tmp_path / "b" / "a" / "adapter_model.safetensors").read_bytes() == before
    lone = here(single(rows(8)), loss="kto", max_steps=2, batch_size=1, settings={"out": tmp_path / "c"})
    align(lone)
    assert all(line["margin"] is None for line in metrics(tmp_path / "c" / "a"))


def test_single_answers_need_kto(here: Callable[..., AlignConfig], rows: Rows) -> None:
    with pytest.raises(InputError, match="stage 'a': dpo learns from pairs, .*allowed: .* or loss kto"):
        plan(here(single(rows(8))))


def test_kto_without_other_prompts_is_refused_before_training(here: Callable[..., AlignConfig], rows: Rows) -> None:
    with pytest.raises(InputError, match="kto needs answers behind prompts that are not theirs; given: 8 of 8"):
        plan(here([row | {"prompt": "how"} for row in single(rows(8))], loss="kto"))


def test_uneven_kto_weights_are_told(
    here: Callable[..., AlignConfig], rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven = [row for place, row in enumerate(single(rows(32))) if place % 2 or place % 8 == 0]
    plan(here(uneven, loss="kto"))
    assert capsys.readouterr().err == (
        "a: warning: 16 desirable answers weigh 16, the 4 others 4; undesirable_weight 4 makes them even\n"
    )
    plan(here(uneven, loss="kto", undesirable_weight=4))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "yes"}, "row 2: 'label' is wrong; given: 'yes'; allowed: true or false"),
        ({"label": None}, "row 2: 'label' is wrong; given: nothing"),
        ({"completion": 7}, r"row 2: 'completion' is wrong; given: 7 \(int\)"),
        ({"completion": None}, "row 2: 'completion' is wrong; given: nothing"),
        ({"completion": [{"role": "user", "content": "so"}]}, "row 2: the completion answer is not one message"),
        ({"prompt": [{"role": "assistant", "content": "so"}]}, "row 2: the prompt ends with the assistant's message"),
    ],
)
def test_bad_single_answers(row: dict[str, Any], message: str, here: Callable[..., AlignConfig], rows: Rows) -> None:
    good = single(rows(3))
    with pytest.raises(InputError, match=message):
        plan(here([good[0], good[1] | row], loss="kto"))
    with pytest.raises(InputError, match="row 2: unknown column 'label'; allowed: completion, prompt"):
        plan(here([good[0], {"prompt": "how", "completion": "so"}], loss="kto"))


def test_margins(here: Callable[..., AlignConfig], rows: Rows, metrics: Callable[[Path], list[dict[str, Any]]]) -> None:
    """At the start the policy is its reference: the loss is log(1 + exp(margin / weight)) of the rows' margins."""
    given = [row | {"other": 3.0, "third": 2} for row in rows(8)]
    stage = {"loss": "modpo", "margin_weight": 2, "max_steps": 1, "batch_size": 8}
    config = here(given, columns={"margin": "other"}, **stage)
    align(config)
    assert metrics(config.out / "a")[0]["loss"] == pytest.approx(1.7014133, abs=1e-6)
    assert plan(config)["a.state"] == "done"
    with pytest.raises(InputError, match="holds the result of other settings"):
        plan(here(given, columns={"margin": "third"}, **stage))
    with pytest.raises(InputError, match="row 1: unknown column 'margin'"):
        plan(here(given, loss="modpo"))
    with pytest.raises(InputError, match="row 1: 'margin' is wrong; given: '3'; allowed: a finite number"):
        plan(here([row | {"margin": "3"} for row in given], loss="modpo"))


def test_safety_flags(
    here: Callable[..., AlignConfig], rows: Rows, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """log(1 + exp(Delta)) at the start, for pairs of a safe and an unsafe answer whichever was preferred."""
    given = [row | {"chosen_safe": i % 2 == 0, "rejected_safe": i % 2 == 1} for i, row in enumerate(rows(8))]
    config = here(given, loss="safedpo", safety_margin=3, max_steps=1, batch_size=8)
    align(config)
    assert metrics(config.out / "a")[0]["loss"] == pytest.approx(3.0485874, abs=1e-6)
    assert (read_manifest(config.out / "a") or {})["rows"]["swapped"] == 4
    with pytest.raises(InputError, match="row 1: unknown column 'chosen_safe'"):
        plan(here(rows(8), loss="safedpo"))


def test_preset_of_a_stage(
    here: Callable[..., AlignConfig], rows: Rows, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hh = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in rows(8)
    ]
    found = plan(here(hh, preset="hh-rlhf"))
    assert capsys.readouterr().err == ""
    assert found == plan(here(hh)) == plan(here(rows(8)))
    err = capsys.readouterr().err
    assert err == f"a: by its columns {tmp_path / 'rows.jsonl'} is read with preset hh-rlhf\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "hh-rhlf"}, "unknown preset 'hh-rhlf', did you mean 'hh-rlhf'.*allowed: beavertails, hh-rlhf"),
        ({"preset": "hh-rlhf", "columns": {"chosen": "good"}}, "preset hh-rlhf knows its columns"),
        ({"columns": {"margin": "score"}}, "columns name margin, which only modpo reads"),
        ({"truncation": {"answer": "keep_end"}}, "truncation.answer: .*'keep_start', 'drop' or 'error'"),
        ({"truncation": {"promt": "drop"}}, "in truncation: unknown key 'promt', did you mean 'prompt'"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(Stage, {"name": "a", "data": "x"} | values, where="recipe")


def test_truncation_of_a_stage(here: Callable[..., AlignConfig], rows: Rows) -> None:
    given = [*rows(7), {"prompt": "bread " * 40, "chosen": "so", "rejected": "no"}]
    short = {"max_length": 32}
    assert plan(here(given, settings=short))["a.pairs"] == 8
    assert plan(here(given, settings=short, truncation={"prompt": "drop"}))["a.pairs"] == 7
    with pytest.raises(InputError, match="row 8: the prompt is .* tokens, and max_length 32 leaves it"):
        plan(here(given, settings=short, truncation={"prompt": "error"}))


def test_overlap_with_the_evaluation(
    here: Callable[..., AlignConfig],
    rows: Rows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write_rows: Callable[..., Path],
) -> None:
    given = rows(8)
    asked = write_rows(tmp_path / "prompts.jsonl", [{"prompt": given[2]["prompt"].upper()}, {"prompt": "else"}])
    config = here(given, settings={"evaluation_prompts": asked}, max_steps=1)
    align(config)
    assert "a: warning: 1 of 8 rows ask what the evaluation's prompts ask" in capsys.readouterr().err
    assert (read_manifest(config.out / "a") or {})["rows"]["overlap"] == 1
    # It is told and decides nothing.
    assert plan(here(given, max_steps=1))["a.state"] == "done"
    assert "evaluation_prompts" not in json.dumps(config.model_dump(mode="json"))
    plan(here(given, settings={"evaluation_prompts": tmp_path / "nowhere.jsonl"}, max_steps=1))
    assert "is not counted: no file or directory at" in capsys.readouterr().err
