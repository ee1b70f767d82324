"""Many requests to an OpenAI-compatible endpoint at once, each tried until it passes or cannot pass."""

from __future__ import annotations

import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from psacpo.errors import InputError

Thing = TypeVar("Thing")
Result = TypeVar("Result")
_RETRIED = (408, 409, 429)
# What says that no request will ever succeed: a wrong key, a model that is not served, no such route, no money left.
_FATAL = (401, 403, 404)
_FATAL_CODES = ("insufficient_quota", "billing_not_active")
_LONGEST_WAIT = 60.0


class EndpointSettings(Protocol):
    """What the settings of everything that asks an endpoint have in common; see `config.OpenAI`."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def api_key_env(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def timeout(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff(self) -> float: ...


@dataclass(frozen=True)
class GaveUp:
    """Why a request has no answer.

    Attributes:
        status: The HTTP status of the endpoint's last word, None where there was none.
    """

    why: str
    status: int | None = None


def url_and_key(settings: EndpointSettings, *, what: str, setting: str) -> tuple[str, str]:
    """The base URL and the key, from the settings and the environment.

    Args:
        what: Who asks, such as "engine openai"; the first words of an error.
        setting: How the user writes the URL down, such as "openai.base_url".

    Raises:
        InputError: There is no URL, it is none, or it holds a password, which would be written down.
    """
    url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        raise InputError(f"{what}: no endpoint", allowed=f"{setting}, or OPENAI_BASE_URL in the environment")
    if not re.match(r"https?://[^/\s]+", url):
        raise InputError(f"{what}: base_url is no URL", given=url, allowed="such as http://localhost:8000/v1")
    if re.match(r"https?://[^/\s]*@", url):
        raise InputError(f"{what}: base_url holds a user or password", allowed="the key in api_key_env's variable")
    try:
        # Reading the port raises for one that is none, and splitting for brackets that are not closed.
        _ = urlsplit(url).port
    except ValueError as error:
        raise InputError(f"{what}: base_url is no URL ({error})", given=url) from error
    key = os.environ.get(settings.api_key_env) or "none"
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"{what}: the key in {settings.api_key_env} holds a line end or a letter that no key has",
            allowed="printable ASCII",
        )
    # Servers on one's own machine ask for no key; the client insists on one.
    return url.rstrip("/"), key


class Endpoint:
    """A pool of threads, each with one request under way.

    Attributes:
        client: The `openai` client; its own retries are off, for it does not repeat an answer that is no JSON and waits
            8 s at most.
        url: The base URL.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        what: str,
        setting: str = "base_url",
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        import openai

        self.settings = settings
        self.url, key = url_and_key(settings, what=what, setting=setting)
        self.client = openai.OpenAI(base_url=self.url, api_key=key, timeout=settings.timeout, max_retries=0)
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def all(self, things: Sequence[Thing], ask: Callable[[Thing], Result]) -> Iterator[Result]:
        """`ask(thing)` of each, `concurrency` at a time, in the order in which they end; the first error ends all."""
        waiting, under_way = deque(things), set[Future[Result]]()
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

    def send(
        self,
        create: Callable[..., Any],
        body: Mapping[str, Any],
        read: Callable[[dict[str, Any]], Result],
        *,
        allowed: str,
    ) -> Result | GaveUp:
        """What `read` makes of the answer's JSON as it came, after as many tries as it takes.

        Args:
            create: A method of `client`'s `with_raw_response`.
            body: Its arguments.
            read: Raises ValueError, KeyError, IndexError or TypeError for JSON that is no answer: tried again.
            allowed: What could be mended where the endpoint will never answer.

        Raises:
            InputError: The endpoint knows no such key, model or route: nothing would ever come of it.
        """
        import openai

        why, status = "", None
        for attempt in range(self.settings.retries + 1):
            after = None
            try:
                return read(create(**body).http_response.json())
            except openai.APIStatusError as error:
                status = error.status_code
                why = f"HTTP {status}: {_said(error)}"
                if status in _FATAL or error.code in _FATAL_CODES:
                    raise InputError(f"{self.url} refuses {body['model']}: {why}", allowed=allowed) from error
                if status not in _RETRIED and status < 500:
                    return GaveUp(why, status)
                after = error.response.headers.get("retry-after")
            except openai.APIConnectionError as error:
                why, status = f"{type(error).__name__}: {error.__cause__ or error}", None
            except (ValueError, KeyError, IndexError, TypeError, RecursionError, openai.APIError) as error:
                why, status = f"the answer is damaged ({type(error).__name__}: {error})", None
            if self._stopped.is_set():
                break
            if attempt < self.settings.retries:
                self._sleep(_pause(self.settings.backoff, attempt, after))
        return GaveUp(f"{why} (after {self.settings.retries + 1} tries)"[:500], status)

    def close(self) -> None:
        """Close the connections and wake whoever waits for a next try."""
        self._stopped.set()
        self.client.close()


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
    lines = str(message or error.message).strip().splitlines()
    return lines[0][:200] if lines else "without a word"
