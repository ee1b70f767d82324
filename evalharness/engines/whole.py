"""An end of the sweep that is no adapter but a whole model: trained in full, as the paper's own are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from psacpo.errors import InputError
from psacpo.files import digest_model
from psacpo.merge.adapters import Adapter, read_adapter
from psacpo.merge.lora_config import CONFIG, HEADS, LoraConfig
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.stored import StoredTensor, stored_in

_NONE = LoraConfig(
    base="",
    revision=None,
    rank=1,
    alpha=1.0,
    rank_pattern={},
    alpha_pattern={},
    targets=(),
    saved=(),
    bias="none",
    rslora=False,
    dora=False,
    lora_bias=False,
    fan_in_fan_out=False,
    tying=False,
)


class WholeModel(Adapter):
    """A model directory as the change W_i - W_base of every tensor: an adapter that trained all of them."""

    @property
    def content(self) -> str:
        return self.digest


def read_policy(path: Path, base: Path | str) -> Adapter:
    """A PEFT directory, or a model directory of the base's architecture; of a model the headers only.

    Args:
        path: The directory.
        base: The base's directory, which a whole model is measured from; a hub id that is not a directory is looked
            at when the base is.

    Raises:
        InputError: It is neither, is damaged, or lacks a weight that the base has.
    """
    if (path / CONFIG).is_file() or not (path / "config.json").is_file():
        return read_adapter(path)
    model = read_model(path)
    saved = {name: tensor for name in model.tensors() if (tensor := stored_in(model, name)) is not None}
    if Path(base).is_dir():
        saved |= _heads(model, saved, read_model(Path(base)))
    return WholeModel(
        path=path,
        base=str(base),
        modules={},
        embeddings=frozenset(),
        copies=frozenset(),
        config={},
        digest=digest_model(path),
        manifest=None,
        settings=_NONE,
        saved=saved,
    )


def _heads(model: ModelDirectory, saved: Mapping[str, StoredTensor], base: ModelDirectory) -> dict[str, StoredTensor]:
    """The output embedding of a model that ties it, which no file names: the change of a tied pair is one change."""
    lacking = [name for name in base.tensors() if name not in saved and stored_in(base, name) is not None]
    heads = [name for name in lacking if name.removesuffix(".weight").rpartition(".")[2] in HEADS]
    if other := [name for name in lacking if name not in heads]:
        raise InputError(f"{model.path} lacks the weight {other[0]} that base {base.path} has")
    if not base.ties_embeddings:
        if heads:
            raise InputError(f"{model.path} lacks the weight {heads[0]} that base {base.path} has")
        return {}
    pairs = [name for name in saved if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    known = any(name.removesuffix(".weight").rpartition(".")[2] in HEADS for name in saved)
    return {} if known or not pairs else {heads[0] if heads else "lm_head.weight": saved[pairs[0]]}
