"""From a prompt to token ids, in one place, so that training, generation and judging see the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from psacpo.errors import InputError

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]
# Those that templates know; what they do with these messages is theirs to decide, as to leave out earlier thoughts.
_ROLES = ("system", "developer", "user", "assistant", "tool")


def render_prompt(tokenizer: Any, prompt: Prompt, template: str | None) -> str:
    """The text before the answer.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: A string, or messages `{"role", "content"}` that end with the user's.
        template: A raw string with `{prompt}` in it, or None for the tokenizer's chat template.

    Raises:
        InputError: No template can be had, or the raw template meets a conversation.
    """
    if template is not None:
        if not isinstance(prompt, str):
            if len(prompt) != 1:
                raise InputError(
                    "a raw template takes one string, this prompt has several messages",
                    given=json.dumps(list(prompt), ensure_ascii=False)[:80],
                    allowed="a string prompt, or template: null to use the tokenizer's chat template",
                )
            prompt = prompt[0]["content"]
        return template.replace("{prompt}", prompt)
    require_chat_template(tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    text = _apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    for message in messages:
        if message.get("role") not in _ROLES and str(message.get("content", "")).strip() not in text:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} leaves out messages of '{message.get('role')}'",
                allowed="system, user and assistant",
            )
    return text


def _apply_chat_template(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The tokenizer's chat template over messages; a template that is broken or refuses them is one line."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is somebody's code: it raises what it likes
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} cannot write messages of {roles}: {error}",
            allowed="messages that it takes, or a raw template:",
        ) from error
    return text


def require_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no chat template where none was given as a raw string."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            allowed="set template: to a string such as 'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'",
        )


def encode_prompt(tokenizer: Any, prompt: Prompt, template: str | None) -> list[int]:
    """Token ids of the rendered prompt, with the BOS that belongs there and no second one.

    A chat template says itself whether its format begins with BOS, as transformers, TRL and vLLM have it. Before a raw
    template BOS is put where the tokenizer would put it.

    Raises:
        InputError: The template writes BOS twice.
    """
    text = render_prompt(tokenizer, prompt, template)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    # Some tokenizers have a BOS that they never write (Qwen2), so it is asked what an empty text becomes.
    if template is not None and ids[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    if ids[:2] == [bos, bos]:
        raise InputError("the template writes the BOS token twice", given=text[:60])
    return ids


def encode_completion(tokenizer: Any, prompt: Prompt, completion: Prompt, template: str | None) -> list[int]:
    """Token ids of an answer as training sees it, ended by the end-of-turn or EOS token.

    Under a raw template the text is encoded as it stands and EOS follows. Under a chat template the ids are those
    that the template adds to the prompt for an assistant's message, so they end as the template ends a turn.
    """
    if template is not None:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    before = render_prompt(tokenizer, prompt, None)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    whole = _apply_chat_template(tokenizer, [*messages, *answer], add_generation_prompt=False)
    if not whole.startswith(before):
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} writes an answered prompt differently from an open one",
            allowed="a chat template with add_generation_prompt, or a raw template:",
        )
    ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    # Text after the end-of-turn (a line break in ChatML) is never generated, so it is not trained on either.
    ends = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)}
    last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in ends), None)
    return [*ids, tokenizer.eos_token_id] if last is None else ids[: last + 1]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens that end an assistant's turn in the common chat formats and that this tokenizer knows."""
    unknown = tokenizer.unk_token_id
    found = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))
    return [i for i in found if i is not None and i != unknown]
