"""One forward pass of a causal language model over a padded batch, with logits only where answers are predicted."""

from __future__ import annotations

import inspect
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from psacpo.align.logprobs import predicting_mask, sequence_log_probs

Selection: TypeAlias = Literal["mask", "positions", "all"]


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


def batch_log_probs(model: Any, batch: dict[str, Tensor], selection: Selection) -> Tensor:
    """log pi(answer | prompt) of each row, through the model's forward, so that wrappers' hooks run.

    Args:
        model: A causal language model or a wrapper of one.
        batch: `input_ids`, `attention_mask` and `completion_mask` of `pairs.collate`. Shape (B, T) each.
        selection: What `logits_selection` says of the model inside.

    Returns:
        Shape (B,), float32, in nats.
    """
    ids, answered = batch["input_ids"], batch["completion_mask"]
    mask = predicting_mask(answered)
    options: dict[str, Tensor] = {}
    if selection == "mask":
        options = {"logits_to_keep": mask}
    elif selection == "positions":
        positions = mask.any(dim=0).nonzero().squeeze(1)
        options = {"logits_to_keep": positions}
        mask = mask[:, positions]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False, **options).logits
    return sequence_log_probs(logits if selection == "mask" else logits[mask], ids, answered)
