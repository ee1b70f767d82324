"""Proof, before a sweep, that each policy acts: an adapter that silently does nothing gives answers like any other.

What the engine says next after a few prompts is held against the base's and against the dense merge's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.engines.base import Engine, NextTokens, Policy, Request
from psacpo.merge.adapters import Adapter

Reference = Callable[[Policy, Sequence[tuple[int, ...]]], Sequence[Sequence[float]]]
"""Log-probabilities [prompts][vocabulary] of the next token under a policy."""

# Log-probabilities of the likeliest tokens from two implementations differ by no more than this; nats. Measured on tiny
# models in float32; the others are an order above what rounding of activations to 11 and 8 bits leaves.
TOLERANCE = {"float32": 5e-3, "float16": 0.05, "bfloat16": 0.3}
_PROMPTS = 3
_AGAIN = "base, once more"


def probe(
    engine: Engine,
    policies: Sequence[Policy],
    prompts: Sequence[tuple[int, ...]],
    *,
    reference: Reference | None,
    dtype: str,
    has_base: bool = True,
) -> list[str]:
    """Hold each policy against the base and against `reference`.

    Args:
        engine: Running.
        policies: All of the sweep.
        prompts: Token ids; the shortest few of them are used.
        reference: The dense merge, None where there is no room for it.
        dtype: Of the engine: decides the tolerance.
        has_base: Whether the engine can be asked for the base, which need not be a policy of the sweep.

    Returns:
        Lines for people: what could not be told apart or held against anything.

    Raises:
        InputError: A policy that does not act, that is not the dense merge, or whose logits are no numbers, by name.
    """
    chosen = sorted(set(prompts), key=lambda ids: (len(ids), ids))[:_PROMPTS]
    asked = [policy for policy in policies if policy.adapted or policy.checkpoint]
    if not asked or not chosen:
        return []
    base = next((policy for policy in policies if policy not in asked), Policy("base"))
    # The base is asked twice, in two places of a batch: what it differs from itself by is no adapter's doing.
    shown = {policy.name: policy for policy in ([base, *asked] if has_base else asked)}
    if has_base:
        shown[_AGAIN] = base
    requests = [
        Request(f"{number}/{place}", policy, ids, seed=0)
        for place, ids in enumerate(chosen)
        for number, policy in enumerate(shown.values())
    ]
    lines: list[str] = []
    expected: dict[str, Sequence[Sequence[float]]] = {}
    for replica in engine.next_tokens(requests):
        found = {
            name: [replica[f"{number}/{place}"] for place in range(len(chosen))] for number, name in enumerate(shown)
        }
        _require_numbers(found)
        if has_base:
            _require_acting(found, base, asked)
        if reference is not None:
            if not expected:
                held = {policy.name: policy for policy in shown.values() if policy.checkpoint is None}
                expected = {name: reference(policy, chosen) for name, policy in held.items()}
                lines = _weak(expected, base, asked, TOLERANCE[dtype]) if has_base else []
            _require_merged(found, expected, TOLERANCE[dtype])
    return lines


def dense_reference(engine: Engine, base: Path, adapters: Mapping[str, Adapter]) -> Reference | None:
    """The base with each policy's deltas multiplied out, in float32 on the CPU.

    None where memory has no room for it, or the base is quantised. The transformers engine's own model serves where
    there is one: it is not loaded twice. What is more than factors (DoRA, whole models) is merged as `psacpo merge`
    writes it, and put into a model of transformers.
    """
    import os

    import torch
    from transformers import AutoModelForCausalLM

    from psacpo.evalharness.engines.plan import plain
    from psacpo.evalharness.engines.transformers import TransformersEngine
    from psacpo.hub import load_model
    from psacpo.merge.models import read_model

    if isinstance(engine, TransformersEngine):
        return _reference_of(engine.model, adapters)
    try:
        entries = [entry for _, tensors in read_model(base).shards.values() for entry in tensors.values()]
    except InputError:
        return None  # a quantised base
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * sum(math.prod(entry.shape) for entry in entries) > free / 2:
        return None
    model: Any = load_model(AutoModelForCausalLM, base, dtype=torch.float32).eval()
    if plain(adapters):
        return _reference_of(model, adapters)
    return _reference_by_weights(model, base, adapters)


def _reference_by_weights(model: Any, base: Path, adapters: Mapping[str, Adapter]) -> Reference | None:
    """Each policy's weights in turn in one model; None where its class calls the weights otherwise than the files do."""
    import torch

    from psacpo.evalharness.engines.dense import dense_logprobs
    from psacpo.evalharness.engines.vllm_worker import merged_weights
    from psacpo.merge.models import read_model

    found = read_model(base)
    own = model.state_dict()
    if not found.tensors().keys() <= own.keys():
        return None

    def reference(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        weights = policy.adapted
        with torch.no_grad():
            for name, tensor in merged_weights(found, [adapters[n] for n in weights], list(weights.values())):
                own[name].copy_(tensor)
        return [row.tolist() for row in dense_logprobs(model, {}, {}, prompts)]

    return reference


def _reference_of(model: Any, adapters: Mapping[str, Adapter]) -> Reference:
    from psacpo.evalharness.engines.dense import dense_logprobs

    def reference(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return [row.tolist() for row in dense_logprobs(model, adapters, policy.adapted, prompts)]

    return reference


def _require_numbers(found: Mapping[str, Sequence[NextTokens]]) -> None:
    # A masked token is -inf and fine; the likeliest one of each row must be a number, and none may be NaN.
    bad = [
        name
        for name, rows in found.items()
        if any(not row or any(math.isnan(v) for v in row.values()) or max(row.values()) == -math.inf for row in rows)
    ]
    if bad:
        raise InputError(f"the logits of {', '.join(bad)} are not finite: its weights overflow the engine's dtype")


def _require_acting(found: Mapping[str, Sequence[NextTokens]], base: Policy, asked: Sequence[Policy]) -> None:
    noise = _difference(found[_AGAIN], found[base.name])
    for policy in asked:
        if _difference(found[policy.name], found[base.name]) <= noise:
            how = f"to {noise:.2g}, which is how well the base repeats itself" if noise else "to the last digit"
            raise InputError(
                f"{policy.name} says what the base says after each probe prompt, {how}: its adapters do not act in "
                "this engine",
                allowed="adapters that change the base, another strategy or engine, or probe: false",
            )


def _difference(found: Sequence[NextTokens], base: Sequence[NextTokens]) -> float:
    """The largest difference of log-probabilities that both give; infinite where they have no likely token in common."""
    most = 0.0
    for row, other in zip(found, base, strict=True):
        common = [token for token in row.keys() & other.keys() if row[token] != other[token]]
        most = max(most, *(abs(row[token] - other[token]) for token in common), 0.0)
        if not row.keys() & other.keys():
            return math.inf
    return most


def _require_merged(
    found: Mapping[str, Sequence[NextTokens]], expected: Mapping[str, Sequence[Sequence[float]]], tolerance: float
) -> None:
    for name, wanted in expected.items():
        rows = zip(found[name], wanted, strict=True)
        error = max(abs(value - row[token]) for said, row in rows for token, value in said.items() if value > -math.inf)
        if not error <= tolerance:
            raise InputError(
                f"{name} is not the merged model in this engine: log-probabilities of the next token differ from the "
                f"dense merge's by {error:.3g} on a probe prompt (tolerance {tolerance:g})",
                allowed="another strategy or engine, or probe: false",
            )


def _weak(
    expected: Mapping[str, Sequence[Sequence[float]]], base: Policy, asked: Sequence[Policy], tolerance: float
) -> list[str]:
    """Policies that the tolerance cannot tell from the base."""
    lines = []
    for policy in asked:
        if policy.name not in expected:
            continue
        rows = zip(expected[policy.name], expected[base.name], strict=True)
        effect = max(abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True) if a > -math.inf)
        if effect <= tolerance:
            lines.append(
                f"{policy.name} moves the probe prompts' log-probabilities by {effect:.2g} at most, within the "
                f"tolerance {tolerance:g}: that it acts is not proven"
            )
    return lines
