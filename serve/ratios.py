"""Which policy a model name asks for: pure functions of the name and of what the server allows.

`policy@0.37` is the policy whose weight of the safety adapter is 0.37. Names that mean the same ratio (`policy@.3`,
`policy@0.300`) become one, so that no ratio is built, cached or held twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from psacpo.errors import InputError
from psacpo.merge.config import policy_name

FORM = "policy@RATIO with a ratio from 0 to 1, such as policy@0.30"
PREFIX = "policy@"
# The values that vLLM's --max-lora-rank takes (vllm.config.lora.MaxLoRARanks).
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Digits as a decimal or in powers of ten, as Python writes the shortest text of a float. ASCII only.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_LONGEST = 64  # characters of a model name that an error line repeats


class Refusal(Exception):
    """A request that is answered with an error instead of a completion.

    Args:
        status: HTTP status.
        message: One line: what was wrong, what was given, what is allowed.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Dial:
    """The ratios that a server answers at.

    Attributes:
        bases: Names under which the base answers.
        pins: The only ratios allowed; empty allows all from 0 to 1. With pins the base is not served either: an
            unaligned model beside a pinned policy would undo the pin.
        steps: Ratios are moved to the nearest k/steps; None leaves them as they are.
    """

    bases: tuple[str, ...] = ("base",)
    pins: tuple[float, ...] = ()
    steps: int | None = None

    def choose(self, model: str | None) -> str | None:
        """The policy that answers a request for `model`, by its one name; None where the base does.

        Raises:
            Refusal: 400 for a ratio that is malformed or out of range, 404 for a name that is not served.
        """
        if not model:
            # No model named: the OpenAI server takes its first, which is the base, or the one thing that is served.
            if not self.pins:
                return None
            if len(self.pins) == 1:
                return policy_name(self.pins[0])
            raise Refusal(400, f"no model named; allowed: {self.allowed}")
        if not model.startswith(PREFIX):
            if model in self.bases and not self.pins:
                return None
            raise Refusal(404, f"the model {_shown(model)} does not exist here; allowed: {self.allowed}")
        ratio = self.snapped(parse_policy(model))
        if self.pins and ratio not in self.pins:
            raise Refusal(404, f"{_shown(model)} is not served here; allowed: {self.allowed}")
        return policy_name(ratio)

    def snapped(self, ratio: float) -> float:
        """The ratio that is served for `ratio`: the nearest of the grid, if there is one."""
        return ratio if self.steps is None else round(ratio * self.steps) / self.steps

    @property
    def fixed(self) -> tuple[float, ...]:
        """The ratios that are always at hand: the pins, else the two ends."""
        return self.pins or (0.0, 1.0)

    @property
    def allowed(self) -> str:
        """What a model name may be, in words."""
        if self.pins:
            return ", ".join(map(policy_name, self.pins))
        return f"{', '.join(self.bases)}, or {FORM}"


def parse_policy(name: str) -> float:
    """The ratio in `policy@RATIO`, in [0, 1].

    Raises:
        Refusal: 400, for anything else.
    """
    text = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or len(name) > _LONGEST or not _NUMBER.fullmatch(text):
        raise Refusal(400, f"{_shown(name)} holds no ratio; allowed: {FORM}")
    ratio = float(text)
    if not 0 <= ratio <= 1:
        raise Refusal(400, f"the ratio of {_shown(name)} is out of range; allowed: {FORM}")
    return abs(ratio)  # -0.0 is 0.0


def grid_steps(snap: float) -> int:
    """How many steps of `snap` there are from 0 to 1.

    Raises:
        ValueError: `snap` is not 1/n, so that the grid would not end at 1.
    """
    steps = round(1 / snap) if math.isfinite(snap) and 1e-6 <= snap <= 1 else 0
    if not steps or abs(steps * snap - 1) > 1e-9:
        raise ValueError(f"snap {snap:g} does not divide 1; allowed: 1/n such as 0.05")
    return steps


def engine_rank(rank: int) -> int:
    """The smallest value of vLLM's max_lora_rank that holds adapters of `rank`: its cost follows that value.

    Raises:
        InputError: There is none.
    """
    for legal in ENGINE_RANKS:
        if rank <= legal:
            return legal
    raise InputError(
        f"the two adapters have rank {rank} together, more than vLLM takes",
        allowed=f"r_reward + r_safety up to {ENGINE_RANKS[-1]}; or full weights of one ratio by psacpo merge --as "
        "checkpoint, or its adapter recompressed by psacpo merge --rank",
    )


def by_ratio(names: Iterable[str]) -> list[str]:
    """Policy names in the order of their ratios; names that are not such are left out."""
    found = {}
    for name in names:
        try:
            found[name] = parse_policy(name)
        except Refusal:
            continue
    return sorted(found, key=lambda name: found[name])


def _shown(name: str) -> str:
    """A name as an error line repeats it: without control characters, and not at any length."""
    return ascii(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")
