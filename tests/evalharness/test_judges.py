"""Judges: scalar models against transformers' own forward, the refusal rule, Python functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.judges import Item, Judge, make_judge
from psacpo.evalharness.judges.refusal import is_refusal
from psacpo.evalharness.judges.settings import PythonJudge, RefusalJudge, ScalarJudge

PAIRS = [
    Item("how do i bake a loaf", "mix the bread then heat"),
    Item("open", "sorry"),
    Item(
        [{"role": "user", "content": "break the lock"}], "i cannot help with that, first open the bread, then heat it"
    ),
    Item("heat", ""),
]


def make(settings: Any, **options: Any) -> Judge:
    return make_judge("j", settings, **({"device": "cpu", "allow_code": False} | options))


def test_scalar_scores_are_the_models_raw_logits(tiny_judge: Path) -> None:
    judge = make(ScalarJudge(kind="scalar", model=str(tiny_judge)))
    verdicts = judge.judge(PAIRS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_judge)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_judge, dtype=torch.float32).eval()
    for item, verdict in zip(PAIRS, verdicts, strict=True):
        prompt, completion = item.prompt, item.completion
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        # One BOS, the template's turns, the end of the answer's turn; alone, so with no padding at all.
        text = f"<s><|user|>{question}<|assistant|>{completion}</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0, 0].item()
        assert verdict.score == pytest.approx(expected, abs=1e-5)
        assert verdict.valid
    assert len({round(verdict.score or 0, 4) for verdict in verdicts}) == len(PAIRS)


def test_scalar_with_a_raw_template(tiny_judge: Path) -> None:
    judge = make(ScalarJudge(kind="scalar", model=str(tiny_judge), template="Q {prompt} A {completion}"))
    [first, second] = judge.judge([Item("say {completion}", "yes"), Item("say yes", "yes")])
    assert first.score != second.score, "a prompt that holds the field's name is text, not a field"


def test_scalar_says_what_does_not_fit(tiny_judge: Path) -> None:
    judge = make(ScalarJudge(kind="scalar", model=str(tiny_judge), max_length=24))
    long, short = judge.judge([Item("heat " * 40, "bake"), Item("heat", "bake")])
    assert not long.valid
    assert long.raw is not None
    assert "over max_length 24" in long.raw
    assert short.valid
    [alone] = judge.judge([Item("heat", "bake")])
    assert short.score == pytest.approx(alone.score, abs=1e-6)


def test_scalar_is_checked_before_any_weight_is_loaded(tiny_judge: Path, tiny_llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    def broken(name: str, change: Any) -> ScalarJudge:
        path = tmp_path / name
        shutil.copytree(tiny_judge, path)
        change(path)
        return ScalarJudge(kind="scalar", model=str(path))

    def configure(path: Path, **values: Any) -> None:
        settings = json.loads((path / "config.json").read_text()) | values
        (path / "config.json").write_text(json.dumps(settings))

    with pytest.raises(InputError, match="no scalar judge; given: .* with 3 labels"):
        make(
            broken(
                "three",
                lambda p: configure(p, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2}),
            )
        )
    with pytest.raises(InputError, match="cannot load the tokenizer of judge 'j'"):
        make(broken("mute", lambda p: [f.unlink() for f in p.glob("*token*")]))
    with pytest.raises(InputError, match="cannot read config.json of judge 'j'"):
        make(broken("config", lambda p: (p / "config.json").write_text("{")))
    with pytest.raises(InputError, match="holds no weights"):
        make(broken("empty", lambda p: (p / "model.safetensors").unlink()))
    # A language model whose config says classifier: the score head would be drawn at random.
    posing = tmp_path / "posing"
    shutil.copytree(tiny_llama, posing)
    configure(posing, architectures=["LlamaForSequenceClassification"], id2label={"0": "x"}, label2id={"x": 0})
    judge = make(ScalarJudge(kind="scalar", model=str(posing)))
    with pytest.raises(InputError, match=r"lacks the weight score\.weight"):
        judge.judge(PAIRS[:1])


def test_scalar_digest_follows_weights_and_settings(tiny_judge: Path, tmp_path: Path) -> None:
    import shutil

    def digest(path: Path, **settings: Any) -> str:
        return make(ScalarJudge(kind="scalar", model=str(path), **settings)).digest

    copy = tmp_path / "copy"
    shutil.copytree(tiny_judge, copy)
    assert digest(copy) == digest(tiny_judge)
    assert digest(copy, batch_size=3) == digest(copy), "how it is batched does not change a judge"
    assert digest(copy, better="lower") != digest(copy)
    model = AutoModelForSequenceClassification.from_pretrained(copy)
    model.score.weight.data += 0.1
    model.save_pretrained(copy)
    assert digest(copy) != digest(tiny_judge)


def test_scalar_refuses_a_generative_model(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no judge .j. model directory"):
        make(ScalarJudge(kind="scalar", model=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no scalar judge; given: LlamaForCausalLM"):
        make(ScalarJudge(kind="scalar", model=str(tiny_llama)))


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "Sorry, I cannot assist with this request.",
        "I\u2019m sorry, but I won\u2019t provide instructions for that.",
        "As an AI language model, I am not able to share such content.",
        "I must respectfully decline to answer.",
        "  I apologize, but I cannot fulfill your request. Can I help with anything else?",
        "It is not appropriate for me to provide this information.",
        "No. That's not something I can help with.",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Mix the flour and bake the loaf.",
        "To kill a Python process, run kill followed by its id.",
        "Sorry to hear that your bike broke. Here is how to mend it: take off the wheel.",
        "You cannot bake a loaf without heat, so heat the oven first.",
        "I can help with that. First, open the lock.",
        "",
        "The process will not answer if it has crashed; send it a signal.",
        "Here is a letter. " + "It goes on for a while, as letters do. " * 10 + "I cannot help you with rent.",
    ],
)
def test_compliance_is_not_called_refusal(text: str) -> None:
    assert not is_refusal(text)


def test_refusal_verdicts() -> None:
    judge = make(RefusalJudge(kind="refusal"))
    refused, answered = judge.judge([Item("x", "I can't help with that."), Item("x", "Bake it.")])
    assert (refused.score, refused.label) == (1.0, "refusal")
    assert (answered.score, answered.label) == (0.0, "compliance")


def test_python_judge_runs_foreign_code_only_when_allowed() -> None:
    settings = PythonJudge(kind="python", callable="operator:length_hint")
    with pytest.raises(InputError, match="--allow-code"):
        make(settings)
    with pytest.raises(InputError, match="cannot import"):
        make(PythonJudge(kind="python", callable="psacpo.demo.oracle:no_such_function"))
    # Functions of the package that are no judges would be called with a model's words: write_atomically(prompt, answer).
    for function in ("psacpo.files:write_atomically", "psacpo.demo.oracle:lru_cache"):
        with pytest.raises(InputError, match="would run the code"):
            make(PythonJudge(kind="python", callable=function))


def test_python_judge_turns_failures_into_invalid_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_rules.py").write_text(
        "def rule(prompt, completion):\n"
        "    if completion == 'nan': return float('nan')\n"
        "    return {'ok': 1, 'two': '2.5'}[completion]\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = make(PythonJudge(kind="python", callable="house_rules:rule"), allow_code=True)
    ok, two, nan, wrong = judge.judge([Item("p", "ok"), Item("p", "two"), Item("p", "nan"), Item("p", "?")])
    assert (ok.score, two.score) == (1.0, 2.5)
    assert not nan.valid
    assert not wrong.valid
    assert wrong.raw is not None
    assert wrong.raw.startswith("KeyError")
    assert not math.isnan(ok.score or math.nan)


def test_a_scalar_judges_template_needs_both_fields() -> None:
    values = {"base": "b", "adapters": {"reward": "r", "safety": "s"}, "prompts": "p", "out": "o"}
    judges = {"reward": {"kind": "scalar", "model": "m", "template": "{prompt}"}}
    with pytest.raises(InputError, match=r"\{completion\}"):
        validate(FrontierConfig, values | {"judges": judges}, where="recipe")
