"""vLLM's real server over real HTTP, asked with the `openai` client: any ratio, exact, concurrent, after kills.

Three servers in turn share one cache directory, each a process that `psacpo serve` runs:
    first       any ratio, twelve held at once, so that twenty ratios make it give policies up; killed at the end
    second      beside the first: a key, ratios snapped to a grid; its launcher is killed at the end
    restarted   after the kill, by the command in a project directory, on what the first has left, two ratios pinned;
                ended by SIGTERM
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from psacpo.serve.probe import prompt_scores

openai = pytest.importorskip("openai")

# One worker, since tests look at what earlier ones left in the module's servers.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve-http")]

TIE = 1e-4  # two logits nearer than this may come out in either order
TOKENS = 12
START = 500  # seconds, on a machine that does other things too
ENGINE = ["--enforce-eager", "--distributed-executor-backend", "uni"]


def unavailable(reason: str) -> None:
    """Skip, with the reason; where vLLM is required, fail."""
    if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
        pytest.fail(f"PSACPO_REQUIRE_VLLM=1, but {reason}")
    pytest.skip(reason)


@dataclass
class Server:
    """`psacpo serve` in a process of its own."""

    settings: dict[str, Any]
    log: Path
    environment: Mapping[str, str]
    key: str = "none"
    project: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    port: int = field(default=0)

    def start(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self.project is None:
            said = json.dumps(self.settings | {"port": self.port, "engine_args": ENGINE}, default=str)
            command = [sys.executable, "-m", "psacpo.serve.run", said]
        else:
            command = self.typed(self.project)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.project,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + START
        while "serving at" not in self.text():
            if self.process.poll() is not None:
                if "cannot be imported" in self.text():
                    unavailable(self.text())
                pytest.fail(f"the server ended: {self.text()}")
            assert time.monotonic() < until, self.text()
            time.sleep(0.2)
        return self

    def typed(self, project: Path) -> list[str]:
        """`psacpo serve` as it is typed in a project directory, whose recipe says base, adapters and dtype."""
        said = dict(self.settings)
        recipe = {"base": str(said.pop("base")), "dtype": said.pop("dtype")}
        recipe["adapters"] = {end: str(said.pop(end)) for end in ("reward", "safety")}
        (project / "psacpo.yaml").write_text(json.dumps(recipe))
        flags = [f"--ratio={ratio}" for ratio in said.pop("ratios")]
        flags += [f"--{name.replace('_', '-')}={value}" for name, value in said.items()]
        flags += [f"--port={self.port}", "--engine-args", " ".join(ENGINE)]
        return [sys.executable, "-m", "psacpo.cli", "serve", *flags]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[int]:
        """The processes that descend from the launcher, which is not among them."""
        assert self.process is not None
        listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        found, edge = [], {self.process.pid}
        while edge:
            edge = {int(pid) for pid, parent, stat in rows if int(parent) in edge and not stat.startswith("Z")}
            found += sorted(edge)
        return found

    def kill(self, number: int) -> int:
        """Signal the launcher, and give its exit code back."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=120, **options)

    def asynchronous(self) -> Any:
        return openai.AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=300)

    def models(self) -> list[str]:
        return [model.id for model in self.client().models.list()]


def gone(pids: Sequence[int], seconds: float = 30) -> bool:
    """Whether processes end within a time; one that nobody has waited for counts as ended."""
    until = time.monotonic() + seconds
    while True:
        listed = [
            subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
            for pid in pids
        ]
        if all(state.strip().startswith("Z") or not state.strip() for state in listed):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, served_base: Path, make_adapter: Callable[..., Path]
) -> dict[str, Any]:
    """A base, two adapters on it, a cache directory."""
    base = served_base
    # Ranks 4 and 6 of different scale, so that a wrong weight, scale or order of the two shows.
    reward = make_adapter(base, seed=11, r=4, lora_alpha=8)
    safety = make_adapter(base, seed=12, r=6, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
    cache = tmp_path_factory.mktemp("policies")
    limits = {"dtype": "float32", "max_model_len": 128, "cache_dir": cache, "cache_size": "50MB", "max_loras": 4}
    return {"base": base, "reward": reward, "safety": safety} | limits


class Offline:
    """What each policy answers by transformers on dense weights, in float32: the reference that nothing here shares."""

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._bare = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self._deltas = [self._dense(path) for path in adapters]

    @staticmethod
    def _dense(path: Path) -> Mapping[str, torch.Tensor]:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"]
        return {
            key.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): scale
            * tensors[key.replace("lora_A", "lora_B")].double()
            @ tensors[key].double()
            for key in tensors
            if "lora_A" in key
        }

    def at(self, ratio: float) -> Offline:
        """With the weights of the policy at a ratio."""
        weights = {name: weight.clone() for name, weight in self._bare.items()}
        for deltas, weight in zip(self._deltas, (1 - ratio, ratio), strict=True):
            for name, delta in deltas.items():
                weights[name] = (weights[name].double() + weight * delta).float()
        self.model.load_state_dict(weights)
        return self

    @torch.no_grad()
    def differences(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """By how much each token of an answer misses the best logit, given what stands before it; 0 where it is it."""
        assert answer
        ids = torch.tensor([[*prompt, *answer]])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return (logits.max(dim=1).values - chosen).tolist()

    def greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether an answer is what greedy decoding gives, but for ties."""
        return max(self.differences(prompt, answer)) <= TIE


@pytest.fixture(scope="module")
def offline(world: dict[str, Any]) -> Offline:
    return Offline(world["base"], [world["reward"], world["safety"]])


@pytest.fixture(scope="module")
def first(
    world: dict[str, Any], vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = Server(world | {"max_ratios": 12}, tmp_path_factory.mktemp("first") / "log", vllm_environment).start()
    yield server
    stop(server)


@pytest.fixture(scope="module")
def second(world: dict[str, Any], first: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("second") / "log"
    server = Server(world | {"snap": 0.05, "api_key": "s3cret"}, log, first.environment, key="s3cret").start()
    yield server
    stop(server)


def stop(server: Server) -> None:
    if server.process is not None and server.process.poll() is None:
        server.kill(signal.SIGTERM)


def prompts(count: int, *, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[0, *(draw.randrange(10, 300) for _ in range(draw.randrange(3, 20)))] for _ in range(count)]


def options(prompt: Sequence[int]) -> dict[str, Any]:
    more = {"return_token_ids": True, "ignore_eos": True}
    return {"prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "extra_body": more}


async def complete(client: Any, model: str, prompt: Sequence[int]) -> tuple[str, list[int]]:
    """Who answered, and its token ids."""
    answer = await client.completions.create(model=model, **options(prompt))
    return answer.model, answer.choices[0].token_ids


def together(server: Server, asked: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, list[int]]]:
    async def scene() -> list[tuple[str, list[int]]]:
        async with server.asynchronous() as client:
            return await asyncio.gather(*(complete(client, model, prompt) for model, prompt in asked))

    return asyncio.run(scene())


def test_three_ratios_at_once_answer_as_the_dense_merges(first: Server, offline: Offline) -> None:
    ratios = (0.1, 0.37, 0.62)
    rows = prompts(4, seed=1)
    asked = [(f"policy@{ratio}", row) for ratio in ratios for row in rows]
    answers = together(first, asked)
    for (model, row), (who, tokens) in zip(asked, answers, strict=True):
        ratio = float(model.removeprefix("policy@"))
        assert float(who.removeprefix("policy@")) == ratio
        assert len(tokens) == TOKENS
        assert offline.at(ratio).greedy(row, tokens), offline.differences(row, tokens)
    # The check has teeth: an answer is not greedy at another ratio, nor of the base.
    own = [tokens for _, tokens in answers]
    assert not any(offline.at(0.62).greedy(row, tokens) for row, tokens in zip(rows, own[:4], strict=True))


def test_the_ends_and_the_base_are_what_they_say(first: Server, offline: Offline) -> None:
    [row] = prompts(1, seed=2)
    # As many policies as the engine has slots: its CPU kernels would give the base the last one's.
    together(first, [(f"policy@0.{k}", row) for k in range(1, 7)])
    answers = together(first, [("policy@0", row), ("policy@1.00", row), ("base", row)])
    assert [who for who, _ in answers] == ["policy@0.00", "policy@1.00", "base"]
    for ratio, (_, tokens) in zip((0.0, 1.0), answers[:2], strict=True):
        assert offline.at(ratio).greedy(row, tokens)
    offline.model.load_state_dict(offline._bare)
    assert offline.greedy(row, answers[2][1])
    assert len({tuple(tokens) for _, tokens in answers}) == 3


def test_log_probabilities_of_prompts_in_one_batch(first: Server, offline: Offline) -> None:
    """They ended the server: vLLM's CPU kernels take one row for each request there."""
    models = ["policy@0.37", "base", "policy@0.62"]
    rows = prompts(8, seed=8)
    client = first.client()

    def scores(model: str) -> list[list[float]]:
        answer = client.completions.create(model=model, prompt=rows, max_tokens=1, extra_body={"prompt_logprobs": 0})
        return [prompt_scores(choice.prompt_logprobs) for choice in answer.choices]  # type: ignore[attr-defined]

    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(scores, models))
    for model, row, numbers in (
        (model, *pair) for model, found in zip(models, answers, strict=True) for pair in zip(rows, found, strict=True)
    ):
        if model == "base":
            offline.model.load_state_dict(offline._bare)
        else:
            offline.at(float(model.removeprefix("policy@")))
        with torch.inference_mode():
            logits = offline.model(torch.tensor([row])).logits[0, :-1].float().log_softmax(dim=-1)
        wanted = logits.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(numbers), wanted, atol=2e-3, rtol=0)


def test_a_stream_is_the_same_answer_in_pieces(first: Server) -> None:
    client, [row] = first.client(), prompts(1, seed=3)
    whole = client.completions.create(model="policy@0.44", **options(row))
    pieces = list(client.completions.create(model="policy@.440", stream=True, **options(row)))
    assert {piece.model for piece in pieces} == {"policy@0.44"}
    assert len(pieces) > 3
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text
    tokens = [token for piece in pieces for choice in piece.choices for token in choice.token_ids or ()]
    assert tokens == whole.choices[0].token_ids


def test_chat_takes_the_bases_template_with_one_bos(first: Server, offline: Offline) -> None:
    answer = first.client().chat.completions.create(
        model="policy@0.62",
        messages=[{"role": "user", "content": "how do i bake bread"}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert answer.prompt_token_ids.count(0) == 1
    assert offline.at(0.62).greedy(answer.prompt_token_ids, answer.choices[0].token_ids)


@pytest.mark.parametrize("model", ["policy@1.5", "policy@-0.1", "policy@nan", "policy@", "policy@0.3;ls", "policy@inf"])
def test_a_malformed_ratio_is_a_clean_400(first: Server, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="policy@RATIO with a ratio from 0 to 1, such as policy@0.30"):
        first.client().completions.create(model=model, prompt="x")


def test_an_unknown_model_is_a_clean_404_and_adapters_cannot_be_loaded(first: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist here; allowed: base, or policy@RATIO"):
        first.client().chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match="adapters are managed by psacpo serve"):
        first.client().post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "/tmp"}, cast_to=object)


def test_a_bad_request_to_a_good_policy_is_vllms_own_answer(first: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        first.client().completions.create(model="policy@0.44", prompt=[5] * 200, max_tokens=5)


def test_two_hundred_requests_over_twenty_ratios(first: Server, offline: Offline) -> None:
    """More ratios than are held at once, in random order: none lost, none answered by another's policy."""
    ratios = [round(0.03 + 0.0489 * k, 4) for k in range(20)]
    rows = prompts(10, seed=4)
    asked = [(ratio, index) for ratio in ratios for index in range(10)]
    random.Random(5).shuffle(asked)
    answers = together(first, [(f"policy@{ratio}", rows[index]) for ratio, index in asked])
    assert len(answers) == 200
    found: dict[float, dict[int, list[int]]] = {ratio: {} for ratio in ratios}
    for (ratio, index), (who, tokens) in zip(asked, answers, strict=True):
        assert float(who.removeprefix("policy@")) == ratio
        assert len(tokens) == TOKENS
        found[ratio][index] = tokens
    for ratio in ratios:
        offline.at(ratio)
        for index, tokens in found[ratio].items():
            assert offline.greedy(rows[index], tokens), (ratio, index, offline.differences(rows[index], tokens))
    # A crossed answer would have been seen: at each prompt the ratios answer in many ways.
    assert all(len({tuple(found[ratio][index]) for ratio in ratios}) >= 8 for index in range(10))
    listed = first.models()
    assert listed[:2] == ["base", "policy@0.00"]
    assert listed[-1] == "policy@1.00"
    assert {f"policy@{ratio}" for ratio in (0.37, 0.44, *ratios)} >= {name for name in listed if len(name) > 11}
    assert len(listed) >= 20


def test_what_vllm_remembers_is_bounded(first: Server) -> None:
    """Its resolver says what it loads: a ratio given up for others is loaded again when it is asked for again."""
    [row] = prompts(1, seed=6)
    line = "Resolved and loaded LoRA adapter 'policy@0.37'"
    together(first, [("policy@0.37", row)])
    before = first.text().count(line)
    assert before >= 1
    together(first, [("policy@0.37", row)])
    assert first.text().count(line) == before
    together(first, [(f"policy@{round(0.405 + k / 100, 3)}", row) for k in range(13)])  # more than are held at once
    together(first, [("policy@0.37", row)])
    assert first.text().count(line) == before + 1


def test_a_second_server_on_the_same_cache(
    first: Server, second: Server, world: dict[str, Any], offline: Offline
) -> None:
    assert "policy@0.10" in second.models()  # the first server's, and on the grid
    assert "policy@0.37" not in second.models()
    rows = prompts(3, seed=7)
    fresh = ("policy@0.15", "policy@0.25", "policy@0.65")  # that neither has: both build, one at a time

    async def scene() -> list[Any]:
        async with first.asynchronous() as one, second.asynchronous() as two:
            jobs = [complete(client, model, row) for model in fresh for row in rows for client in (one, two)]
            return await asyncio.gather(*jobs)

    answers = iter(asyncio.run(scene()))
    for model in fresh:
        offline.at(float(model.removeprefix("policy@")))
        for row in rows:
            (who, tokens), (other, same) = next(answers), next(answers)
            assert who == other == model
            assert offline.greedy(row, tokens)
            assert offline.greedy(row, same)
    left = [path.name for path in world["cache_dir"].glob("*/.*")]
    assert left == []
    assert len(list(world["cache_dir"].iterdir())) == 2  # the lock, and one directory: equal adapters share


def test_a_snapped_ratio_says_what_it_became(second: Server, offline: Offline) -> None:
    [row] = prompts(1, seed=8)
    [(who, tokens)] = together(second, [("policy@0.37", row)])
    assert who == "policy@0.35"
    assert offline.at(0.35).greedy(row, tokens)


def test_the_key_guards_what_vllms_own_does_not(second: Server) -> None:
    keyless = openai.OpenAI(base_url=second.url, api_key="wrong", max_retries=0)
    for call in (
        lambda: keyless.models.list(),
        lambda: keyless.completions.create(model="policy@0.3", prompt="x"),
        lambda: openai.OpenAI(base_url=second.url[:-3], api_key="wrong", max_retries=0).post(
            "/tokenize", body={"model": "base", "prompt": "x"}, cast_to=object
        ),
    ):
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            call()
    assert "s3cret" not in second.text()


def test_the_launchers_death_ends_its_server(second: Server) -> None:
    family = second.family()
    assert len(family) >= 2  # vLLM's server and its engine
    assert second.kill(signal.SIGKILL) == -signal.SIGKILL
    assert gone(family)


def test_kill_and_restart_on_the_same_cache(
    first: Server, world: dict[str, Any], offline: Offline, tmp_path: Path
) -> None:
    assert first.process is not None
    family = first.family()
    stream = first.client().completions.create(
        model="policy@0.37", prompt=[5, 6, 7], max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.kill(family[0], signal.SIGKILL)  # vLLM's server, in the middle of an answer
    with pytest.raises((openai.APIError, OSError, Exception)):
        list(stream)
    assert first.process.wait(60) == 128 + signal.SIGKILL
    assert "vLLM ended by itself, killed by SIGKILL" in first.text()
    assert gone(family), "its engine is left"

    [kept] = world["cache_dir"].glob("*/policy@0.37/adapter_model.safetensors")
    built = kept.stat().st_mtime_ns
    restarted = Server(world | {"ratios": [0.37, 0.77]}, tmp_path / "log", first.environment, project=tmp_path).start()
    try:
        assert kept.stat().st_mtime_ns == built  # what was built is used
        assert restarted.models() == ["policy@0.37", "policy@0.77"]
        rows = prompts(2, seed=9)
        asked = [(f"policy@{ratio}", row) for ratio in (0.37, 0.77) for row in rows]
        for (model, row), (who, tokens) in zip(asked, together(restarted, asked), strict=True):
            assert who == model
            assert offline.at(float(model.removeprefix("policy@"))).greedy(row, tokens)
        for refused in ("policy@0.30", "policy@0.00", "base"):
            with pytest.raises(openai.NotFoundError, match="allowed: policy@0.37, policy@0.77"):
                restarted.client().completions.create(model=refused, prompt="x")
        family = restarted.family()
        assert restarted.kill(signal.SIGTERM) == 128 + signal.SIGTERM
        assert gone(family, 1)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", restarted.port))
    finally:
        stop(restarted)
