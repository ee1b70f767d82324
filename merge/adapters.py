"""LoRA adapters as PEFT keeps them on disk: read, stacked at any weights, written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from psacpo.errors import InputError
from psacpo.files import digest, digest_file, digest_model, read_manifest
from psacpo.merge.arithmetic import Factors, lora_scale, stack
from psacpo.merge.tensorfiles import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "base_layer.weight": "copy",
}
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.(?P<part>" + "|".join(map(re.escape, _PARTS)) + ")")

# Settings that change nothing about what trained factors mean, or that are read here. Any other one that is set makes
# an adapter something else than plain LoRA.
# fmt: off
_UNDERSTOOD = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size",
))
# fmt: on
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights each time they are loaded.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        path: Its directory.
        base: The base model that it names (hub id or path).
        modules: Module name as in the base model (`model.layers.0.self_attn.q_proj`) -> factors in float32. For an
            embedding the factors are those of the transposed weight: A [rank, tokens], B [dimensions, rank].
        embeddings: Those modules that are embeddings.
        copies: Modules of which the adapter holds the base's own weight too (PEFT saves it for embeddings).
        config: adapter_config.json.
        digest: Of its weights and configuration.
        manifest: psacpo.json, if it has one.
    """

    path: Path
    base: str
    modules: Mapping[str, Factors]
    embeddings: frozenset[str]
    copies: frozenset[str]
    config: Mapping[str, Any]
    digest: str
    manifest: Mapping[str, Any] | None

    @property
    def base_digest(self) -> str | None:
        """Digest of the base that it was made on, where its manifest knows it."""
        found = (self.manifest or {}).get("base_digest")
        return found if isinstance(found, str) else None

    @property
    def content(self) -> str:
        """Digest of what it does to a base: not of what that base is called, so a moved project keeps its records."""
        config = {
            key: value for key, value in self.config.items() if key not in ("base_model_name_or_path", "revision")
        }
        return digest([digest_file(self.path / WEIGHTS), config])

    @property
    def revision(self) -> str | None:
        """The base's revision on the hub; None is the main branch."""
        revision: str | None = self.config.get("revision")
        return None if revision == "main" else revision

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weights as [inputs, outputs] (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))

    def copy_of(self, module: str) -> torch.Tensor:
        """The base's weight of a module in `copies`, as the adapter holds it."""
        with safe_open(self.path / WEIGHTS, framework="pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(f"{_PREFIX}{module}.base_layer.weight")
            return tensor


def read_adapter(path: Path) -> Adapter:
    """A PEFT LoRA directory in memory.

    Raises:
        InputError: It is no adapter directory, or holds anything that is not plain LoRA, by name.
    """
    if not path.is_dir():
        raise InputError(f"no adapter directory at {path}", allowed=f"a PEFT directory with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} is not an adapter directory: no {CONFIG} in it")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").exists():
            raise InputError(f"{path} holds adapter_model.bin, which is pickle and not read", allowed=WEIGHTS)
        raise InputError(f"{path} is not an adapter directory: no {WEIGHTS} in it")
    config = read_json(path / CONFIG)
    _require_plain_lora(path, config)
    parts, embeddings, copies = _read_tensors(path)
    modules = {name: _factors(path, config, name, parts[name]) for name in sorted(parts)}
    _require_covered(path, config, modules)
    return Adapter(
        path=path,
        base=config["base_model_name_or_path"],
        modules=modules,
        embeddings=embeddings,
        copies=copies,
        config=config,
        digest=digest_model(path),
        manifest=read_manifest(path),
    )


def factors_by_module(adapters: Sequence[Adapter]) -> dict[str, list[Factors | None]]:
    """Module name -> the factors that each adapter has for it, None where it has none, so that its delta is zero."""
    names = sorted({name for adapter in adapters for name in adapter.modules})
    return {name: [adapter.modules.get(name) for adapter in adapters] for name in names}


def stack_adapters(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """Module name -> factors, with scale 1, of the weighted sum of the adapters' deltas.

    An adapter of weight zero takes no rank: at ratio 0 or 1 the result is the other adapter alone.
    """
    kept, weights = _weighted(adapters, weights)
    return {
        name: stack(*zip(*[(update, w) for update, w in zip(row, weights, strict=True) if update], strict=True))
        for name, row in factors_by_module(kept).items()
    }


def require_compatible(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters, by name, that cannot be summed: other shapes, kinds of module, tasks or revisions of the base."""
    (first, one), *others = adapters.items()
    for name, other in others:
        for what, given, wanted in (
            ("task_type", other.config.get("task_type"), one.config.get("task_type")),
            ("revision of the base", other.revision, one.revision),
            ("fan_in_fan_out", other.fan_in_fan_out, one.fan_in_fan_out),
        ):
            if given != wanted:
                raise InputError(f"adapters differ in {what}: {first} has {wanted}, {name} has {given}")
    seen: dict[str, tuple[str, Adapter]] = {}
    for name, adapter in adapters.items():
        for module, factors in adapter.modules.items():
            before, other = seen.setdefault(module, (name, adapter))
            expected = other.modules[module].shape
            if factors.shape != expected or (module in adapter.embeddings) != (module in other.embeddings):
                raise InputError(
                    f"adapters do not fit together at {module}: {before} changes a weight of shape {list(expected)}, "
                    f"{name} one of shape {list(factors.shape)}"
                )


def adapter_bytes(adapters: Sequence[Adapter], weights: Sequence[float]) -> int:
    """Size of the stacked factors on disk, in bytes."""
    kept, _ = _weighted(adapters, weights)
    return 4 * sum(update.A.numel() + update.B.numel() for adapter in kept for update in adapter.modules.values())


def write_adapter(directory: Path, adapters: Sequence[Adapter], weights: Sequence[float], *, base: str) -> int:
    """Write the weighted sum of adapters as a PEFT LoRA directory, and give its rank back.

    Every module has lora_alpha = r, so a reader that knows no patterns finds the right scale, 1, too.
    """
    kept, kept_weights = _weighted(adapters, weights)
    stacked = stack_adapters(kept, kept_weights)
    embeddings = frozenset[str]().union(*(adapter.embeddings for adapter in kept))
    rank = max(factors.rank for factors in stacked.values())
    patterns = _rank_pattern(stacked, rank)
    config = {
        "alpha_pattern": patterns,
        "auto_mapping": kept[0].config.get("auto_mapping"),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": kept[0].fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": version("peft"),
        "r": rank,
        "rank_pattern": patterns,
        "revision": kept[0].revision,
        "target_modules": _target_modules(kept),
        "task_type": kept[0].config.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, factors in stacked.items():
        key_a, key_b = (
            ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{_PREFIX}{name}.{key_a}"] = factors.A.contiguous()
        tensors[f"{_PREFIX}{name}.{key_b}"] = factors.B.contiguous()
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # By way of bytes: a full disk is then an OSError, which the caller can tell in words.
    (directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    return rank


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module: the first key that matches its whole end (PEFT's rule)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """The adapters that count, and their weights; one of weight zero is kept if all are."""
    pairs = [pair for pair in zip(adapters, weights, strict=True) if pair[1] != 0] or [(adapters[0], 0.0)]
    return [adapter for adapter, _ in pairs], [weight for _, weight in pairs]


def _require_plain_lora(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"adapter {path} is of another kind than LoRA", given=f"peft_type {kind}", allowed="LORA")
    for name in sorted(config):
        # Every such setting of PEFT is off when it is false, null or empty.
        if name not in _UNDERSTOOD and config[name]:
            raise InputError(
                f"adapter {path} is not plain LoRA: it sets {name}",
                given=json.dumps(config[name])[:80],
                allowed="unset",
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"adapter {path} is not plain LoRA: it trains biases", given=f"bias {config['bias']}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise InputError(
            f"adapter {path} starts from changed base weights",
            given=f"init_lora_weights {config['init_lora_weights']}",
            allowed="an adapter converted to plain LoRA (path_initial_model_for_weight_conversion in PEFT)",
        )
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise InputError(f"adapter {path} names no base model (base_model_name_or_path in {CONFIG})")
    if not config.get("target_modules"):
        raise InputError(f"adapter {path} names no target_modules in {CONFIG}")


def _read_tensors(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], frozenset[str], frozenset[str]]:
    """The factors of each module as {"A": .., "B": ..}, the modules that are embeddings, and those copied from the base."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    embeddings, copies = set(), set()
    try:
        with safe_open(path / WEIGHTS, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (not a mapping)
                found = _KEY.fullmatch(key)
                if found is None:
                    raise InputError(f"adapter {path} holds a tensor that is not a LoRA factor: {key}")
                module, part = found["module"], found["part"]
                if _PARTS[part] == "copy":
                    copies.add(module)
                    continue
                if part.startswith("lora_embedding"):
                    embeddings.add(module)
                parts.setdefault(module, {})[_PARTS[part]] = _factor(path, key, weights.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / WEIGHTS} is damaged: {error}") from error
    if not parts:
        raise InputError(f"adapter {path} holds no LoRA factors")
    return parts, frozenset(embeddings), frozenset(copies)


def _factor(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise InputError(
            f"adapter {path}: {key} is not a matrix of numbers", given=f"{tensor.dtype} of shape {list(tensor.shape)}"
        )
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise InputError(f"adapter {path}: {key} holds NaN or infinity")
    return tensor


def _factors(path: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, torch.Tensor]) -> Factors:
    if len(parts) != 2:
        raise InputError(f"adapter {path} holds only one of the two factors of {module}")
    A, B = parts["A"], parts["B"]
    rank = pattern_value(config.get("rank_pattern") or {}, module, config.get("r", 8))
    if A.shape[0] != rank or B.shape[1] != rank:
        raise InputError(
            f"adapter {path}: the factors of {module} do not have the rank that {CONFIG} says",
            given=f"A {list(A.shape)}, B {list(B.shape)}",
            allowed=f"rank {rank}",
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha <= 0:
        raise InputError(f"adapter {path}: lora_alpha of {module} is not a number above 0", given=alpha)
    return Factors(A, B, lora_scale(alpha, rank, rslora=bool(config.get("use_rslora"))))


def _require_covered(path: Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuse factors that PEFT would not load: their module is not one of target_modules."""
    targets = config["target_modules"]
    if targets == "all-linear":
        return
    for module in modules:
        covered = (
            re.fullmatch(targets, module)
            if isinstance(targets, str)
            else any(module == target or module.endswith(f".{target}") for target in targets)
        )
        if not covered:
            raise InputError(f"adapter {path} holds factors of {module}, which its target_modules do not name")


def _target_modules(adapters: Sequence[Adapter]) -> list[str]:
    """Names that match the adapted modules and no other.

    Names that select in every adapter what it adapted select together what they adapted together. Where a selection
    had more to it (a regular expression, some layers only), each module is named in full.
    """
    narrowed = ("exclude_modules", "layers_to_transform")
    by_name = all(
        isinstance(adapter.config["target_modules"], list)
        and not any(adapter.config.get(name) not in (None, [], "") for name in narrowed)
        for adapter in adapters
    )
    if by_name:
        return sorted({name for adapter in adapters for name in adapter.config["target_modules"]})
    return sorted({name for adapter in adapters for name in adapter.modules})


def _rank_pattern(stacked: Mapping[str, Factors], rank: int) -> dict[str, int]:
    """The modules whose rank is not `rank`: by last name where all modules of that name agree, else in full."""
    ranks_by_end: dict[str, set[int]] = {}
    for name, factors in stacked.items():
        ranks_by_end.setdefault(name.rpartition(".")[2], set()).add(factors.rank)
    patterns: dict[str, int] = {}
    for name, factors in stacked.items():
        end = name.rpartition(".")[2]
        if factors.rank != rank:
            patterns[re.escape(end) if len(ranks_by_end[end]) == 1 else f"^{re.escape(name)}"] = factors.rank
    return patterns
