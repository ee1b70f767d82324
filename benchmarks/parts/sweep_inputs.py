"""What both arms of sweep.py work on: a random model, two adapters, prompts, policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RATIOS = [i / 8 for i in range(9)]
# Asked for when the nine are done, of the engine that runs.
TENTH = 0.3
VOCABULARY = 2048
PROMPT = 24
RANK = 4


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
