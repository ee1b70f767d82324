"""LoRA adapters together: whether they fit each other, stacked at any weights, written as one adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from psacpo.errors import InputError
from psacpo.merge.adapter_files import PREFIX, WEIGHTS, Adapter, read_adapter
from psacpo.merge.arithmetic import Factors, interpolate, stack
from psacpo.merge.changes import locate, tied_partner
from psacpo.merge.compress import compress
from psacpo.merge.lora_config import CONFIG, excludes, pattern_value
from psacpo.merge.models import ModelDirectory
from psacpo.merge.stored import StoredTensor, is_finite, stored_in

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "Written",
    "adapter_bytes",
    "base_tensor",
    "factors_by_module",
    "pattern_value",
    "read_adapter",
    "require_compatible",
    "require_plain",
    "require_writable",
    "stack_adapters",
    "warnings_of",
    "write_adapter",
]


@dataclass(frozen=True)
class Written:
    """What `write_adapter` wrote.

    Attributes:
        ranks: Module name -> rank.
        errors: Module name -> Frobenius norm of what recompression left out, over that of the whole; 0 is nothing.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


def factors_by_module(adapters: Sequence[Adapter]) -> dict[str, list[Factors | None]]:
    """Module name -> the factors that each adapter has for it, None where it has none, so that its delta is zero."""
    return {name: [adapter.modules.get(name) for adapter in adapters] for name in _modules(adapters)}


def stack_adapters(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """Module name -> factors, with scale 1, of the weighted sum of the adapters' deltas.

    An adapter of weight zero takes no rank: at ratio 0 or 1 the result is the other adapter alone.

    Raises:
        InputError: An adapter is more than its factors (see `require_plain`).
    """
    require_plain({str(adapter.path): adapter for adapter in adapters})
    kept, weights = _weighted(adapters, weights)
    return {name: _stacked(kept, weights, name) for name in _modules(kept)}


def require_compatible(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters, by name, that cannot be summed: other shapes, kinds of module, tasks or revisions of the base."""
    (first, one), *others = adapters.items()
    for name, other in others:
        for what, given, wanted in (
            ("task_type", other.config.get("task_type"), one.config.get("task_type")),
            ("revision of the base", other.revision, one.revision),
            ("fan_in_fan_out", other.fan_in_fan_out, one.fan_in_fan_out),
        ):
            if given != wanted:
                raise InputError(f"adapters differ in {what}: {first} has {wanted}, {name} has {given}")
    seen: dict[str, tuple[str, tuple[int, ...], bool]] = {}
    for name, adapter in adapters.items():
        changes = [(module, adapter.shape(module), module in adapter.embeddings) for module in adapter.modules]
        for what, shape, embedding in [*changes, *((f"{t} whole", s.shape, False) for t, s in adapter.saved.items())]:
            before, expected, was_embedding = seen.setdefault(what, (name, shape, embedding))
            if shape != expected or embedding != was_embedding:
                raise InputError(
                    f"adapters do not fit together at {what}: {before} changes a weight of shape {list(expected)}, "
                    f"{name} one of shape {list(shape)}"
                )


def require_plain(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters, by name, that are more than their factors: what adds up factors only would lose the rest."""
    for name, adapter in adapters.items():
        more = _more(adapter)
        if more:
            raise InputError(
                f"adapter {name} is not plain LoRA: {more[0]}",
                given=str(adapter.path),
                allowed="plain LoRA, or full weights of one ratio by psacpo merge --as checkpoint",
            )


def warnings_of(adapters: Mapping[str, Adapter]) -> list[str]:
    """What is odd about adapters and no error, a line each."""
    return [
        f"the {name} adapter {adapter.path} changes nothing: all of its deltas are zero"
        for name, adapter in adapters.items()
        if adapter.zero
    ]


def adapter_bytes(adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None) -> int:
    """Size on disk of the numbers that `write_adapter` writes, in bytes."""
    kept, _ = _weighted(adapters, weights)
    ranks = _ranks(kept, rank)
    count = sum(ranks[name] * sum(_shape(kept, name)) for name in ranks)
    if any(adapter.shifts for adapter in kept):
        count += sum(_shape(kept, name)[0] for name in ranks)
    return 4 * (count + sum(math.prod(shape) for shape in _saved(kept).values()))


def write_adapter(
    directory: Path,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    base: str,
    rank: int | None = None,
    model: ModelDirectory | None = None,
) -> Written:
    """Write the weighted sum of adapters as a PEFT LoRA directory.

    Deltas are stacked, which is exact, or recompressed to `rank`. Whole tensors that adapters hold (modules_to_save,
    trained biases) become base + sum_i w_i (W_i - base). All is float32. Every module has lora_alpha = r, so a reader
    that knows no patterns finds the right scale, 1, too. One module is in memory at a time, but for what the adapters
    hold themselves.

    Args:
        directory: Where to; an empty directory.
        adapters: All on one base.
        weights: One for each, of any sign. An adapter of weight zero takes no part.
        base: What the configuration calls the base.
        rank: At most this rank for every module; None keeps the sum of the adapters' ranks.
        model: The base on disk, which whole tensors need.

    Raises:
        InputError: The sum is no adapter (DoRA, a module that is adapted here and trained whole there), or `model` is
            needed, lacks a tensor, or holds NaN or infinity; or a result is not finite in float32.
    """
    kept, kept_weights = _weighted(adapters, weights)
    require_writable(kept)
    if model is None and _saved(kept):
        raise InputError(
            f"adapter {next(a for a in kept if a.saved).path} trains whole tensors of the base, which is not on disk",
            allowed="--base with a model directory",
        )
    ranks = _ranks(kept, rank)
    shifted = any(adapter.shifts for adapter in kept)
    errors: dict[str, float] = {}

    def tensors_of(name: str) -> Iterator[torch.Tensor]:
        factors, errors[name] = _stacked(kept, kept_weights, name), 0.0
        if factors.rank > ranks[name]:
            _require_finite(f"{PREFIX}{name}", factors.A, factors.B)
            factors, errors[name] = compress(factors, ranks[name])
        yield factors.A
        yield factors.B
        if shifted:
            yield _shift(kept, kept_weights, name, factors.shape[0])

    shapes: dict[str, tuple[int, ...]] = {}
    for name in ranks:
        outputs, inputs = _shape(kept, name)
        embedding = any(name in adapter.embeddings for adapter in kept)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        shapes[f"{PREFIX}{name}.{names[0]}"] = ranks[name], inputs
        shapes[f"{PREFIX}{name}.{names[1]}"] = outputs, ranks[name]
        if shifted:
            shapes[f"{PREFIX}{name}.lora_B.bias"] = (outputs,)
    saved = _saved(kept)
    for tensor, shape in saved.items():
        module, _, last = tensor.rpartition(".")
        shapes[f"{PREFIX}{module}.base_layer.{last}" if module in ranks else f"{PREFIX}{tensor}"] = shape

    def values() -> Iterator[torch.Tensor]:
        for name in ranks:
            yield from tensors_of(name)
        for tensor in saved:
            assert model is not None
            yield from _interpolated(model, kept, kept_weights, tensor)

    config = _config(kept, ranks, base)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tensors(directory / WEIGHTS, shapes, values())
    return Written(ranks, errors)


def require_writable(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose weighted sum PEFT has no adapter for; see `write_adapter`."""
    way = "--as checkpoint"
    saved = tuple(sorted({name for adapter in adapters for name in _saved_modules(adapter)}))
    for adapter in adapters:
        if adapter.magnitudes:
            raise InputError(
                f"adapter {adapter.path} is DoRA (use_dora), whose weights do not add up as factors", allowed=way
            )
        for module in adapter.modules:
            if excludes(saved, module):
                raise InputError(
                    f"adapter {adapter.path} adapts {module}, which another adapter trains whole (modules_to_save)",
                    allowed=way,
                )
            if module in adapter.embeddings and any(other.shifts for other in adapters):
                raise InputError(
                    f"adapter {adapter.path} adapts the embedding {module} and an adapter has lora_bias, which PEFT does "
                    "not load together",
                    allowed=way,
                )


def _more(adapter: Adapter) -> list[str]:
    """What an adapter is besides factors."""
    saved = sorted(adapter.saved)
    found = (
        ("it is DoRA (use_dora)", adapter.magnitudes),
        ("its B have biases (lora_bias)", adapter.shifts),
        (f"it holds trained values of {saved[0] if saved else ''} (modules_to_save or bias)", saved),
    )
    return [what for what, there in found if there]


def _modules(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({name for adapter in adapters for name in adapter.modules})


def _shape(adapters: Sequence[Adapter], module: str) -> tuple[int, int]:
    return next(adapter.shape(module) for adapter in adapters if module in adapter.modules)


def _ranks(adapters: Sequence[Adapter], most: int | None) -> dict[str, int]:
    """Module name -> rank of the stacked factors, or of what recompression makes of them."""
    ranks = {name: sum(a.rank(name) for a in adapters if name in a.modules) for name in _modules(adapters)}
    if most is None:
        return ranks
    return {name: rank if rank <= most else min(most, *_shape(adapters, name)) for name, rank in ranks.items()}


def _stacked(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors:
    """Factors of the weighted sum of the deltas of one module."""
    row = [(a.modules[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
    return stack(*zip(*row, strict=True))


def _weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """The adapters that count, and their weights; one of weight zero is kept if all are."""
    pairs = [pair for pair in zip(adapters, weights, strict=True) if pair[1] != 0] or [(adapters[0], 0.0)]
    return [adapter for adapter, _ in pairs], [weight for _, weight in pairs]


def _shift(adapters: Sequence[Adapter], weights: Sequence[float], module: str, outputs: int) -> torch.Tensor:
    """sum_i w_i * scale_i * (bias of lora_B), shape [outputs]; zero where no adapter has one."""
    total = torch.zeros(outputs, dtype=torch.float64)
    for adapter, weight in zip(adapters, weights, strict=True):
        if module in adapter.shifts:
            total += adapter.shifts[module].double() * (weight * adapter.modules[module].scale)
    return total.float()


def _saved(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Tensor of the base of which an adapter holds trained values -> shape."""
    return {name: saved.entry.shape for adapter in adapters for name, saved in sorted(adapter.saved.items())}


def base_tensor(model: ModelDirectory, tensor: str) -> StoredTensor:
    """What a base holds of a tensor that adapters train whole; of a tied head, the embedding.

    Raises:
        InputError: It holds no float weights of it.
    """
    name = locate(model, tensor) or tied_partner(model, tensor.rpartition(".")[0])
    source = stored_in(model, name) if name is not None else None
    if source is None:
        raise InputError(
            f"the adapters hold trained values of {tensor}, of which base {model.path} has no float weights"
        )
    return source


def _interpolated(
    model: ModelDirectory, adapters: Sequence[Adapter], weights: Sequence[float], tensor: str
) -> Iterator[torch.Tensor]:
    """base + sum_i w_i (trained_i - base) of one tensor, in blocks of rows, float32."""
    source = base_tensor(model, tensor)
    trained: list[tuple[StoredTensor, float]] = [
        (a.saved[tensor], w) for a, w in zip(adapters, weights, strict=True) if tensor in a.saved
    ]
    if source.shape != trained[0][0].shape:
        raise InputError(
            f"the adapters hold trained values of {tensor}, of which base {model.path} has no float weights of the shape "
            f"{list(trained[0][0].shape)}"
        )
    for rows in source.blocks():
        block = source.read(rows)
        source.require_finite(block, rows)
        own = [saved.read(rows).to(source.wide) for saved, _ in trained]
        yield interpolate(block.to(source.wide), own, [weight for _, weight in trained]).float()


def _write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterator[torch.Tensor]) -> None:
    """A safetensors file of float32 tensors, whose values come in their order, whole or in blocks of rows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Of each tensor in turn: name, elements that are still to come.
    ahead = iter([(name, math.prod(shape)) for name, shape in shapes.items()])
    name, left = "", 0
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            while left == 0 < value.numel():
                name, left = next(ahead)
            left -= value.numel()
            _require_finite(name, value)
            handle.write(value.contiguous().numpy().data)
        size = handle.tell()
    if size != 8 + len(text) + end:
        raise ValueError(f"{size} bytes written where {8 + len(text) + end} were announced")


def _require_finite(name: str, *values: torch.Tensor) -> None:
    if not all(map(is_finite, values)):
        raise InputError(
            f"the merged {name.removeprefix(PREFIX)} is not finite in F32",
            allowed="adapters, scales and weights whose products are below 3.4e38, or --as checkpoint",
        )


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """adapter_config.json of the sum of adapters."""
    rank = max(ranks.values())
    patterns = _rank_pattern(ranks, rank)
    biases = {adapter.settings.bias for adapter in adapters}
    saved = sorted({name for adapter in adapters for name in _saved_modules(adapter)})
    return {
        "alpha_pattern": patterns,
        "auto_mapping": adapters[0].config.get("auto_mapping"),
        "base_model_name_or_path": base,
        "bias": next(kind for kind in ("all", "lora_only", "none") if kind in biases),
        "fan_in_fan_out": adapters[0].fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        **({"lora_bias": True} if any(adapter.shifts for adapter in adapters) else {}),
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "peft_version": version("peft"),
        "r": rank,
        "rank_pattern": patterns,
        "revision": adapters[0].revision,
        "target_modules": _target_modules(adapters),
        "task_type": adapters[0].config.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }


def _saved_modules(adapter: Adapter) -> set[str]:
    """modules_to_save of an adapter that ties nothing by itself: the output embedding is named beside the input."""
    names = set(adapter.settings.saved)
    if names and adapter.settings.tying:
        modules = {tensor.rpartition(".")[0] for tensor in adapter.saved}
        names |= {module for module in modules if not any(module.endswith(name) for name in names)}
    return names


def _target_modules(adapters: Sequence[Adapter]) -> list[str]:
    """Names that match the adapted modules and no other.

    Names that select in every adapter what it adapted select together what they adapted together. Where a selection
    had more to it (a regular expression, some layers only, a tie), each module is named in full.
    """
    narrowed = ("exclude_modules", "layers_to_transform")
    by_name = all(
        isinstance(adapter.settings.targets, tuple)
        and not adapter.settings.tying
        and not any(adapter.config.get(name) not in (None, [], "") for name in narrowed)
        for adapter in adapters
    )
    if by_name:
        return sorted({name for adapter in adapters for name in adapter.settings.targets})
    return _modules(adapters)


def _rank_pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """The modules whose rank is not `rank`: by last name where all modules of that name agree, else in full."""
    ranks_by_end: dict[str, set[int]] = {}
    for name, own in ranks.items():
        ranks_by_end.setdefault(name.rpartition(".")[2], set()).add(own)
    patterns: dict[str, int] = {}
    for name, own in ranks.items():
        end = name.rpartition(".")[2]
        if own != rank:
            patterns[re.escape(end) if len(ranks_by_end[end]) == 1 else f"^{re.escape(name)}"] = own
    return patterns
