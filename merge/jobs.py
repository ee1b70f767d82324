"""What is to be merged, once it is certain that it can be: from which sources, by which route, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.files import canonical_json, digest, digest_file
from psacpo.hub import is_path, model_directory
from psacpo.merge.config import SAFETENSORS_DTYPES, MergeConfig, Mix, OutputKind
from psacpo.merge.models import ADAPTER_CONFIG, ModelDirectory, read_model
from psacpo.merge.sidefiles import copy_side_files, side_files, tokenizer_warnings
from psacpo.merge.tensorfiles import FLOATING, byte_size

Open = Callable[[Mix], AbstractContextManager[Path]]
"""Gives the directory to write one output in, which becomes the output when it is left without an error."""
Describe = Callable[[Mix, Path, Mapping[str, Any]], None]
"""Writes card and manifest of one output, with what only the work could tell."""
Advance = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A merge that has passed every check.

    Attributes:
        kind: What comes out.
        base: What the card calls the base.
        sources: Name -> the directory that was read.
        of_adapters: Whether adapters come in.
        places: Directories of which no output may be a part.
        digests: Input -> SHA-256, as far as known before the work.
        key: Digest of what decides the outputs' bytes.
        tensors: How many an output has.
        bytes_in: What is read, once for all outputs.
        bytes_out: What one output takes on disk.
        memory: About how many bytes are held at once.
        work: Total of what `write` advances by for one output.
        write: Writes the outputs.
        warnings: What is odd and no error.
        facts: What each manifest says besides.
        directories: What was read that is no source.
    """

    kind: OutputKind
    base: str
    sources: Mapping[str, Path]
    of_adapters: bool
    places: Sequence[Path]
    digests: Mapping[str, str]
    key: str
    tensors: int
    bytes_in: int
    bytes_out: Callable[[Mix], int]
    memory: int
    work: int
    write: Callable[[Sequence[Mix], Open, Describe, Advance], None]
    warnings: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    directories: Mapping[str, Path] = field(default_factory=dict)


def prepare(config: MergeConfig, mixes: Sequence[Mix]) -> Job:
    """Find out what the sources are, check that they fit, and choose the route.

    Raises:
        InputError: A source is missing, damaged or of another kind than the others, or cannot be merged so.
    """
    places = {name: _source_directory(name, where) for name, where in config.sources.items()}
    adapters = {name for name, place in places.items() if (place / ADAPTER_CONFIG).is_file()}
    if adapters and adapters != set(places):
        model = next(name for name in places if name not in adapters)
        raise InputError(
            f"{next(iter(sorted(adapters)))} is an adapter and {model} is a full model",
            allowed="adapters on one base, or full models",
        )
    if adapters:
        from psacpo.merge.adapter_jobs import prepare_adapters

        return prepare_adapters(config, mixes, places)
    return _prepare_models(config, mixes, places)


def checkpoint_writer(
    layout: ModelDirectory,
    make: Callable[[Sequence[Mix]], Any],
    inputs: Callable[[Any], Mapping[str, str]],
    *,
    dtype: str | None,
    write_files: Callable[..., list[dict[str, str]]] | None = None,
) -> Callable[[Sequence[Mix], Open, Describe, Advance], None]:
    """A `Job.write` of full weights: side files, then every shard of `layout` for all outputs in one pass.

    Args:
        layout: The model whose shards and side files the outputs have.
        make: Mixes -> the producer of their tensors.
        inputs: The producer, once it is through -> digests of inputs that only then are known.
        dtype: Of the outputs, in config.json's words; None keeps the layout's.
        write_files: Writes the shards as `psacpo.merge.shards.write_shards` does, which it is by default.
    """

    def write(mixes: Sequence[Mix], open_directory: Open, describe: Describe, advance: Advance) -> None:
        from psacpo.merge.shards import write_shards

        with ExitStack() as stack:
            directories = [stack.enter_context(open_directory(mix)) for mix in mixes]
            produce = make(mixes)
            stored = SAFETENSORS_DTYPES[dtype] if dtype else None
            written = (write_files or write_shards)(directories, layout, produce, dtype=stored, done=advance)
            found = inputs(produce)
            for mix, directory, files in zip(mixes, directories, written, strict=True):
                copy_side_files(layout, directory, dtype=dtype)
                describe(mix, directory, {"outputs": files, "inputs": found})

    return write


def weights_digest(files: Mapping[str, str]) -> str:
    """One digest of a model's weights from those of its shards; `xxh3:` in front, as theirs have it."""
    return f"xxh3:{digest(dict(sorted(files.items())))}"


def read_digest(model: ModelDirectory) -> str:
    """The digest of a model's weights, for which every byte of them is read."""
    from psacpo.merge.shards import digest_shard

    return weights_digest({shard: digest_shard(model.path / shard) for shard in model.shards})


def identity(models: Mapping[str, ModelDirectory]) -> str:
    """Digest of what the files of models are, without reading them: name, size, times and inode of each."""
    return digest(
        [[name, [[shard, *_stat(model.path / shard)] for shard in model.shards]] for name, model in models.items()]
    )


def model_bytes(model: ModelDirectory) -> int:
    """What the shards of a model take."""
    return sum((model.path / shard).stat().st_size for shard in model.shards)


def written_bytes(layout: ModelDirectory, dtype: str | None) -> int:
    """What an output in a model's layout takes, with the side files; `dtype` in safetensors' words, None keeps its own."""
    small = sum((layout.path / name).stat().st_size for name in side_files(layout))
    entries = [entry for _, found in layout.shards.values() for entry in found.values()]
    headers = sum(begin for begin, _ in layout.shards.values())
    return (
        small + headers + sum(byte_size((dtype if e.dtype in FLOATING else None) or e.dtype, e.shape) for e in entries)
    )


def side_digests(layout: ModelDirectory) -> dict[str, str]:
    """What an output takes from its layout besides weights: file name -> SHA-256."""
    return {name: digest_file(layout.path / name) for name in side_files(layout)}


def _stat(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _source_directory(name: str, where: str) -> Path:
    """The directory of an adapter or a model; a hub id, with a revision behind an @ if it has one, is fetched."""
    try:
        where.encode()  # it will be written down
        path = Path(where).expanduser()
        if path.is_dir():
            return path
        there = path.exists() or is_path(where)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        shown = ascii(where if len(where) <= 80 else f"{where[:77]}...")
        raise InputError(f"no {name} adapter or model directory can be at {shown}: {reason}") from error
    if there:
        raise InputError(f"no {name} adapter or model directory at {where}")
    hub_id, _, revision = where.partition("@")
    return model_directory(hub_id, what=name, revision=revision or None)


def _prepare_models(config: MergeConfig, mixes: Sequence[Mix], places: Mapping[str, Path]) -> Job:
    if config.as_ == "adapter":
        raise InputError("full models cannot be merged to an adapter", allowed="--as checkpoint, or adapters")
    if config.rank is not None:
        raise InputError("rank is of adapters, and these are full models", given=f"--rank {config.rank}")
    models = {name: read_model(place) for name, place in places.items()}
    base = read_model(_source_directory("base", config.base)) if config.base is not None else None
    if config.layers is not None or config.one_vocabulary:
        from psacpo.merge.mergekit import require_models_fit

        require_models_fit(list(models.values()), layers=config.layers, one_vocabulary=config.one_vocabulary)
    plain = all(mix.weights is not None for mix in mixes)
    if base is not None and plain:
        raise InputError(
            "a base is of adapters, or of methods that merge differences from it; linear merges full models as they are",
            given=f"--base {config.base}",
        )
    layout = _layout(config, models, base)
    everyone = [*models.values(), *([base] if base else [])]
    stored = SAFETENSORS_DTYPES[config.dtype] if config.dtype else None
    if plain:
        from psacpo.merge.linear import linear_producer, require_same_tensors
        from psacpo.merge.processes import write_in_processes

        require_same_tensors(models)
        write_files: Any = write_in_processes

        def inputs(producer: Any) -> Mapping[str, str]:
            return dict(zip(models, map(weights_digest, producer.input_digests()), strict=True))

        def make(chosen: Sequence[Mix]) -> Any:
            return linear_producer(list(models.values()), [mix.weights or () for mix in chosen], dtype=stored)
    else:
        from psacpo.merge.combine import method_producer

        write_files = None

        def inputs(producer: Any) -> Mapping[str, str]:
            named = {**models, **({"base": base} if base else {})}
            return {name: read_digest(model) for name, model in named.items()}

        def make(chosen: Sequence[Mix]) -> Any:
            return method_producer(
                list(models.values()), base, [mix.settings for mix in chosen], dtype=stored, seed=config.seed
            )

        make(mixes)
    entries = [entry for _, found in layout.shards.values() for entry in found.values()]
    size = written_bytes(layout, stored)
    largest = max((entry.end - entry.start for entry in entries), default=0)
    return Job(
        kind="checkpoint",
        base=str(layout.path),
        sources=places,
        of_adapters=False,
        places=list({*places.values(), layout.path, *([base.path] if base else [])}),
        digests={},
        key=digest(
            [identity(models | ({"base": base} if base else {})), layout.path, side_digests(layout), decisive(config)]
        ),
        tensors=len(entries),
        bytes_in=sum(map(model_bytes, everyone)),
        bytes_out=lambda mix: size,
        memory=(40 << 20) if plain else (500 << 20) + 4 * (len(everyone) + 2) * largest,
        work=model_bytes(layout),
        write=checkpoint_writer(layout, make, inputs, dtype=config.dtype, write_files=write_files),
        warnings=tokenizer_warnings(models, layout),
        directories={"layout": layout.path} | ({"base": base.path} if base else {}),
    )


def _layout(config: MergeConfig, models: Mapping[str, ModelDirectory], base: ModelDirectory | None) -> ModelDirectory:
    """The model whose shards and side files the outputs have."""
    if config.layout is None:
        return base or next(iter(models.values()))
    wanted = _source_directory("layout", config.layout).resolve()
    known = [*models.values(), *([base] if base else [])]
    return next((model for model in known if model.path.resolve() == wanted), None) or read_model(wanted)


def decisive(config: MergeConfig) -> str:
    """The settings that decide an output's bytes, as text; but for its ratio, which is in its name."""
    machine = {"out", "overwrite", "push_to_hub", "private", "ratios"}
    return canonical_json(config.model_dump(mode="json", by_alias=True, exclude=machine))
