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
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.sweep_inputs import RANK, RATIOS, make_inputs, make_prompts, merged, requests
from parts.sweep_vllm import by_vllm, child

# (hidden, layers, prompts, new tokens)
QUICK = (256, 4, 32, 32)
FULL = (512, 12, 64, 64)


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
