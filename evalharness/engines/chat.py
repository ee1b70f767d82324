"""A model behind an OpenAI-compatible chat endpoint: it gets messages and writes its own prompt out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.baseline_settings import Served
from psacpo.evalharness.config import Generation
from psacpo.evalharness.endpoint import Endpoint, GaveUp
from psacpo.evalharness.engines.base import Completion, Failure, NextTokens, Passage, Request
from psacpo.hub import load_tokenizer


class ChatEngine:
    """A pool of threads, each with one request under way.

    Attributes:
        tokenizer: The sweep's own: an endpoint need not tell its tokens, and lengths are to be compared.
        batch_size: None: the server fills its batches itself.
    """

    batch_size: int | None = None

    def __init__(
        self, base: Path, settings: Served, generation: Generation, *, sleep: Callable[[float], Any] | None = None
    ) -> None:
        self.settings, self.generation = settings, generation
        self._endpoint = Endpoint(settings, what="baseline", setting="endpoint.base_url", sleep=sleep)
        self.tokenizer = load_tokenizer(base)
        # Newer models of OpenAI's own call it max_completion_tokens, and say so.
        self._limit = "max_tokens"

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """Answers as they arrive. A request that fails after every retry is a `Failure`, and the others go on.

        Raises:
            InputError: The endpoint knows no such key, model or route: nothing would ever come of it.
        """
        yield from self._endpoint.all(requests, self._answer)

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Not to be had.

        Raises:
            InputError: Always.
        """
        raise InputError("a chat endpoint does not tell what comes next", allowed="probe: false")

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterator[tuple[str, float] | Failure]:
        """Not to be had.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "a chat endpoint does not tell the probability of a text", allowed="generation.kl_to_base: false"
        )

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _answer(self, request: Request) -> Completion | Failure:
        choice = self._choice(request)
        if isinstance(choice, GaveUp):
            return Failure(request.key, choice.why)
        message, reason = choice.get("message") or {}, choice.get("finish_reason")
        text = message.get("content")
        if not isinstance(text, str):
            text = message.get("refusal")  # a model's refusal is its answer
        if reason not in ("stop", "length") or not isinstance(text, str):
            return Failure(request.key, f"the endpoint ended the answer with finish_reason {reason}")
        token_ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Completion(request.key, text, token_ids, reason)

    def _choice(self, request: Request) -> dict[str, Any] | GaveUp:
        limit = self._limit
        found = self._post(request, limit)
        if isinstance(found, GaveUp) and limit == "max_tokens" and "max_completion_tokens" in found.why:
            self._limit = "max_completion_tokens"
            found = self._post(request, self._limit)
        return found

    def _post(self, request: Request, limit: str) -> dict[str, Any] | GaveUp:
        sampling, prompt = self.generation, request.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            limit: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % 2**63,
        }
        if sampling.stop:
            body["stop"] = sampling.stop
        # OpenAI's own endpoint knows no top_k; 0 is none everywhere.
        extra = ({"top_k": sampling.top_k} if sampling.top_k else {}) | self.settings.extra
        if extra:
            body["extra_body"] = extra
        return self._endpoint.send(
            self._endpoint.client.chat.completions.with_raw_response.create,
            body,
            _first_choice,
            allowed=f"a key in {self.settings.api_key_env}, a served model",
        )


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = answer["choices"][0]
    return choice
