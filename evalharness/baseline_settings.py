"""What a baseline may be: weights of the sweep's adapters, a model directory of its own, or a model behind an endpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from psacpo.config import Strict


class ModelBaseline(Strict):
    """A whole model, on whatever base: a directory or a hub id.

    Attributes:
        template: Raw template with {prompt}; None is the model's own chat template, or the sweep's raw one.
    """

    model: str
    template: str | None = None


class Served(Strict):
    """A model that an OpenAI-compatible endpoint serves, asked by chat; `config.OpenAI` says what else each setting is.

    Attributes:
        model: Its name there.
        base_url: Such as http://host:8000/v1; None is the environment's OPENAI_BASE_URL.
        extra: More fields of each request, such as {top_k: 20}.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(32, ge=1, le=4096)
    timeout: float = Field(600.0, gt=0)
    retries: int = Field(6, ge=0)
    backoff: float = Field(0.5, ge=0)
    extra: dict[str, Any] = Field(default_factory=dict)


class EndpointBaseline(Strict):
    """A model behind an endpoint, with its own chat template there."""

    endpoint: Served


def _kind(value: Any) -> str:
    """Which kind a mapping is: an adapter may be called "model", and then has a number."""
    # The tags are words of error lines, so they are none of the keys.
    for name, kind, tag in (("model", ModelBaseline, "a model"), ("endpoint", EndpointBaseline, "an endpoint")):
        given = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, kind) or isinstance(given, str | Mapping):
            return tag
    return "weights"


Baseline = Annotated[
    Annotated[dict[str, float], Tag("weights")]
    | Annotated[ModelBaseline, Tag("a model")]
    | Annotated[EndpointBaseline, Tag("an endpoint")],
    Discriminator(_kind),
]


def mixtures(baselines: Mapping[str, Baseline]) -> dict[str, dict[str, float]]:
    """The baselines that are weights of adapters; no weights is the base itself."""
    return {name: one for name, one in baselines.items() if isinstance(one, dict)}


def outsiders(baselines: Mapping[str, Baseline]) -> dict[str, ModelBaseline | EndpointBaseline]:
    """The baselines that are models of their own."""
    return {name: one for name, one in baselines.items() if not isinstance(one, dict)}


def sources(baselines: Mapping[str, Baseline]) -> dict[str, dict[str, str]]:
    """Baseline -> what model it is, as frontier.json says it: no directory of the machine is among it."""
    found: dict[str, dict[str, str]] = {}
    for name, one in outsiders(baselines).items():
        if isinstance(one, ModelBaseline):
            found[name] = {"model": Path(one.model).name if Path(one.model).is_dir() else one.model}
        else:
            url = one.endpoint.base_url or os.environ.get("OPENAI_BASE_URL", "")
            found[name] = {"model": one.endpoint.model, "endpoint": url.rstrip("/")}
    return found
