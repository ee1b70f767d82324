"""The settings of `merge`: which adapters, at which ratios, as what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from psacpo.config import Strict
from psacpo.errors import InputError

OutputKind = Literal["adapter", "checkpoint"]


class MergeConfig(Strict):
    """W(q) = W_base + (1-q) * delta_reward + q * delta_safety, for each ratio q.

    Attributes:
        base: Model directory or hub id; None takes what the adapters name.
        ratios: Weights of the safety policy, each in [0, 1].
        out: The output directory; with several ratios each goes to a directory in it, named policy@q.
        as_: A PEFT adapter, or full weights.
    """

    reward: Path
    safety: Path
    ratios: list[float] = Field(min_length=1)
    out: Path
    base: str | None = None
    as_: OutputKind = Field("adapter", alias="as")
    overwrite: bool = False

    @model_validator(mode="after")
    def _ratios_in_range(self) -> MergeConfig:
        for ratio in self.ratios:
            if not math.isfinite(ratio) or not 0 <= ratio <= 1:
                raise ValueError(f"ratio {ratio} is out of range; allowed: a number from 0 to 1")
        if len(set(map(policy_name, self.ratios))) != len(self.ratios):
            raise ValueError(f"two ratios are the same: {self.ratios}")
        return self


def policy_name(ratio: float) -> str:
    """`policy@0.30`: the name of the policy at one ratio, with as many digits (two at least) as tell it exactly."""
    text = f"{ratio:.2f}"
    return f"policy@{text if float(text) == ratio else repr(float(ratio))}"


def parse_ratios(texts: list[str]) -> list[float]:
    """Ratios from text: numbers (`0.3`), and grids START:STOP:STEP from START up to STOP at most (`0:1:0.125`).

    Raises:
        InputError: A text is neither, or a ratio is not from 0 to 1.
    """
    ratios: list[float] = []
    for text in texts:
        parts = [_number(part, text) for part in text.split(":")]
        if len(parts) == 1:
            ratios += parts
        elif len(parts) == 3 and parts[2] > 0 and parts[1] >= parts[0]:
            start, stop, step = parts
            count = round(min((stop - start) / step, 1e9))
            if count > 1000:
                raise InputError(f"ratio grid '{text}' has {count + 1} ratios", allowed="at most 1001")
            # Rounded to what was typed: 3 * 0.1 is not 0.3, and a policy's name shows it.
            ratios += [
                round(start + index * step, 10) for index in range(count + 1) if start + index * step <= stop + 1e-9
            ]
        else:
            raise InputError(f"ratio grid '{text}' cannot be read", allowed="START:STOP:STEP such as 0:1:0.1")
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise InputError(f"ratio {ratio:g} is out of range", allowed="a number from 0 to 1")
    return ratios


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"ratio '{whole}' is not a number", allowed="a number from 0 to 1, or START:STOP:STEP such as 0:1:0.1"
        )
    return value
