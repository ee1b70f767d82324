"""Two faults of vLLM's CPU kernels (0.32.0), mended in the servers that we start.

The base answered with an adapter's weights:
vLLM marks a token that wants no adapter with the index -1. Its CPU kernels (vllm.lora.ops.torch_ops, seen in 0.32.0) use
that to index the adapter slots, where -1 is the last slot. While that slot is empty nothing shows. Once as many policies
are loaded as there are slots, every request for the base gets the last one's policy.

A request ended the server: with `prompt_logprobs` one request has a row for each token of its prompt, and the output
embedding's kernel looks up one adapter for each request ("einsum(): subscript b has size ...").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

_MODULES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.punica_wrapper.punica_cpu")
# The last step of every layer's update: y += inputs @ B[index]. With zero inputs it adds zero, exactly.
_EXPANDING = ("bgmv_expand", "bgmv_expand_slice")


def leave_the_base_alone() -> None:
    """Make vLLM's CPU kernels add nothing for tokens that want no adapter. More than once is no error."""
    for name in _MODULES:
        try:
            module = import_module(name)
        except ImportError:  # another version's layout
            continue
        for function in _EXPANDING:
            found = getattr(module, function, None)
            if found is not None and not hasattr(found, "__wrapped__"):
                setattr(module, function, without_negative(found))


def leave_the_logits_alone() -> None:
    """Make vLLM's CPU kernels add nothing to logits: what is served changes no output embedding (`serve.policies`)."""
    try:
        wrapper: Any = import_module("vllm.lora.punica_wrapper.punica_cpu").PunicaWrapperCPU
    except (ImportError, AttributeError):  # another version's layout
        return
    wrapper.add_lora_logits = _add_nothing


def _add_nothing(_wrapper: object, logits: Any, *_rest: object, **_named: object) -> Any:
    return logits


def without_negative(expand: Callable[..., Any]) -> Callable[..., Any]:
    """`expand(inputs, weights, output, indices, ...)` that takes rows of a negative index for zeros.

    Args:
        expand: Adds inputs [tokens, rank] @ weights[indices] to output [tokens, outputs].
    """

    @functools.wraps(expand)
    def masked(inputs: Any, weights: Any, output: Any, indices: Any, *more: Any, **named: Any) -> Any:
        if indices.shape[0] == inputs.shape[0]:
            inputs = inputs.masked_fill((indices < 0)[:, None], 0)
        return expand(inputs, weights, output, indices, *more, **named)

    return masked
