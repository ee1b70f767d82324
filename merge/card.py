"""README.md beside a merged policy: the Hub's model card, with how it was made and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from psacpo import __version__
from psacpo.merge.config import OutputKind, policy_name

# The ranks that vLLM takes for --max-lora-rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Dial:
    """What the safety stage was trained at (SACPO, arXiv 2404.11049, Theorem 1).

    Attributes:
        beta: KL weight of the reward stage.
        lambda_bar: Weight of safety, so that the safety stage's KL weight is beta / lambda_bar.
    """

    beta: float
    lambda_bar: float

    def effective(self, ratio: float) -> tuple[float, float]:
        """(lambda, KL weight of the safety stage) whose optimum the policy at this ratio stands for, to first order.

        lambda = q * lambda_bar and beta_2 = (beta / lambda_bar) / q; at q = 0 the latter is infinite.
        """
        beta_2 = self.beta / self.lambda_bar
        return ratio * self.lambda_bar, beta_2 / ratio if ratio else float("inf")


def render_card(
    *,
    kind: OutputKind,
    base: str,
    ratio: float,
    digests: Mapping[str, str],
    rank: int | None,
    dial: Dial | None,
) -> str:
    """The card's Markdown.

    Args:
        kind: What was written.
        base: The base's name.
        ratio: Weight of the safety adapter.
        digests: Input (reward, safety, base) -> SHA-256.
        rank: Of the merged adapter; None for a checkpoint.
        dial: What the adapters know of their training.
    """
    name = policy_name(ratio)
    head: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "tags": ["psacpo", "merge", "safety", "alignment", *(["lora"] if kind == "adapter" else [])],
        "ratio": ratio,
    }
    sources = "\n".join(f"| {role} | `{digest}` |" for role, digest in digests.items())
    made = [
        f"# {name}",
        "",
        f"`{base}` with a reward and a safety adapter merged at ratio q = {ratio:g} by psacpo {__version__}:",
        "",
        "    W(q) = W_base + (1 - q) * delta_reward + q * delta_safety",
        "",
        (
            f"The factors of both adapters are stacked (rank {rank}), which is that sum exactly."
            if kind == "adapter"
            else "The sum was computed in float32 and rounded once to the base's own dtype, in the base's shard layout."
        ),
        "",
        "| input | SHA-256 of weights and configuration |",
        "|---|---|",
        sources,
        "",
        *_dial_lines(dial, ratio),
        "## Use",
        "",
        "With this directory at `DIR`:",
        "",
    ]
    usage = _adapter_usage(base, name, rank or 1) if kind == "adapter" else _checkpoint_usage()
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join([*made, *usage]) + "\n"


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds `rank`, None where there is none."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None)


def _dial_lines(dial: Dial | None, ratio: float) -> list[str]:
    if dial is None:
        return []
    weight, beta_2 = dial.effective(ratio)
    shown = f"{beta_2:.6g}" if ratio else "infinite (no safety stage)"
    text = (
        f"The safety stage was trained at lambda = {dial.lambda_bar:g} and beta = {dial.beta:g}. To first order this "
        f"ratio stands for lambda = {weight:.6g}, that is a KL weight of the safety stage of {shown}."
    )
    return [text, ""]


def _adapter_usage(base: str, name: str, rank: int) -> list[str]:
    lines = [
        "```python",
        "# transformers",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("DIR")',
        "",
        "# PEFT",
        "from peft import PeftModel",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(base, "DIR")',
        "```",
        "",
    ]
    legal = vllm_rank(rank)
    if legal is None:
        return [*lines, f"vLLM serves adapters up to rank {_VLLM_RANKS[-1]}; merge with `--as checkpoint` for it."]
    return [
        *lines,
        "```bash",
        "# vLLM",
        f"vllm serve '{base}' --enable-lora --max-lora-rank {legal} --lora-modules {name}=DIR",
        "```",
    ]


def _checkpoint_usage() -> list[str]:
    return [
        "```python",
        "# transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("DIR")',
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        "```",
        "",
        "```bash",
        "# vLLM",
        "vllm serve DIR",
        "```",
    ]
