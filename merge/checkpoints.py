"""Full weights: a base model plus merged deltas, written shard by shard in the base's own layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from psacpo.errors import InputError
from psacpo.files import MANIFEST
from psacpo.hub import OTHER_WEIGHTS
from psacpo.merge.arithmetic import Factors, add_delta
from psacpo.merge.models import ModelDirectory
from psacpo.merge.tensorfiles import FLOATING, Entry

_BLOCK = 1 << 20
# Names of the output embedding in transformers' causal language models.
_HEADS = ("lm_head", "embed_out")
# Model types whose linear layers store weights as [inputs, outputs]; PEFT says fan_in_fan_out in their adapters.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def plan_deltas(
    model: ModelDirectory, shapes: Mapping[str, tuple[int, int]], *, embeddings: Collection[str], fan_in_fan_out: bool
) -> dict[str, tuple[str, bool]]:
    """Tensor name in the base -> (module whose delta it takes, whether the delta is transposed to fit).

    Args:
        model: The base.
        shapes: Module name -> [outputs, inputs] of its delta.
        embeddings: The modules that are embeddings, whose weight is [inputs, outputs].
        fan_in_fan_out: Whether the other weights are [inputs, outputs] too.

    Raises:
        InputError: A delta finds no weight, one of another shape or of no floating dtype, or one that is tied.
    """
    kind = model.config.get("model_type")
    if kind in _CONV1D and not fan_in_fan_out:
        raise InputError(
            f"base {model.path} is of type {kind}", allowed="adapters with fan_in_fan_out, or --as adapter"
        )
    plan = {}
    for module, shape in shapes.items():
        head = module.rpartition(".")[2] in _HEADS
        if (module in embeddings or head) and model.ties_embeddings:
            raise InputError(
                f"the adapters change {module}, which base {model.path} ties to its other embedding",
                allowed="--as adapter, or adapters on other modules",
            )
        name = f"{module}.weight"
        found = model.find(name)
        if found is None:
            raise InputError(f"the adapters change {module}, but base {model.path} has no weight {name}")
        transposed = module in embeddings or (fan_in_fan_out and not head)
        expected = shape[::-1] if transposed else shape
        if found[1].shape != expected:
            raise InputError(
                f"shape mismatch at {module}: the adapters change a weight of shape {list(expected)}, the base has "
                f"{list(found[1].shape)}"
            )
        if found[1].dtype not in FLOATING:
            raise InputError(
                f"base {model.path} has no float weights at {module}", given=found[1].dtype, allowed=", ".join(FLOATING)
            )
        plan[name] = (module, transposed)
    return plan


def side_files(model: ModelDirectory) -> list[str]:
    """Names of what is copied verbatim: configuration, tokenizer, chat templates, licence, code; no other weights."""
    top = [
        file
        for file in model.path.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in (*OTHER_WEIGHTS, ".safetensors")
        and not file.name.endswith((".safetensors.index.json", ".bin.index.json"))
        and file.name not in (MANIFEST, "README.md")
    ]
    more = [file for file in (model.path / "additional_chat_templates").glob("*") if file.is_file()]
    index = [model.index] if model.index else []
    return sorted([file.relative_to(model.path).as_posix() for file in [*top, *more]] + index)


def checkpoint_bytes(model: ModelDirectory) -> int:
    """Size of the output on disk, in bytes: that of what is copied and of the shards, which keep their size."""
    return sum((model.path / name).stat().st_size for name in [*side_files(model), *model.shards])


def write_checkpoint(
    directory: Path,
    model: ModelDirectory,
    deltas: Mapping[str, Factors],
    plan: Mapping[str, tuple[str, bool]],
    *,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write base + deltas as a model directory with the base's shards, headers and offsets, one tensor at a time.

    Args:
        directory: An empty directory.
        model: The base.
        deltas: Module name -> factors.
        plan: From `plan_deltas`; tensors not in it, and those whose module has no delta, are copied as bytes.
        done: Called after each shard.

    Raises:
        InputError: A merged weight is not finite in the base's dtype.
    """
    for name in side_files(model):
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(model.path / name, target)
    for shard, (begin, entries) in model.shards.items():
        source_path = model.path / shard
        with (
            source_path.open("rb") as source,
            (directory / shard).open("wb") as target_file,
            safe_open(source_path, framework="pt") as weights,
        ):
            _copy(source, target_file, 0, begin)
            for name, entry in entries.items():
                module, transposed = plan.get(name, (None, False))
                if module is None or module not in deltas:
                    _copy(source, target_file, begin + entry.start, entry.end - entry.start)
                    continue
                factors = deltas[module].transposed() if transposed else deltas[module]
                target_file.write(_merged_bytes(name, entry, weights.get_tensor(name), factors))
        done()


def _merged_bytes(name: str, entry: Entry, weight: torch.Tensor, factors: Factors) -> Any:
    """The bytes of weight + delta, as a view of the tensor's memory."""
    merged = add_delta(weight, factors)
    if not torch.isfinite(merged).all():
        raise InputError(f"the merged weight {name} is not finite in the base's dtype {entry.dtype}")
    return merged.view(torch.uint8).numpy().data


def _copy(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    source.seek(start)
    while length:
        block = source.read(min(_BLOCK, length))
        if not block:
            raise InputError(f"{source.name} ended early")
        target.write(block)
        length -= len(block)
