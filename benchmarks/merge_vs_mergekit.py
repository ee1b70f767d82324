"""`psacpo merge` against mergekit, PEFT, `cp`, and a loop that reads and writes the same bytes and does nothing else.

    python benchmarks/merge_vs_mergekit.py [--quick] [--mergekit PATH/mergekit-yaml] [--rounds 5] [--work DIR]

Random Llamas of 1.1 billion bfloat16 parameters are made on the spot (`--quick`: 0.2 billion). Every arm is a process of
its own, in turn over several rounds; figures are medians, ratios medians of each round's ratio. psacpo runs as its
command does, with the scan for NaN, digests, fsync and atomic rename on; its cache of digests is empty each time.

mergekit (0.1.5) does not install beside current transformers: make it an environment of its own and name its command.
It runs with `--lazy-unpickle --out-shard-size 600M`, once more with asynchronous writing, and its better median counts.

The last line is one JSON object. `wall_ratio` and `cpu_ratio` are mergekit's over psacpo's, `copy_loop_ratio` is
psacpo's wall time over that of the loop (which does not fsync; `copy_loop_fsync_ratio`: over one that does), `peak_mib`
psacpo's peak memory. `five_reads` and `five_writes` are what five ratios in one pass read and write, over what one
does. `lora_cpu_ratio` is PEFT's CPU time (cat, merge_and_unload, save) over psacpo's, `lora_peak_mib` psacpo's memory.
"""

from __future__ import annotations

# Nothing large is imported here: the system counts a parent's memory into its children's peak.
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_VALUE_HEADS = 2048, 5632, 32000, 32, 4
RANK = 16
RATIO = 0.3
FIVE = [0.1, 0.3, 0.5, 0.7, 0.9]
MERGEKIT = {
    "mergekit, lazy": ["--lazy-unpickle", "--out-shard-size", "600M"],
    "mergekit, async": ["--lazy-unpickle", "--out-shard-size", "600M", "--async-write", "--write-threads", "2"],
}


# --- what the arms do besides commands, each in a process of its own


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama."""
    head = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for place in range(layers):
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("post_attention_layernorm", (HIDDEN,)),
            ("self_attn.k_proj", (KEY_VALUE_HEADS * head, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.v_proj", (KEY_VALUE_HEADS * head, HIDDEN)),
        ):
            found[f"model.layers.{place}.{name}.weight"] = shape
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_model(out: Path, layers: int, seed: int) -> None:
    """A model directory in two shards."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    left = shapes(layers)
    total = sum(_count(shape) for shape in left.values())
    weight_map, shard, size = {}, {}, 0
    names = list(left)
    for name in names:
        shard[name] = (torch.randn(left[name], generator=draw) * 0.02).bfloat16()
        size += shard[name].numel()
        first = "00001" not in "".join(weight_map.values())
        if (first and size >= total / 2) or name == names[-1]:
            file = f"model-0000{1 if first else 2}-of-00002.safetensors"
            save_file(shard, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config))


def make_adapter(out: Path, base: Path, layers: int, seed: int) -> None:
    """A LoRA of rank 16 on all linear layers."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for name, shape in shapes(layers).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            continue
        targets.add(module.rpartition(".")[2])
        for factor, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
            key = f"base_model.model.{module}.lora_{factor}.weight"
            tensors[key] = torch.randn(size, generator=draw) * 0.02
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(targets),
        "base_model_name_or_path": str(base),
    }
    (out / "adapter_config.json").write_text(json.dumps(config))


def make(root: Path, layers: int) -> None:
    for seed, name in enumerate(("reward", "safety")):
        make_model(root / name, layers, seed)
        make_adapter(root / f"{name}-lora", root / "reward", layers, seed)


def copy_loop(root: Path, out: Path, fsync: bool) -> None:
    """Read both models and write one's bytes, in the threads and blocks that suit this machine."""
    out.mkdir()

    def one(name: str) -> None:
        block = 1 << 18
        first, second = bytearray(block), bytearray(block)
        with (
            (root / "reward" / name).open("rb", buffering=0) as a,
            (root / "safety" / name).open("rb", buffering=0) as b,
            (out / name).open("wb", buffering=0) as c,
        ):
            while count := a.readinto(first):
                b.readinto(second)
                c.write(memoryview(first)[:count])
            if fsync:
                os.fsync(c.fileno())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, sorted(path.name for path in (root / "reward").glob("*.safetensors"))))


def merge_by_peft(root: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / "reward", dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, root / "reward-lora", adapter_name="reward")
    model.load_adapter(root / "safety-lora", adapter_name="safety")
    model.add_weighted_adapter(["reward", "safety"], [1 - RATIO, RATIO], "merged", combination_type="cat")
    model.set_adapter("merged")
    model.merge_and_unload().save_pretrained(out)


def compare(one: Path, other: Path) -> None:
    """How far two bfloat16 models of the same tensors are apart, printed as JSON."""
    import numpy as np

    from psacpo.merge.models import read_model

    models = [read_model(path) for path in (one, other)]
    equal, count, furthest = 0, 0, 0.0
    for name in models[0].tensors():
        numbers = []
        for model in models:
            shard, entry = model.tensors()[name]
            start = model.shards[shard][0] + entry.start
            bits = np.fromfile(model.path / shard, np.int16, _count(entry.shape), offset=start)
            numbers.append((bits.astype(np.int32) << 16).view(np.float32))
        apart = np.abs(numbers[0] - numbers[1])
        # In units of bfloat16's rounding of the tensor's largest number; cancelled ones are small and exact in neither.
        furthest = max(furthest, float(apart.max() / (np.abs(numbers[0]).max() * 2**-8)))
        equal, count = equal + int((apart == 0).sum()), count + apart.size
    print(json.dumps({"equal": equal / count, "furthest_roundings": furthest}))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# --- timing


def measure(command: list[str], root: Path, out: Path | None) -> dict[str, float]:
    """Run a command: wall and CPU seconds, MiB of peak memory, bytes that it asked to read and write."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(root / "cache", ignore_errors=True)
    os.sync()
    environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - started
        counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{(root / 'log').read_text(errors='replace')[-3000:]}")
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "read": int(counts["rchar"]),
        "written": int(counts["wchar"]),
    }


def arms_of(root: Path, mergekit: str | None) -> dict[str, list[str]]:
    out = str(root / "out")
    job = [sys.executable, __file__, "--work", str(root), "--job"]
    psacpo = [sys.executable, "-m", "psacpo.cli", "merge", "--out", out]
    pair = ["--reward", str(root / "reward"), "--safety", str(root / "safety")]
    adapters = ["--reward", str(root / "reward-lora"), "--safety", str(root / "safety-lora")]
    found = {
        "psacpo": [*psacpo, *pair, "--ratio", str(RATIO)],
        "psacpo, five ratios": [*psacpo, *pair, *(flag for ratio in FIVE for flag in ("--ratio", str(ratio)))],
        "read and write": [*job, "loop"],
        "read, write, fsync": [*job, "loop-fsync"],
        "cp -r": ["cp", "-r", str(root / "reward"), out],
        "psacpo, LoRA": [
            *psacpo,
            *adapters,
            "--base",
            str(root / "reward"),
            "--ratio",
            str(RATIO),
            "--as",
            "checkpoint",
        ],
        "PEFT, LoRA": [*job, "peft"],
    }
    if mergekit is not None:
        for name, flags in MERGEKIT.items():
            found[name] = [mergekit, str(root / "mergekit.yml"), out, "--quiet", *flags]
    return found


def mergekit_file(root: Path) -> str:
    models = [
        {"model": str(root / name), "parameters": {"weight": weight}}
        for name, weight in (("reward", 1 - RATIO), ("safety", RATIO))
    ]
    # JSON is YAML.
    return json.dumps({"models": models, "merge_method": "linear", "dtype": "bfloat16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--mergekit", default=shutil.which("mergekit-yaml"), help="the command of an environment that has it"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--work", type=Path, help="where to put about 9 GB for a while")
    parser.add_argument(
        "--job", choices=["make", "make-quick", "loop", "loop-fsync", "peft", "compare"], help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.job:
        jobs = {
            "make": lambda: make(given.work, 22),
            "make-quick": lambda: make(given.work, 2),
            "loop": lambda: copy_loop(given.work, given.work / "out", fsync=False),
            "loop-fsync": lambda: copy_loop(given.work, given.work / "out", fsync=True),
            "peft": lambda: merge_by_peft(given.work, given.work / "out"),
            "compare": lambda: compare(given.work / "kept", given.work / "out"),
        }
        jobs[given.job]()
        return
    if given.mergekit is None:
        print("mergekit is left out: no mergekit-yaml on PATH, and none named by --mergekit")
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        print(json.dumps(run(Path(scratch), given.mergekit, given.rounds or (1 if given.quick else 5), given.quick)))


def run(root: Path, mergekit: str | None, rounds: int, quick: bool) -> dict[str, Any]:
    job = [sys.executable, __file__, "--work", str(root), "--job"]
    subprocess.run([*job, "make-quick" if quick else "make"], check=True)
    (root / "mergekit.yml").write_text(mergekit_file(root))
    arms = arms_of(root, mergekit)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    agreement: dict[str, Any] = {}
    for number in range(rounds):
        for name, command in arms.items():
            found[name].append(measure(command, root, root / "out"))
            if number == 0 and name == "psacpo":
                shutil.copytree(root / "out", root / "kept")
            if number == 0 and name.startswith("mergekit"):
                agreement = json.loads(subprocess.run([*job, "compare"], check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(root / "kept")
    middle = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(f"{'':<22}{'wall s':>9}{'CPU s':>9}{'peak MiB':>10}{'read GB':>9}{'written GB':>12}")
    for name, cost in middle.items():
        print(
            f"{name:<22}{cost['wall_s']:>9.2f}{cost['cpu_s']:>9.2f}{cost['peak_mib']:>10.0f}"
            f"{cost['read'] / 1e9:>9.2f}{cost['written'] / 1e9:>12.2f}"
        )

    def over(one: str, other: str, key: str) -> float:
        """The median of each round's ratio."""
        return statistics.median(a[key] / b[key] for a, b in zip(found[one], found[other], strict=True))

    best = min((name for name in MERGEKIT if name in arms), key=lambda name: middle[name]["wall_s"], default=None)
    model = sum(2 * _count(shape) for shape in shapes(2 if quick else 22).values())
    five, one = middle["psacpo, five ratios"], middle["psacpo"]
    return {
        "parameters": model // 2,
        "rounds": rounds,
        "wall_ratio": over(best, "psacpo", "wall_s") if best else None,
        "cpu_ratio": over(best, "psacpo", "cpu_s") if best else None,
        "mergekit_flags": MERGEKIT[best] if best else None,
        "agreement": agreement or None,
        "peak_mib": one["peak_mib"],
        "copy_loop_ratio": over("psacpo", "read and write", "wall_s"),
        "copy_loop_fsync_ratio": over("psacpo", "read, write, fsync", "wall_s"),
        "cp_ratio": over("psacpo", "cp -r", "wall_s"),
        "five_wall_ratio": over("psacpo, five ratios", "psacpo", "wall_s"),
        "five_reads": five["read"] / one["read"],
        "five_writes": five["written"] / one["written"],
        "lora_wall_ratio": over("PEFT, LoRA", "psacpo, LoRA", "wall_s"),
        "lora_cpu_ratio": over("PEFT, LoRA", "psacpo, LoRA", "cpu_s"),
        "lora_peak_mib": middle["psacpo, LoRA"]["peak_mib"],
        "arms": middle,
    }


if __name__ == "__main__":
    main()
