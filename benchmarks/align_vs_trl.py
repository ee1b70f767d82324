"""A step of psacpo against TRL's, DPO and KTO, on the same rows, model, LoRA and seeds: time and peak memory.

    python benchmarks/align_vs_trl.py [--quick | --all] [--device cuda] [--rows preferences.jsonl]

Both train through their own real loop; after every optimiser step the next one has its turn, so that a busy machine
slows all alike. TRL has its best options: reference log-probabilities computed beforehand, no gradient checkpointing,
and the compact output layer that it uses on a GPU (answers' tokens only). With --all it also runs with the output layer
that it ships on a CPU, and with one pair a batch in the place of all. First both must agree on DPO's loss and gradient (on KTO's they do in
tests/align/test_align_trl.py: here the rows stand in another order). KTO has both answers of every pair, each with
its label. A step of Ra-DPO with CVaR, which TRL has not, is compared with psacpo's own DPO step. What the reference says of
all rows is computed before the first step in every arm. Memory is the peak above what is held before the first step, each
arm in a process of its own. The last line is one JSON object; its ratios are TRL's figure over psacpo's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer
from trl.trainer.kto_trainer import KTOConfig, KTOTrainer

from psacpo.align import AlignConfig
from psacpo.align import model as policies
from psacpo.align.examples import Pair
from psacpo.align.planning import prepare
from psacpo.align.stages import training_arguments
from psacpo.align.trainer import PairTrainer

BETA = 0.1
RANK, ALPHA = 16, 32
RATE = 1e-4
# Of the random rows, in tokens: prompts, answers.
PROMPTS, ANSWERS = (128, 256), (64, 128)
ARMS = {
    "trl": "TRL, as shipped on this device",
    "trl_compact": "TRL, compact head",
    "trl_compact_one": "TRL, compact head, 1 pair x accumulation",
    "psacpo": "psacpo",
    "trl_compact_kto": "TRL, compact head, KTO",
    "psacpo_kto": "psacpo, KTO",
    "psacpo_cvar": "psacpo, Ra-DPO with CVaR",
}
# Whose figure each one's is divided by.
OURS = {name: "psacpo_kto" if name.endswith("_kto") else "psacpo" for name in ARMS}
PEERS = ["trl", "trl_compact", "trl_compact_one"]
# What is measured without --all: TRL at its best against psacpo.
USUAL = ["trl_compact", "psacpo", "trl_compact_kto", "psacpo_kto", "psacpo_cvar"]
LOSSES = {"kto": {"loss": "kto"}, "cvar": {"loss": "radpo2", "risk": "cvar", "risk_level": 0.97}}


def make_inputs(root: Path, options: argparse.Namespace) -> None:
    """A random Llama of the wanted size with its tokenizer, and the rows as JSON lines."""
    torch.manual_seed(0)
    heads = options.hidden // 64
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    if options.rows is None:
        special = ["<pad>", "</s>"]
        words = [*special, *(f"w{i}" for i in range(2, options.vocabulary))]
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[2]))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        draw = random.Random(0)

        def text(low: int, high: int) -> str:
            return "".join(f" {words[draw.randrange(3, options.vocabulary)]}" for _ in range(draw.randint(low, high)))

        # One token of each answer is the end's.
        rows = [
            {"prompt": text(*PROMPTS).strip()}
            | {name: text(ANSWERS[0] - 1, ANSWERS[1] - 1) for name in ("chosen", "rejected")}
            for _ in range(options.pairs * options.steps)
        ]
    else:
        from psacpo.align.data import read_preferences

        given = [row for row in read_preferences(options.rows, {}).rows if isinstance(row.prompt, str)]
        given = random.Random(0).sample(given, min(options.pairs * options.steps, len(given)))
        rows = [
            {"prompt": row.prompt, "chosen": f" {row.chosen.strip()}", "rejected": f" {row.rejected.strip()}"}
            for row in given
        ]
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special = ["<pad>", "</s>"]
        core.train_from_iterator(
            (text for row in rows for text in row.values()),
            trainers.BpeTrainer(
                vocab_size=options.vocabulary,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1]).save_pretrained(
        root / "base"
    )
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(root: Path, options: argparse.Namespace, loss: str = "") -> AlignConfig:
    """The run in psacpo's words."""
    stage = {
        "name": "reward",
        "data": str(root / "rows.jsonl"),
        "beta": BETA,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "batch_size": options.pairs,
        "max_steps": options.steps,
    } | LOSSES.get(loss, {})
    return AlignConfig.model_validate(
        {
            "base": str(root / "base"),
            "out": root / "out",
            "template": "{prompt}",
            "max_length": options.max_length,
            "lora": {"r": RANK, "alpha": ALPHA},
            "dtype": options.dtype,
            "device": options.device,
            "stages": [stage],
        }
    )


def randomise(policy: Any) -> None:
    """The same small B in every LoRA layer of every arm: with B = 0 half of the gradients would be 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Arm:
    """One trainer with its clock.

    Attributes:
        seconds, cpu: Of each step, by the wall and of the process.
        losses: Of each step.
        reference: Seconds for the reference of all rows, before the first step.
    """

    def __init__(self, name: str, root: Path, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.reference = 0.0
        self.gate = threading.Event()
        self.hand_over: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        with quiet(root / f"{name}.log"):
            self.trainer = self.psacpo(root) if name.startswith("psacpo") else self.trl(root)
        randomise(self.trainer.model)
        self.trainer.add_callback(_Clock(self))

    def psacpo(self, root: Path) -> Any:
        config = settings(root, self.options, self.name.rpartition("_")[2])
        prepared = prepare(config)
        (task,) = prepared.tasks
        self.pairs = task.drawn
        policy = policies.load_policy(prepared.base, config.lora, config.dtype, None, gradient_checkpointing=False)
        arm = self

        class Timed(PairTrainer):
            def begin(self) -> None:
                super().begin()
                started = time.perf_counter()
                size = arm.options.pairs
                for first in range(0, len(self.pairs), size):
                    part = list(range(first, min(first + size, len(self.pairs))))
                    if arm.name == "psacpo_cvar":
                        for some in self.scorer.split(part):
                            self.scorer.start_states(self.model_wrapped, self.scorer.batch(some))
                    else:
                        self.scorer.score(self.objective.referred([part]))
                synchronise(arm.options)
                arm.reference = time.perf_counter() - started

            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                super().log(logs, start_time)
                if "learning_rate" in logs:
                    arm.losses.append(float(self.metrics[-1]["loss"] or 0))

        arguments = training_arguments(config, task, prepared.device, str(root / "scratch"))
        trainer = Timed(policy, arguments, task.drawn, task.stage, beta=BETA, fresh=True, pad_id=0)
        if self.options.one_call:
            trainer.scorer.call_cost = math.inf
        self.seed = arguments.seed
        return trainer

    def trl(self, root: Path) -> Any:
        options = self.options
        one, unpaired = self.name.endswith("_one"), self.name.endswith("_kto")
        # The same seed gives the same order of rows.
        seed = prepare(settings(root, options)).tasks[0].seed
        rows_a_step = (2 if unpaired else 1) * options.pairs
        special: dict[str, Any] = {"train_sampling_strategy": "sequential"} if unpaired else {}
        arguments = (KTOConfig if unpaired else DPOConfig)(
            **special,
            output_dir=str(root / "scratch"),
            beta=BETA,
            per_device_train_batch_size=1 if one else rows_a_step,
            gradient_accumulation_steps=options.pairs if one else 1,
            precompute_ref_batch_size=rows_a_step,
            max_steps=options.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            max_length=options.max_length,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_steps=10_000,
            report_to="none",
            disable_tqdm=True,
            dataset_num_proc=None,
        )
        arm = self

        class Timed(KTOTrainer if unpaired else DPOTrainer):  # type: ignore[misc]
            def _precompute_ref_logps(self, *given: Any, **named: Any) -> Any:
                started = time.perf_counter()
                found = super()._precompute_ref_logps(*given, **named)
                synchronise(arm.options)
                arm.reference = time.perf_counter() - started
                return found

            def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
                loss: torch.Tensor = super().training_step(*given, **named)
                arm.losses.append(loss.item())
                return loss

        model: Any = AutoModelForCausalLM.from_pretrained(root / "base", dtype=policies.DTYPES[options.dtype])
        rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
        if unpaired:
            rows = [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
                for row in rows
                for name in ("chosen", "rejected")
            ]
        with self.compact():
            return Timed(
                model=model,
                args=arguments,
                processing_class=PreTrainedTokenizerFast.from_pretrained(root / "base"),
                train_dataset=Dataset.from_list(rows),
                peft_config=LoraConfig(
                    r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
                ),
            )

    @contextmanager
    def compact(self) -> Iterator[None]:
        """Where this arm has it, let TRL's output layer score the answers' tokens only, as it does on a GPU."""
        before = trl_utils._use_triton
        if self.name.startswith("trl_compact"):
            trl_utils._use_triton = lambda device: True
        try:
            yield
        finally:
            trl_utils._use_triton = before

    def run(self) -> None:
        """The whole loop, in a thread of its own: each step waits for its turn."""
        try:
            self.gate.wait()
            # A number of threads holds for the thread that sets it.
            torch.set_num_threads(self.options.threads)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.start()
                self.trainer.train()
        except BaseException as error:  # noqa: BLE001  it is raised again in the main thread
            self.failure = error
        finally:
            self.hand_over()

    def start(self) -> None:
        self.wall, self.spent = time.perf_counter(), time.process_time()

    def step_done(self) -> None:
        synchronise(self.options)
        self.seconds.append(time.perf_counter() - self.wall)
        self.cpu.append(time.process_time() - self.spent)
        self.gate.clear()
        self.hand_over()
        self.gate.wait()
        self.start()


class _Clock(TrainerCallback):
    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.arm.step_done()


def in_turn(arms: list[Arm]) -> None:
    """Run the arms' loops, one step of each after the other."""
    threads = {arm.name: threading.Thread(target=arm.run, daemon=True) for arm in arms}
    for thread in threads.values():
        thread.start()
    done = threading.Event()
    for arm in arms:
        arm.hand_over = done.set
    while any(thread.is_alive() for thread in threads.values()):
        for arm in arms:
            if not threads[arm.name].is_alive():
                continue
            done.clear()
            with arm.compact():
                arm.gate.set()
                done.wait()
            if arm.failure is not None:
                raise arm.failure
            time.sleep(0.01)


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Standard error into a file while a trainer is made: tokenisation writes bars and notes there."""
    held = os.dup(2)
    with log.open("w") as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(handle.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(held, 2)
            os.close(held)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.detach().float().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    return found


def agreement(arms: dict[str, Arm], options: argparse.Namespace) -> dict[str, float]:
    """Loss and gradient of the first rows, before any update: psacpo's against TRL's with its compact head."""
    ours, theirs = arms["psacpo"].trainer, arms["trl_compact"].trainer
    places = list(range(options.pairs))
    dataset = theirs.train_dataset
    batch = theirs._prepare_inputs(theirs.data_collator([dataset[place] for place in places]))
    check_tokens(arms["psacpo"].pairs[: options.pairs], batch)
    theirs.model.to(theirs.args.device).train()
    with arms["trl_compact"].compact():
        expected = theirs.compute_loss(theirs.model, batch)
        expected.backward()
    wanted = gradients(theirs)

    scorer = ours.scorer
    ours.model.to(ours.args.device).train()
    scorer.begin(ours.model, ours.model.dtype)
    ours.objective.begin(scorer)
    scorer.score([places])
    found = 0.0
    for part in scorer.split(places):
        loss = ours.compute_loss(ours.model, scorer.batch(part), num_items_in_batch=torch.tensor(options.pairs))
        loss.backward()
        found += loss.item()
    ours.sums = None
    mine = gradients(ours)
    scorer.reference.fill_(math.nan)
    difference = sum((mine[name] - wanted[name]).square().sum() for name in wanted).sqrt()
    size = sum(value.square().sum() for value in wanted.values()).sqrt()
    return {"loss_diff": abs(found - expected.item()), "grad_rel_diff": (difference / size).item()}


def check_tokens(pairs: list[Pair], batch: dict[str, torch.Tensor]) -> None:
    """Refuse to compare runs on different tokens."""
    sequences = [pair.prompt + pair.chosen for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    for row, ids in enumerate(sequences):
        kept = batch["attention_mask"][row].bool()
        if batch["input_ids"][row][kept].tolist() != ids:
            raise SystemExit(f"the two tokenise row {row % len(pairs)} differently")


def peak_memory(name: str, root: Path, options: argparse.Namespace) -> None:
    """In a process of its own: print the peak of two steps above what was held before, in MiB."""
    arm = Arm(name, root, options)
    arm.trainer.args.max_steps = 2
    before = 0.0

    def reset() -> None:
        nonlocal before
        if options.device == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")

    class Baseline(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            reset()

    arm.trainer.add_callback(Baseline())
    arm.gate.set()
    with arm.compact():
        arm.step_done = lambda: None  # type: ignore[method-assign]
        arm.run()
    if arm.failure is not None:
        raise arm.failure
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else held("VmHWM")
    print(json.dumps(peak - before))


def held(field: str) -> float:
    """A field of this process's status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory(name: str, root: Path, options: argparse.Namespace, *, one_call: bool = False) -> float:
    command = [sys.executable, __file__, "--measure", name, "--root", str(root)]
    for key in ("device", "dtype", "vocabulary", "hidden", "layers", "pairs", "max-length", "threads"):
        command += [f"--{key}", str(getattr(options, key.replace("-", "_")))]
    command += ["--steps", "2", *(["--one-call"] if one_call else [])]
    # Small blocks of freed memory go back to the system at once, so that the peak is what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smaller model, 2 pairs a step: to see that it runs")
    parser.add_argument("--all", action="store_true", help="also TRL as shipped, and with one pair a batch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", help="preference rows with plain prompts, in place of random ones")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=0, help="0: 256 with --quick, else 384")
    parser.add_argument("--layers", type=int, default=0, help="0: 4 with --quick, else 6")
    parser.add_argument("--pairs", type=int, default=0, help="a step; 0: 2 with --quick, else 8")
    parser.add_argument("--steps", type=int, default=0, help="0: 3 with --quick, else 5; the first is not counted")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one-call", action="store_true", help="keep psacpo from splitting a batch")
    parser.add_argument("--measure", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, quick, usual in (("hidden", 256, 384), ("layers", 4, 6), ("pairs", 2, 8), ("steps", 3, 5)):
        setattr(options, name, getattr(options, name) or (quick if options.quick else usual))
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if options.measure:
        peak_memory(options.measure, options.root, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_inputs(root, options)
        arms = {name: Arm(name, root, options) for name in (ARMS if options.all else USUAL)}
        peers = [name for name in PEERS if name in arms]
        agreed = agreement(arms, options)
        bound = 1e-4 if options.dtype == "float32" else 2e-2
        if agreed["loss_diff"] > bound or agreed["grad_rel_diff"] > 10 * bound:
            raise SystemExit(f"the two do not agree on one batch: {agreed}")
        in_turn(list(arms.values()))
        pairs = arms["psacpo"].pairs
        tokens = {
            "padded": statistics.mean(2 * len(pair) for pair in pairs),
            "shared": statistics.mean(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs),
        }
        ours = arms["psacpo"]
        measured = [name for name in arms if not (options.quick and name.endswith("_kto"))]
        peaks = {name: memory(name, root, options) for name in measured}
        peaks["psacpo_one_call"] = memory("psacpo", root, options, one_call=True)

    def ratios(name: str, field: str) -> list[float]:
        under = arms[OURS[name]]
        return [a / b for a, b in zip(getattr(arms[name], field)[1:], getattr(under, field)[1:], strict=False)]

    step = {name: ratios(name, "seconds") for name in arms if OURS[name] != name}
    with_reference = {
        name: (arms[name].reference / options.steps + statistics.median(arms[name].seconds[1:]))
        / (ours.reference / options.steps + statistics.median(ours.seconds[1:]))
        for name in peers
    }
    losses = max(abs(a - b) for a, b in zip(arms["trl_compact"].losses, ours.losses, strict=True))
    print(
        f"{'':<42}{'s a step':>10}{'min':>8}{'reference s':>13}{'peak MiB':>10}{'step ratio':>12}{'memory ratio':>14}"
    )
    for name, arm in arms.items():
        title = ARMS[name]
        ratio = statistics.median(step[name]) if name in step else 1.0
        print(
            f"{title:<42}{statistics.median(arm.seconds[1:]):>10.2f}{min(arm.seconds[1:]):>8.2f}{arm.reference:>13.2f}"
            f"{peaks.get(name, math.nan):>10.0f}{ratio:>12.2f}"
            f"{peaks.get(name, math.nan) / peaks.get(OURS[name], math.nan):>14.2f}"
        )
    print(f"{'psacpo, a batch never split':<42}{'':>31}{peaks['psacpo_one_call']:>10.0f}")
    print(
        f"{options.pairs} pairs a step, {tokens['padded']:.0f} tokens a pair apart and {tokens['shared']:.0f} with the "
        f"prompt shared, vocabulary {options.vocabulary}; losses of {options.steps} steps within {losses:.1e}, "
        f"gradients of the first rows within {agreed['grad_rel_diff']:.1e}"
    )
    print(
        json.dumps(
            {
                "benchmark": "align_vs_trl",
                "device": options.device,
                "dtype": options.dtype,
                "rows": options.rows or "random",
                "hidden": options.hidden,
                "layers": options.layers,
                "vocabulary": options.vocabulary,
                "pairs": options.pairs,
                "tokens_a_pair": tokens,
                "threads": options.threads,
                "step_ratio": statistics.median(step["trl_compact"]),
                "step_ratio_all": step,
                "step_ratio_cpu": {name: statistics.median(ratios(name, "cpu")) for name in step},
                "kto_step_ratio": statistics.median(step["trl_compact_kto"]),
                "kto_memory_ratio": peaks["trl_compact_kto"] / peaks["psacpo_kto"] if "psacpo_kto" in peaks else None,
                "cvar_over_dpo": statistics.median(step["psacpo_cvar"]),
                "cvar_memory_over_dpo": peaks["psacpo_cvar"] / peaks["psacpo"],
                "step_ratio_shipped": statistics.median(step["trl"]) if "trl" in step else None,
                "step_ratio_with_reference": with_reference,
                "memory_ratio": peaks["trl_compact"] / peaks["psacpo"],
                "memory_ratio_one_call": peaks["trl_compact"] / peaks["psacpo_one_call"],
                "peak_mib": peaks,
                "seconds": {name: arm.seconds for name, arm in arms.items()},
                "cpu_seconds": {name: arm.cpu for name, arm in arms.items()},
                "reference_seconds": {name: arm.reference for name, arm in arms.items()},
                "loss_max_diff": losses,
                "first_batch": agreed,
                "grad_rel_diff": agreed["grad_rel_diff"],
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
