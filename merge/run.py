"""The job: read two adapters, check everything, write the policy at each ratio."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.console import progress
from psacpo.errors import InputError
from psacpo.files import atomic_directory, readable_io_errors, require_free_space, require_unused, write_manifest
from psacpo.merge.adapters import (
    Adapter,
    adapter_bytes,
    factors_by_module,
    read_adapter,
    require_compatible,
    stack_adapters,
    write_adapter,
)
from psacpo.merge.bases import Base, find_base
from psacpo.merge.card import Dial, render_card
from psacpo.merge.checkpoints import checkpoint_bytes, plan_deltas, write_checkpoint
from psacpo.merge.config import MergeConfig, policy_name
from psacpo.merge.models import ModelDirectory, read_model

# Card, manifest and configuration of one output, generously.
_SMALL_FILES = 1 << 18


def merge(config: MergeConfig) -> list[Path]:
    """Write W(q) = W_base + (1-q) * delta_reward + q * delta_safety for each ratio q.

    Everything is checked before anything is written; each output appears whole or not at all.

    Returns:
        The output directories in the order of the ratios: `config.out` itself for one ratio, else directories in it.

    Raises:
        InputError: Bad input, an output that is in use, no space.
    """
    outputs = _outputs(config)
    adapters = {"reward": read_adapter(config.reward), "safety": read_adapter(config.safety)}
    require_compatible(adapters)
    base = find_base(config.base, adapters, on_disk=config.as_ == "checkpoint")
    _require_apart(outputs.values(), [config.reward, config.safety, *([base.path] if base.path else [])])
    pair = list(adapters.values())
    if config.as_ == "checkpoint":
        assert base.path is not None
        model = read_model(base.path)
        plan = _plan(model, adapters)
        needed = checkpoint_bytes(model) * len(outputs)
        shards = len(model.shards)
    else:
        model, plan, shards = None, {}, 1
        needed = sum(adapter_bytes(pair, _weights(ratio)) for ratio in outputs)
    require_free_space(config.out, needed + _SMALL_FILES * len(outputs))

    with _no_empty_parents(next(iter(outputs.values()))), progress("merge", len(outputs) * shards) as advance:
        for ratio, out in outputs.items():
            with atomic_directory(out, overwrite=config.overwrite) as directory:
                rank = None
                if model is None:
                    rank = write_adapter(directory, pair, _weights(ratio), base=base.name)
                    advance()
                else:
                    write_checkpoint(directory, model, stack_adapters(pair, _weights(ratio)), plan, done=advance)
                _describe(directory, config, adapters, base, ratio, rank)
    return list(outputs.values())


def _weights(ratio: float) -> tuple[float, float]:
    """Weights of (reward, safety) at a ratio."""
    return 1.0 - ratio, ratio


def _outputs(config: MergeConfig) -> dict[float, Path]:
    """Ratio -> its output directory, none of them in use."""
    one = len(config.ratios) == 1
    outputs = {ratio: config.out if one else config.out / policy_name(ratio) for ratio in config.ratios}
    for out in outputs.values():
        with readable_io_errors(out):
            nearest = next(parent for parent in out.absolute().parents if parent.exists())
            if not nearest.is_dir():
                raise InputError(f"cannot write {out}: {nearest} is a file, not a directory")
            require_unused(out, overwrite=config.overwrite)
    return outputs


def _require_apart(outputs: Iterable[Path], inputs: Sequence[Path]) -> None:
    """Refuse an output that would replace an input or change its digest."""
    for out in outputs:
        for given in inputs:
            one, other = out.resolve(), given.resolve()
            if one == other or one in other.parents or other in one.parents:
                raise InputError(f"output {out} and input {given} overlap", allowed="an output outside the inputs")


def _plan(model: ModelDirectory, adapters: Mapping[str, Adapter]) -> dict[str, tuple[str, bool]]:
    """Where each delta of either adapter goes in the base's weights."""
    pair = list(adapters.values())
    shapes = {
        module: next(factors.shape for factors in row if factors is not None)
        for module, row in factors_by_module(pair).items()
    }
    embeddings = frozenset[str]().union(*(adapter.embeddings for adapter in pair))
    return plan_deltas(model, shapes, embeddings=embeddings, fan_in_fan_out=pair[0].fan_in_fan_out)


def _describe(
    directory: Path, config: MergeConfig, adapters: Mapping[str, Adapter], base: Base, ratio: float, rank: int | None
) -> None:
    """Write card and manifest. Neither says where the output lies, so that equal inputs give equal bytes."""
    digests = {role: adapter.digest for role, adapter in adapters.items()}
    base_digest = base.digest or next((a.base_digest for a in adapters.values() if a.base_digest), None)
    known = {"base": base_digest} if base_digest else {}
    dial = _dial(adapters)
    card = render_card(kind=config.as_, base=base.name, ratio=ratio, digests=known | digests, rank=rank, dial=dial)
    (directory / "README.md").write_text(card, encoding="utf-8")
    more: dict[str, Any] = {"policy": policy_name(ratio), "ratio": ratio, "base_digest": base_digest}
    if dial is not None:
        weight, beta = dial.effective(ratio)
        more |= {"lambda": weight, "safety_beta": beta if ratio else None}
    settings = config.model_dump(mode="json", by_alias=True, exclude={"out", "overwrite", "ratios"})
    settings |= {"base": base.name, "ratios": [ratio]}
    write_manifest(directory, kind="policy", config=settings, inputs=known | digests, seeds={}, **more)


def _dial(adapters: Mapping[str, Adapter]) -> Dial | None:
    """beta and lambda of stepwise training, where the safety adapter is known to have started at this reward adapter.

    Of other pairs the theorem says nothing.
    """
    reward, safety = adapters["reward"], adapters["safety"]
    after, before = safety.manifest or {}, reward.manifest or {}
    beta, weight = before.get("beta"), after.get("lambda")
    stepwise = (after.get("inputs") or {}).get("start") == reward.digest
    if not stepwise or not isinstance(beta, int | float) or not isinstance(weight, int | float) or weight <= 0:
        return None
    return Dial(beta=float(beta), lambda_bar=float(weight))


@contextlib.contextmanager
def _no_empty_parents(out: Path) -> Iterator[None]:
    """On failure, remove the parents of `out` that were not there before and that nothing came to lie in."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
