"""What lies beside a model's weights and belongs to it: configuration, tokenizer, templates, licence, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from psacpo.files import MANIFEST, digest_file
from psacpo.hub import OTHER_WEIGHTS
from psacpo.merge.models import CONFIG, ModelDirectory
from psacpo.merge.tensorfiles import read_header

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "tekken.json")


def side_files(model: ModelDirectory) -> list[str]:
    """Names of what is copied verbatim; no weights of any format, nothing hidden, no card and no manifest."""
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


def copy_side_files(model: ModelDirectory, directory: Path, *, dtype: str | None = None) -> None:
    """Copy them beside the weights; with `dtype` config.json names that one, and the index the bytes that it takes.

    Args:
        model: The model.
        directory: Where to.
        dtype: As config.json says it ("bfloat16"), where the weights are written in another one than the model's.
    """
    for name in side_files(model):
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(model.path / name, target)
    if dtype is not None:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        (directory / CONFIG).write_text(json.dumps(config | {key: dtype}, indent=2) + "\n", encoding="utf-8")
        if model.index:
            index = json.loads((directory / model.index).read_text(encoding="utf-8"))
            total = sum((directory / shard).stat().st_size for shard in model.shards)
            headers = sum(read_header(directory / shard)[0] for shard in model.shards)
            metadata = index.get("metadata")
            index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total - headers}
            (directory / model.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tokenizer_warnings(models: Mapping[str, ModelDirectory], layout: ModelDirectory) -> list[str]:
    """A line for each model whose tokenizer files are not those that the output gets."""

    def digests(model: ModelDirectory) -> dict[str, str]:
        return {name: digest_file(model.path / name) for name in _TOKENIZER if (model.path / name).is_file()}

    wanted = digests(layout)
    return [
        f"the tokenizer of {name} is not that of {layout.path}, which the output has"
        for name, model in models.items()
        if digests(model) and digests(model) != wanted
    ]
