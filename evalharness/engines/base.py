"""What every engine takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Policy:
    """The base plus a weighted sum of adapter deltas: W = W_base + sum_i weights[i] * delta_i.

    Attributes:
        name: `policy@0.30` for a point of the sweep, or a baseline's name.
        weights: Adapter name -> weight; empty is the base itself.
        ratio: The weight of the safety policy, None for a baseline.
    """

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None


@dataclass(frozen=True)
class Request:
    """One answer to make.

    Attributes:
        key: Content address of the answer: equal keys mean an equal answer.
        policy: Who answers.
        prompt_ids: Token ids of the whole prompt, BOS included.
        seed: Of this answer's random numbers. Policies that answer one prompt share it, so that their
            differences are not drowned in sampling noise.
    """

    key: str
    policy: Policy
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One answer. `finish_reason` is "stop" at an end token or stop string, "length" at the token limit."""

    key: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Engine(Protocol):
    """Answers batches of requests of any mix of policies."""

    def generate(self, requests: Sequence[Request]) -> Iterable[Completion]:
        """The completions of one batch, in any order. The same batch gives the same completions."""
        ...
