"""Makes a project directory out of hh-rlhf's pairs alone: data split by prompt, a small language model, two judges.

    python recipes/hh/prepare.py --helpful helpful.jsonl.gz --harmless harmless.jsonl.gz --out hh

The files are hh-rlhf's own (`chosen` and `rejected` as whole transcripts, github.com/anthropics/hh-rlhf) or rows with
`prompt`, `chosen` and `rejected`. Everything is trained from scratch on them, on a CPU, in minutes. A part that is
there already, made from the same input with the same settings, is not made again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from pairs import Pair, encode, fit, make_tokenizer, read_pairs, split, write_data
from torch import Tensor
from training import IdPair, held_out_loss, judge_margins, judge_scores, train_judge, train_language_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from psacpo.console import say
from psacpo.errors import InputError
from psacpo.files import atomic_directory, canonical_json, digest, digest_file, read_manifest, write_manifest
from psacpo.recipe import RECIPE

Report: TypeAlias = dict[str, Any]
# Each judge learns from one file: its category, and 1 where the chosen answer is to score higher, -1 where lower.
JUDGES = {"reward": ("helpful", 1.0), "cost": ("harmful", -1.0)}


@dataclass(frozen=True)
class Corpus:
    """The pairs of `train`, `dev` and `held-out`, and their token ids, in the same order."""

    parts: dict[str, list[Pair]]
    ids: dict[str, list[IdPair]]
    tokenizer: Any

    def rows(self, part: str) -> list[list[int]]:
        """Every conversation of a part, with the chosen and with the rejected answer."""
        return [row for pair in self.ids[part] for row in pair]

    def of(self, category: str) -> Corpus:
        """The pairs of one category."""
        own = {n: [i for i, pair in enumerate(pairs) if pair.category == category] for n, pairs in self.parts.items()}
        return Corpus(
            {name: [self.parts[name][i] for i in places] for name, places in own.items()},
            {name: [self.ids[name][i] for i in places] for name, places in own.items()},
            self.tokenizer,
        )


def read_corpus(args: argparse.Namespace, counts: Counter[str]) -> Corpus:
    """Both files read, split and tokenised, with every loss counted."""
    files = {"helpful": args.helpful, "harmful": args.harmless}
    pairs = [pair for category, path in files.items() for pair in read_pairs(path, category, counts)]
    parts = split(pairs, args.seed, counts)
    tokenizer = make_tokenizer(parts["train"], args.vocabulary)
    for name, members in parts.items():
        fitting = [fit(pair, tokenizer, args.length) for pair in members]
        parts[name] = [pair for pair in fitting if pair is not None]
        counts[f"{name}: too long"] = len(members) - len(parts[name])
        for category in files:
            counts[f"{name}: {category} pairs"] = sum(pair.category == category for pair in parts[name])
    corpus = Corpus(
        parts, {name: [encode(p, tokenizer) for p in members] for name, members in parts.items()}, tokenizer
    )
    counts["train: tokens"] = sum(map(len, corpus.rows("train")))
    begin = tokenizer.bos_token_id
    assert all(row[0] == begin and row.count(begin) == 1 for row in corpus.rows("train"))
    return corpus


def build_model(out: Path, corpus: Corpus, args: argparse.Namespace) -> Report:
    """A small Llama, trained from scratch on both answers to every training prompt."""
    torch.manual_seed(args.seed)
    tokenizer = corpus.tokenizer
    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2 * args.length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    pad_id, tokens = tokenizer.pad_token_id, args.tokens
    last = train_language_model(
        model, corpus.rows("train"), pad_id, epochs=args.epochs, tokens=tokens, peak=args.rate, seed=args.seed
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    losses = {n: held_out_loss(model, corpus.rows(n), pad_id, tokens) for n in ("dev", "held-out")} | {"train": last}
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "loss": {name: round(loss, 4) for name, loss in losses.items()},
    }


def build_judge(out: Path, base: Path, name: str, corpus: Corpus, args: argparse.Namespace) -> Report:
    """A scalar judge on top of the language model, trained on the pairs of its category."""
    torch.manual_seed(args.seed)
    category, sign = JUDGES[name]
    own = corpus.of(category)
    pad_id, tokens = corpus.tokenizer.pad_token_id, args.tokens
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    kept = train_judge(
        model,
        own.ids["train"],
        own.ids["dev"],
        pad_id,
        sign=sign,
        epochs=args.judge_epochs,
        tokens=tokens,
        peak=args.judge_rate,
        seed=args.seed,
    )
    model.save_pretrained(out)
    corpus.tokenizer.save_pretrained(out)
    right = {n: (sign * judge_margins(model, pairs, pad_id, tokens) > 0).float() for n, pairs in own.ids.items()}
    scores = judge_scores(model, own.ids["train"], pad_id, tokens)
    return (
        judge_report(right["held-out"], own.parts["train"], own.parts["held-out"])
        | {"train": accuracy(right["train"]), "dev": accuracy(right["dev"]), "epoch": kept}
        | {"training answers' score": {"mean": round(scores.mean().item(), 4), "sd": round(scores.std().item(), 4)}}
    )


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    centre, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - width) / (1 + z * z / n), (centre + width) / (1 + z * z / n)


def accuracy(right: Tensor) -> Report:
    """A share with its interval, from 1, 0 and 0.5 for each pair."""
    share = right.mean().item()
    low, high = wilson(share, len(right))
    return {"accuracy": round(share, 4), "low": round(low, 4), "high": round(high, 4), "pairs": len(right)}


def longer(pairs: Sequence[Pair]) -> Tensor:
    """Whether the chosen answer has more characters than the rejected: 1, 0, or 0.5 for a tie. Shape (pairs,)."""
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    return 0.5 + 0.5 * (lengths[:, 0] - lengths[:, 1]).sign()


def judge_report(right: Tensor, train: Sequence[Pair], held_out: Sequence[Pair]) -> Report:
    """The judge's accuracy beside that of always taking the longer or the shorter answer, whichever train favours."""
    rule = "longer" if longer(train).mean() >= 0.5 else "shorter"
    by_length = longer(held_out) if rule == "longer" else 1 - longer(held_out)
    return {
        "held-out": accuracy(right),
        "length only": accuracy(by_length) | {"rule": f"the {rule} answer"},
        "judge right, length wrong": int((right > by_length).sum()),
        "judge wrong, length right": int((right < by_length).sum()),
        "picks the longer": round((right == longer(held_out)).float().mean().item(), 4),
    }


def part(out: Path, name: str, decides: dict[str, Any], build: Callable[[Path], Report]) -> Report:
    """What `build` reports, made in `out/name` now or found there from before."""
    key, at = digest(decides), out / name
    found = read_manifest(at)
    if found is not None and found.get("key") == key:
        say(f"{name}: already there")
        report: Report = found["report"]
        return report
    started = time.perf_counter()
    with atomic_directory(at) as fresh:
        report = build(fresh)
        report["seconds"] = round(time.perf_counter() - started)
        write_manifest(fresh, kind=name, config=decides, inputs={}, seeds={}, key=key, report=report)
    say(f"{name}: {canonical_json(report)}")
    return report


def prepare(args: argparse.Namespace) -> str:
    """Data, model and judges, each from the one before; gives the tables."""
    out: Path = args.out
    counts: Counter[str] = Counter()
    corpus = read_corpus(args, counts)
    decides = {name: getattr(args, name) for name in ("seed", "vocabulary", "length", "prompts")}
    decides |= {name: digest_file(getattr(args, name)) for name in ("helpful", "harmless")}

    def build_data(at: Path) -> Report:
        return dict(counts) | {"files": write_data(at, corpus.parts, args.prompts, args.seed)}

    data = part(out, "data", decides, build_data)
    decides |= {name: getattr(args, name) for name in ("hidden", "layers", "epochs", "tokens", "rate")}
    model = part(out, "model", decides, partial(build_model, corpus=corpus, args=args))
    decides |= {name: getattr(args, name) for name in ("judge_epochs", "judge_rate")}
    judges = {}
    for name in JUDGES:
        build = partial(build_judge, base=out / "model", name=name, corpus=corpus, args=args)
        judges[name] = part(out, f"judges/{name}", decides, build)
    if not (out / RECIPE).exists():
        shutil.copyfile(Path(__file__).with_name(RECIPE), out / RECIPE)
    return tables(data, model, judges)


def tables(data: Report, model: Report, judges: dict[str, Report]) -> str:
    """Counts, losses and accuracies in Markdown."""
    lines = [
        "| part | helpful pairs | harmful pairs | leaks dropped | too long | LM loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("train", "dev", "held-out"):
        cells = [data[f"{name}: {what}"] for what in ("helpful pairs", "harmful pairs", "leaks", "too long")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + f" | {model['loss'][name]:.3f} |")
    lines += ["", "| judge | held-out pairs right | by length only | rule |", "|---|---|---|---|"]
    for name, report in judges.items():
        cells = [
            f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}] of {r['pairs']}"
            for r in (report["held-out"], report["length only"])
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {report['length only']['rule']} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line and prepare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helpful", type=Path, required=True, help="pairs whose chosen answer is the more helpful")
    parser.add_argument("--harmless", type=Path, required=True, help="pairs whose chosen answer is the less harmful")
    parser.add_argument("--out", type=Path, required=True, help="the project directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens; of longer conversations the oldest turns go")
    parser.add_argument("--prompts", type=int, default=90, help="held-out prompts of each category")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch, padding included")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the language model")
    parser.add_argument("--judge-epochs", type=int, default=2, help="at most; the best on the dev part is kept")
    parser.add_argument("--judge-rate", type=float, default=3e-4, help="peak learning rate of the judges")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    libraries: Any = transformers.utils.logging
    libraries.set_verbosity_error()
    libraries.disable_progress_bar()
    try:
        print(prepare(args))
    except InputError as error:
        parser.error(str(error))
    print(f"\nGo on:  cd {args.out} && psacpo align && psacpo frontier")


if __name__ == "__main__":
    main()
