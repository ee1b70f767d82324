"""Any OpenAI-compatible completions endpoint: the policy's name is the model's name there."""

from __future__ import annotations

import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation, OpenAI
from psacpo.evalharness.engines.answers import answer_text, end_ids, read_generation_config, strip_end
from psacpo.evalharness.engines.base import Completion, Failure, NextTokens, Request
from psacpo.hub import load_tokenizer

_RETRIED = (408, 409, 429)
# What says that no request will ever succeed: a wrong key, a model that is not served, no such route.
_FATAL = (401, 403, 404)
_LONGEST_WAIT = 60.0
# Likeliest tokens to ask for: what OpenAI and vLLM give at most unless told otherwise.
_TOP = 5


def endpoint(settings: OpenAI) -> tuple[str, str]:
    """The base URL and the key, from the settings and the environment.

    Raises:
        InputError: There is no URL, or it is none.
    """
    url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        raise InputError("engine openai: no endpoint", allowed="openai.base_url, or OPENAI_BASE_URL in the environment")
    if not re.match(r"https?://[^/\s]+", url):
        raise InputError("engine openai: base_url is no URL", given=url, allowed="such as http://localhost:8000/v1")
    # Servers on one's own machine ask for no key; the client insists on one.
    return url.rstrip("/"), os.environ.get(settings.api_key_env) or "none"


class OpenAIEngine:
    """A pool of threads, each with one request under way.

    Attributes:
        batch_size: None: the server fills its batches itself.
    """

    batch_size: int | None = None

    def __init__(
        self, base: Path, settings: OpenAI, generation: Generation, *, sleep: Callable[[float], Any] | None = None
    ) -> None:
        import openai

        self.settings, self.generation = settings, generation
        self.url, key = endpoint(settings)
        # Its own retries are off: it does not repeat an answer that is no JSON, and waits 8 s at most.
        self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=settings.timeout, max_retries=0)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self.tokenizer = load_tokenizer(base)
        self.end_ids = end_ids(read_generation_config(base), self.tokenizer)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """Answers as they arrive. A request that fails after every retry is a `Failure`, and the others go on.

        Raises:
            InputError: The endpoint knows no such key, model or route: nothing would ever come of it.
        """
        yield from self._all(requests, self._answer)

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Key -> log-probabilities of the likeliest next tokens; of the vllm dialect, which tells tokens by their ids."""
        found: dict[str, NextTokens] = {}

        def ask(request: Request) -> tuple[str, NextTokens] | Failure:
            body = self._body(request) | {"max_tokens": 1, "temperature": 0.0, "logprobs": _TOP}
            body["extra_body"] = body.get("extra_body", {}) | {"return_tokens_as_token_ids": True, "stop_token_ids": []}
            choice = self._choice(request, body)
            return choice if isinstance(choice, Failure) else (request.key, _top(choice))

        for answer in self._all(requests, ask):
            if isinstance(answer, Failure):
                raise InputError(f"{self.url} gave no answer to a probe prompt: {answer.error}")
            found[answer[0]] = answer[1]
        return [found]

    def close(self) -> None:
        """Close the connections."""
        self._stopped.set()
        self._client.close()

    def _all(self, requests: Sequence[Request], ask: Callable[[Request], Any]) -> Iterator[Any]:
        waiting, under_way = deque(requests), set[Future[Any]]()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < self.settings.concurrency:
                        under_way.add(pool.submit(ask, waiting.popleft()))
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            except BaseException:
                self._stopped.set()
                raise

    def _answer(self, request: Request) -> Completion | Failure:
        choice = self._choice(request, self._body(request))
        if isinstance(choice, Failure):
            return choice
        reason, text = choice.get("finish_reason"), choice.get("text")
        if reason not in ("stop", "length") or not isinstance(text, str):
            return Failure(request.key, f"the endpoint ended the answer with finish_reason {reason}")
        ids = choice.get("token_ids")
        if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
            token_ids = strip_end(ids, self.end_ids)
            text = answer_text(self.tokenizer, token_ids, self.generation.stop)
        else:
            # The endpoint does not tell its tokens: the text's own are as near as can be had.
            token_ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        logprobs = None
        if self.generation.logprobs:
            said = (choice.get("logprobs") or {}).get("token_logprobs") or []
            logprobs = tuple(float(value) for value in said[: len(token_ids)])
            if len(logprobs) != len(token_ids):
                return Failure(request.key, "the endpoint gave no log-probabilities for the answer's tokens")
        return Completion(request.key, text, token_ids, reason, logprobs)

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
        if settings.logprobs:
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
        import openai

        why = ""
        for attempt in range(self.settings.retries + 1):
            after = None
            try:
                raw = self._client.completions.with_raw_response.create(**body)
                answer = raw.http_response.json()
                choice: dict[str, Any] = answer["choices"][0]
                return choice
            except openai.APIStatusError as error:
                why = f"HTTP {error.status_code}: {_said(error)}"
                if error.status_code in _FATAL:
                    raise InputError(
                        f"{self.url} refuses {body['model']}: {why}",
                        allowed=f"a key in {self.settings.api_key_env}, a served model, openai.models",
                    ) from error
                if error.status_code not in _RETRIED and error.status_code < 500:
                    return Failure(request.key, why)
                after = error.response.headers.get("retry-after")
            except openai.APIConnectionError as error:
                why = f"{type(error).__name__}: {error.__cause__ or error}"
            except (ValueError, KeyError, IndexError, TypeError, openai.APIError) as error:
                why = f"the answer is damaged ({type(error).__name__}: {error})"
            if self._stopped.is_set():
                break
            if attempt < self.settings.retries:
                self._sleep(_pause(self.settings.backoff, attempt, after))
        return Failure(request.key, f"{why} (after {self.settings.retries + 1} tries)"[:500])


def _top(choice: Mapping[str, Any]) -> NextTokens:
    """Token id -> log-probability of the first token's likeliest, where the endpoint writes `token_id:17`."""
    top = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0]
    return {int(token.removeprefix("token_id:")): float(value) for token, value in top.items() if ":" in token}


def _pause(backoff: float, attempt: int, after: str | None) -> float:
    """Seconds before the next try: what the server asks for, else doubling, with jitter so that clients spread out."""
    try:
        if after is not None:
            return min(max(float(after), 0.0), _LONGEST_WAIT)
    except ValueError:
        pass  # a date: not worth a clock that may be wrong
    return min(backoff * 2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _said(error: Any) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message).strip().splitlines()[0][:200]
