"""How the first stage of `align` learns to order held-out pairs of hh-rlhf, step by step, beside going by length.

    python recipes/hh/learning.py --helpful helpful.jsonl.gz --harmless harmless.jsonl.gz --project hh

`hh` is what prepare.py made from the same files; the split by prompts is made again as it made it. A pair is right when
the policy's log-ratio to the base is larger for the chosen answer; before the first step all ratios are 0. Prints a table
a file: share of held-out pairs that are right, after every tenth of the steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pairs import encode, fit, read_pairs, split
from scipy.stats import binomtest
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from psacpo.align.arguments import training_arguments
from psacpo.align.config import AlignConfig
from psacpo.align.model import load_policy
from psacpo.align.planning import prepare
from psacpo.align.trainer import PairTrainer

Answer = tuple[list[int], int]  # token ids of prompt and answer, where the answer begins


@torch.no_grad()
def log_probs(model: Any, answers: list[Answer], size: int = 32) -> Tensor:
    """Sum of the log-probabilities of each answer's tokens given its prompt, shape [answers]."""
    found = torch.zeros(len(answers))
    order = sorted(range(len(answers)), key=lambda place: len(answers[place][0]))
    training = model.training
    model.eval()
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(answers[place][0]) for place in places)
        ids = torch.tensor([answers[place][0] + [0] * (width - len(answers[place][0])) for place in places])
        # Padding is on the right and attention is causal, so it needs no mask.
        each = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        for row, place in enumerate(places):
            tokens, begin = answers[place]
            found[place] = each[row, begin - 1 : len(tokens) - 1].sum()
    model.train(training)
    return found


class HeldOut(TrainerCallback):
    """Looks at the held-out pairs after some steps."""

    def __init__(self, answers: list[Answer], every: int) -> None:
        self.answers, self.every = answers, every
        self.start: Tensor | None = None
        self.right: dict[int, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.start = log_probs(model, self.answers)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            assert self.start is not None
            ratios = (log_probs(model, self.answers) - self.start).view(-1, 2)
            self.right[state.global_step] = ratios[:, 0] > ratios[:, 1]


def held_out(given: argparse.Namespace, tokenizer: Any, wanted: str) -> list[Answer]:
    """Chosen and rejected answer of each held-out pair of a category, one after the other, cut as prepare.py cuts."""
    files, counts = {"helpful": given.helpful, "harmful": given.harmless}, Counter[str]()
    pairs = [pair for category, path in files.items() for pair in read_pairs(path, category, counts)]

    def tokens() -> Iterator[Answer]:
        for pair in split(pairs, given.seed, counts)["held-out"]:
            shorter = fit(pair, tokenizer, given.length) if pair.category == wanted else None
            if shorter is not None:
                chosen, rejected = encode(shorter, tokenizer)
                shared = next(i for i, (a, b) in enumerate(zip([*chosen, -1], [*rejected, -2], strict=False)) if a != b)
                # An answer may begin like the other; the log-ratio of what they share is the same.
                yield chosen, shared
                yield rejected, shared

    return list(tokens())


def learn(given: argparse.Namespace, category: str, data: str) -> None:
    model = given.project / "model"
    answers = held_out(given, AutoTokenizer.from_pretrained(model), category)
    lengths = torch.tensor([len(ids) for ids, _ in answers]).view(-1, 2)
    longer = (lengths[:, 0] > lengths[:, 1]).float() + 0.5 * (lengths[:, 0] == lengths[:, 1])
    by_length = longer if longer.mean() > 0.5 else 1 - longer
    stage = {
        "name": "reward",
        "data": str(given.project / "data" / data),
        "learning_rate": given.learning_rate,
        "warmup_steps": 5,
        "batch_size": 16,
        "max_steps": given.steps,
    }
    with tempfile.TemporaryDirectory() as scratch:
        config = AlignConfig.model_validate(
            {"base": str(model), "out": Path(scratch), "device": "cpu", "max_length": given.length, "stages": [stage]}
            | {"seed": given.seed, "save_steps": 0}
        )
        prepared = prepare(config)
        (task,) = prepared.tasks
        policy = load_policy(prepared.base, config.lora, config.dtype, None, gradient_checkpointing=False)
        trainer = PairTrainer(
            policy,
            training_arguments(config, task, "cpu", scratch),
            task.drawn,
            task.stage,
            beta=config.beta_of(task.stage),
            fresh=True,
            pad_id=0,
        )
        seen = HeldOut(answers, max(1, given.steps // 10))
        trainer.add_callback(seen)
        trainer.fit()
    count = len(by_length)
    print(f"\n{data}: {len(task.pairs.pairs)} training pairs, {count} held-out pairs, rate {given.learning_rate:g}")
    print(f"by length alone (the {'longer' if longer.mean() > 0.5 else 'shorter'}): {by_length.mean():.3f}")
    print("\n| step | held-out pairs right | 95 % | only the policy right | only length right | p (sign test) |")
    print("|---|---|---|---|---|---|")
    for step, right in seen.right.items():
        low, high = binomtest(int(right.sum()), count).proportion_ci(method="wilson")
        better, worse = int((right & (by_length < 0.5)).sum()), int((~right & (by_length > 0.5)).sum())
        p = binomtest(better, better + worse).pvalue
        print(f"| {step} | {right.float().mean():.3f} | [{low:.3f}, {high:.3f}] | {better} | {worse} | {p:.2g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helpful", type=Path, required=True)
    parser.add_argument("--harmless", type=Path, required=True)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=256, help="as prepare.py's")
    parser.add_argument("--seed", type=int, default=0, help="as prepare.py's")
    given = parser.parse_args()
    for category, data in (("harmful", "harmless.jsonl"), ("helpful", "helpful.jsonl")):
        learn(given, category, data)


if __name__ == "__main__":
    main()
