"""A policy by the longest way: each adapted weight multiplied out and added to the base's, then a plain forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psacpo.merge.adapters import Adapter, stack_adapters
from psacpo.merge.arithmetic import Factors, add_delta


@torch.inference_mode()
def dense_logprobs(
    model: Any, adapters: Mapping[str, Adapter], weights: Mapping[str, float], prompts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities [vocabulary] of the next token after each prompt, float32.

    Args:
        model: A causal language model with no adapter on it; it is left as it was found.
        adapters: Name -> adapter.
        weights: Adapter name -> weight; none is the base itself.
        prompts: Token ids, one at a time, so that nothing is padded.
    """
    found = []
    with _merged(model, adapters, weights):
        for ids in prompts:
            logits = model(input_ids=torch.tensor([list(ids)], device=model.device), logits_to_keep=1).logits[0, -1]
            found.append(logits.float().log_softmax(dim=-1).cpu())
    return found


@contextlib.contextmanager
def _merged(model: nn.Module, adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Iterator[None]:
    """Give each adapted module its merged weight for the time of its own forward pass: one is held at a time."""
    used = [adapters[name] for name in weights]
    deltas = stack_adapters(used, list(weights.values())) if used else {}
    embeddings = frozenset[str]().union(*(adapter.embeddings for adapter in used))
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as hooks:
        for name, factors in deltas.items():
            turned = name in embeddings or type(modules[name]).__name__ == "Conv1D"
            for handle in _exchange(modules[name], factors.transposed() if turned else factors):
                hooks.callback(handle.remove)
        yield


def _exchange(module: Any, factors: Factors) -> tuple[Any, Any]:
    place = module.weight.device
    delta = Factors(factors.A.to(place), factors.B.to(place), factors.scale)
    held: list[Tensor] = []

    def before(module: Any, _: Any) -> None:
        held.append(module.weight.data)
        module.weight.data = add_delta(module.weight.data, delta)

    def after(module: Any, _: Any, __: Any) -> None:
        module.weight.data = held.pop()

    return module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
