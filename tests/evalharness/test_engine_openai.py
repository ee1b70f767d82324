"""The OpenAI-compatible engine against a server on this machine that misbehaves as real ones do."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig, Generation, OpenAI
from psacpo.evalharness.engines import Completion, Failure, Passage, Policy, Request
from psacpo.evalharness.engines.openai import OpenAIEngine
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.sweep import FAILURES
from psacpo.merge.adapters import read_adapter

MakeConfig = Callable[..., FrontierConfig]
Trouble = Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes] | None]


class Server(ThreadingHTTPServer):
    """Answers completions by `answer`, after whatever `trouble` does to a request's first tries."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = plain
        self.trouble: Trouble = lambda body, attempt: None
        self.tries: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = json.dumps([body["model"], body["prompt"], body["seed"], body["max_tokens"]])
        with self.server.guard:
            self.server.tries[name] += 1
            attempt = self.server.tries[name]
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("authorization"))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            found = self.server.trouble(body, attempt)
            if found is None:
                found = 200, {}, json.dumps(self.server.answer(body)).encode()
            status, headers, content = found
        finally:
            with self.server.guard:
                self.server.busy -= 1
        try:
            self.send_response(status)
            for key, value in (
                {"content-type": "application/json", "content-length": str(len(content))} | headers
            ).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client gave up waiting

    def log_message(self, *_: Any) -> None:
        pass


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """An answer that tells who was asked what."""
    choice = {"index": 0, "text": f"{body['model']} {body['prompt']}", "finish_reason": "stop", "logprobs": None}
    return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def make(base: Path, server: Server, generation: dict[str, Any] | None = None, **settings: Any) -> OpenAIEngine:
    values = {"base_url": server.url, "retries": 3, "backoff": 0.001} | settings
    chosen = Generation.model_validate({"max_new_tokens": 5, "temperature": 0.0} | (generation or {}))
    return OpenAIEngine(base, OpenAI.model_validate(values), chosen)


def asked(count: int, policies: Sequence[Policy] = (Policy("policy@0.30"), Policy("base"))) -> list[Request]:
    return [
        Request(f"{policy.name}/{i}", policy, (0, 5 + i, 9), seed=2**63 + i)
        for i in range(count)
        for policy in policies
    ]


def test_ids_go_out_and_nothing_is_crossed(tiny_llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = make(tiny_llama, server, {"stop": ["END"], "top_k": 7}, concurrency=4, models={"base": "org/base"})
    found = {answer.key: answer for answer in engine.generate(asked(20))}
    assert len(found) == 40
    for key, answer in found.items():
        name, _, place = key.rpartition("/")
        model = "org/base" if name == "base" else name
        assert isinstance(answer, Completion)
        assert answer.text == f"{model} [0, {5 + int(place)}, 9]"
    assert server.most_busy <= 4
    assert server.keys == {"Bearer secret"}
    body = server.bodies[0]
    assert body["stop"] == ["END"]
    assert body["top_k"] == 7
    assert body["return_token_ids"] is True
    assert 1 in body["stop_token_ids"]
    assert all(body["seed"] < 2**63 for body in server.bodies)


def test_the_openai_dialect_sends_text_without_a_second_bos_and_no_field_of_others(
    tiny_llama: Path, server: Server
) -> None:
    engine = make(tiny_llama, server, dialect="openai")
    ids = tuple(engine.tokenizer("how do i bake")["input_ids"])
    assert ids[0] == engine.tokenizer.bos_token_id
    [answer] = engine.generate([Request("a", Policy("base"), ids, 0)])
    [body] = server.bodies
    assert body["prompt"] == "how do i bake"
    assert set(body) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
    assert isinstance(answer, Completion)
    assert answer.token_ids == tuple(engine.tokenizer(answer.text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("429", lambda body, attempt: (429, {"retry-after": "0"}, b'{"error": {"message": "slow"}}')),
        ("500", lambda body, attempt: (500, {}, b"oops")),
        ("503", lambda body, attempt: (503, {"retry-after": "not a number"}, b"{}")),
        ("truncated", lambda body, attempt: (200, {}, json.dumps(plain(body)).encode()[:-20])),
        ("short", lambda body, attempt: (200, {"content-length": "900", "connection": "close"}, b'{"choices')),
        ("no choice", lambda body, attempt: (200, {}, b'{"choices": []}')),
        ("not json", lambda body, attempt: (200, {"content-type": "text/html"}, b"<html>gateway</html>")),
    ],
)
def test_what_passes_is_tried_again(tiny_llama: Path, server: Server, name: str, trouble: Any) -> None:
    server.trouble = lambda body, attempt: trouble(body, attempt) if attempt <= 2 else None
    found = list(make(tiny_llama, server).generate(asked(3)))
    assert all(isinstance(answer, Completion) for answer in found)
    assert set(server.tries.values()) == {3}


def test_a_timeout_is_tried_again(tiny_llama: Path, server: Server) -> None:
    def slow(body: dict[str, Any], attempt: int) -> None:
        if attempt == 1:
            time.sleep(0.5)

    server.trouble = slow  # type: ignore[assignment]
    found = list(make(tiny_llama, server, timeout=0.1).generate(asked(2)))
    assert all(isinstance(answer, Completion) for answer in found)
    assert set(server.tries.values()) == {2}


def test_what_does_not_pass_fails_alone(tiny_llama: Path, server: Server) -> None:
    def trouble(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], bytes] | None:
        if body["prompt"] == [0, 6, 9]:
            return 500, {}, b'{"error": {"message": "out of pages"}}'
        if body["prompt"] == [0, 7, 9]:
            return 400, {}, b'{"error": {"message": "prompt too long"}}'
        return None

    server.trouble = trouble
    found = {answer.key: answer for answer in make(tiny_llama, server).generate(asked(4, [Policy("base")]))}
    kinds = {key: type(answer) for key, answer in found.items()}
    assert kinds == {"base/0": Completion, "base/1": Failure, "base/2": Failure, "base/3": Completion}
    assert found["base/1"] == Failure("base/1", "HTTP 500: out of pages (after 4 tries)")
    assert found["base/2"] == Failure("base/2", "HTTP 400: prompt too long")
    assert sorted(server.tries.values()) == [1, 1, 1, 4]


def test_an_answer_that_was_filtered_is_a_failure(tiny_llama: Path, server: Server) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        found = plain(body)
        found["choices"][0]["finish_reason"] = "content_filter"
        return found

    server.answer = answer
    [found] = make(tiny_llama, server).generate(asked(1, [Policy("base")]))
    assert found == Failure("base/0", "the endpoint ended the answer with finish_reason content_filter")


@pytest.mark.parametrize(("status", "said"), [(401, "bad key"), (404, "no model policy@0.30")])
def test_what_can_never_pass_stops_at_once(tiny_llama: Path, server: Server, status: int, said: str) -> None:
    server.trouble = lambda body, attempt: (status, {}, json.dumps({"error": {"message": said}}).encode())
    with pytest.raises(InputError, match=f"refuses policy@0.30: HTTP {status}: {said}"):
        list(make(tiny_llama, server, concurrency=1).generate(asked(50)))
    assert sum(server.tries.values()) == 1


def test_nobody_there_is_a_failure_in_words(tiny_llama: Path, server: Server) -> None:
    engine = make(tiny_llama, server, base_url="http://127.0.0.1:9/v1", retries=1)
    [found] = engine.generate(asked(1, [Policy("base")]))
    assert isinstance(found, Failure)
    assert "Connection" in found.error
    assert "(after 2 tries)" in found.error


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="engine openai: no endpoint; allowed: openai.base_url, or OPENAI_BASE_URL"):
        frontier(make_config(engine="openai"))
    with pytest.raises(InputError, match="base_url is no URL; given: localhost:8000"):
        frontier(make_config(engine="openai", openai={"base_url": "localhost:8000"}))


class Real:
    """The stub's answers by the transformers engine: a whole endpoint that serves the sweep's policies."""

    def __init__(self, config: FrontierConfig, policies: dict[str, dict[str, float]]) -> None:
        adapters = {name: read_adapter(path) for name, path in config.adapters.items()}
        self.engine = TransformersEngine.load(
            config.base, adapters, generation=config.generation, dtype="float32", device="cpu", log_probs=True
        )
        self.policies, self.guard = policies, threading.Lock()

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        policy = Policy(body["model"], self.policies[body["model"]])
        request = Request("x", policy, tuple(body["prompt"]), body["seed"])
        if "prompt_logprobs" in body:
            return self.read(body)
        found = plain(body)
        choice = found["choices"][0]
        with self.guard:
            if body["max_tokens"] == 1:
                [row] = self.engine.next_tokens([request])
                top = sorted(row["x"].items(), key=lambda pair: -pair[1])[: body["logprobs"]]
                choice["logprobs"] = {"top_logprobs": [{f"token_id:{token}": value for token, value in top}]}
                return found
            [answer] = self.engine.generate([request])
        ids = [*answer.token_ids, *([] if answer.end_id is None else [answer.end_id])]
        choice |= {"text": answer.text, "token_ids": ids, "finish_reason": answer.finish_reason}
        # Only their sum is told apart from the sweep's own.
        choice["logprobs"] = {"token_logprobs": [answer.log_prob, *[0.0] * (len(ids) - 1)]}
        return found

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the base thinks of a text, as vLLM writes it: each token's own log-probability, the first has none."""
        assert self.policies[body["model"]] == {}
        found = plain(body)
        prompt, last = body["prompt"], body["allowed_token_ids"][0]
        with self.guard:
            said = [
                dict(self.engine.base_log_probs([Passage("x", tuple(prompt[:i]), (token,))]))["x"]
                for i, token in enumerate([*prompt, last])
                if i
            ]
        entries = [{str(token): {"logprob": value}} for token, value in zip(prompt[1:], said[:-1], strict=True)]
        found["choices"][0] |= {"prompt_logprobs": [None, *entries], "logprobs": {"token_logprobs": [said[-1]]}}
        return found


def records(run: Path, name: str = "completions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_sweep_over_http_keeps_what_failed_and_tries_it_again(
    make_config: MakeConfig, server: Server, tmp_path: Path
) -> None:
    greedy = {"max_new_tokens": 12, "temperature": 0.0, "kl_to_base": True}
    local = frontier(make_config(out=tmp_path / "local", generation=greedy))
    settings = {"base_url": server.url, "retries": 1, "backoff": 0.001}
    config = make_config(out=tmp_path / "remote", engine="openai", openai=settings, generation=greedy)
    policies = {f"policy@{q:.2f}": {"reward": 1 - q, "safety": q} for q in (0.0, 0.5, 1.0)} | {"base": {}}
    server.answer = Real(config, policies)

    def trouble(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], bytes] | None:
        bad = body["model"] == "policy@0.50" and body["max_tokens"] > 1
        return (500, {}, b"{}") if bad else None

    server.trouble = trouble
    with pytest.raises(
        InputError, match=r"5 of 20 answers failed, the first of policy@0\.50 .* the same command again"
    ):
        frontier(config)
    assert {record["policy"] for record in records(config.out, FAILURES)} == {"policy@0.50"}
    assert all(record["error"].startswith("HTTP 500") for record in records(config.out, FAILURES))
    assert len(records(config.out)) == 15
    assert not (config.out / "frontier.json").exists()

    server.trouble = lambda body, attempt: None
    server.tries.clear()
    run = frontier(config)
    generated = [key for key in server.tries if json.loads(key)[3] > 1]
    assert {json.loads(key)[0] for key in generated} == {"policy@0.50"}
    assert not (run / FAILURES).exists()

    def answers(run: Path) -> dict[tuple[str, str], tuple[str, list[int], str]]:
        return {(r["policy"], r["prompt_id"]): (r["text"], r["token_ids"], r["finish_reason"]) for r in records(run)}

    assert answers(run) == answers(local)
    ours, theirs = (json.loads((one / "frontier.json").read_text())["points"] for one in (run, local))
    for point, expected in zip(ours, theirs, strict=True):
        assert point["kl_to_base"]["mean"] == pytest.approx(expected["kl_to_base"]["mean"], abs=1e-3)


def test_an_endpoint_that_reads_no_prompts_aloud_is_told_of(
    make_config: MakeConfig, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It gives log-probabilities of its answers and none of a prompt: the sweep ends, without the metric."""
    config = make_config(
        out=tmp_path / "remote",
        engine="openai",
        openai={"base_url": server.url, "backoff": 0.001},
        generation={"max_new_tokens": 12, "kl_to_base": True},
    )
    policies = {f"policy@{q:.2f}": {"reward": 1 - q, "safety": q} for q in (0.0, 0.5, 1.0)} | {"base": {}}
    real = Real(config, policies)
    server.answer = lambda body: plain(body) if "prompt_logprobs" in body else real(body)
    found = json.loads((frontier(config) / "frontier.json").read_text())
    assert found["points"][0]["kl_to_base"]["mean"] is None
    assert "KL to base is not known of 15 texts, the first because: the endpoint gives no" in capfd.readouterr().err


def test_an_endpoint_that_serves_the_base_for_every_name_is_caught(
    make_config: MakeConfig, server: Server, tmp_path: Path
) -> None:
    config = make_config(engine="openai", openai={"base_url": server.url})
    server.answer = Real(config, {name: {} for name in ("policy@0.00", "policy@0.50", "policy@1.00", "base")})
    with pytest.raises(InputError, match=r"policy@0\.00 says what the base says"):
        frontier(config)
    swapped = {f"policy@{q:.2f}": {"reward": q, "safety": 1 - q} for q in (0.0, 0.5, 1.0)} | {"base": {}}
    server.answer = Real(config, swapped)
    with pytest.raises(InputError, match=r"policy@0\.00 is not the merged model in this engine.*dense merge's by"):
        frontier(config)
    assert not records(config.out)
