"""Log-probabilities of answers through a model's forward: which rows it takes, where its head is applied.

Everything goes through the wrapped model's own forward, so that the hooks of data-parallel and sharded training run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from psacpo.align.head import chunk_rows, frozen_head_log_probs, recomputed_log_probs
from psacpo.align.layout import Batch, Layout, tree_mask
from psacpo.align.logprobs import in_place, token_log_probs

Head: TypeAlias = Literal["chunked", "model"]
Selection: TypeAlias = Literal["mask", "positions", "all"]


@dataclass(frozen=True, slots=True)
class Route:
    """How a model is asked.

    Attributes:
        layout: "shared" computes a prompt once for both answers, "padded" is right for every causal model.
        head: "chunked" applies the output layer to the answers' tokens only, some at a time; "model" lets the model
            do it, for heads with something behind them (a soft cap, a scale).
    """

    layout: Layout
    head: Head

    def __str__(self) -> str:
        prompts = "prompts shared" if self.layout == "shared" else "prompts not shared"
        return f"{prompts}, {'logits in chunks' if self.head == 'chunked' else 'logits by the model'}"


PLAIN = Route("padded", "model")


def answer_log_probs(model: Any, base: Any, batch: Batch, route: Route) -> Tensor:
    """log pi(token | what stands before) of every token of every answer.

    Args:
        model: A causal language model, or whatever wraps it; this is what is called.
        base: The causal language model inside, which has the output layer.
        batch: In the route's layout, on the model's device.

    Returns:
        Shape (2B, L), float32, in nats, 0 behind an answer's end; chosen answers first.
    """
    answered = batch["completion_mask"]
    places, targets = batch["predictors"][answered], batch["targets"][answered]
    inputs = model_inputs(base, batch)
    if route.head == "chunked":
        with head_replaced(base, places, _scoring(base, targets)):
            found = model(**inputs, use_cache=False).logits.flatten()
    else:
        found = token_log_probs(logits_at(model, base, inputs, places), targets)
    return in_place(found, answered)


def model_inputs(base: Any, batch: Batch) -> Batch:
    """What the model's forward takes of a batch."""
    inputs: Batch = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if "segments" in batch:
        seen = tree_mask(batch["segments"])
        inputs["attention_mask"] = _additive(seen, base) if _is_eager(base) else seen
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs


def _is_eager(base: Any) -> bool:
    return getattr(base.config, "_attn_implementation", None) == "eager"


def _additive(seen: Tensor, base: Any) -> Tensor:
    """The mask as eager attention takes it: added to the scores, so 0 or minus infinity."""
    return torch.zeros(seen.shape, dtype=base.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@contextlib.contextmanager
def head_replaced(base: Any, places: Tensor, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the model's output layer give, in the place of logits, `function` of its inputs at `places`.

    The layer is still called by the model's own forward as a module, so its hooks run and its weights are gathered.

    Args:
        function: From hidden states of shape (N, D) to shape (N, k); the model's logits have shape (1, N, k) then.
    """
    head: nn.Module = base.get_output_embeddings()
    before = head.__dict__.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        return function(hidden.reshape(-1, hidden.shape[-1]).index_select(0, places))[None]

    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _scoring(base: Any, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """From hidden states (N, D) to the targets' log-probabilities, shape (N, 1)."""
    head: nn.Module = base.get_output_embeddings()
    logits: Callable[[Tensor], Tensor] = head.forward
    frozen = isinstance(head, nn.Linear) and not any(parameter.requires_grad for parameter in head.parameters())

    def score(rows: Tensor) -> Tensor:
        chunk = chunk_rows(base.config.get_text_config().vocab_size, rows.device.type)
        if frozen and isinstance(head, nn.Linear) and head.weight.is_floating_point():
            found = frozen_head_log_probs(rows, head.weight, head.bias, targets, chunk)
        else:
            found = recomputed_log_probs(logits, rows, targets, chunk)
        return found[:, None]

    return score


def logits_at(model: Any, base: Any, inputs: Batch, places: Tensor) -> Tensor:
    """The model's own logits at `places`, computed for little else. Shape (N, V)."""
    selection = logits_selection(base)
    ids = inputs["input_ids"]
    kept = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill_(0, places, True).view(ids.shape)
    if selection == "mask":
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits[(kept.flatten().cumsum(0) - 1)[places]]
    if selection == "positions":
        columns = kept.any(dim=0)
        logits = model(**inputs, use_cache=False, logits_to_keep=columns.nonzero().squeeze(1)).logits
        row, column = places // ids.shape[1], (columns.cumsum(0) - 1)[places % ids.shape[1]]
        return logits[row, column]
    logits = model(**inputs, use_cache=False).logits
    return logits.flatten(0, 1)[places]


def logits_selection(model: Any) -> Selection:
    """What the model's own `logits_to_keep` understands: a mask, one list of positions for all rows, or nothing.

    Logits that are not computed cost neither time nor memory: with a vocabulary of 128k, one position takes 0.5 MB.
    """
    forward = inspect.unwrap(model.forward)
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        return "all"
    helper = getattr(forward, "__globals__", {}).get("slice_logits_to_keep")
    if helper is None:
        return "positions"
    try:
        kept = helper(torch.zeros(1, 2, 1), torch.tensor([[True, False]]))
    except IndexError:
        return "positions"
    return "mask" if kept.shape == (1, 1) else "positions"
