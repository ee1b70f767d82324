"""A Hugging Face model directory by its headers: configuration, shards, where each tensor lies. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psacpo.errors import InputError
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
        except (ValueError, OSError, AttributeError):
            return True  # a model class that is not known here: the careful answer


def read_model(path: Path) -> ModelDirectory:
    """A model directory by its headers.

    Raises:
        InputError: No safetensors weights, a missing or damaged shard, or quantised weights.
    """
    require_model(path)
    config = read_json(path / CONFIG)
    if config.get("quantization_config"):
        raise InputError(
            f"base {path} is quantised (quantization_config in {CONFIG})", allowed="float weights, or --as adapter"
        )
    if (path / WEIGHTS).is_file():
        return ModelDirectory(path, config, None, {WEIGHTS: read_header(path / WEIGHTS)})
    if not (path / INDEX).is_file():
        pickled = sorted(file.name for file in path.glob("pytorch_model*"))
        if pickled:
            raise InputError(f"base {path} holds {pickled[0]}, which is pickle and not read", allowed="safetensors")
        raise InputError(f"{path} is not a model directory with weights: no {WEIGHTS} or {INDEX} in it")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} is damaged: no weight_map")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise InputError(f"{path} lacks the shard {shard} that {INDEX} names")
        shards[shard] = read_header(path / shard)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard][1]:
            raise InputError(f"{path / shard} lacks the tensor {tensor} that {INDEX} places there")
    return ModelDirectory(path, config, INDEX, shards)


def require_model(path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"base {path} is an adapter directory ({ADAPTER_CONFIG} in it)", allowed="a model directory")
    if not (path / CONFIG).is_file():
        raise InputError(f"base {path} is not a model directory: no {CONFIG} in it")
