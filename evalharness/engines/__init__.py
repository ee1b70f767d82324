"""Engines turn requests into completions; `start_engine` starts the one that a plan names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psacpo.errors import unknown_name
from psacpo.evalharness.engines.base import Completion, Engine, Failure, NextTokens, Passage, Policy, Request

if TYPE_CHECKING:
    from psacpo.evalharness.config import FrontierConfig
    from psacpo.evalharness.engines.plan import EnginePlan
    from psacpo.merge.adapters import Adapter

__all__ = ["ENGINES", "Completion", "Engine", "Failure", "NextTokens", "Passage", "Policy", "Request", "make_engine"]

Start = Callable[["FrontierConfig", Path, Mapping[str, "Adapter"], Sequence[Policy], "EnginePlan"], Engine]


def _transformers(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    plan: EnginePlan,
) -> Engine:
    from psacpo.evalharness.engines.transformers import TransformersEngine

    return TransformersEngine.load(
        base,
        adapters,
        generation=config.generation,
        dtype=config.dtype,
        device=config.device,
        log_probs=config.measures_kl(),
    )


def _vllm(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    plan: EnginePlan,
) -> Engine:
    from psacpo.evalharness.engines.vllm import VllmEngine

    return VllmEngine.load(
        base,
        adapters,
        policies,
        plan=plan,
        settings=config.vllm,
        generation=config.generation,
        dtype=config.dtype,
        seed=config.seed,
        log_probs=config.measures_kl(),
    )


def _openai(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    plan: EnginePlan,
) -> Engine:
    from psacpo.evalharness.engines.openai import OpenAIEngine

    # Of several baselines that are the base any will do.
    served_base = config.bases()[0] if config.measures_kl() else None
    return OpenAIEngine(base, config.openai, config.generation, served_base=served_base)


def _chat(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    plan: EnginePlan,
) -> Engine:
    from psacpo.evalharness.baseline_settings import EndpointBaseline
    from psacpo.evalharness.engines.chat import ChatEngine

    one = config.baselines[policies[0].name]
    assert isinstance(one, EndpointBaseline)
    return ChatEngine(base, one.endpoint, config.generation)


ENGINES: dict[str, Start] = {"transformers": _transformers, "vllm": _vllm, "openai": _openai, "chat": _chat}


def start_engine(
    config: FrontierConfig, base: Path, adapters: Mapping[str, Adapter], policies: Sequence[Policy], plan: EnginePlan
) -> Engine:
    """The engine that `plan.name` names, in this process, with the base and `adapters` loaded once."""
    if plan.name not in ENGINES:
        raise unknown_name("engine", plan.name, ENGINES)
    return ENGINES[plan.name](config, base, adapters, policies, plan)


def make_engine(
    config: FrontierConfig, base: Path, adapters: Mapping[str, Adapter], policies: Sequence[Policy], plan: EnginePlan
) -> Engine:
    """The engine of a sweep: in this process, or in the workers of a Ray cluster."""
    if plan.workers:
        from psacpo.evalharness.engines.ray import RayEngine

        return RayEngine(config, base, adapters, policies, plan)
    return start_engine(config, base, adapters, policies, plan)
