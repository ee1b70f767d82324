"""README.md beside a merged policy: the Hub's model card, with how it was made and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from psacpo import __version__
from psacpo.files import MANIFEST, read_manifest
from psacpo.merge.config import Mix, OutputKind
from psacpo.merge.parameters import MethodSettings

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
    mix: Mix,
    sources: Sequence[str],
    of_adapters: bool,
    digests: Mapping[str, str],
    rank: int | None = None,
    exact: bool = True,
    dial: Dial | None = None,
) -> str:
    """The card's Markdown.

    Args:
        kind: What was written.
        base: Name of the base, or of the model whose layout the output has.
        mix: What this output is made of.
        sources: What the sources are called, in the order of the weights.
        of_adapters: Whether the sources are adapters, so that their deltas were merged.
        digests: Input (a source's name, base) -> digest of its weights and configuration.
        rank: Of the merged adapter; None for a checkpoint.
        exact: Whether nothing was lost by recompression.
        dial: What the adapters know of their training.
    """
    head: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["psacpo", "merge", "safety", "alignment", *(["lora"] if kind == "adapter" else [])],
        **({} if mix.ratio is None else {"ratio": mix.ratio}),
    }
    made = [
        f"# {mix.name}",
        "",
        *_what(base, mix, sources, of_adapters),
        "",
        _how(kind, of_adapters, mix, rank, exact),
        "",
        "| input | digest of weights and configuration |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in digests.items()),
        "",
        *(_dial_lines(dial, mix.ratio) if mix.ratio is not None else []),
        "## Use",
        "",
        "With this directory at `DIR`:",
        "",
    ]
    usage = _adapter_usage(base, mix.name, rank or 1) if kind == "adapter" else _checkpoint_usage()
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join([*made, *usage]) + "\n"


def _what(base: str, mix: Mix, sources: Sequence[str], of_adapters: bool) -> list[str]:
    """One line of what was merged, and the formula."""
    by = f"by psacpo {__version__}"
    if mix.weights is None:
        settings = mix.settings
        return [
            f"{_listed(sources)} merged by the method `{settings.method}` {by}, with these settings:",
            "",
            "```yaml",
            *yaml.safe_dump(_said(settings, sources), sort_keys=False).strip().splitlines(),
            "```",
        ]
    if mix.ratio is not None:
        what = f"`{base}` with a reward and a safety adapter" if of_adapters else "A reward and a safety model"
        line = f"{what} merged at ratio q = {mix.ratio:g} {by}:"
        terms = (
            "W_base + (1 - q) * delta_reward + q * delta_safety" if of_adapters else "(1 - q) * W_reward + q * W_safety"
        )
        return [line, "", f"    W(q) = {terms}"]
    what = f"`{base}` with {len(sources)} adapters" if of_adapters else f"{len(sources)} models"
    letter = "delta" if of_adapters else "W"
    terms = " + ".join(f"{weight:g} * {letter}[{name}]" for name, weight in zip(sources, mix.weights, strict=True))
    return [f"{what} merged {by}:", "", f"    W = {'W_base + ' if of_adapters else ''}{terms}"]


def _said(settings: MethodSettings, sources: Sequence[str]) -> dict[str, Any]:
    """The settings of a method as a file would have them."""
    shown = settings.model_dump(mode="json")
    models = {name: own for name, own in zip(sources, shown["models"], strict=True) if own}
    return {"method": settings.method, **({"models": models} if models else {}), **shown["shared"]}


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def _how(kind: OutputKind, of_adapters: bool, mix: Mix, rank: int | None, exact: bool) -> str:
    if kind == "checkpoint":
        layout = "the base's" if of_adapters else "the first model's"
        return f"The result was computed in float32 and rounded once to its dtype, in {layout} shard layout."
    if exact:
        return f"The factors of the adapters are stacked (rank {rank}), which is that sum exactly."
    return (
        f"That sum is recompressed to rank {rank}, the best approximation there is; psacpo.json has each layer's error."
    )


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


def written_before(out: Path) -> dict[Path, int]:
    """Each merged policy at a place or in it -> when it was written, for `merge_summary`."""
    found = [out / MANIFEST, *out.glob(f"*/{MANIFEST}")]
    return {path.parent: path.stat().st_mtime_ns for path in found if path.is_file()}


def merge_summary(outputs: Sequence[Path], before: Mapping[Path, int]) -> list[str]:
    """What the command prints when it is done: what was taken, what was lost, what was written, what was there already.

    Args:
        before: What `written_before` found ahead of the merge.
    """
    manifests = [read_manifest(out) or {} for out in outputs]
    first = manifests[0]
    lines = [f"{name}: {_shown(path)}" for name, path in first.get("sources", {}).items()]
    lines += [f"warning: {text}" for text in first.get("warnings", [])]
    for out, manifest in zip(outputs, manifests, strict=True):
        errors = manifest.get("truncation", {})
        if errors:
            worst = max(errors, key=errors.__getitem__)
            lines.append(f"truncation error of each layer, relative, at rank {manifest['rank']}:")
            lines += [f"  {name}  {error:.2e}" for name, error in errors.items()]
            lines.append(f"  worst: {worst}")
        if manifest.get("uploaded"):
            lines.append(f"uploaded to {manifest['uploaded']}")
        there = out in before and before[out] == written_before(out).get(out)
        lines.append(f"{'there already:' if there else 'wrote'} {out}")
    return lines


def _shown(path: str) -> str:
    """A path from the working directory where it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
