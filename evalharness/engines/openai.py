"""Any OpenAI-compatible completions endpoint: the policy's name is the model's name there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation, OpenAI
from psacpo.evalharness.endpoint import Endpoint, GaveUp, url_and_key
from psacpo.evalharness.engines.answers import answer_text, end_ids, read_generation_config, strip_end
from psacpo.evalharness.engines.base import Completion, Failure, NextTokens, Passage, Policy, Request
from psacpo.hub import load_tokenizer

# Likeliest tokens to ask for: what OpenAI and vLLM give at most unless told otherwise.
_TOP = 5


def endpoint(settings: OpenAI) -> tuple[str, str]:
    """The base URL and the key, from the settings and the environment.

    Raises:
        InputError: There is no URL, it is none, or it holds a password.
    """
    return url_and_key(settings, what="engine openai", setting="openai.base_url")


class OpenAIEngine:
    """A pool of threads, each with one request under way.

    Attributes:
        batch_size: None: the server fills its batches itself.
        served_base: Which policy is the base alone, None where that is not served; with it answers are given with their
            log-probability, where the endpoint tells.
    """

    batch_size: int | None = None

    def __init__(
        self,
        base: Path,
        settings: OpenAI,
        generation: Generation,
        *,
        served_base: str | None = None,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        self.settings, self.generation, self.served_base = settings, generation, served_base
        self._endpoint = Endpoint(settings, what="engine openai", setting="openai.base_url", sleep=sleep)
        self.url = self._endpoint.url
        self.tokenizer = load_tokenizer(base)
        self.end_ids = end_ids(read_generation_config(base), self.tokenizer)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """Answers as they arrive. A request that fails after every retry is a `Failure`, and the others go on.

        Raises:
            InputError: The endpoint knows no such key, model or route: nothing would ever come of it.
        """
        yield from self._endpoint.all(requests, self._answer)

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Key -> log-probabilities of the likeliest next tokens; of the vllm dialect, which tells tokens by their ids."""
        found: dict[str, NextTokens] = {}

        def ask(request: Request) -> tuple[str, NextTokens] | Failure:
            body = self._body(request) | {"max_tokens": 1, "temperature": 0.0, "logprobs": _TOP}
            body["extra_body"] = body.get("extra_body", {}) | {"return_tokens_as_token_ids": True, "stop_token_ids": []}
            choice = self._choice(request, body)
            return choice if isinstance(choice, Failure) else (request.key, _top(choice))

        for answer in self._endpoint.all(requests, ask):
            if isinstance(answer, Failure):
                raise InputError(f"{self.url} gave no answer to a probe prompt: {answer.error}")
            found[answer[0]] = answer[1]
        return [found]

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterator[tuple[str, float] | Failure]:
        """Of endpoints that give `prompt_logprobs`, as vLLM's do: the base reads each answer but its last token, which
        it is then made to write.

        Raises:
            InputError: The endpoint does not serve the base.
        """
        if self.served_base is None:
            raise InputError("the endpoint does not serve the base", allowed="a baseline without weights")
        base = Policy(self.served_base)

        def ask(passage: Passage) -> tuple[str, float] | Failure:
            request = Request(passage.key, base, passage.prompt_ids + passage.token_ids[:-1], seed=0)
            body = self._body(request) | {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}
            body["extra_body"] |= {
                "prompt_logprobs": 0,
                "allowed_token_ids": [passage.token_ids[-1]],
                "stop_token_ids": [],
            }
            choice = self._choice(request, body)
            return choice if isinstance(choice, Failure) else _base_log_prob(passage, choice)

        yield from self._endpoint.all(passages, ask)

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _answer(self, request: Request) -> Completion | Failure:
        choice = self._choice(request, self._body(request))
        if isinstance(choice, Failure):
            return choice
        reason, text = choice.get("finish_reason"), choice.get("text")
        if reason not in ("stop", "length") or not isinstance(text, str):
            return Failure(request.key, f"the endpoint ended the answer with finish_reason {reason}")
        ids = choice.get("token_ids")
        said = (choice.get("logprobs") or {}).get("token_logprobs") or []
        log_prob, end_id = None, None
        if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
            token_ids = strip_end(ids, self.end_ids)
            if self.served_base is not None and len(said) == len(ids):
                log_prob = math.fsum(map(float, said))
                end_id = ids[-1] if len(token_ids) < len(ids) else None
            text = answer_text(self.tokenizer, token_ids, self.generation.stop)
        else:
            # The endpoint does not tell its tokens: the text's own are as near as can be had.
            token_ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        logprobs = None
        if self.generation.logprobs:
            logprobs = tuple(float(value) for value in said[: len(token_ids)])
            if len(logprobs) != len(token_ids):
                return Failure(request.key, "the endpoint gave no log-probabilities for the answer's tokens")
        return Completion(request.key, text, token_ids, reason, logprobs, log_prob, end_id)

    def _body(self, request: Request) -> dict[str, Any]:
        settings = self.generation
        if request.policy.checkpoint is not None:
            raise InputError(f"{request.policy.name} is a checkpoint, which an endpoint has to serve by itself")
        body: dict[str, Any] = {
            "model": self.settings.models.get(request.policy.name, request.policy.name),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": request.seed % 2**63,
        }
        if settings.stop:
            body["stop"] = settings.stop
        if settings.logprobs or self.served_base is not None:
            body["logprobs"] = 1
        if self.settings.dialect == "vllm":
            more = {"top_k": settings.top_k, "stop_token_ids": sorted(self.end_ids), "return_token_ids": True}
            return body | {"prompt": list(request.prompt_ids), "extra_body": more}
        return body | {"prompt": self._prompt_text(request.prompt_ids)}

    def _prompt_text(self, ids: Sequence[int]) -> str:
        """The prompt as text, without the BOS that the endpoint's tokenizer puts there itself."""
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        start = 1 if adds_bos and ids[:1] == (bos,) else 0
        text: str = self.tokenizer.decode(ids[start:], skip_special_tokens=False)
        return text

    def _choice(self, request: Request, body: Mapping[str, Any]) -> dict[str, Any] | Failure:
        """The first choice of the answer as it came, after as many tries as it takes."""
        found = self._endpoint.send(
            self._endpoint.client.completions.with_raw_response.create,
            body,
            _first_choice,
            allowed=f"a key in {self.settings.api_key_env}, a served model, openai.models",
        )
        return Failure(request.key, found.why) if isinstance(found, GaveUp) else found


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def _base_log_prob(passage: Passage, choice: Mapping[str, Any]) -> tuple[str, float] | Failure:
    """The answer's part of `prompt_logprobs`, and the one token that was written."""
    said: Any = choice.get("prompt_logprobs")
    written = ((choice.get("logprobs") or {}).get("token_logprobs") or [None])[0]
    try:
        places = zip(said[len(passage.prompt_ids) :], passage.token_ids[:-1], strict=True)
        return passage.key, math.fsum([*(float(entry[str(token)]["logprob"]) for entry, token in places), written])
    except (TypeError, KeyError, ValueError):
        return Failure(passage.key, "the endpoint gives no log-probabilities of a prompt (prompt_logprobs)")


def _top(choice: Mapping[str, Any]) -> NextTokens:
    """Token id -> log-probability of the first token's likeliest, where the endpoint writes `token_id:17`."""
    top = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0]
    return {int(token.removeprefix("token_id:")): float(value) for token, value in top.items() if ":" in token}
