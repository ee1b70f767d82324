"""The command line that a sweep's flags make: what the report prints under "Reproduce"."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from psacpo.errors import InputError
from psacpo.merge.config import parse_ratios

_SINGLE = {
    "base": "--base",
    "prompts": "--prompts",
    "template": "--template",
    "samples": "--samples",
    "engine": "--engine",
    "strategy": "--strategy",
    "out": "--out",
    "seed": "--seed",
}
_ADAPTERS = {"reward": "--reward", "safety": "--safety"}
_JUDGES = {"reward": "--reward-model", "cost": "--cost-model"}


def command_line(flags: Mapping[str, Any], recipe: str | None = None) -> str:
    """`psacpo frontier` with those of its flags that were said, quoted for a POSIX shell.

    Args:
        flags: The arguments of `Project.frontier`, paths as the command's directory sees them.
        recipe: The recipe to name, None for the directory's psacpo.yaml or none at all.

    Returns:
        The line; "" for settings that have no flag, as a program may give them.
    """
    known = {*_SINGLE, "adapters", "judges", "ratios", "constraints", "vllm", "openai", "ray", "allow_code"}
    if (
        set(flags) - known
        or set(flags.get("adapters", {})) - set(_ADAPTERS)
        or set(flags.get("judges", {})) - set(_JUDGES)
    ):
        return ""
    words: list[str] = ["psacpo", "frontier", *([recipe] if recipe else [])]
    for name, path in flags.get("adapters", {}).items():
        words += [_ADAPTERS[name], str(path)]
    for name, judge in flags.get("judges", {}).items():
        words += [_JUDGES[name], str(judge["model"])]
    for name, flag in _SINGLE.items():
        if flags.get(name) is not None:
            words += [flag, str(flags[name])]
    for text in _ratios(flags.get("ratios") or []):
        words += ["--ratio", text]
    for constraint in flags.get("constraints") or []:
        words += ["--constraint", str(constraint)]
    for engine in ("vllm", "openai", "ray"):
        for name, value in flags.get(engine, {}).items():
            words += ["--engine-set", f"{engine}.{name}={json.dumps(value)}"]
    if flags.get("allow_code"):
        words.append("--allow-code")
    # A word that begins with a dash would be read as a flag; only a flag's own value can, and = ties it to its flag.
    return shlex.join(_tied(words))


def _tied(words: Sequence[str]) -> list[str]:
    tied: list[str] = []
    flags = {*_SINGLE.values(), *_ADAPTERS.values(), *_JUDGES.values(), "--ratio", "--constraint", "--engine-set"}
    for word in words:
        if word.startswith("-") and tied and tied[-1] in flags:
            tied[-1] += f"={word}"
        else:
            tied.append(word)
    return tied


def _ratios(ratios: Sequence[float]) -> list[str]:
    """The ratios one by one, or as a grid where they are one."""
    plain = [repr(ratio) for ratio in ratios]
    if len(ratios) > 2:
        grid = f"{ratios[0]:.12g}:{ratios[-1]:.12g}:{(ratios[-1] - ratios[0]) / (len(ratios) - 1):.12g}"
        try:
            if parse_ratios([grid]) == list(ratios):
                return [grid]
        except InputError:
            pass
    return plain
