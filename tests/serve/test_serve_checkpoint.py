"""Full weights of one ratio in vLLM's server as it is: no psacpo in that process, no flag but the directory."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve-checkpoint")]

RATIO = 0.37
TIE = 1e-4  # two logits nearer than this may come out in either order


@pytest.fixture(scope="module")
def ends(served_base: Path, make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    return (
        make_adapter(served_base, seed=11, r=4, lora_alpha=8),
        make_adapter(served_base, seed=12, r=6, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    )


@pytest.fixture(scope="module")
def checkpoint(
    vllm_environment: dict[str, str], served_base: Path, ends: tuple[Path, Path], tmp_path_factory: Any
) -> Path:
    out: Path = tmp_path_factory.mktemp("merged") / "policy"
    flags = {"base": served_base, "reward": ends[0], "safety": ends[1], "ratio": RATIO, "as": "checkpoint", "out": out}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "psacpo.cli", "merge", *given]
    done = subprocess.run(command, env=vllm_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def url(vllm_environment: dict[str, str], checkpoint: Path, tmp_path_factory: Any) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log: Path = tmp_path_factory.mktemp("plain") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    # Of this test, not of the checkpoint: tokens that can be compared, and how vLLM starts quickly on a CPU.
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--distributed-executor-backend", "uni"]
    with log.open("wb") as handle:
        process = subprocess.Popen(command, env=vllm_environment, stdout=handle, stderr=handle)
    try:
        until = time.monotonic() + 500
        while True:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < until, log.read_text(errors="replace")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@pytest.fixture(scope="module")
def reference(served_base: Path, ends: tuple[Path, Path]) -> Any:
    """PEFT's own exact sum of the two adapters (`cat`), with the base, in float32."""
    base = AutoModelForCausalLM.from_pretrained(served_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, ends[0], adapter_name="reward")
    model.load_adapter(ends[1], adapter_name="safety")
    model.add_weighted_adapter(["reward", "safety"], [1 - RATIO, RATIO], "policy", combination_type="cat")
    model.set_adapter("policy")
    return model.eval()


@torch.no_grad()
def misses(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By how much the answer's tokens miss the best logits at most; 0 is greedy decoding."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())


def test_it_answers_as_the_exact_sum(url: str, checkpoint: Path, reference: Any) -> None:
    greedy = {"model": str(checkpoint), "max_tokens": 12, "temperature": 0}
    more = {"return_token_ids": True, "ignore_eos": True}
    for prompt in ([0, 20, 31, 47], [0, 90, 12, 200, 33, 8]):
        tokens = ask(url, "/completions", greedy | more | {"prompt": prompt})["choices"][0]["token_ids"]
        assert len(tokens) == 12
        assert misses(reference, prompt, tokens) <= TIE
        with reference.disable_adapter():  # the check has teeth: the base alone answers otherwise
            assert misses(reference, prompt, tokens) > TIE


def test_its_tokenizer_and_chat_template_come_with_it(url: str, checkpoint: Path, reference: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "how do i bake bread"}], "model": str(checkpoint)}
    more = {"max_tokens": 12, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    answer = ask(url, "/chat/completions", asked | more)
    assert answer["prompt_token_ids"].count(0) == 1
    assert misses(reference, answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) <= TIE
