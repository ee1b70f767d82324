"""Merging LoRA adapters: to an adapter whose delta is the mix of theirs, or into the weights of their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.files import digest
from psacpo.merge.adapters import (
    WEIGHTS,
    Adapter,
    adapter_bytes,
    factors_by_module,
    read_adapter,
    require_compatible,
    require_plain,
    require_writable,
    warnings_of,
    write_adapter,
)
from psacpo.merge.bases import Base, find_base
from psacpo.merge.card import Dial
from psacpo.merge.changes import plan_changes
from psacpo.merge.checkpoints import delta_producer, write_in_threads
from psacpo.merge.config import SAFETENSORS_DTYPES, MergeConfig, Mix
from psacpo.merge.deltas import delta_method_producer
from psacpo.merge.jobs import (
    Advance,
    Describe,
    Job,
    Open,
    checkpoint_writer,
    decisive,
    identity,
    model_bytes,
    side_digests,
    weights_digest,
    written_bytes,
)
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.shards import digest_shard
from psacpo.merge.signatures import DELTA_METHODS

# torch and its libraries, once they have run.
_RUNTIME = 350 << 20


def prepare_adapters(config: MergeConfig, mixes: Sequence[Mix], places: Mapping[str, Path]) -> Job:
    """The job of merging adapters.

    Raises:
        InputError: An adapter or the base is not fit, they do not belong together, or the method needs full models.
    """
    kind = config.as_ or "adapter"
    if config.dtype is not None and kind == "adapter":
        raise InputError(
            "dtype is of full weights; an adapter is written in float32",
            given=f"--dtype {config.dtype}",
            allowed="--as checkpoint, or no dtype",
        )
    if config.method != "linear" and kind == "adapter":
        raise InputError(
            f"{config.method} is not written as an adapter", allowed="--as checkpoint, or the method linear"
        )
    if config.method != "linear" and config.method not in DELTA_METHODS:
        raise InputError(
            f"{config.method} works on weights, not on the deltas of adapters",
            allowed=f"linear, {', '.join(DELTA_METHODS)}, or full models",
        )
    adapters = {name: read_adapter(place) for name, place in places.items()}
    require_compatible(adapters)
    # A linear merge into weights reads every byte of the base anyway.
    learned = kind == "checkpoint" and config.method == "linear"
    base = find_base(
        config.base,
        adapters,
        on_disk=kind == "checkpoint",
        allow_different_base=config.allow_different_base,
        digested=not learned,
    )
    known = base.digest or next((a.base_digest for a in adapters.values() if a.base_digest), None)
    digests = ({"base": known} if known else {}) | {name: adapter.digest for name, adapter in adapters.items()}
    common: dict[str, Any] = {
        "kind": kind,
        "base": base.name,
        "sources": places,
        "of_adapters": True,
        "places": [*places.values(), *([base.path] if base.path else [])],
        "digests": digests,
        "key": digest([digests, decisive(config)]),
        "warnings": _warnings(adapters),
        "facts": {"base_digest": known, "dial": _dial(adapters)},
        "directories": {"base": base.path} if base.path else {},
    }
    given = list(adapters.values())
    model = read_model(base.path) if base.path is not None else None
    if kind == "checkpoint":
        assert model is not None
        own = [] if base.digest else [identity({"base": model})]
        common["key"] = digest([common["key"], side_digests(model), *own])
        return Job(**common, **_checkpoint(config, model, given, learn=base.digest is None))
    require_writable(given)
    return Job(**common, **_adapter(config, base, model, given))


def _adapter(
    config: MergeConfig, base: Base, model: ModelDirectory | None, adapters: Sequence[Adapter]
) -> dict[str, Any]:
    def write(mixes: Sequence[Mix], open_directory: Open, describe: Describe, advance: Advance) -> None:
        for mix in mixes:
            with open_directory(mix) as directory:
                weights = _weights(mix)
                written = write_adapter(directory, adapters, weights, base=base.name, rank=config.rank, model=model)
                more = {"truncation": dict(written.errors)} if config.rank else {}
                describe(mix, directory, {"rank": written.rank, "outputs": _outputs(directory), **more})
            advance(1)

    return {
        "tensors": 2 * len(factors_by_module(adapters)),
        "bytes_in": _adapter_files(adapters),
        "bytes_out": lambda mix: adapter_bytes(adapters, _weights(mix), rank=config.rank),
        "memory": _RUNTIME + _adapter_files(adapters),
        "work": 1,
        "write": write,
    }


def _checkpoint(
    config: MergeConfig, model: ModelDirectory, adapters: Sequence[Adapter], *, learn: bool
) -> dict[str, Any]:
    """`learn`: the digest of the base is not known before the work."""
    dtype = SAFETENSORS_DTYPES[config.dtype] if config.dtype else None
    plan_changes(model, adapters)

    def make(mixes: Sequence[Mix]) -> Any:
        if config.method == "linear":
            return delta_producer(model, adapters, [_weights(mix) for mix in mixes], dtype=dtype)
        settings = [mix.settings for mix in mixes]
        return delta_method_producer(model, adapters, settings, seed=config.seed, dtype=dtype)

    if config.method != "linear":
        require_plain({adapter.path.name: adapter for adapter in adapters})
    entries = [entry for _, found in model.shards.values() for entry in found.values()]
    size = written_bytes(model, dtype)
    return {
        "tensors": len(entries),
        "bytes_in": model_bytes(model) + _adapter_files(adapters),
        "bytes_out": lambda mix: size,
        "memory": _RUNTIME + _adapter_files(adapters) + (64 << 20),
        "work": model_bytes(model),
        "write": checkpoint_writer(
            model,
            make,
            lambda producer: {"base": weights_digest(producer.base_digests())} if learn else {},
            dtype=config.dtype,
            write_files=write_in_threads if config.method == "linear" else None,
        ),
    }


def _adapter_files(adapters: Sequence[Adapter]) -> int:
    return sum((adapter.path / WEIGHTS).stat().st_size for adapter in adapters)


def _weights(mix: Mix) -> tuple[float, ...]:
    """Of a weighted sum; a method has its own."""
    return mix.weights or ()


def _outputs(directory: Path) -> dict[str, str]:
    return {WEIGHTS: digest_shard(directory / WEIGHTS)}


def _warnings(adapters: Mapping[str, Adapter]) -> list[str]:
    found = warnings_of(adapters)
    contents = [adapter.content for adapter in adapters.values()]
    if len(set(contents)) != len(contents):
        found.append(f"two of the adapters are the same: {', '.join(str(a.path) for a in adapters.values())}")
    return found


def _dial(adapters: Mapping[str, Adapter]) -> Dial | None:
    """beta and lambda of stepwise training, where the safety adapter is known to have started at this reward adapter.

    Of other pairs the theorem says nothing.
    """
    if set(adapters) != {"reward", "safety"}:
        return None
    reward, safety = adapters["reward"], adapters["safety"]
    after, before = safety.manifest or {}, reward.manifest or {}
    beta, weight = before.get("beta"), after.get("lambda")
    inputs = after.get("inputs")
    stepwise = isinstance(inputs, dict) and inputs.get("start") == reward.digest
    if not stepwise or not isinstance(beta, int | float) or not isinstance(weight, int | float) or weight <= 0:
        return None
    return Dial(beta=float(beta), lambda_bar=float(weight))
