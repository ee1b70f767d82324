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
    "confidence": "--confidence",
    "weights": "--weights",
    "holdout": "--holdout",
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
    known = {
        *_SINGLE,
        "adapters",
        "baselines",
        "judges",
        "ratios",
        "constraints",
        "vllm",
        "openai",
        "ray",
        "allow_code",
        "adaptive",
    }
    if set(flags) - known or set(flags.get("judges", {})) - set(_JUDGES):
        return ""
    words: list[str] = ["psacpo", "frontier", *([recipe] if recipe else [])]
    for name, path in flags.get("adapters", {}).items():
        words += [_ADAPTERS[name], str(path)] if name in _ADAPTERS else ["--adapter", f"{name}={path}"]
    for name, one in flags.get("baselines", {}).items():
        words += ["--baseline", f"{name}={one['model']}"]
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
    if flags.get("adaptive") is not None:
        words.append("--adaptive")
        # A budget that is not text is the recipe's own.
        if isinstance(budget := flags["adaptive"].get("budget"), str):
            words += ["--budget", budget]
    if flags.get("allow_code"):
        words.append("--allow-code")
    # A word that begins with a dash would be read as a flag; only a flag's own value can, and = ties it to its flag.
    return shlex.join(_tied(words))


def parse_named(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`NAME=PLACE` texts of a repeatable flag.

    Raises:
        InputError: A text is of another form, or a name is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not name.strip() or not place.strip():
            raise InputError(f"{flag} {text} cannot be read", allowed=f"{flag} NAME=DIR")
        if name.strip() in found:
            raise InputError(f"{flag} names '{name.strip()}' twice")
        found[name.strip()] = place.strip()
    return found


def _tied(words: Sequence[str]) -> list[str]:
    tied: list[str] = []
    flags = {
        *_SINGLE.values(),
        *_ADAPTERS.values(),
        *_JUDGES.values(),
        "--ratio",
        "--constraint",
        "--engine-set",
        "--adapter",
        "--baseline",
    }
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
