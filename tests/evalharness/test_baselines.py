"""Baselines that are models of their own: a model directory, an endpoint; on the axes of the sweep, never made twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.evalharness.sweep import plan_summary
from psacpo.merge import merge
from psacpo.merge.config import MergeConfig
from psacpo.recipe import Project

MakeConfig = Callable[..., FrontierConfig]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "batch_size": 8}


def load(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "frontier.json").read_text())
    return found


def answers(run: Path, policy: str) -> dict[str, str]:
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    return {row["prompt_id"]: row["text"] for row in rows if row["policy"] == policy}


class _Chat(BaseHTTPRequestHandler):
    """Says the last message back, after one failure; knows no max_tokens."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: Any = self.server
        server.bodies.append(body)
        status, found = 200, {}
        if len(server.bodies) == 1:
            status, found = 503, {"error": {"message": "busy"}}
        elif "max_tokens" in body:
            status, found = 400, {"error": {"message": "max_tokens is not supported, use max_completion_tokens"}}
        else:
            said = {"role": "assistant", "content": "you asked: " + body["messages"][-1]["content"]}
            found = {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]}
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def chat() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    server.daemon_threads = True
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_directory_is_measured_beside_the_sweep(
    make_config: MakeConfig, tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_config()
    merged = tmp_path / "merged"
    merge(
        MergeConfig.model_validate(
            {
                "base": plain.base,
                "reward": plain.adapters["reward"],
                "safety": plain.adapters["safety"],
                "ratios": [0.5],
                "as": "checkpoint",
                "out": merged,
            }
        )
    )
    baselines = {
        "base": {},
        "merged": {"model": str(merged)},
        "other": {"model": str(tiny_qwen2), "template": "{prompt}"},
    }
    config = make_config(baselines=baselines, generation=GREEDY)
    assert plan_summary(config)["answers"] == 6 * 5
    run = frontier(config)
    found = load(run)
    assert [entry["name"] for entry in found["baselines"]] == ["base", "merged", "other"]
    assert found["baselines"][1]["source"] == {"model": "merged"}
    assert found["counts"]["generated"] == 6 * 5
    # The merged checkpoint is the policy at that ratio; a model of another tokenizer answers from its own.
    assert answers(run, "merged") == answers(run, "policy@0.50") != answers(run, "base")
    assert len(answers(run, "other")) == 5
    assert {entry["cost"]["n"] for entry in found["baselines"]} == {5}
    manifest = json.loads((run / "psacpo.json").read_text())
    assert {"baseline merged", "baseline other"} <= manifest["inputs"].keys()

    before = (run / "frontier.json").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded for finished work")

    monkeypatch.setattr(TransformersEngine, "load", fail)
    frontier(config)
    assert (run / "frontier.json").read_bytes() == before
    # Another model under the same name is never met with the old one's answers.
    with pytest.raises(AssertionError, match="a model was loaded"):
        frontier(make_config(baselines={"base": {}, "merged": {"model": config.base}}, generation=GREEDY))


def test_an_endpoint_is_measured_beside_the_sweep(make_config: MakeConfig, chat: Any) -> None:
    pytest.importorskip("openai")
    url = f"http://127.0.0.1:{chat.server_address[1]}/v1"
    served = {"model": "some-chat", "base_url": url, "backoff": 0.01, "concurrency": 1, "extra": {"user": "x"}}
    config = make_config(baselines={"base": {}, "chat": {"endpoint": served}}, samples=2)
    run = frontier(config)
    found = load(run)
    assert found["baselines"][1]["source"] == {"model": "some-chat", "endpoint": url}
    assert answers(run, "chat")["e"] == "you asked: heat"
    assert found["baselines"][1]["reward"]["n"] == 10
    last = chat.bodies[-1]
    assert (last["model"], last["temperature"], last["top_p"], last["user"]) == ("some-chat", 1.0, 1.0, "x")
    assert last["max_completion_tokens"] == 12
    asked = len(chat.bodies)
    assert asked == 2 + 10  # one was busy, one knew no max_tokens
    assert len({body["seed"] for body in chat.bodies}) == 10
    frontier(config)
    assert len(chat.bodies) == asked
    other = served | {"model": "another"}
    frontier(make_config(baselines={"base": {}, "chat": {"endpoint": other}}, samples=2))
    assert len(chat.bodies) > asked


def test_baselines_that_cannot_be_had_are_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, tiny_llama_raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def refused(match: str, one: Any) -> None:
        with pytest.raises(InputError, match=match):
            frontier(make_config(baselines={"x": one}))
        assert not (tmp_path / "run").exists()

    refused("no baseline 'x' model directory at", {"model": str(tmp_path / "nowhere")})
    refused("has no chat template", {"model": str(tiny_llama_raw)})
    refused("did you mean 'template'", {"model": str(tiny_llama_raw), "templat": "{prompt}"})
    refused("adapter 'rewrad' which is unknown", {"rewrad": 1.0})
    pytest.importorskip("openai")
    refused("baseline 'x': no endpoint", {"endpoint": {"model": "m"}})
    refused("holds a user or password", {"endpoint": {"model": "m", "base_url": "http://a:b@host/v1"}})


def test_adapters_that_align_leaves_for_comparison_need_no_line(tmp_path: Path) -> None:
    recipe = {
        "base": "base",
        "out": "trained",
        "stages": [{"name": "reward", "data": "a.jsonl"}, {"name": "safety", "data": "b.jsonl"}],
        "naive": True,
        "lambdas": [4],
        "adapters": {"reward": "trained/reward", "safety": "trained/safety"},
        "baselines": {"soup": {"reward": 0.5, "safety-naive": 0.5}, "retrained": {"safety-lambda4": 1}},
        "prompts": "p.jsonl",
        "judges": {"reward": {"kind": "length", "better": "higher"}, "cost": {"kind": "refusal"}},
    }
    (tmp_path / "psacpo.yaml").write_text(yaml.safe_dump(recipe))
    config = Project.find(tmp_path).frontier()
    assert config.adapters["safety-naive"] == tmp_path / "trained" / "safety-naive"
    assert config.adapters["safety-lambda4"] == tmp_path / "trained" / "safety-lambda4"
    recipe["naive"] = False
    (tmp_path / "psacpo.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match="baseline 'soup' weighs adapter 'safety-naive' which is unknown"):
        Project.find(tmp_path).frontier()
