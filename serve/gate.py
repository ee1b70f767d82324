"""ASGI middleware in front of vLLM's server: who may ask, for which policy, and how many policies are held.

vLLM's own registry of adapters only grows, its key guards only some of its paths, and a name that it does not know
gets an answer that does not say which are right. The gate settles these before a request reaches vLLM: it checks the
key, gives each ratio its one name, builds the policy and keeps it while the request runs, and has vLLM forget the
least recently used.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

from psacpo.errors import InputError
from psacpo.merge.config import policy_name
from psacpo.serve.cache import CacheFull, PolicyCache
from psacpo.serve.plan import Plan
from psacpo.serve.policies import Policies
from psacpo.serve.pool import Busy, Pool
from psacpo.serve.ratios import Refusal, by_ratio

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PROBE_HEADER = b"x-psacpo-probe"
# Paths on which a client could put adapters of its own into the engine, or take ours out.
_MANAGEMENT = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
# Bytes of one request: a prompt of a million tokens takes a few, images more. Without a limit one client could fill memory.
_LARGEST_BODY = 256 << 20
_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
_log = logging.getLogger("vllm.psacpo")  # below vLLM's logger, so it has its handlers and format


class Gate:
    """The middleware; vLLM makes one, from its import path, in the process that answers HTTP.

    Args:
        app: What comes behind: vLLM's application.
        plan: What the launcher settled; None takes it from the environment.
        api_key: That clients must send; None takes VLLM_API_KEY, empty asks for none.
    """

    running: ClassVar[Gate | None] = None

    def __init__(self, app: App, plan: Plan | None = None, api_key: str | None = None) -> None:
        found = plan or Plan.find()
        if found is None:
            raise InputError("psacpo's gate is in a vLLM that psacpo did not start", allowed="psacpo serve")
        self.app, self.plan, self.dial = app, found, found.dial
        key = os.environ.get("VLLM_API_KEY", "") if api_key is None else api_key
        self._key = hashlib.sha256(key.encode()).digest() if key else None
        self.policies = Policies(found, PolicyCache(found.cache_dir, found.cache_size))
        # The engine reads these again whenever its own copies had to make room.
        self.fixed = {name: self.policies.lease(name) for name in map(policy_name, self.dial.fixed)}
        self.pool = Pool(found.capacity, self.policies.lease, self._forget)
        self._restoring = asyncio.Lock()
        self._state: Any = None
        if found.watch is not None:
            threading.Thread(target=_end_with_launcher, args=(found.watch,), daemon=True).start()
        Gate.running = self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # Read ahead, so that the first new ratio does not pay for it; what is wrong shows on its use.
            threading.Thread(target=self._read_ahead, daemon=True).start()
            return await self.app(scope, receive, send)
        if scope.get("method") == "OPTIONS":  # a browser's question before its request; it carries no key
            return await self.app(scope, receive, send)
        self._state = getattr(scope.get("app"), "state", None)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path != "/health" and not self._has_key(scope):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _answer(send, 401, _error(401, "no valid API key; allowed: Authorization: Bearer KEY"))
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if path.startswith(_MANAGEMENT):
            return await _answer(send, 404, _error(404, "adapters are managed by psacpo serve; ask for policy@RATIO"))
        if scope["method"] == "GET" and path == "/v1/models":
            return await self._list_models(scope, receive, send)
        if scope["method"] == "POST":
            return await self._post(scope, receive, send)
        await self.app(scope, receive, send)

    def path(self, name: str) -> Path | None:
        """The directory of a policy that a request is using now, None for any other name."""
        return self.fixed[name].path if name in self.fixed else self.pool.path(name)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(receive)
            if body is None:
                return  # the client has gone
            request = _parse(body)
            if request is None:
                # Not a JSON object, or a model that is no text: vLLM says what is wrong with it.
                if self.dial.pins:
                    raise Refusal(400, "the body is no JSON object with a model's name")
                return await self.app(scope, _replay(body, receive), send)
            named = request.get("model")
            name = None if self._is_probe(scope) and named in self.dial.bases else self.dial.choose(named)
            if name is not None and name != named:
                body = json.dumps(request | {"model": name}).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
            await self._pass(name, scope, _replay(body, receive), send)
        except Refusal as refusal:
            await _answer(send, refusal.status, _error(refusal.status, str(refusal)))

    async def _pass(self, name: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        if name is None:
            return await self.app(scope, receive, send)
        if name in self.fixed:
            await self._restore(name)
            return await self.app(scope, receive, send)
        async with contextlib.AsyncExitStack() as stack:
            try:
                use = await stack.enter_async_context(self.pool.use(name))
            except Busy as busy:
                raise Refusal(429, str(busy)) from busy
            except (CacheFull, InputError, OSError) as error:
                raise _unavailable(name, error) from error

            async def sending(message: Message) -> None:
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    use.finished = True

            await self.app(scope, receive, sending)

    async def _restore(self, name: str) -> None:
        """Build a fixed policy again whose files have been removed: the engine reads them whenever it made room."""
        if not self.fixed[name].lost:
            return
        async with self._restoring:
            if self.fixed[name].lost:
                try:
                    lease = await asyncio.to_thread(self.policies.lease, name)
                except (CacheFull, InputError, OSError) as error:
                    raise _unavailable(name, error) from error
                self.fixed[name].close()
                self.fixed[name] = lease

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list of base models, and ours of policies: those always at hand and those in the cache."""
        status, body = await _collect(self.app, scope, receive)
        if status != 200:
            return await _answer(send, status, json.loads(body) if body else {})
        listed = json.loads(body)
        bases = [card for card in listed["data"] if card["id"] in self.dial.bases]
        names = set(self.fixed)
        if not self.dial.pins:
            names |= set(filter(self._reachable, await asyncio.to_thread(self.policies.cached)))
        cards = [
            {
                "id": name,
                "object": "model",
                "created": bases[0]["created"],
                "owned_by": "psacpo",
                "root": name,
                "parent": bases[0]["id"],
                "max_model_len": bases[0].get("max_model_len"),
                "permission": [],
            }
            for name in by_ratio(names)
        ]
        await _answer(send, 200, listed | {"data": ([] if self.dial.pins else bases) + cards})

    async def _forget(self, name: str) -> None:
        """Have vLLM forget a policy, so that a later request for it is resolved afresh."""
        models = getattr(self._state, "openai_serving_models", None)
        if models is None:
            return
        models.lora_resolver_lock.pop(name, None)
        request = models.lora_requests.pop(name, None)
        if request is not None:
            # In line behind the end of the policy's last request: once this returns the engine is done with its files.
            with contextlib.suppress(Exception):  # an engine that died says so to its requests
                await models.engine_client.remove_lora(request.lora_int_id)

    def _reachable(self, name: str) -> bool:
        """Whether a request for `name` would be answered by that very policy."""
        try:
            return self.dial.choose(name) == name
        except Refusal:
            return False

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        header = _header(scope, b"authorization")
        scheme, _, token = header.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(hashlib.sha256(token).digest(), self._key)

    def _is_probe(self, scope: Scope) -> bool:
        secret = self.plan.probe
        return secret is not None and secrets.compare_digest(_header(scope, PROBE_HEADER), secret.encode())

    def _read_ahead(self) -> None:
        try:
            self.policies.read()
        except InputError as error:
            _log.error("%s", error)


def _end_with_launcher(descriptor: int) -> None:
    """Stop this server when the launcher's end of the pipe closes, however the launcher ended."""
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _unavailable(name: str, error: Exception) -> Refusal:
    _log.error("%s cannot be had: %s", name, error)
    return Refusal(503, f"{name} cannot be had now: {error}")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(key, value) for key, value in headers if key.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def _parse(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body, None if it is no object or its model is no text."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str | None):
        return None
    return request


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body of a request, None if the client went away before its end.

    Raises:
        Refusal: 413, before all of it is in memory.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LARGEST_BODY:
            raise Refusal(413, f"the body is larger than {_LARGEST_BODY >> 20} MiB, the most that this server reads")
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the application behind: the body as one message, then what the client still sends."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _collect(app: App, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """Status and body of what the application answers."""
    status, parts = 500, []

    async def collecting(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, collecting)
    return status, b"".join(parts)


def _error(status: int, message: str) -> dict[str, Any]:
    """An error as the OpenAI API has it."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "ServiceUnavailableError")
    return {
        "error": {"message": message, "type": kind, "param": "model" if status in (400, 404) else None, "code": status}
    }


async def _answer(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
