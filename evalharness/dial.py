"""What a ratio stands for: a policy, and the multiplier lambda that the safety end of the sweep was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from psacpo.errors import InputError
from psacpo.evalharness.engines.base import Policy
from psacpo.files import read_manifest
from psacpo.merge.adapters import read_adapter
from psacpo.merge.config import policy_name


def ratio_policy(ratio: float) -> Policy:
    """The policy at one ratio of the dial between the reward and the safety adapter."""
    return Policy(policy_name(ratio), {"reward": 1 - ratio, "safety": ratio}, ratio)


def lambda_bar(adapters: Mapping[str, Path]) -> float | None:
    """lambda of the safety adapter, where it is known to have started at this reward adapter; else None.

    The policy at ratio q then stands for lambda = q * lambda_bar, to first order in the weights; of other pairs the
    theorem says nothing (Wachi et al. 2024, Theorem 1).
    """
    try:
        after = read_manifest(adapters["safety"]) or {}
        weight, inputs = after.get("lambda"), after.get("inputs")
        if not isinstance(weight, int | float) or weight <= 0 or not isinstance(inputs, dict):
            return None
        return float(weight) if inputs.get("start") == read_adapter(adapters["reward"]).digest else None
    except (InputError, OSError, KeyError):  # moved, or a whole model: the ratio is without a name
        return None
