"""Baselines that are models of their own: each answers the sweep's prompts through an engine of its own, after the sweep's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.baseline_settings import EndpointBaseline, ModelBaseline, outsiders
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.endpoint import url_and_key
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.engines.install import how_to_install, installed
from psacpo.evalharness.engines.plan import EnginePlan, engine_identity, plan_engine
from psacpo.evalharness.generation import Plan
from psacpo.evalharness.prompts import PromptRow, plan_jobs
from psacpo.files import digest_model
from psacpo.hub import load_config, load_tokenizer, model_directory
from psacpo.prompting import require_chat_template


def check_outsiders(config: FrontierConfig) -> None:
    """Refuse a model that is not there or has no template, and an endpoint that cannot be asked, before anything runs.

    Raises:
        InputError: By the baseline's name.
    """
    for name, one in outsiders(config.baselines).items():
        if isinstance(one, ModelBaseline):
            _template(config, one, _tokenizer(name, _directory(name, one)))
        else:
            _url(name, one)


def plan_outsiders(
    config: FrontierConfig, prompts: Sequence[PromptRow], base: Path
) -> list[tuple[FrontierConfig, Plan]]:
    """The work of each baseline that is no mixture of the sweep's adapters, as a sweep of one policy with its settings.

    Args:
        base: The sweep's base, whose tokens the answers of endpoints are counted in.

    Raises:
        InputError: A model or endpoint is not fit, or a prompt is too long for a model.
    """
    found = []
    for name, one in outsiders(config.baselines).items():
        common = {"adapters": {}, "baselines": {name: one}, "probe": False}
        common["generation"] = config.generation.model_copy(update={"kl_to_base": False})
        if isinstance(one, ModelBaseline):
            found.append(_plan_model(config.model_copy(update=common), name, one, prompts))
        else:
            found.append(_plan_endpoint(config.model_copy(update=common), name, one, prompts, base))
    return found


def _plan_model(
    config: FrontierConfig, name: str, one: ModelBaseline, prompts: Sequence[PromptRow]
) -> tuple[FrontierConfig, Plan]:
    path = _directory(name, one)
    tokenizer = _tokenizer(name, path)
    changes = {
        "base": str(path),
        "template": _template(config, one, tokenizer),
        # An endpoint serves the sweep's policies, not this one; with no adapter there is nothing to swap in.
        "engine": "auto" if config.engine == "openai" else config.engine,
        "strategy": "lora",
    }
    own = config.model_copy(update=changes)
    known = digest_model(path)
    identity = {"base": known, "generation": _generation(own)} | engine_identity(own)
    plan = _plan(own, name, path, known, tokenizer, prompts, identity, _positions(path))
    requests = [job.request for job in plan.jobs]
    plan.engine = replace(plan_engine(own, path, {}, plan.policies, requests), why=f"baseline {name}: {path}")
    return own, plan


def _plan_endpoint(
    config: FrontierConfig, name: str, one: EndpointBaseline, prompts: Sequence[PromptRow], base: Path
) -> tuple[FrontierConfig, Plan]:
    url = _url(name, one)
    served = {"endpoint": url, "model": one.endpoint.model, "extra": one.endpoint.extra}
    plan = _plan(
        config, name, base, "", load_tokenizer(base), prompts, served | {"generation": _generation(config)}, None
    )
    plan.engine = EnginePlan("chat", f"baseline {name}: {one.endpoint.model} at {url}")
    return config, plan


def _plan(
    config: FrontierConfig,
    name: str,
    path: Path,
    known: str,
    tokenizer: Any,
    prompts: Sequence[PromptRow],
    identity: Mapping[str, Any],
    positions: int | None,
) -> Plan:
    policy = Policy(name)
    jobs = plan_jobs(
        tokenizer,
        prompts,
        [policy],
        template=config.template,
        samples=config.samples,
        seed=config.seed,
        max_length=positions,
        max_new_tokens=config.generation.max_new_tokens,
        identity=dict(identity),
        adapter_digests={},
    )
    engine = EnginePlan("", f"baseline {name}")
    return Plan(path, known, {}, {}, list(prompts), [policy], jobs, engine)


def _generation(config: FrontierConfig) -> dict[str, Any]:
    """What of the sampling decides an answer."""
    return config.generation.model_dump(exclude={"batch_size", "logprobs", "kl_to_base"})


def _positions(path: Path) -> int | None:
    found: int | None = getattr(load_config(path), "max_position_embeddings", None)
    return found


def _directory(name: str, one: ModelBaseline) -> Path:
    return model_directory(one.model, what=f"baseline '{name}'")


def _tokenizer(name: str, path: Path) -> Any:
    return load_tokenizer(path, what=f"baseline '{name}'")


def _template(config: FrontierConfig, one: ModelBaseline, tokenizer: Any) -> str | None:
    """The raw template that its prompts are written by, None for its chat template."""
    if one.template is not None:
        return one.template
    if not getattr(tokenizer, "chat_template", None):
        if config.template is None:
            require_chat_template(tokenizer)
        return config.template
    return None


def _url(name: str, one: EndpointBaseline) -> str:
    if not installed("openai"):
        raise InputError(
            f"baseline '{name}': the package openai is not installed", allowed=how_to_install("openai", gpu=False)
        )
    return url_and_key(one.endpoint, what=f"baseline '{name}'", setting="endpoint.base_url")[0]
