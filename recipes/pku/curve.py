"""Does `psacpo align` learn which of two answers is the safe one? A learning curve on held-out prompts of PKU-SafeRLHF.

    python recipes/pku/curve.py --pairs pku.jsonl.gz --out pku

Rows are {prompt, chosen, rejected}, chosen the safe answer of a safe and an unsafe one (CC BY-NC 4.0, so not here). They
are split by prompt. A small Llama is trained from scratch as a language model on both answers of the training part; then
`psacpo align` runs in OUT on the recipe that is left there, and its checkpoints are looked at with the held-out pairs.
A pair is right when the policy's log-ratio to the base is larger for the chosen answer. The table has this beside two
rules that see nothing but the answers' lengths, both fitted on the training part: the longer or the shorter answer; and a
logistic model with a weight for each tenth of the lengths. Intervals are percentiles of 2000 draws of prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from scipy.optimize import minimize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from psacpo.console import say
from psacpo.files import atomic_directory
from psacpo.prompting import encode_completion, encode_prompt
from psacpo.rows import read_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "hh"))
from learning import log_probs
from training import held_out_loss, train_language_model

TEMPLATE = "USER: {prompt} ASSISTANT:"
SPECIAL = ["<pad>", "<s>", "</s>"]
HELD_OUT, DEVELOPMENT = 0.25, 0.10
Row = dict[str, str]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def split(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """`train`, `dev` and `held-out`: all rows of a prompt in one part."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held_out, dev = HELD_OUT * len(prompts), (HELD_OUT + DEVELOPMENT) * len(prompts)
    part = {p: "held-out" if i < held_out else "dev" if i < dev else "train" for i, p in enumerate(prompts)}
    found = defaultdict(list)
    for row in rows:
        # The template ends without a space, so answers begin with one.
        answers = {side: f" {row[side].strip()}" for side in ("chosen", "rejected")}
        found[part[row["prompt"]]].append({"prompt": row["prompt"]} | answers)
    return dict(found)


def make_tokenizer(rows: Sequence[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training part's text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(
        [TEMPLATE.format(**row) + row[side] for row in rows for side in ("chosen", "rejected")], trainer
    )
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrap: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = wrap(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return made


def encode(rows: Sequence[Row], tokenizer: Any, length: int) -> list[tuple[list[int], int]]:
    """Chosen and rejected answer of each row, one after the other: token ids with the prompt, where the answer begins."""
    found = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"], TEMPLATE)
        for side in ("chosen", "rejected"):
            ids = prompt + encode_completion(tokenizer, row["prompt"], row[side], TEMPLATE)
            found.append((ids[:length], len(prompt)))
    return found


def prepare(given: argparse.Namespace) -> dict[str, list[Row]]:
    """The data's parts and the language model, in OUT/data and OUT/model."""
    parts = split(read_rows(given.pairs), given.seed)
    data, model_place = given.out / "data", given.out / "model"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if model_place.exists():
        return parts
    tokenizer = make_tokenizer(parts["train"], given.vocabulary)
    ids = {name: [one for one, _ in encode(rows, tokenizer, given.length)] for name, rows in parts.items()}
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden // 64),
        num_key_value_heads=max(1, given.hidden // 64),
        max_position_embeddings=2 * given.length,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    tokens = sum(map(len, ids["train"]))
    say(f"model: {model.num_parameters():,} parameters, {tokens:,} tokens of training text")
    train_language_model(
        model, ids["train"], 0, epochs=given.epochs, tokens=given.tokens, peak=given.rate, seed=given.seed
    )
    say(f"model: held-out loss {held_out_loss(model, ids['held-out'], 0, given.tokens):.3f} nats a token")
    with atomic_directory(model_place) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return parts


def align(given: argparse.Namespace) -> dict[int, Path]:
    """Run the command, and keep each checkpoint's adapter, which it removes when there is a newer one."""
    stage = {
        "name": "safety",
        "data": "data/train.jsonl",
        "learning_rate": given.learning_rate,
        "warmup_steps": 10,
        "batch_size": 16,
        "max_steps": given.steps,
    }
    recipe = {"base": "model", "template": TEMPLATE, "seed": given.seed, "beta": given.beta, "max_length": given.length}
    recipe |= {"device": "cpu", "save_steps": given.every, "stages": [stage]}
    (given.out / "psacpo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    kept = given.out / "curve"
    kept.mkdir(exist_ok=True)
    running = subprocess.Popen([sys.executable, "-m", "psacpo", "align"], cwd=given.out)
    while running.poll() is None:
        for marker in (given.out / ".safety.checkpoints").glob("checkpoint-*/progress.json"):
            place = kept / marker.parent.name.rpartition("-")[2]
            if not place.exists():
                with atomic_directory(place) as fresh:
                    for file in ("adapter_config.json", "adapter_model.safetensors"):
                        shutil.copyfile(marker.parent / file, fresh / file)
        time.sleep(0.2)
    if running.returncode:
        sys.exit(running.returncode)
    found = {int(place.name): place for place in kept.iterdir() if place.name.isdecimal()}
    return dict(sorted(found.items())) | {given.steps: given.out / "safety"}


def by_length(train: Numbers, held_out: Numbers) -> dict[str, Numbers]:
    """Each held-out pair right (1), wrong (0) or undecided (.5) by rules fitted on the training pairs' lengths.

    Args:
        train, held_out: Tokens of chosen and rejected answers. Shape (pairs, 2).
    """
    longer = np.sign(train[:, 0] - train[:, 1]).mean() > 0
    sign = 1 if longer else -1
    rules = {f"the {'longer' if longer else 'shorter'} answer": 0.5 + 0.5 * sign * np.sign(held_out @ [1.0, -1.0])}
    edges = np.quantile(train, np.linspace(0, 1, 11)[1:-1])

    def features(lengths: Numbers) -> Numbers:
        tenth = np.eye(10)[np.searchsorted(edges, lengths)]
        difference: Numbers = tenth[:, 0] - tenth[:, 1]
        return difference

    x = features(train)
    weights = minimize(lambda w: np.logaddexp(0, -x @ w).sum() + 0.5 * w @ w, np.zeros(10)).x
    scores = np.round(features(held_out) @ weights, 9)
    return rules | {"tenths of length": 0.5 + 0.5 * np.sign(scores)}


def interval(values: Numbers, prompts: Sequence[str], draws: int = 2000) -> tuple[float, float, float]:
    """Mean over pairs and its 95 % interval over draws of prompts."""
    places = defaultdict(list)
    for index, prompt in enumerate(prompts):
        places[prompt].append(index)
    sums = np.array([[values[own].sum(), len(own)] for own in places.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    totals = sums[drawn].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def shown(found: tuple[float, float, float], sign: str = "") -> str:
    return "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*found, s=sign)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a project directory; what is there is gone on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of prompt and answer")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of the language model")
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch of the language model")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the language model")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of psacpo align")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=30, help="steps between two looks")
    parser.add_argument("--part", default="held-out", choices=("held-out", "dev"), help="what the table is about")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    libraries: Any = logging
    libraries.set_verbosity_error()
    libraries.disable_progress_bar()

    parts = prepare(given)
    adapters = align(given)
    tokenizer = AutoTokenizer.from_pretrained(given.out / "model")
    coded = {name: encode(parts[name], tokenizer, given.length) for name in ("train", given.part)}
    lengths = {n: np.array([len(ids) - at for ids, at in one], float).reshape(-1, 2) for n, one in coded.items()}
    rules = by_length(lengths["train"], lengths[given.part])
    prompts = [row["prompt"] for row in parts[given.part]]
    counts = {
        name: f"{len(rows)} pairs of {len({row['prompt'] for row in rows})} prompts" for name, rows in parts.items()
    }
    print(f"\ntraining: {counts['train']}; {given.part}: {counts[given.part]}\n")
    for name, right in rules.items():
        print(f"by length alone, {name}: {shown(interval(right, prompts))}")
    best = max(rules.values(), key=lambda right: right.mean())

    base = AutoModelForCausalLM.from_pretrained(given.out / "model")
    start = log_probs(base, coded[given.part])
    print("\n| step | pairs right | more than the better rule of length | margin, nats | picks the shorter answer |")
    print("|---|---|---|---|---|", flush=True)
    for step, place in adapters.items():
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given.out / "model"), place)
        ratios = (log_probs(policy, coded[given.part]) - start).view(-1, 2).double().numpy()
        margins = ratios[:, 0] - ratios[:, 1]
        right = 0.5 + 0.5 * np.sign(margins)
        shorter = (np.sign(margins) == np.sign(lengths[given.part] @ [-1.0, 1.0])).mean()
        gain = interval(right - best, prompts)
        print(
            f"| {step} | {shown(interval(right, prompts))} | {shown(gain, '+')} | {margins.mean():.2f} | {shorter:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
