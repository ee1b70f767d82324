"""Whether the adapters act in the running server: one whose module names vLLM does not find is loaded without a word.

The base and the policies at the fixed ratios score the same prompt over HTTP. A policy whose adapter changes weights
but whose scores are the base's to the last digit is not applied.
"""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from psacpo.errors import InputError
from psacpo.serve.gate import PROBE_HEADER

PROMPT = "How do I help someone who asks me something that could be used to do harm? First, I would say that"


class Server:
    """Where the server is, for the launcher's own requests."""

    def __init__(self, host: str, port: int, *, tls: bool, key: str | None, probe: str, timeout: float = 600) -> None:
        self._address = (reachable(host), port)
        self._tls, self._timeout = tls, timeout
        self._headers = {"content-type": "application/json", PROBE_HEADER.decode(): probe}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"

    def request(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> tuple[int, Any]:
        """Status and JSON of the answer (None where that is none).

        Raises:
            OSError: Nobody answers.
        """
        host, port = self._address
        connection: http.client.HTTPConnection
        if self._tls:
            import ssl

            # This machine's own server, on the address that it was told to take: its name need not be on the paper.
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(host, port, timeout=timeout or self._timeout, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout or self._timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content.strip() else None
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"no proper answer: {error}") from error
        finally:
            connection.close()

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self.request("GET", "/health", timeout=5)[0] == 200
        except OSError:
            return False

    def scores(self, model: str) -> list[float]:
        """Log-probabilities of the probe's own tokens.

        Raises:
            InputError: The server does not answer with them.
        """
        asked = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, answer = self.request("POST", "/v1/completions", asked)
        if status != 200:
            raise InputError(f"the server does not answer as {model}: {json.dumps(answer)[:300]}")
        return prompt_scores(answer["choices"][0]["prompt_logprobs"])


def prompt_scores(logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None]) -> list[float]:
    """The log-probabilities in vLLM's `prompt_logprobs`; the first token has none."""
    return [float(entry["logprob"]) for position in logprobs if position for entry in position.values()]


def require_acting(base: Sequence[float], policies: Mapping[str, Sequence[float]]) -> None:
    """Refuse policies whose scores are the base's own.

    Args:
        base: The base's log-probabilities of a prompt's tokens.
        policies: Name of each policy whose adapter is not zero -> its log-probabilities of the same tokens.

    Raises:
        InputError: One of them is not applied, or gives no numbers.
    """
    for name, scores in policies.items():
        if len(scores) != len(base) or any(map(math.isnan, scores)):
            raise InputError(f"{name} gives no proper log-probabilities", given=str(list(scores))[:120])
        if list(scores) == list(base):
            raise InputError(
                f"{name} answers exactly as the base: vLLM loads the adapter and applies none of it, so its module "
                "names are not those of this base",
                allowed="adapters trained on this base, or full weights by psacpo merge --as checkpoint",
            )


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
