"""Engines turn requests into completions; `make_engine` chooses one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from psacpo.errors import unknown_name
from psacpo.evalharness.engines.base import Completion, Engine, Policy, Request

if TYPE_CHECKING:
    from psacpo.evalharness.config import FrontierConfig
    from psacpo.merge.adapters import Adapter

__all__ = ["ENGINES", "Completion", "Engine", "Policy", "Request", "make_engine"]


def _transformers(config: FrontierConfig, adapters: Mapping[str, Adapter]) -> Engine:
    from psacpo.evalharness.engines.transformers import TransformersEngine

    return TransformersEngine.load(
        config.base, adapters, generation=config.generation, dtype=config.dtype, device=config.device
    )


ENGINES: dict[str, Callable[[FrontierConfig, Mapping[str, Adapter]], Engine]] = {
    "auto": _transformers,
    "transformers": _transformers,
}


def make_engine(config: FrontierConfig, adapters: Mapping[str, Adapter]) -> Engine:
    """The engine that `config.engine` names, with the base and `adapters` loaded once."""
    if config.engine not in ENGINES:
        raise unknown_name("engine", config.engine, ENGINES)
    return ENGINES[config.engine](config, adapters)
