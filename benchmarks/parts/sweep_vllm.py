"""vLLM in sweep.py: a process a start, for the official way as for psacpo's strategies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parts.sweep_inputs import PROMPT, RANK, RATIOS, TENTH, merged, policies, requests

# Each start is this script again, with the job in a file.
SCRIPT = Path(__file__).parents[1] / "sweep.py"


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
            [sys.executable, str(SCRIPT), "--job", str(written)],
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
