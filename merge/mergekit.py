"""mergekit's merge files, read: what `mergekit-yaml` would be told, as settings of the methods here.

What is read means the same as in mergekit 0.1.5. What is not read is refused by name; nothing that would change the
result is passed over. One difference stays: `dtype` names the dtype of the output (unless `out_dtype` does), and the
arithmetic is always in float32 on the weights as stored; mergekit first rounds the weights to `dtype` and works in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from psacpo.config import Strict, read_yaml, validate
from psacpo.errors import InputError, unknown_name
from psacpo.merge.models import ModelDirectory
from psacpo.merge.parameters import MethodSettings, Setting, count_layers, method_settings
from psacpo.merge.signatures import SIGNATURES
from psacpo.merge.tensorfiles import read_json

# mergekit's names of dtypes -> those of safetensors.
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# Keys of mergekit's that change the result and are not read -> what to do instead.
_REFUSED = {
    "modules": "models, or one slice that covers the whole model; for models of several modules use mergekit",
    "tokenizer": "tokenizer_source: base, or none; to build another tokenizer use mergekit",
    "chat_template": "none: the chat template of the base is kept; edit it in the output",
}
_REFUSED_IN_SLICE = {"residual_weight": "none; use mergekit"}


class ModelReference(Strict):
    """A model as the file names it: a directory, or a hub id with its revision."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


class MergekitSpec(Strict):
    """A mergekit file's merge.

    Attributes:
        settings: The method and its settings, one entry in `settings.models` for each of `models`.
        models: The sources in order: without the base for methods that work on differences from it; for slerp the base
            first, which is where t is 0.
        base: What differences are taken from; None for methods that do not.
        layout: The model whose configuration, tokenizer and side files the output has: the file's `base_model`, or its
            first model.
        dtype: Of the output, as safetensors calls it; None keeps the models' own.
        tokenizer_source: `base`, where the file says so.
        layers: The number of layers that the file's slices say the models have.
    """

    settings: MethodSettings
    models: tuple[ModelReference, ...]
    base: ModelReference | None
    layout: ModelReference
    dtype: str | None = None
    tokenizer_source: Literal["base"] | None = None
    layers: int | None = None


class _Model(Strict):
    model: str
    parameters: dict[str, Setting] | None = None


class _Source(_Model):
    layer_range: tuple[int, int]


class _Slice(Strict):
    sources: list[_Source] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Setting] | None = None


class _File(Strict):
    merge_method: str
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    parameters: dict[str, Setting] | None = None


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is a mergekit file: no recipe of psacpo has a `merge_method`."""
    return "merge_method" in values


def read_mergekit(path: Path) -> MergekitSpec:
    """A mergekit YAML file of one of the methods here.

    `models`, and `slices` with one slice that covers the whole model, are read. A model is a directory beside the file if
    there is one of that name, else a hub id, with a revision after @.

    Raises:
        InputError: No such file, a method or key that is not read (by name), values out of range, `model+lora`.
    """
    values = read_yaml(path)
    where = str(path)
    _refuse(values, where)
    file = validate(_File, values, where=where)
    if file.merge_method not in SIGNATURES:
        raise InputError(f"{where}: {unknown_name('merge_method', file.merge_method, SIGNATURES)}, or use mergekit")
    if (file.models is None) == (file.slices is None):
        raise InputError(f"{where} must hold either models or slices")

    given: Sequence[_Model]
    shared = dict(file.parameters or {})
    base_name, layers = file.base_model, None
    if file.slices is not None:
        whole, layers = _whole_slice(file.slices, where)
        given, base_name = whole.sources, whole.base_model or base_name
        # What a slice gives comes before what the file gives for all; where its filters do not hold, the file's do.
        for key, cases in (whole.parameters or {}).items():
            shared[key] = (*cases, *shared.get(key, ()))
    else:
        given = file.models or []
    if not given:
        raise InputError(f"{where} names no models")

    references = [_reference(one.model, path) for one in given]
    if len(set(references)) != len(references):
        repeated = next(str(one) for one in references if references.count(one) > 1)
        raise InputError(f"{where} names a model twice", given=repeated, allowed="each model once")
    base = _reference(base_name, path) if base_name else None
    _check_tokenizer(file, base, where)
    models = dict(zip(references, (one.parameters or {} for one in given), strict=True))
    ordered, under = _in_order(file, base, models, where)
    return MergekitSpec(
        settings=method_settings(file.merge_method, [models[one] for one in ordered], shared, where=where),
        models=tuple(ordered),
        base=under,
        layout=base or references[0],
        dtype=_dtype(file, where),
        tokenizer_source="base" if file.tokenizer_source else None,
        layers=layers,
    )


def require_models_fit(models: Sequence[ModelDirectory], *, layers: int | None, one_vocabulary: bool) -> None:
    """Check what the file says of the models against them: layers, and for `tokenizer_source: base` one vocabulary.

    mergekit would put embedding rows in the base's order, and leave out rows beyond its tokenizer; here the rows stay as
    they are, so the models' tokenizers must agree.

    Raises:
        InputError: They do not.
    """
    first = models[0]
    for model in models:
        tensors = (name for _, entries in model.shards.values() for name in entries)
        count = max(count_layers(tensors).values(), default=0)
        if layers is not None and count != layers:
            raise InputError(
                f"slices that leave out layers of a model are not read: {model.path} has {count} layers",
                given=f"layer_range [0, {layers}]",
                allowed=f"[0, {count}], or mergekit",
            )
        if one_vocabulary and model is not first and _vocabulary(model) != _vocabulary(first):
            raise InputError(
                f"tokenizer_source: base with different tokenizers: {model.path} has another vocabulary than {first.path}",
                allowed="models of one vocabulary, or mergekit",
            )


def _refuse(values: Mapping[str, Any], where: str) -> None:
    found = [(key, told) for key, told in _REFUSED.items() if values.get(key) is not None]
    slices = values.get("slices")
    for one in slices if isinstance(slices, list) else []:
        if isinstance(one, dict):
            found += [(key, told) for key, told in _REFUSED_IN_SLICE.items() if one.get(key) is not None]
    for key, told in found:
        raise InputError(f"{where}: {key} is not read", allowed=told)
    if values.get("merge_method") == "passthrough":
        raise InputError(f"{where}: passthrough slices stack layers of models and are not read; use mergekit")


def _whole_slice(slices: Sequence[_Slice], where: str) -> tuple[_Slice, int]:
    """The one slice, and the number of layers that it covers."""
    if len(slices) != 1:
        raise InputError(
            f"{where}: a model built of several slices is not read; use mergekit",
            given=f"{len(slices)} slices",
            allowed="one slice that covers the whole model",
        )
    ranges = {source.layer_range for source in slices[0].sources}
    start, stop = next(iter(ranges))
    if len(ranges) != 1 or start != 0 or stop < 1:
        raise InputError(
            f"{where}: slices that do not cover the whole model are not read; use mergekit",
            given=", ".join(str(list(one)) for one in sorted(ranges)),
            allowed="the same layer_range [0, layers] for each source",
        )
    return slices[0], stop


def _reference(name: str, file: Path) -> ModelReference:
    """A directory beside the file or as named, else what mergekit takes a name for: hub id, @ and revision."""
    if not name.strip():
        raise InputError(f"{file}: '{name}' names no model", allowed="a directory, or a hub id")
    path = Path(name).expanduser()
    for candidate in (file.parent / path, path):
        if candidate.is_dir():
            return ModelReference(name=str(candidate))
    if "+" in name:
        raise InputError(
            f"{file}: the model+lora syntax is not read",
            given=name,
            allowed="full models; merge adapters with psacpo merge --base --reward --safety, or --policy DIR=weight",
        )
    model, _, revision = name.partition("@")
    if not model or "@" in revision:
        raise InputError(f"{file}: '{name}' names no model", allowed="a directory, or a hub id")
    return ModelReference(name=model, revision=revision or None)


def _in_order(
    file: _File, base: ModelReference | None, models: dict[ModelReference, Any], where: str
) -> tuple[list[ModelReference], ModelReference | None]:
    """The sources in the order that the method takes them, and the base that it takes differences from."""
    takes = SIGNATURES[file.merge_method]
    others = [one for one in models if one != base]
    if file.merge_method == "linear":
        # Here the base is a model like the others; mergekit counts it as one also where `models` does not list it.
        if base is not None and base not in models and file.slices is None:
            models[base] = {}
        return list(models), None
    if base is None and (takes.base == "required" or file.merge_method == "slerp"):
        raise InputError(f"{where}: {file.merge_method} needs a base_model")
    if file.merge_method == "slerp":
        assert base is not None
        models.setdefault(base, {})
        return [base, *others], None
    return others, base


def _check_tokenizer(file: _File, base: ModelReference | None, where: str) -> None:
    if file.tokenizer_source not in (None, "base"):
        raise InputError(
            f"{where}: tokenizer_source is not read but for base; use mergekit",
            given=file.tokenizer_source,
            allowed="base, or none",
        )
    if file.tokenizer_source and base is None:
        raise InputError(f"{where}: tokenizer_source: base without a base_model")


def _dtype(file: _File, where: str) -> str | None:
    for key, name in (("out_dtype", file.out_dtype), ("dtype", file.dtype)):
        if name:
            plain = name.removeprefix("torch.")
            if plain not in _DTYPES:
                raise InputError(f"{where}: {unknown_name(key, name, _DTYPES)}")
            return _DTYPES[plain]
    return None


def _vocabulary(model: ModelDirectory) -> object:
    """Token -> number, of a fast tokenizer; for others, the bytes of their files."""
    if (model.path / "tokenizer.json").is_file():
        stored = read_json(model.path / "tokenizer.json")
        added = {token["content"]: token["id"] for token in stored.get("added_tokens") or []}
        return [json.dumps(stored.get("model", {}).get("vocab"), sort_keys=True), added]
    files = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
    return {name: (model.path / name).read_bytes() for name in files if (model.path / name).is_file()}
