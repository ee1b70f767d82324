"""A LoRA adapter as PEFT keeps it on disk, checked and read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from psacpo.errors import InputError
from psacpo.files import digest, digest_file, digest_model, read_manifest
from psacpo.merge.arithmetic import Factors, lora_scale
from psacpo.merge.lora_config import CONFIG, LoraConfig, read_lora_config
from psacpo.merge.pickles import adapter_command
from psacpo.merge.stored import StoredTensor, stored_tensors
from psacpo.merge.tensorfiles import Entry

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "shift",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "copy",
}
_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<part>" + "|".join(map(re.escape, _PARTS)) + ")")
_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<name>.+\.[^.]+)")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: Its directory.
        base: The base model that it names (hub id or path).
        modules: Module name as in the base model (`model.layers.0.self_attn.q_proj`) -> factors in float32, or
            their own float64. For an embedding the factors are those of the transposed weight: A [rank, tokens], B [dimensions, rank].
        embeddings: Those modules that are embeddings.
        copies: Modules of which the adapter holds the base's own weight too (PEFT saves it for embeddings).
        config: adapter_config.json.
        digest: Of its weights and configuration.
        manifest: psacpo.json, if it has one.
        settings: What the configuration says, checked.
        tensors: Its file's tensors by key.
        magnitudes: DoRA: module name -> the norm of each output of its weight, [outputs], float32 or float64.
        shifts: lora_bias: module name -> the bias of its B, [outputs], likewise; the layer's bias grows by scale * this.
        saved: Name of a tensor of the base -> the adapter's own trained values of it (modules_to_save, bias).
        zero: Whether it changes nothing at all, as far as can be told without the base.
    """

    path: Path
    base: str
    modules: Mapping[str, Factors]
    embeddings: frozenset[str]
    copies: frozenset[str]
    config: Mapping[str, Any]
    digest: str
    manifest: Mapping[str, Any] | None
    settings: LoraConfig
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)
    zero: bool = False

    @property
    def base_digest(self) -> str | None:
        """Digest of the base that it was made on, where its manifest knows it."""
        found = (self.manifest or {}).get("base_digest")
        return found if isinstance(found, str) else None

    @property
    def content(self) -> str:
        """Digest of what it does to a base: not of what that base is called, so a moved project keeps its records."""
        config = {
            key: value for key, value in self.config.items() if key not in ("base_model_name_or_path", "revision")
        }
        return digest([digest_file(self.path / WEIGHTS), config])

    @property
    def revision(self) -> str | None:
        """The base's revision on the hub; None is the main branch."""
        return self.settings.revision

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weights as [inputs, outputs] (GPT-2's Conv1D)."""
        return self.settings.fan_in_fan_out

    def shape(self, module: str) -> tuple[int, int]:
        """[outputs, inputs] of a module's delta; reads nothing."""
        if isinstance(self.modules, StoredFactors):
            return self.modules.shape(module)
        return self.modules[module].shape

    def rank(self, module: str) -> int:
        """The rank of a module's delta; reads nothing."""
        if isinstance(self.modules, StoredFactors):
            return self.modules.rank(module)
        return self.modules[module].rank

    def copy_of(self, module: str) -> StoredTensor:
        """The base's weight of a module in `copies`, as the adapter holds it."""
        return self.tensors[f"{PREFIX}{module}.base_layer.weight"]


class StoredFactors(Mapping[str, Factors]):
    """The factors of an adapter's modules, each read from the file when it is asked for."""

    def __init__(self, places: Mapping[str, tuple[StoredTensor, StoredTensor, float]]) -> None:
        """`places`: module name -> where A and B lie, and the scale."""
        self._places = places

    def __getitem__(self, module: str) -> Factors:
        A, B, scale = self._places[module]
        return Factors(_wide(A), _wide(B), scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, module: object) -> bool:
        return module in self._places

    def shape(self, module: str) -> tuple[int, int]:
        A, B, _ = self._places[module]
        return B.shape[0], A.shape[1]

    def rank(self, module: str) -> int:
        return self._places[module][0].shape[0]


def read_adapter(path: Path, *, in_memory: bool = True) -> Adapter:
    """A PEFT LoRA directory, every number of it checked.

    Args:
        path: The directory.
        in_memory: Hold the factors. Otherwise each is read when it is asked for, so that an adapter of any size takes
            no memory; its file must then stay as it is.

    Raises:
        InputError: It is no adapter directory, is damaged, holds NaN or infinity, or is no LoRA that is known here.
    """
    _require_files(path)
    config, settings = read_lora_config(path)
    tensors, others = stored_tensors(path / WEIGHTS)
    found = _sorted(path, settings, tensors, others)
    some = {key: tensor.scan() for key, tensor in tensors.items() if key not in found.copied}
    modules = _factors(path, settings, found)
    vectors = {
        part: {name: _vector(path, modules, name, tensor) for name, tensor in sorted(places.items())}
        for part, places in (("shift", found.shifts), ("magnitude", found.magnitudes))
    }
    changed = any(some[tensor.name] for tensor in found.shifts.values()) or any(
        some[found.parts[name]["A"].name] and some[found.parts[name]["B"].name] and _changes(modules[name])
        for name in modules
    )
    try:
        content = digest_model(path)
    except OSError as error:
        raise InputError(f"cannot read the adapter {path}: {error.strerror}") from error
    return Adapter(
        path=path,
        base=settings.base,
        modules=modules if not in_memory else {name: modules[name] for name in modules},
        embeddings=frozenset(found.embeddings),
        copies=frozenset(found.copies),
        config=config,
        digest=content,
        manifest=read_manifest(path),
        settings=settings,
        tensors=tensors,
        magnitudes=vectors["magnitude"],
        shifts=vectors["shift"],
        saved=found.saved,
        zero=not changed and not found.saved and not found.magnitudes,
    )


def _require_files(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"no adapter directory at {path}", allowed=f"a PEFT directory with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} is not an adapter directory: no {CONFIG} in it")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").exists():
            raise InputError(
                f"{path} holds adapter_model.bin, which is pickle and not read",
                allowed=f"{WEIGHTS}, which this writes beside it: {adapter_command(path)}",
            )
        raise InputError(f"{path} is not an adapter directory: no {WEIGHTS} in it")


@dataclass
class _Found:
    """What an adapter's tensors are, by module (`saved`: by tensor of the base)."""

    parts: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    shifts: dict[str, StoredTensor] = field(default_factory=dict)
    magnitudes: dict[str, StoredTensor] = field(default_factory=dict)
    saved: dict[str, StoredTensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)
    copied: set[str] = field(default_factory=set)


def _sorted(
    path: Path, settings: LoraConfig, tensors: Mapping[str, StoredTensor], others: Mapping[str, Entry]
) -> _Found:
    found = _Found()
    for key, entry in others.items():
        raise InputError(
            f"adapter {path}: {key} is not of a floating dtype", given=f"{entry.dtype} of shape {list(entry.shape)}"
        )
    rest = []
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None:
            rest.append(key)
            continue
        module, part = match["module"], _PARTS[match["part"]]
        if part == "copy":
            found.copies.add(module)
            found.copied.add(key)
        elif part == "shift":
            found.shifts[module] = tensor
        elif part == "magnitude":
            found.magnitudes[module] = tensor
        else:
            if match["part"].startswith("lora_embedding"):
                found.embeddings.add(module)
            found.parts.setdefault(module, {})[part] = tensor
    for key in rest:
        match = _TENSOR.fullmatch(key)
        name = match["name"] if match is not None else ""
        module, _, last = name.rpartition(".")
        if module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
            name = f"{module}.{last}"
        if not name or not (settings.saves(name) or settings.trains_bias(name, adapted=module in found.parts)):
            raise InputError(
                f"adapter {path} holds a tensor that is not a LoRA factor, nor trained by its {CONFIG}: {key}"
            )
        found.saved[name] = tensors[key]
    if not found.parts:
        raise InputError(f"adapter {path} holds no LoRA factors")
    return found


def _factors(path: Path, settings: LoraConfig, found: _Found) -> StoredFactors:
    places = {}
    for module, parts in sorted(found.parts.items()):
        if len(parts) != 2:
            raise InputError(f"adapter {path} holds only one of the two factors of {module}")
        if not settings.targets_module(module):
            raise InputError(f"adapter {path} holds factors of {module}, which its target_modules do not name")
        A, B = parts["A"], parts["B"]
        for tensor in (A, B):
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise InputError(
                    f"adapter {path}: {tensor.name} is not a matrix of numbers",
                    given=f"{tensor.entry.dtype} of shape {list(tensor.entry.shape)}",
                )
        rank = settings.rank_of(module)
        if A.shape[0] != rank or B.shape[1] != rank:
            raise InputError(
                f"adapter {path}: the factors of {module} do not have the rank that {CONFIG} says",
                given=f"A {list(A.shape)}, B {list(B.shape)}",
                allowed=f"rank {rank}",
            )
        places[module] = A, B, lora_scale(settings.alpha_of(module), rank, rslora=settings.rslora)
    for what, wanted, given in (
        ("use_dora", settings.dora, found.magnitudes),
        ("lora_bias", settings.lora_bias, found.shifts),
    ):
        for module in sorted(given if not wanted else places):
            if (module in places and module in given) != wanted:
                part = "a magnitude" if what == "use_dora" else "a bias of lora_B"
                raise InputError(
                    f"adapter {path} {'lacks' if wanted else 'holds'} {part} for {module}",
                    given=f"{what} {str(wanted).lower()} in {CONFIG}",
                )
        for module in given:
            if module not in places:
                raise InputError(f"adapter {path} holds {given[module].name} without the factors of {module}")
    return StoredFactors(places)


def _changes(factors: Factors) -> bool:
    """Whether any column of B that is not zero meets a row of A that is not."""
    return bool((factors.B.any(dim=0) & factors.A.any(dim=1)).any())


def _vector(path: Path, modules: StoredFactors, module: str, tensor: StoredTensor) -> torch.Tensor:
    outputs = modules.shape(module)[0]
    if tensor.entry.shape != (outputs,):
        raise InputError(
            f"adapter {path}: {tensor.name} does not fit the factors beside it",
            given=f"shape {list(tensor.entry.shape)}",
            allowed=f"[{outputs}]",
        )
    return _wide(tensor)


def _wide(tensor: StoredTensor) -> torch.Tensor:
    """Its values in what they are computed in."""
    return tensor.read().to(tensor.wide)
