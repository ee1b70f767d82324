"""adapter_config.json of a LoRA adapter, checked: what of it decides what the adapter does. No torch here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.merge.tensorfiles import read_json

CONFIG = "adapter_config.json"
# Modules to which LoRA on all linear layers is put, in PEFT's word.
ALL_LINEAR = "all-linear"
# Names of the output embedding in transformers' causal language models.
HEADS = ("lm_head", "embed_out")

# Settings that change nothing about what trained factors mean, or that are read here. Any other one that is set makes
# an adapter something that is not known here.
# fmt: off
UNDERSTOOD = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "modules_to_save", "lora_bias", "use_dora",
    "ensure_weight_tying",
))
# fmt: on
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights each time they are loaded.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class LoraConfig:
    """What a PEFT LoRA configuration says, each value of the type that PEFT documents.

    Attributes:
        base: The base model that it names (hub id or path).
        revision: Of the base on the hub; None is the main branch.
        rank: r, of modules that `rank_pattern` does not name.
        alpha: lora_alpha, of modules that `alpha_pattern` does not name.
        rank_pattern: Regular expression for the end of a module's name -> rank.
        alpha_pattern: The same -> alpha.
        targets: target_modules: a regular expression, or names.
        saved: modules_to_save: ends of the names of modules that are trained whole.
        bias: Which biases of the base are trained: none, lora_only or all.
        rslora: Scaled by 1 / sqrt(rank) instead of 1 / rank.
        dora: Weight-decomposed: each adapted module has a magnitude too.
        lora_bias: B has a bias.
        fan_in_fan_out: The base's weights are [inputs, outputs] (GPT-2's Conv1D).
        tying: The output embedding takes the change of the input embedding.
    """

    base: str
    revision: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    saved: tuple[str, ...]
    bias: str
    rslora: bool
    dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    tying: bool

    def rank_of(self, module: str) -> int:
        rank: int = pattern_value(self.rank_pattern, module, self.rank)
        return rank

    def alpha_of(self, module: str) -> float:
        alpha: float = pattern_value(self.alpha_pattern, module, self.alpha)
        return alpha

    def targets_module(self, module: str) -> bool:
        """Whether PEFT would put factors to a module of this name (narrowing by layer and by exclusion left out)."""
        if self.targets == ALL_LINEAR or (self.tying and _last(module) in HEADS):
            return True
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)

    def saves(self, tensor: str) -> bool:
        """Whether a tensor of the base belongs to one of modules_to_save: PEFT goes by the end of a module's name."""
        parts = tensor.split(".")[:-1]
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        tied = self.tying and bool(self.saved) and bool(parts) and parts[-1] in HEADS
        return tied or any(module.endswith(name) for module in modules for name in self.saved)

    def trains_bias(self, tensor: str, *, adapted: bool) -> bool:
        """Whether a tensor of the base is a bias that is trained; `adapted`: its module has factors."""
        wanted = self.bias == "all" or (self.bias == "lora_only" and adapted)
        return wanted and _last(tensor) == "bias"


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module: the first key that matches its whole end (PEFT's rule)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def excludes(names: tuple[str, ...], module: str) -> bool:
    """Whether PEFT puts no factors to a module because modules_to_save has `names` (its rule, an expression a name)."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


def read_lora_config(path: Path) -> tuple[dict[str, Any], LoraConfig]:
    """adapter_config.json of an adapter directory: as it stands, and checked.

    Raises:
        InputError: It is no JSON object, no LoRA, of a kind that is not known here, or a value is of another type or
            range than PEFT's.
    """
    config = read_json(path / CONFIG)
    _require_known(path, config)
    value = _Values(path, config)
    targets = value.names("target_modules", or_expression=True)
    if not targets:
        raise InputError(f"adapter {path} names no target_modules in {CONFIG}")
    base = value.text("base_model_name_or_path")
    if not base:
        raise InputError(f"adapter {path} names no base model (base_model_name_or_path in {CONFIG})")
    value.text("task_type")
    bias = value.text("bias") or "none"
    if bias not in _BIASES:
        raise value.wrong("bias", ", ".join(_BIASES))
    revision = value.text("revision")
    saved = value.names("modules_to_save")
    for name in saved:
        value.expression("modules_to_save", name)
    return config, LoraConfig(
        base=base,
        revision=None if revision == "main" else revision,
        rank=value.rank("r", config.get("r", 8)),
        alpha=value.alpha("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern=value.pattern("rank_pattern", value.rank),
        alpha_pattern=value.pattern("alpha_pattern", value.alpha),
        targets=targets,
        saved=tuple(saved),
        bias=bias,
        rslora=value.flag("use_rslora"),
        dora=value.flag("use_dora"),
        lora_bias=value.flag("lora_bias"),
        fan_in_fan_out=value.flag("fan_in_fan_out"),
        tying=value.flag("ensure_weight_tying"),
    )


def _require_known(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"adapter {path} is of another kind than LoRA", given=f"peft_type {kind}", allowed="LORA")
    for name in sorted(config):
        # Every such setting of PEFT is off when it is false, null or empty.
        if name not in UNDERSTOOD and config[name]:
            raise InputError(
                f"adapter {path} is not LoRA of a kind that can be merged: it sets {name}",
                given=_shown(config[name]),
                allowed="unset",
            )
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise InputError(
            f"adapter {path} starts from changed base weights",
            given=f"init_lora_weights {_shown(config['init_lora_weights'])}",
            allowed="an adapter converted to plain LoRA (path_initial_model_for_weight_conversion in PEFT)",
        )


@dataclass(frozen=True)
class _Values:
    """The values of a configuration, each by the type that it must have; null and absent are one."""

    path: Path
    config: Mapping[str, Any]

    def wrong(self, name: str, allowed: str, given: Any = ...) -> InputError:
        given = self.config.get(name) if given is ... else given
        return InputError(f"adapter {self.path}: {name} in {CONFIG} is wrong", given=_shown(given), allowed=allowed)

    def text(self, name: str) -> str | None:
        value = self.config.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true, false")
        return bool(value)

    def names(self, name: str, *, or_expression: bool = False) -> Any:
        """A list of names, as a tuple; a regular expression stays text."""
        value = self.config.get(name)
        if value is None:
            return ()
        if or_expression and isinstance(value, str):
            self.expression(name, value)
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.wrong(name, "a list of names" + (", or a regular expression" if or_expression else ""))
        return tuple(value)

    def expression(self, name: str, value: str) -> None:
        try:
            re.compile(rf"(.*\.)?({value})$")
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.wrong(name, f"a regular expression ({error})", value) from error

    def pattern(self, name: str, check: Callable[[str, Any], Any]) -> dict[str, Any]:
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, "names of modules with a number each")
        for key in value:
            self.expression(name, key)
        return {key: check(name, item) for key, item in value.items()}

    def rank(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a whole number above 0", value)
        return value

    def alpha(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number <= 0:
            raise self.wrong(name, "a number above 0", value)
        return number


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _last(name: str) -> str:
    return name.rpartition(".")[2]
