"""A Hugging Face model directory by its headers: configuration, shards, where each tensor lies. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psacpo.errors import InputError
from psacpo.merge.pickles import model_command
from psacpo.merge.tensorfiles import Entry, read_header, read_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory by its headers: no weight is read.

    Attributes:
        path: The directory.
        config: config.json.
        index: The name of the shard index, None for a model in one file.
        shards: File name -> (where its tensors begin, its tensors in the order in which they lie).
    """

    path: Path
    config: Mapping[str, Any]
    index: str | None
    shards: Mapping[str, tuple[int, Mapping[str, Entry]]]

    def tensors(self) -> dict[str, tuple[str, Entry]]:
        """Every tensor, in the order of the files and as they lie there: name -> (the shard that holds it, its entry)."""
        return {name: (shard, entry) for shard, (_, entries) in self.shards.items() for name, entry in entries.items()}

    def find(self, tensor: str) -> tuple[str, Entry] | None:
        """The shard that holds a tensor, and its entry there."""
        for shard, (_, entries) in self.shards.items():
            if tensor in entries:
                return shard, entries[tensor]
        return None

    def read(self, tensor: str) -> torch.Tensor | None:
        """A tensor's values, None where there is no such tensor."""
        found = self.find(tensor)
        if found is None:
            return None
        from safetensors import safe_open

        with safe_open(self.path / found[0], framework="pt") as weights:
            value: torch.Tensor = weights.get_tensor(tensor)
            return value

    @property
    def ties_embeddings(self) -> bool:
        """Whether input and output embedding are one weight, also where config.json leaves that to the model class."""
        said = self.config.get("tie_word_embeddings")
        if said is not None:
            return bool(said)
        from transformers import AutoConfig

        try:
            return bool(AutoConfig.from_pretrained(self.path).tie_word_embeddings)
        except Exception:  # noqa: BLE001 - a class that is not known here, or settings that it refuses in its own way
            return True  # the careful answer


def read_model(path: Path) -> ModelDirectory:
    """A model directory by its headers.

    Raises:
        InputError: No safetensors weights, a missing or damaged shard or index, a tensor that is in two shards, or
            quantised weights.
    """
    require_model(path)
    config = read_json(path / CONFIG)
    if config.get("quantization_config"):
        raise InputError(
            f"base {path} is quantised (quantization_config in {CONFIG})", allowed="float weights, or --as adapter"
        )
    if (path / WEIGHTS).is_file():
        model = ModelDirectory(path, config, None, {WEIGHTS: read_header(path / WEIGHTS)})
    elif (path / INDEX).is_file():
        model = ModelDirectory(path, config, INDEX, _read_shards(path))
    else:
        pickled = sorted(file.name for file in path.glob("pytorch_model*"))
        if pickled:
            raise InputError(
                f"base {path} holds {pickled[0]}, which is pickle and not read",
                allowed=f"safetensors, as this writes them: {model_command(path)}",
            )
        raise InputError(f"{path} is not a model directory with weights: no {WEIGHTS} or {INDEX} in it")
    if not model.tensors():
        raise InputError(f"{path} is not a model directory with weights: they hold no tensor")
    return model


def _read_shards(path: Path) -> dict[str, tuple[int, dict[str, Entry]]]:
    """The shards that the index names, by their headers."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} is damaged: no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InputError(
                f"{path / INDEX} is damaged: the shard of {tensor} is no file name", given=repr(shard)[:80]
            )
    shards = {}
    for shard in sorted(set(weight_map.values())):
        # A shard is a file of this very directory; in a download cache it is a link to one elsewhere.
        if Path(shard).name != shard or not (path / shard).is_file():
            raise InputError(f"{path} lacks the shard {shard} that {INDEX} names")
        shards[shard] = read_header(path / shard)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard][1]:
            raise InputError(f"{path / shard} lacks the tensor {tensor} that {INDEX} places there")
    seen: dict[str, str] = {}
    for shard, (_, entries) in shards.items():
        for tensor in entries:
            if seen.setdefault(tensor, shard) != shard:
                raise InputError(f"{path} holds the tensor {tensor} twice, in {seen[tensor]} and {shard}")
    return shards


def require_model(path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"base {path} is an adapter directory ({ADAPTER_CONFIG} in it)", allowed="a model directory")
    if not (path / CONFIG).is_file():
        raise InputError(f"base {path} is not a model directory: no {CONFIG} in it")
