"""Token ids of prompts and answers: one BOS, the template's own end of turn, nothing that is never generated."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from psacpo.errors import InputError
from psacpo.prompting import encode_completion, encode_prompt, end_of_turn_ids, render_prompt

RAW = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def test_raw_template(tiny_llama_raw: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_raw)
    ids = encode_prompt(tokenizer, "open the {prompt} lock", RAW)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "BEGINNING OF CONVERSATION: USER: open the {prompt} lock ASSISTANT:"
    answer = encode_completion(tokenizer, "open", " heat", RAW)
    assert tokenizer.decode(answer) == " heat</s>"
    # A template that writes BOS itself does not get a second one.
    assert encode_prompt(tokenizer, "x", "<s>" + RAW).count(tokenizer.bos_token_id) == 1
    with pytest.raises(InputError, match="BOS token twice"):
        encode_prompt(tokenizer, "x", "<s><s>" + RAW)


def test_chat_template(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert render_prompt(tokenizer, "open", None) == "<s><|user|>open<|assistant|>"
    one = encode_prompt(tokenizer, "open", None)
    assert one == encode_prompt(tokenizer, [{"role": "user", "content": "open"}], None)
    assert one[0] == tokenizer.bos_token_id
    assert one.count(tokenizer.bos_token_id) == 1
    answer = encode_completion(tokenizer, "open", "heat", None)
    assert tokenizer.decode(answer) == "heat</s>"
    assert answer == encode_completion(tokenizer, "open", [{"role": "assistant", "content": "heat"}], None)


def test_a_tokenizer_without_bos_gets_none(tiny_qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    assert tokenizer.decode(encode_prompt(tokenizer, "open", None)) == "<|user|>open<|assistant|>"


def test_a_chat_template_without_bos_gets_none(tiny_llama: Path) -> None:
    """As transformers' own apply_chat_template and a vLLM server's chat endpoint have it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    own = tokenizer.apply_chat_template([{"role": "user", "content": "open"}], add_generation_prompt=True)
    ids = encode_prompt(tokenizer, "open", None)
    assert ids == own["input_ids"]
    assert tokenizer.bos_token_id not in ids
    tokenizer.chat_template = "<s><s>" + tokenizer.chat_template
    with pytest.raises(InputError, match="BOS token twice"):
        encode_prompt(tokenizer, "open", None)


def test_text_after_the_end_of_turn_is_not_trained_on(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>{% endif %}", "</s>\n{% endif %}")
    assert tokenizer.decode(encode_completion(tokenizer, "open", "heat", None)) == "heat</s>"


def test_end_of_turn_tokens_are_found_by_name(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert end_of_turn_ids(tokenizer) == []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_what_cannot_be_rendered_is_told(tiny_llama_raw: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_raw)
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(tokenizer, "x", None)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(InputError, match="several messages"):
        encode_prompt(tokenizer, turns, RAW)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{% for m in %}", "{{ 1 / 0 + x.y.z }}"]
)
def test_a_template_that_fails_is_one_line(tiny_llama: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template of .* cannot write messages of user: .*allowed"):
        encode_prompt(tokenizer, "open", None)
