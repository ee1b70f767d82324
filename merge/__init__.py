"""Two adapters on one base become one policy, exactly: W(q) = W_base + (1-q) * delta_reward + q * delta_safety.

What needs torch is imported when it is first asked for, so that `import psacpo.merge` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from psacpo.merge.config import MergeConfig, OutputKind, policy_name

if TYPE_CHECKING:
    from pathlib import Path

    from psacpo.merge.adapters import Adapter, factors_by_module, read_adapter, require_compatible, stack_adapters
    from psacpo.merge.arithmetic import Factors, dense_delta, stack
    from psacpo.merge.bases import Base, find_base

__all__ = [
    "Adapter",
    "Base",
    "Factors",
    "MergeConfig",
    "OutputKind",
    "dense_delta",
    "factors_by_module",
    "find_base",
    "merge",
    "policy_name",
    "read_adapter",
    "require_compatible",
    "stack",
    "stack_adapters",
]

_HOME = {
    "Adapter": "adapters",
    "Base": "bases",
    "Factors": "arithmetic",
    "dense_delta": "arithmetic",
    "factors_by_module": "adapters",
    "find_base": "bases",
    "read_adapter": "adapters",
    "require_compatible": "adapters",
    "stack": "arithmetic",
    "stack_adapters": "adapters",
}


def merge(config: MergeConfig) -> list[Path]:
    """Write the policy at each of the ratios and give the directories back; see `psacpo.merge.run.merge`."""
    from psacpo.merge.run import merge as job

    return job(config)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
