"""What a sweep by adapters costs against one by swapped weights: numbers in, seconds out.

Both strategies are exact, both start one engine and both make every token; only what each adds to that is told here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds that a strategy adds on one kind of device.

    Attributes:
        adapted: A token with an adapter, for each unit of max_lora_rank and each input or output of an adapted layer.
            vLLM works on factors padded to max_lora_rank, so the adapter's own rank does not enter.
        swap: A swap of weights, whatever their size.
        byte: A swap of weights, for each byte of them.
    """

    adapted: float
    swap: float
    byte: float


CPU = Costs(adapted=4.0e-9, swap=0.04, byte=1.1e-9)
"""vLLM 0.32 on one core, a model of 3.9 M parameters in float32 (docs/engines.md has the runs)."""


@dataclass(frozen=True)
class Sweep:
    """The size of a sweep.

    Attributes:
        tokens: Prompt and answer tokens of all requests.
        bytes: Of the model's weights.
        widths: Inputs plus outputs of all adapted layers.
        swaps: Policies that need weights of their own.
    """

    tokens: int
    bytes: int
    widths: int
    swaps: int


def lora_seconds(sweep: Sweep, costs: Costs, max_lora_rank: int) -> float:
    """What adapters of rank at most `max_lora_rank` add to the tokens of all policies."""
    return sweep.tokens * costs.adapted * max_lora_rank * sweep.widths


def reload_seconds(sweep: Sweep, costs: Costs) -> float:
    """What the swaps of weights take, one for each policy."""
    return sweep.swaps * (costs.swap + costs.byte * sweep.bytes)
