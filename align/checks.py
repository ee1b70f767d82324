"""What is refused before training because it would train something else than was meant, or nothing."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from psacpo.errors import InputError
from psacpo.prompting import render_prompt, require_chat_template

# Of transformers' class names: what is no language model although its body would load as one.
_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)$|RewardModel$|Classifier$"
)
# The first with NF4 on CPUs.
_BITSANDBYTES = (0, 46)
_QUESTION, _ANSWER = "psacpo-question", "psacpo-answer"


def require_causal(architectures: Sequence[str] | None, name: str) -> None:
    """Refuse a model directory whose config.json says that it is a classifier or another model without a language head."""
    others = [found for found in architectures or () if _OTHER_HEADS.search(found)]
    if others:
        raise InputError(f"{name} is a {others[0]}", allowed="a causal language model (a judge goes under judges:)")


def require_assistant_turn(tokenizer: Any, template: str | None) -> None:
    """Refuse a chat template under which an answer does not follow its prompt as the assistant's own.

    Some templates have no mark of the assistant's turn and begin it with the end of the user's (Mistral), and some put
    text before the answer (an empty thought), so only what is certainly wrong is refused.

    Raises:
        InputError: The template leaves the answer out, or nothing in the prompt says that the assistant is next.
    """
    if template is not None:
        return  # Its {prompt} was looked for when the settings were read.
    require_chat_template(tokenizer)
    prompt = render_prompt(tokenizer, _QUESTION, None)
    user = {"role": "user", "content": _QUESTION}
    messages = [user, {"role": "assistant", "content": _ANSWER}]
    try:
        closed: str = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=False)
        whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is somebody's code: it raises what it likes
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} cannot write an assistant's message: {error}",
            allowed="a chat template for user and assistant, or a raw template:",
        ) from error
    allowed = "a chat template with add_generation_prompt, or a raw template:"
    if _QUESTION not in prompt:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} leaves the user's message out", allowed=allowed
        )
    if _ANSWER not in whole:
        raise InputError(f"the chat template of {tokenizer.name_or_path} has no assistant turn", allowed=allowed)
    answered = whole[len(prompt) :].lstrip() if whole.startswith(prompt) else _ANSWER
    opened = prompt.split(_QUESTION)[-1].strip() and answered.startswith(_ANSWER)
    if prompt == closed and not opened:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} does not open the assistant turn: add_generation_prompt "
            "changes nothing",
            allowed=allowed,
        )


def require_finite(model: nn.Module, name: str) -> None:
    """Refuse a model of which a weight is NaN or infinite: a token that the data do not hold would show it too late."""
    for weight, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the weight {weight} of {name} holds numbers that are not finite", allowed="a whole model"
            )


def require_trainable(model: nn.Module, name: str) -> None:
    """Refuse a policy of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"lora.target_modules match no weight of {name}: nothing would be trained", allowed="all-linear, or names"
        )


def require_quantisation(name: str | None) -> None:
    """Refuse a quantised base where bitsandbytes is not there, or is of before it ran on CPUs too."""
    if name is None:
        return
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if tuple(int(part) for part in found.split(".")[:2] if part.isdecimal()) < _BITSANDBYTES:
        raise InputError(
            f"quantization {name} needs bitsandbytes {'.'.join(map(str, _BITSANDBYTES))} or later"
            + (f", here is {found}" if found else ""),
            allowed="pip install 'psacpo[train]', or quantization: null",
        )
