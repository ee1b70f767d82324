"""Nine ratios answered in mixed batches from one base, against one merged model a ratio with transformers generate().

    python benchmarks/sweep.py [--quick] [--device cuda]

The peer does what the released evaluation of SACPO does, only batched: for each ratio it loads the base, merges the
exact adapter into it and calls `model.generate`. Both arms answer the same prompts greedily with the same number of
tokens, in turn, over several rounds; loading the base counts for both. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from psacpo.evalharness.config import Generation
from psacpo.evalharness.engines import Policy, Request
from psacpo.evalharness.engines.transformers import TransformersEngine
from psacpo.merge import MergeConfig, merge
from psacpo.merge.adapters import read_adapter

RATIOS = [i / 8 for i in range(9)]
VOCABULARY = 2048


def make_inputs(root: Path, hidden: int, layers: int) -> tuple[Path, dict[str, Path]]:
    """A random Llama that never ends an answer, and two random adapters of rank 16 on it."""
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
    )
    base = root / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0").save_pretrained(base)
    adapters = {}
    for name in ("reward", "safety"):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=16, target_modules="all-linear")
        )
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        adapters[name] = root / name
        adapted.save_pretrained(adapters[name])
    return base, adapters


def peer(
    base: Path, merged: dict[float, Path], prompts: torch.Tensor, tokens: int, batch: int, device: str
) -> dict[float, Any]:
    """One model a ratio: load, merge, generate in batches."""
    answers = {}
    for ratio, path in merged.items():
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).merge_and_unload()
        model = model.to(device).eval()
        parts = []
        for rows in prompts.to(device).split(batch):
            mask = torch.ones_like(rows)
            parts.append(
                model.generate(rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[:, rows.shape[1] :]
            )
        answers[ratio] = torch.cat(parts).tolist()
    return answers


def ours(
    base: Path, adapters: dict[str, Path], prompts: torch.Tensor, tokens: int, batch: int, device: str
) -> dict[float, Any]:
    """One base, all ratios mixed in each batch."""
    generation = Generation(max_new_tokens=tokens, temperature=0.0, batch_size=batch)
    found = {name: read_adapter(path) for name, path in adapters.items()}
    engine = TransformersEngine.load(base, found, generation=generation, dtype="float32", device=device)
    requests = [
        Request(
            f"{index}/{ratio}", Policy(str(ratio), {"reward": 1 - ratio, "safety": ratio}, ratio), tuple(row), index
        )
        for index, row in enumerate(prompts.tolist())
        for ratio in RATIOS
    ]
    by_key = {}
    for start in range(0, len(requests), batch):
        by_key |= {answer.key: list(answer.token_ids) for answer in engine.generate(requests[start : start + batch])}
    return {ratio: [by_key[f"{index}/{ratio}"] for index in range(len(prompts))] for ratio in RATIOS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a size that ends within five minutes on 2 cores")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hidden, layers, count, tokens, rounds = (128, 4, 24, 24, 3) if options.quick else (512, 12, 64, 64, 3)
    batch = 72
    seconds: dict[str, list[float]] = {"generate per ratio": [], "psacpo": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, adapters = make_inputs(root, hidden, layers)
        outputs = merge(
            MergeConfig.model_validate(
                {
                    "base": str(base),
                    "reward": adapters["reward"],
                    "safety": adapters["safety"],
                    "ratios": RATIOS,
                    "out": root / "merged",
                }
            )
        )
        merged = dict(zip(RATIOS, outputs, strict=True))
        prompts = torch.randint(2, VOCABULARY, (count, 24), generator=torch.Generator().manual_seed(1))
        same = 0
        for _ in range(rounds):
            started = time.perf_counter()
            expected = peer(base, merged, prompts, tokens, batch, options.device)
            seconds["generate per ratio"].append(time.perf_counter() - started)
            started = time.perf_counter()
            found = ours(base, adapters, prompts, tokens, batch, options.device)
            seconds["psacpo"].append(time.perf_counter() - started)
            same = sum(found[q][i] == expected[q][i] for q in RATIOS for i in range(count))
    total = len(RATIOS) * count
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{'arm':<20}{'median s':>10}{'min':>8}{'max':>8}{'answers/s':>11}")
    for arm, spent in seconds.items():
        middle = statistics.median(spent)
        print(f"{arm:<20}{middle:>10.2f}{min(spent):>8.2f}{max(spent):>8.2f}{total / middle:>11.1f}")
    print(
        f"peer's time over psacpo's, by round: {', '.join(f'{r:.2f}' for r in ratios)}; equal answers {same} of {total}"
    )
    print(
        json.dumps(
            {
                "benchmark": "sweep",
                "device": options.device,
                "hidden": hidden,
                "layers": layers,
                "prompts": count,
                "tokens": tokens,
                "ratios": len(RATIOS),
                "seconds": seconds,
                "speedup": {"median": statistics.median(ratios), "all": ratios},
                "equal_answers": same,
                "answers": total,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
