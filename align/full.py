"""Full fine-tuning: all weights are trained, and a stage leaves a whole model."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from torch import Tensor

from psacpo.align.checks import require_finite
from psacpo.align.config import Dtype
from psacpo.align.losses import all_finite
from psacpo.align.model import DTYPES, Base, disable_dropout, enable_checkpointing, load_causal
from psacpo.errors import InputError


def load_whole(base: Base, start: Path | None, *, gradient_checkpointing: bool) -> Any:
    """The base, or a model that an earlier stage left, in float32 with all weights to train.

    AdamW's steps are smaller than what bfloat16 weights can show, so half precision is for the forward pass alone.

    Raises:
        InputError: Weights are missing, not finite, or not the base's in shape.
    """
    place = base if start is None else Base(start, str(start))
    model = load_causal(place, "float32")
    require_finite(model, place.name)
    disable_dropout(model)
    model.requires_grad_(True)
    # What PEFT models have, so that all that scores a policy finds the language model inside.
    model.get_base_model = types.MethodType(lambda self: self, model)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return model


def save_whole(
    model: Any, state: dict[str, Tensor], directory: Path, tokenizer: Any, *, dtype: Dtype, stage: str
) -> None:
    """Write a model directory with its tokenizer, the weights cast once to `dtype`.

    Args:
        state: The full state dict, gathered where the model is sharded.
        dtype: A name of DTYPES.

    Raises:
        InputError: A weight is not finite in `dtype`. Nothing is written.
    """
    # Tied weights are one tensor under two names, and have to stay so.
    cast: dict[int, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in state.items():
        kept = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        whole[name] = cast.setdefault(tensor.data_ptr(), kept)
    # Gathered from shards they are two.
    for name, source in model.all_tied_weights_keys.items():
        if name in whole and source in whole:
            whole[name] = whole[source]
    if not all_finite(*whole.values()):
        raise InputError(
            f"stage '{stage}': training ended in weights that are not finite in {dtype}",
            allowed="a lower learning_rate, or dtype float32",
        )
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=whole)
    # It writes the dtype that was trained in.
    model.config.dtype = DTYPES[dtype]
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        # safetensors leaves a file that its owner alone may read.
        file.chmod((directory / "config.json").stat().st_mode)
