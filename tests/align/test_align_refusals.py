"""Bad input is one line before anything is trained, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from psacpo.align import AlignConfig, align
from psacpo.align import model as models
from psacpo.align.checks import require_assistant_turn, require_causal, require_trainable
from psacpo.align.config import Lora
from psacpo.errors import InputError


@pytest.fixture
def data(tmp_path: Path, rows: Any, write_rows: Any) -> Path:
    return Path(write_rows(tmp_path / "rows.jsonl", rows(8)))


@pytest.fixture
def refused(data: Path, tmp_path: Path, make_config: Any) -> Callable[..., str]:
    """Run align with these settings, and give the error's line."""

    def run(base: Path, stage: dict[str, Any] | None = None, **settings: Any) -> str:
        config: AlignConfig = make_config(base, tmp_path / "out", [{"data": data} | (stage or {})], **settings)
        with pytest.raises(InputError) as error:
            align(config)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    return run


def changed_weight(base: Path, place: Path, name: str, value: float) -> Path:
    """A copy of a model with one number of one weight replaced."""
    shutil.copytree(base, place)
    weights = load_file(place / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_no_number(value: float, tiny_llama: Path, tmp_path: Path, refused: Any) -> None:
    """Also where no row meets it: the last number of the embedding of a token that is not in the data."""
    name = "model.embed_tokens.weight"
    base = changed_weight(tiny_llama, tmp_path / "base", name, value)
    for settings in ({}, {"tuning": "full"}):
        line = refused(base, **settings)
        assert f"the weight {name} of {base} holds numbers that are not finite" in line.replace("base_model.model.", "")


def test_classifier(tiny_judge: Path, refused: Any) -> None:
    assert f"{tiny_judge} is a LlamaForSequenceClassification; allowed: a causal language model" in refused(tiny_judge)


def test_heads_of_language_models() -> None:
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration", "MistralModel"):
        require_causal([name], "m")
    for name in ("Qwen2ForRewardModel", "GPTNeoXForTokenClassification", "BertForMaskedLM"):
        with pytest.raises(InputError, match=f"m is a {name}"):
            require_causal([name], "m")


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NOT_OPENED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
NO_TURN = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>"
RAISING = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}x{% endfor %}"


@pytest.mark.parametrize("template", [MISTRAL, THOUGHT])
def test_templates_that_open_the_turn(template: str, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    require_assistant_turn(tokenizer, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (BARE, "does not open the assistant turn: add_generation_prompt changes nothing"),
        (NOT_OPENED, "does not open the assistant turn: add_generation_prompt changes nothing"),
        (NO_TURN, "has no assistant turn"),
        (RAISING, "cannot write an assistant's message: users only"),
    ],
)
def test_template_without_assistant_turn(
    template: str, message: str, tiny_llama: Path, tmp_path: Path, refused: Any
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "base")
    assert message in refused(tmp_path / "base")
    # A raw template needs no chat template.
    require_assistant_turn(tokenizer, "Q: {prompt} A:")


def test_answers_that_are_equal_everywhere(tiny_llama: Path, tmp_path: Path, write_rows: Any, refused: Any) -> None:
    equal = [{"prompt": "bake", "chosen": "bread", "rejected": "bread"}] * 4
    line = refused(tiny_llama, {"data": write_rows(tmp_path / "equal.jsonl", equal)})
    assert "leaves nothing to train on" in line
    assert "4 identical" in line


def test_nothing_to_train(tiny_llama: Path, refused: Any, make_config: Any, data: Path, tmp_path: Path) -> None:
    assert "target_modules" in refused(tiny_llama, lora={"target_modules": ["attention"]})
    line = refused(tiny_llama, lora={"r": 17, "target_modules": ["k_proj"]})
    assert "lora.r 17 is above the width of every layer" in line
    assert "allowed: at most 16" in line
    assert "allowed: at most 32" in refused(tiny_llama, lora={"r": 33})
    with pytest.raises(ValueError, match="target_modules"):
        make_config(tiny_llama, tmp_path / "out", [{"data": data}], lora={"target_modules": []})
    base = models.find_base(str(tiny_llama))
    with pytest.raises(InputError, match="nothing would be trained"):
        require_trainable(models.load_causal(base, "float32").requires_grad_(False), base.name)


def test_start_of_another_vocabulary(
    tiny_llama: Path, tmp_path: Path, make_adapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head's factor has as many rows as there are tokens."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    settings = json.loads((other / "config.json").read_text())
    size = settings["vocab_size"]
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": size - 8}))
    weights = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:-8].clone()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    start = make_adapter(tiny_llama, seed=1, target_modules=["q_proj", "lm_head"])
    models.load_policy(models.find_base(str(tiny_llama)), Lora(), "float32", start, gradient_checkpointing=False)
    with pytest.raises(InputError, match="does not fit .*other: size mismatch for .*lm_head") as error:
        models.load_policy(models.find_base(str(other)), Lora(), "float32", start, gradient_checkpointing=False)
    assert "\n" not in str(error.value)
    assert str(size - 8) in str(error.value)
