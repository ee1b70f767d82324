"""What every engine takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from psacpo.prompting import Prompt


@dataclass(frozen=True)
class Policy:
    """The base plus a weighted sum of adapter deltas: W = W_base + sum_i weights[i] * delta_i.

    Attributes:
        name: `policy@0.30` for a point of the sweep, or a baseline's name.
        weights: Adapter name -> weight; empty is the base itself.
        ratio: The weight of the safety policy, None for a baseline and where weights say more than a ratio can.
        point: It is a point of the sweep although it has no ratio.
        checkpoint: A model directory that is the whole policy, in the place of base and weights: what no adapter can
            carry (DoRA, modules_to_save, merges of full models). Only the reload strategy of vLLM takes it.
    """

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    checkpoint: Path | None = None
    point: bool = False

    @property
    def swept(self) -> bool:
        """Whether it is a point of the sweep, and no baseline."""
        return self.ratio is not None or self.point

    @property
    def adapted(self) -> dict[str, float]:
        """The adapters that count: those of weight zero change nothing."""
        return {name: weight for name, weight in self.weights.items() if weight != 0}


@dataclass(frozen=True)
class Request:
    """One answer to make.

    Attributes:
        key: Content address of the answer: equal keys mean an equal answer.
        policy: Who answers.
        prompt_ids: Token ids of the whole prompt, BOS included.
        seed: Of this answer's random numbers. Policies that answer one prompt share it, so that their
            differences are not drowned in sampling noise.
        prompt: What it was before a template and a tokenizer made ids of it, for who has its own.
    """

    key: str
    policy: Policy
    prompt_ids: tuple[int, ...]
    seed: int
    prompt: Prompt = field(default="", compare=False)


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        key: That of its request.
        text: Without special tokens, cut before a stop string.
        token_ids: Without the end token; with those of a stop string.
        finish_reason: "stop" at an end token or stop string, "length" at the token limit.
        logprobs: One number a token, where they were asked for: the log of its probability at temperature 1.
        log_prob: Of the answer as drawn, with the token that ended it: the sum over its tokens, at temperature 1; None
            where the engine does not tell.
        end_id: The token that ended it; None where that was a stop string or the token limit.
    """

    key: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None = None
    log_prob: float | None = None
    end_id: int | None = None


@dataclass(frozen=True)
class Failure:
    """A request that got no answer after every retry, and why: recorded, and tried again when the sweep is resumed."""

    key: str
    error: str


@dataclass(frozen=True)
class Passage:
    """An answer whose probability under the base is asked for.

    Attributes:
        key: Names it.
        prompt_ids: Token ids of the prompt.
        token_ids: Of the answer, with the token that ended it; one at least.
    """

    key: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


NextTokens = Mapping[int, float]
"""Token id -> log-probability (natural, temperature 1) of it coming next, for some of the likeliest tokens."""


class Engine(Protocol):
    """Answers batches of requests of any mix of policies.

    Attributes:
        batch_size: Requests, in their order, that are computed together and decide each other's last bits. A batch with
            a missing answer is done again whole, so that an interrupted sweep ends in the very result of another one.
            None where nothing of the kind holds.
    """

    batch_size: int | None

    def generate(self, requests: Sequence[Request]) -> Iterable[Completion | Failure]:
        """One for each request, in any order, as they finish."""
        ...

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Key -> what the policy would say next, through the path that `generate` takes; one for each worker."""
        ...

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterable[tuple[str, float] | Failure]:
        """Key and log-probability (natural, temperature 1) of each answer under the base alone, in any order."""
        ...

    def close(self) -> None:
        """Give the memory back; the engine is not used again."""
        ...
