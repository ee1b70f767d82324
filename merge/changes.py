"""Which tensors of a base adapters change, and how: by headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from psacpo.errors import InputError
from psacpo.merge.adapter_files import Adapter
from psacpo.merge.lora_config import HEADS
from psacpo.merge.models import ModelDirectory
from psacpo.merge.tensorfiles import FLOATING, Entry

# Names of the input embedding in transformers' language models.
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
# Embeddings that are never tied to the output.
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "token_type_embeddings")
# Model types whose linear layers (but the head) store weights as [inputs, outputs]: transformers' Conv1D.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Part:
    """What one adapter does to one tensor.

    Attributes:
        adapter: Its place among the adapters.
        kind: `delta`: factors are added; `dora`: the weight is made of factors and magnitudes; `saved`: the adapter
            holds trained values; `shift`: a scaled vector is added.
        name: The module whose factors, magnitude or shift it is, or the tensor by the adapter's name.
    """

    adapter: int
    kind: Literal["delta", "dora", "saved", "shift"]
    name: str


@dataclass(frozen=True)
class Change:
    """What adapters do to one tensor of a base.

    Attributes:
        parts: In the order of the adapters.
        transposed: The tensor is [inputs, outputs].
    """

    parts: tuple[Part, ...]
    transposed: bool


def plan_deltas(
    model: ModelDirectory, shapes: Mapping[str, tuple[int, int]], *, embeddings: Collection[str], fan_in_fan_out: bool
) -> dict[str, tuple[str, bool]]:
    """Tensor name in the base -> (module whose delta it takes, whether the delta is transposed to fit).

    Args:
        model: The base.
        shapes: Module name -> [outputs, inputs] of its delta.
        embeddings: The modules that are embeddings, whose weight is [inputs, outputs].
        fan_in_fan_out: What the adapters say of other weights; decides only for types of model that are not known.

    Raises:
        InputError: A delta finds no weight, one of another shape or of no floating dtype, or one that is tied.
    """
    plan = {}
    for module, shape in shapes.items():
        _refuse_tied(model, module, embedding=module in embeddings)
        name, turned = _place_delta(model, module, shape, module in embeddings, fan_in_fan_out)
        plan[name] = (module, turned)
    return plan


def plan_changes(model: ModelDirectory, adapters: Sequence[Adapter]) -> dict[str, Change]:
    """Tensor name in the base -> what the adapters do to it, for a merge into the base's weights.

    A base that ties its embeddings stays tied: adapters that change them are taken where the change of the input and
    of the output embedding are one and the same, and refused elsewhere.

    Raises:
        InputError: A change finds no tensor, one of another shape or of no floating dtype, or would untie the base.
    """
    plan: dict[str, Change] = {}

    def add(name: str, part: Part, turned: bool = False) -> None:
        before = plan.get(name, Change((), turned))
        plan[name] = Change((*before.parts, part), turned or before.transposed)

    for index, adapter in enumerate(adapters):
        tied = _tied_changes(model, adapter)
        for module in adapter.modules:
            embedding = module in adapter.embeddings
            if module in tied and not embedding and model.find(f"{module}.weight") is None:
                continue
            name, turned = _place_delta(model, module, adapter.shape(module), embedding, adapter.fan_in_fan_out)
            add(name, Part(index, "dora" if module in adapter.magnitudes else "delta", module), turned)
        for module, shift in adapter.shifts.items():
            add(_place(model, f"{module}.bias", tuple(shift.shape), module), Part(index, "shift", module))
        for tensor, saved in adapter.saved.items():
            module = tensor.rpartition(".")[0]
            if module in tied and _last(module) in HEADS and model.find(tensor) is None:
                continue
            add(_place(model, tensor, saved.entry.shape, module), Part(index, "saved", tensor))
    return plan


def require_fitting(model: ModelDirectory, adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters that PEFT would load on a base without a word, or with a long one, and that do not belong to it.

    Unlike for a merge into weights, a change of tied embeddings and a bias that the base lacks will do.

    Raises:
        InputError: A change finds no tensor, or one of another shape.
    """
    loaded: frozenset[str] | None = None
    for role, adapter in adapters.items():
        wanted: list[tuple[str, tuple[int, ...], bool]] = [
            (f"{module}.weight", adapter.shape(module), True) for module in adapter.modules
        ]
        wanted += [(tensor, saved.entry.shape, False) for tensor, saved in adapter.saved.items()]
        for tensor, shape, low_rank in wanted:
            module = tensor.rpartition(".")[0]
            stored = locate(model, tensor) or tied_partner(model, module)
            if stored is None:
                # What a class calls a module and what its checkpoints call it differ for some classes.
                loaded = _module_names(model) if loaded is None else loaded
                if module in loaded:
                    continue
                raise InputError(
                    f"{role} adapter {adapter.path} changes {module}, but base {model.path} has no weight {tensor}: "
                    "it would do nothing"
                )
            found = _entry(model, stored)
            if found.dtype not in FLOATING:
                continue
            turned = low_rank and _transposed(model, module, module in adapter.embeddings, adapter.fan_in_fan_out)
            _require_shape(model, module, found, shape[::-1] if turned else shape)


def locate(model: ModelDirectory, tensor: str) -> str | None:
    """The name under which a model's files hold a tensor, None where they do not.

    A checkpoint of the model without its head lacks the first part of the name (`transformer.h.0` is `h.0`).
    """
    if model.find(tensor) is not None:
        return tensor
    first, _, rest = tensor.partition(".")
    headless = not any(name.startswith(f"{first}.") for _, entries in model.shards.values() for name in entries)
    return rest if headless and rest and model.find(rest) is not None else None


def tied_partner(model: ModelDirectory, module: str) -> str | None:
    """The tensor that is the weight of an output embedding which a model ties, and so does not store; else None."""
    if _last(module) not in HEADS or not model.ties_embeddings:
        return None
    names = [name for _, entries in model.shards.values() for name in entries]
    return next((name for name in names if _last(name.removesuffix(".weight")) in _INPUTS), None)


def _tied_changes(model: ModelDirectory, adapter: Adapter) -> frozenset[str]:
    """The modules of both embeddings where an adapter changes both as one; the empty set where it changes neither."""
    modules = {module: module in adapter.embeddings for module in adapter.modules}
    modules |= {tensor.rpartition(".")[0]: False for tensor in adapter.saved if tensor.endswith(".weight")}
    changed = [
        module
        for module, embedding in modules.items()
        if (embedding and _last(module) not in _POSITIONS) or _last(module) in (*HEADS, *_INPUTS)
    ]
    if not changed or not model.ties_embeddings:
        return frozenset()
    if not _changes_agree(adapter, changed):
        _refuse_tied(model, min(changed, key=lambda module: _last(module) not in HEADS), embedding=True)
    return frozenset(changed)


def _changes_agree(adapter: Adapter, changed: Sequence[str]) -> bool:
    if len(changed) != 2 or sum(_last(module) in HEADS for module in changed) != 1:
        return False
    inputs, head = sorted(changed, key=lambda module: _last(module) in HEADS)
    if f"{inputs}.weight" in adapter.saved and f"{head}.weight" in adapter.saved:
        one, other = adapter.saved[f"{inputs}.weight"], adapter.saved[f"{head}.weight"]
        return one.shape == other.shape and all(torch.equal(one.read(rows), other.read(rows)) for rows in one.blocks())
    if inputs not in adapter.modules or head not in adapter.modules or {inputs, head} & set(adapter.magnitudes):
        return False
    one_factors, other_factors = adapter.modules[inputs].transposed(), adapter.modules[head]
    return (
        one_factors.scale == other_factors.scale
        and torch.equal(one_factors.A, other_factors.A)
        and torch.equal(one_factors.B, other_factors.B)
    )


def _refuse_tied(model: ModelDirectory, module: str, *, embedding: bool) -> None:
    if (_last(module) in HEADS or (embedding and _last(module) not in _POSITIONS)) and model.ties_embeddings:
        raise InputError(
            f"the adapters change {module}, which base {model.path} ties to its other embedding",
            allowed="--as adapter, or adapters on other modules",
        )


def _place_delta(
    model: ModelDirectory, module: str, shape: tuple[int, int], embedding: bool, fan_in_fan_out: bool
) -> tuple[str, bool]:
    turned = _transposed(model, module, embedding, fan_in_fan_out)
    return _place(model, f"{module}.weight", shape[::-1] if turned else shape, module), turned


def _transposed(model: ModelDirectory, module: str, embedding: bool, fan_in_fan_out: bool) -> bool:
    """Whether a module's weight is [inputs, outputs]. PEFT goes by its class, whatever the adapter says."""
    if embedding or _last(module) in HEADS:
        return embedding
    kind = model.config.get("model_type")
    if kind in _CONV1D or not fan_in_fan_out:
        return kind in _CONV1D
    from transformers import CONFIG_MAPPING

    return kind not in CONFIG_MAPPING


def _place(model: ModelDirectory, tensor: str, shape: tuple[int, ...], module: str) -> str:
    name = locate(model, tensor)
    if name is None:
        raise InputError(f"the adapters change {module}, but base {model.path} has no weight {tensor}")
    found = _entry(model, name)
    _require_shape(model, module, found, shape)
    if found.dtype not in FLOATING:
        raise InputError(
            f"base {model.path} has no float weights at {module}", given=found.dtype, allowed=", ".join(FLOATING)
        )
    return name


def _require_shape(model: ModelDirectory, module: str, found: Entry, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise InputError(
            f"shape mismatch at {module}: the adapters change a weight of shape {list(shape)}, the base has "
            f"{list(found.shape)}",
            given=f"base {model.path}",
        )


def _module_names(model: ModelDirectory) -> frozenset[str]:
    """The modules of the class that config.json names, built without weights; none where that cannot be."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model.path)
        kind = getattr(transformers, (config.architectures or [""])[0])
        with torch.device("meta"):
            return frozenset(name for name, _ in kind(config).named_modules())
    except Exception:  # noqa: BLE001 - a class that is not known here, or cannot be built so, whatever it raises
        return frozenset()


def _entry(model: ModelDirectory, name: str) -> Entry:
    found = model.find(name)
    assert found is not None
    return found[1]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
