"""Nine ratios from one engine, against one merged checkpoint and one engine start a ratio.

    python benchmarks/sweep.py [--quick] [--device cuda] [--engine vllm|transformers]

Both arms answer the same prompts greedily with the same number of tokens, from the same two adapters.

Where vLLM is installed the peer does what the released evaluation of SACPO does: for each ratio it writes the merged
checkpoint and starts vLLM on it. psacpo starts vLLM once, with each strategy in turn: stacked adapters side by side
(lora), or merged weights swapped in (reload). Every start is a process of its own, whose CPU time, peak memory and
bytes on disk are counted from its first import on.

In any case (and alone where vLLM is missing) the transformers engine, which mixes all ratios in one batch, runs against
one merged model a ratio with `model.generate`, in one process and over several rounds; loading counts for both.

The last line is one JSON object. `cpu_ratio` is the peer's CPU time over psacpo's, `disk_ratio` psacpo's bytes over the
peer's; `tenth_ratio_cpu_s` is the CPU time that one ratio more takes of the engine that has done the nine. All are of
`strategy`, the better one, and `strategies` holds each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATIOS = [i / 8 for i in range(9)]
# Asked for when the nine are done, of the engine that runs.
TENTH = 0.3
VOCABULARY = 2048
PROMPT = 24
RANK = 4
# (hidden, layers, prompts, new tokens)
QUICK = (256, 4, 32, 32)
FULL = (512, 12, 64, 64)


def make_inputs(root: Path, hidden: int, layers: int) -> tuple[Path, dict[str, Path]]:
    """A random Llama that never ends an answer, and two random adapters on all its linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.06,
    )
    base = root / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0").save_pretrained(base)
    adapters = {}
    for name in ("reward", "safety"):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=RANK, target_modules="all-linear")
        )
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        adapters[name] = root / name
        adapted.save_pretrained(adapters[name])
    return base, adapters


def make_prompts(count: int) -> list[list[int]]:
    """Token ids, all of one length."""
    import random

    draw = random.Random(1)
    return [[draw.randrange(2, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


def merged(base: Path, adapters: dict[str, Path], ratios: list[float], out: Path, kind: str) -> list[Path]:
    from psacpo.merge import MergeConfig, merge

    values = {"base": str(base), **{name: str(path) for name, path in adapters.items()}, "ratios": ratios}
    return merge(MergeConfig.model_validate(values | {"out": out, "as": kind}))


# --- transformers: one process, in turn


def generate_per_ratio(
    base: Path, found: dict[float, Path], prompts: list[list[int]], tokens: int, batch: int, device: str
) -> dict[float, Any]:
    """The peer: load, merge, `generate` in batches, for each ratio."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = {}
    for ratio, path in found.items():
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).merge_and_unload()
        model = model.to(device).eval()
        parts = []
        for rows in torch.tensor(prompts, device=device).split(batch):
            mask = torch.ones_like(rows)
            made = model.generate(rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            parts.append(made[:, rows.shape[1] :])
        answers[ratio] = torch.cat(parts).tolist()
    return answers


def mixed_batches(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tokens: int, batch: int, device: str
) -> dict[float, Any]:
    """psacpo: one base, all ratios mixed in each batch."""
    from psacpo.evalharness.config import Generation
    from psacpo.evalharness.engines.transformers import TransformersEngine
    from psacpo.merge.adapters import read_adapter

    generation = Generation(max_new_tokens=tokens, temperature=0.0, batch_size=batch)
    found = {name: read_adapter(path) for name, path in adapters.items()}
    engine = TransformersEngine.load(base, found, generation=generation, dtype="float32", device=device)
    by_key = {answer.key: list(answer.token_ids) for answer in engine.generate(requests(prompts, RATIOS))}
    return {ratio: [by_key[f"{index}/{ratio}"] for index in range(len(prompts))] for ratio in RATIOS}


def requests(prompts: list[list[int]], ratios: list[float]) -> list[Any]:
    """All ratios of a prompt side by side."""
    from psacpo.evalharness.engines import Request

    return [
        Request(f"{index}/{policy.ratio}", policy, tuple(row), index)
        for index, row in enumerate(prompts)
        for policy in policies(ratios)
    ]


def policies(ratios: list[float]) -> list[Any]:
    from psacpo.evalharness.engines import Policy

    return [Policy(f"policy@{ratio}", {"reward": 1 - ratio, "safety": ratio}, ratio) for ratio in ratios]


def by_transformers(
    root: Path,
    base: Path,
    adapters: dict[str, Path],
    prompts: list[list[int]],
    tokens: int,
    device: str,
    rounds: int,
) -> dict[str, Any]:
    import torch

    batch, count = 72, len(prompts)
    outputs = dict(zip(RATIOS, merged(base, adapters, RATIOS, root / "adapters", "adapter"), strict=True))
    seconds: dict[str, list[float]] = {"generate per ratio": [], "psacpo": []}
    cpu: dict[str, list[float]] = {"generate per ratio": [], "psacpo": []}
    same = 0
    for _ in range(rounds):
        answers = []
        for arm, run in (
            ("generate per ratio", lambda: generate_per_ratio(base, outputs, prompts, tokens, batch, device)),
            ("psacpo", lambda: mixed_batches(base, adapters, prompts, tokens, batch, device)),
        ):
            started, used = time.perf_counter(), time.process_time()
            answers.append(run())
            seconds[arm].append(time.perf_counter() - started)
            cpu[arm].append(time.process_time() - used)
        same = sum(answers[0][q][i] == answers[1][q][i] for q in RATIOS for i in range(count))
    total = len(RATIOS) * count
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{'transformers':<20}{'median s':>10}{'min':>8}{'max':>8}{'answers/s':>11}")
    for arm, spent in seconds.items():
        middle = statistics.median(spent)
        print(f"{arm:<20}{middle:>10.2f}{min(spent):>8.2f}{max(spent):>8.2f}{total / middle:>11.1f}")
    print(f"peer's time over psacpo's, by round: {', '.join(f'{r:.2f}' for r in ratios)}; equal {same} of {total}\n")
    return {
        "seconds": seconds,
        "speedup": {"median": statistics.median(ratios), "all": ratios},
        "cpu_ratio": statistics.median(a / b for a, b in zip(*cpu.values(), strict=True)),
        "equal_answers": same,
        "answers": total,
        "torch": torch.__version__,
    }


# --- vLLM: a process a start


def child(job: dict[str, Any]) -> None:
    """One start of vLLM, with everything that it takes to get there: run in a process of its own.

    A job with a strategy sweeps its ratios from one engine, and then one ratio more; one without merges a checkpoint
    and runs that.
    """
    from psacpo.evalharness.config import Generation, Vllm
    from psacpo.evalharness.engines.plan import LORA_RANKS, EnginePlan
    from psacpo.evalharness.engines.vllm import VllmEngine
    from psacpo.merge.adapters import read_adapter

    base, ratios, prompts = Path(job["base"]), job["ratios"], job["prompts"]
    adapters = {name: Path(path) for name, path in job["adapters"].items()}
    scratch = Path(os.environ["TMPDIR"])
    strategy = job["strategy"]
    if strategy is None:
        [base] = merged(base, adapters, ratios, scratch / "merged", "checkpoint")
        adapters = {}
    asked = requests(prompts, ratios)
    if strategy is None:
        from psacpo.evalharness.engines import Policy, Request

        asked = [Request(one.key, Policy("merged"), one.prompt_ids, one.seed) for one in asked]
    rank = next(rank for rank in LORA_RANKS if rank >= 2 * RANK)
    plan = EnginePlan(
        "vllm", "benchmark", strategy=strategy or "reload", max_lora_rank=rank, max_model_len=PROMPT + job["tokens"]
    )
    engine = VllmEngine.load(
        base,
        {name: read_adapter(path) for name, path in adapters.items()},
        policies([*ratios, TENTH]) if adapters else [],
        plan=plan,
        settings=Vllm(),
        generation=Generation(max_new_tokens=job["tokens"], temperature=0.0),
        dtype=job["dtype"],
        seed=0,
    )
    started = time.process_time()
    answers = {answer.key: list(answer.token_ids) for answer in engine.generate(asked)}
    used = time.process_time() - started
    found = {"answers": answers, "start_cpu_s": started, "generate_cpu_s": used}
    if strategy is not None:
        before, began = time.process_time(), time.perf_counter()
        assert len(list(engine.generate(requests(prompts, [TENTH])))) == len(prompts)
        found |= {"tenth_ratio_cpu_s": time.process_time() - before, "tenth_wall_s": time.perf_counter() - began}
    found["disk_bytes"] = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    engine.close()
    Path(job["result"]).write_text(json.dumps(found))


def start(root: Path, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in its own process: what it found, and what the system says it took."""
    scratch = root / name
    scratch.mkdir()
    job = job | {"result": str(root / f"{name}.json")}
    written = root / f"{name}.job.json"
    written.write_text(json.dumps(job))
    began = time.perf_counter()
    with (root / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--job", str(written)],
            env=os.environ | {"TMPDIR": str(scratch)},
            stdout=log,
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit((root / f"{name}.log").read_text(errors="replace")[-4000:])
    found: dict[str, Any] = json.loads(Path(job["result"]).read_text())
    # The nine are compared; what the tenth took is told by itself.
    return found | {
        "wall_s": time.perf_counter() - began - found.get("tenth_wall_s", 0.0),
        "cpu_s": usage.ru_utime + usage.ru_stime - found.get("tenth_ratio_cpu_s", 0.0),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def by_vllm(
    root: Path, base: Path, adapters: dict[str, Path], prompts: list[list[int]], tokens: int, device: str
) -> dict[str, Any]:
    job = {
        "base": str(base),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "prompts": prompts,
        "tokens": tokens,
        "dtype": "bfloat16" if device == "cuda" else "float32",
    }
    arms: dict[str, dict[str, Any]] = {}
    parts = [start(root, f"official-{q}", job | {"ratios": [q], "strategy": None}) for q in RATIOS]
    arms["official"] = {
        key: sum(part[key] for part in parts) for key in ("wall_s", "cpu_s", "disk_bytes", "generate_cpu_s")
    }
    arms["official"]["peak_bytes"] = max(part["peak_bytes"] for part in parts)
    expected = {key: ids for part in parts for key, ids in part["answers"].items()}
    for strategy in ("lora", "reload"):
        arms[strategy] = start(root, strategy, job | {"ratios": RATIOS, "strategy": strategy})
        answers = arms[strategy].pop("answers")
        arms[strategy]["equal_answers"] = sum(answers[key] == ids for key, ids in expected.items())
    print(f"{'vLLM':<20}{'wall s':>10}{'CPU s':>9}{'of it tokens':>14}{'disk MB':>10}{'peak MB':>10}{'equal':>12}")
    for arm, cost in arms.items():
        equal = f"{cost['equal_answers']} of {len(expected)}" if "equal_answers" in cost else ""
        print(
            f"{arm:<20}{cost['wall_s']:>10.1f}{cost['cpu_s']:>9.1f}{cost['generate_cpu_s']:>14.1f}"
            f"{cost['disk_bytes'] / 1e6:>10.2f}{cost['peak_bytes'] / 1e6:>10.0f}{equal:>12}"
        )
    peer = arms["official"]
    strategies = {}
    for name in ("lora", "reload"):
        own = arms[name]
        strategies[name] = own | {
            "wall_ratio": peer["wall_s"] / own["wall_s"],
            "cpu_ratio": peer["cpu_s"] / own["cpu_s"],
            "disk_ratio": own["disk_bytes"] / peer["disk_bytes"],
            "peak_ratio": own["peak_bytes"] / peer["peak_bytes"],
            # What one ratio more costs once the engine runs, against what one costs the peer.
            "tenth_ratio_cpu_ratio": peer["cpu_s"] / len(RATIOS) / own["tenth_ratio_cpu_s"],
        }
        print(
            f"{name}: CPU {strategies[name]['cpu_ratio']:.1f}x less, disk {strategies[name]['disk_ratio']:.1%}, a "
            f"tenth ratio {own['tenth_ratio_cpu_s']:.2f} s of CPU against {peer['cpu_s'] / len(RATIOS):.2f}"
        )
    return {"official": peer, "strategies": strategies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a size that ends within five minutes on 2 cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", choices=["vllm", "transformers"], help="default: vLLM where it is installed")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return child(json.loads(Path(options.job).read_text()))
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Where vLLM carries the claim, one round of the other engine is enough for --quick.
    rounds = 1 if options.quick and options.engine != "transformers" and importlib.util.find_spec("vllm") else 3
    engine = options.engine or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    hidden, layers, count, tokens = QUICK if options.quick else FULL
    prompts = make_prompts(count)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, adapters = make_inputs(root, hidden, layers)
        own = by_transformers(root, base, adapters, prompts, tokens, options.device, rounds)
        result: dict[str, Any] = {
            "benchmark": "sweep",
            "device": options.device,
            "engine": engine,
            "hidden": hidden,
            "layers": layers,
            "prompts": count,
            "tokens": tokens,
            "ratios": len(RATIOS),
            "adapter_rank": RANK,
            **own,
            # The mixture writes nothing, and the peer's model is merged in memory.
            "strategy": "mixture",
            "disk_ratio": 0.0,
        }
        if engine == "vllm":
            found = by_vllm(root, base, adapters, prompts, tokens, options.device)
            best = max(found["strategies"], key=lambda name: found["strategies"][name]["cpu_ratio"])
            of_best = found["strategies"][best]
            result["transformers_cpu_ratio"] = own["cpu_ratio"]
            result |= found | {"strategy": best}
            keys = ("cpu_ratio", "wall_ratio", "disk_ratio", "peak_ratio", "tenth_ratio_cpu_s", "tenth_ratio_cpu_ratio")
            result |= {key: of_best[key] for key in keys} | {
                "lora_disk_ratio": found["strategies"]["lora"]["disk_ratio"]
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
